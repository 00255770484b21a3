"""The kernels, interpreted, against what XLA makes of the same attention; which calls they get, and through whom."""

import warnings
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ads_jax
from ads_jax import ADS
from rec_core.interest import MultiHead, candidates, multi_head_gpu, triton_gpu
from rec_core.interest.multi_head import Mapped
from rec_core.interest.multi_head_gpu import Shape, Tuning, runs

WIDTH = 8
# size, length, groups, heads, d, rows of a block, linear map, where padding stands
CASES = {
    "one group of blocks that do not fit": (3, 20, 1, 4, 16, 16, False, "left"),
    "groups smaller than a block": (3, 40, 4, 4, 16, 32, True, "right"),
    "groups larger than a block": (3, 70, 2, 2, 32, 16, True, "mixed"),
    "a block larger than the sequence, with more queries than it takes": (2, 40, 10, 16, 16, 64, False, "mixed"),
}
GARBAGE = np.array([np.nan, np.inf, -np.inf, 3e38], np.float32)


def draw(*shape, seed=0):
    # Numbers that bfloat16 has, so that all dtypes are given the same.
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(jnp.bfloat16).astype(np.float32)


def ragged(size, length, padded):
    """Row 0 is padding only, the last row full."""
    pick = np.random.default_rng(0)
    count = pick.integers(1, length, size)
    if padded == "mixed":
        mask = pick.random((size, length)) < 0.6
    elif padded == "left":
        mask = np.arange(length) >= (length - count)[:, None]
    else:
        mask = np.arange(length) < count[:, None]
    mask[0], mask[-1] = False, True
    return mask


def spoil(sequence, mask):
    return np.where(mask[..., None], sequence, np.resize(GARBAGE, sequence.shape))


@cache
def interpreted(block):
    """Kernels with blocks of so many rows; those of the backward pass have others."""
    return Tuning(Shape(block), Shape(16 if block > 16 else 32), interpret=True)


def answers(case, dtype, block=None, raw="float32", of_dtype=None):
    """Value and gradients, by kernels with blocks of so many rows or by XLA; numbers are those of `of_dtype`."""
    size, length, groups, heads, d, _, linear, padded = CASES[case]
    mask, module = ragged(size, length, padded), MultiHead(heads, WIDTH, dtype=dtype)
    value = {"params": {"value": {"kernel": draw(d, heads, WIDTH) / 4}}}
    given = {
        "sequence": jnp.asarray(spoil(draw(size, length, d), mask), raw),
        "queries": jnp.asarray(draw(size, groups, heads, d) / 4, dtype),
        "linear": (jnp.asarray(draw(size, d, d) / 4, dtype), jnp.asarray(draw(size, d), dtype)) if linear else None,
    }

    def attend(value, given):
        encoded = module.apply({}, given["sequence"], mask, method="encode")
        assert not encoded.as_given
        if block:
            encoded = Mapped(given["sequence"], mask, as_given=True)
        return module.apply(value, replace(encoded, linear=given["linear"]), given["queries"], method="attend")

    @jax.jit
    def both(value, given):
        out, back = jax.vjp(attend, value, given)
        return out, back(jnp.asarray(draw(size, heads * WIDTH), out.dtype))

    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("highest"):
        for name in ("DEFAULT", "MAPPED"):
            patch.setattr(multi_head_gpu, name, interpreted(block or 16))
        return jax.device_get(both(value, given))


def wide(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in leaves}


def off(got, wanted):
    """The largest difference in each array, in parts of its largest number."""
    return {name: np.abs(got[name] - x).max() / np.abs(x).max() for name, x in wanted.items()}


def zero_at_padding(case, tree):
    out, (_, given) = tree
    size, length, *_, padded = CASES[case]
    nothing = [out[0], given["queries"][0], given["sequence"][~ragged(size, length, padded)]]
    return not any(np.asarray(x, np.float32).any() for x in nothing)


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_attention(case):
    got, wanted = answers(case, "float32", block=CASES[case][5]), answers(case, "float32")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), wanted)
    assert max(off(wide(got), wide(wanted)).values()) < 2e-5
    assert zero_at_padding(case, got)


@pytest.mark.parametrize(
    ("case", "raw"), [("groups smaller than a block", "float32"), ("one group of blocks that do not fit", "bfloat16")]
)
def test_in_bfloat16_kernels_are_as_near_to_float32_as_xla(case, raw):
    got, xla = (answers(case, "bfloat16", block=block, raw=raw) for block in (CASES[case][5], None))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), xla)
    truth = wide(answers(case, "float32"))
    ours, theirs = off(wide(got), truth), off(wide(xla), truth)
    for name, error in ours.items():
        assert error < max(2 * theirs[name], 2**-8), (name, error, theirs[name])  # or a rounding of the largest number
    assert zero_at_padding(case, got)


@pytest.fixture
def kernels(monkeypatch):
    """A function after which every module is given the kernels, interpreted."""

    def give():
        monkeypatch.setattr(multi_head_gpu, "runs", lambda dtype, shape, heads: True)
        for name in ("DEFAULT", "MAPPED"):
            monkeypatch.setattr(multi_head_gpu, name, interpreted(16))

    return give


def compare(kernels, run, *arguments):
    """Values and gradients before and after, and how many kernels then are in the program."""

    def both(*arguments):
        out, back = jax.vjp(run, *arguments)
        return out, back(jnp.asarray(draw(*out.shape, seed=9)))

    wanted = jax.device_get(jax.jit(both)(*arguments))
    kernels()
    traced = jax.jit(lambda *x: both(*x)).trace(*arguments)  # a function that has not been traced
    got = jax.device_get(traced.lower().compile()(*arguments))
    for path, x in jax.tree_util.tree_leaves_with_path(wanted):
        assert np.isfinite(x).all(), path
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5), got, wanted)
    assert not got[0][0].any()  # the row of padding only
    return str(traced.jaxpr).count("pallas_call[")


@pytest.mark.parametrize(("groups", "number"), [(4, 2), (20, 0)])
def test_multi_head_gives_kernels_queries_that_ask_behaviors_and_cleans_up_for_keys(kernels, groups, number):
    module, mask = MultiHead(heads=2, width=WIDTH), ragged(3, 20, "mixed")
    sequence, target = spoil(draw(3, 20, 16), mask), draw(3, groups, 12)
    sizes = {"query": 12, "key": 16, "value": 16}
    params = {"params": {name: {"kernel": draw(d, 2, WIDTH, seed=d) / 4} for name, d in sizes.items()}}
    found = compare(kernels, lambda *x: module.apply(*x, mask), params, target, sequence)
    assert found == number


@cache
def plugged():
    """ADS in chunks of five, of which the oldest is short; padding on both sides of the behaviours."""
    module = ADS(MultiHead(heads=2, width=WIDTH), length=23, items=5, hidden=5)
    mask = ragged(3, 23, "right")
    mask[1, :3] = False
    given = draw(3, 16), spoil(draw(3, 23, 16), mask), draw(3, 4)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *given[:2], mask, given[2])
    return module, jax.tree.map(lambda x: draw(*x.shape) / 4, shapes), mask, *given


def test_ads_gives_kernels_its_chunks_and_its_linear_map(kernels):
    module, params, mask, *given = plugged()

    def run(params, target, sequence, domain):
        return module.apply(params, target, sequence, mask, domain)

    assert compare(kernels, run, params, *given) == 2


def test_candidates_of_a_request_share_what_is_encoded(kernels):
    module, params, mask, target, sequence, domain = plugged()
    many = np.stack([target, -target, target[::-1]], axis=1)
    plain, unit = MultiHead(heads=2, width=WIDTH), {"params": params["params"]["unit"]}

    def run(of):
        if of == "ads":
            return ads_jax.candidates(module, params, many, sequence, mask, domain, chunk=2)
        return candidates(plain, unit, many, sequence, mask, chunk=2)

    wanted = [jax.jit(run, static_argnums=0)(of) for of in ("ads", "plain")]
    kernels()
    for of, x in zip(("ads", "plain"), wanted):
        np.testing.assert_allclose(jax.jit(lambda of=of: run(of))(), x, rtol=1e-3, atol=2e-5)


def test_kernels_run_on_each_device_for_its_examples():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    mask, sequence, value = ragged(4, 20, "mixed"), draw(4, 20, 16), draw(16, 2, WIDTH) / 4
    queries, linear = draw(4, 2, 2, 16) / 4, (draw(4, 16, 16) / 4, draw(4, 16))

    def gradients(queries, sequence, linear, value):
        def loss(queries, sequence, linear, value):
            out = multi_head_gpu.attend(sequence, mask, linear, queries, value, interpreted(16))
            return jnp.square(out).sum()

        return jax.grad(loss, (0, 1, 2, 3))(queries, sequence, linear, value)

    given = queries, sequence, linear, value
    wanted = jax.device_get(jax.jit(gradients)(*given))
    with jax.set_mesh(mesh):
        split = jax.device_put(given, (*[NamedSharding(mesh, P("data"))] * 3, NamedSharding(mesh, P())))
        step = jax.jit(lambda *x: gradients(*x)).lower(*split).compile()
        got = jax.device_get(step(*split))
    assert "all-gather" not in step.as_text()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, wanted)


class Device:
    platform, compute_capability = "gpu", "9.0"


@pytest.mark.portable
def test_what_kernels_decline(monkeypatch):
    served = ("bfloat16", (4096, 200, 64), 4)
    assert not runs(*served)  # on this CPU
    cpu, devices = jax.devices()[0], jax.devices
    monkeypatch.setattr(jax, "devices", lambda platform=None: [Device()] if platform is None else devices(platform))
    monkeypatch.setattr(triton_gpu, "triton", object())
    for other in (cpu, "cpu"):
        with jax.default_device(other):
            assert not runs(*served)
    assert runs(*served) and runs("bfloat16", (512, 7, 16), 1)
    declined = [
        *(("float32", (4096, 200, 64), 4), ("float16", (4096, 200, 64), 4)),
        *(("bfloat16", shape, 4) for shape in [(4096, 200, 48), (4096, 200, 8), (4096, 200, 128), (4096, 0, 64)]),
        *(("bfloat16", shape, 4) for shape in [(1, 200, 64), (0, 200, 64), (4096, 10_000, 64), (4096, 64)]),
        *(("bfloat16", (4096, 200, 64), heads) for heads in (3, 32)),
    ]
    assert not any(runs(*call) for call in declined)
    for capability in ("7.5", "gfx942", None):  # before bfloat16, another maker's, unknown
        monkeypatch.setattr(Device, "compute_capability", capability)
        assert not runs(*served)
    monkeypatch.setattr(Device, "compute_capability", "12.0")
    assert runs(*served)
    monkeypatch.setattr(Device, "platform", "tpu")
    assert not runs(*served)
    monkeypatch.setattr(Device, "platform", "gpu")
    monkeypatch.setattr(triton_gpu, "triton", None)  # a JAX without the backend
    assert not runs(*served)


@pytest.mark.portable
def test_queries_that_do_not_divide_the_behaviors_are_refused():
    encoded = Mapped(draw(2, 7, 16), np.ones((2, 7), bool))
    with pytest.raises(ValueError, match="MultiHead: 3 queries for 7 behaviours; give a number that divides these"):
        MultiHead(2, WIDTH).apply({}, encoded, draw(2, 3, 2, 16), method="attend")


@pytest.mark.parametrize("case", ["one query", "chunks and a map", "inside shard_map"])
def test_lowers_for_a_gpu_without_a_warning(case):
    def given(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    groups, linear = (1, None) if case == "one query" else (20, (given(512, 64, 64), given(512, 64)))
    arrays = given(512, 200, 64, dtype=jnp.float32), linear, given(512, groups, 4, 64), given(64, 4, 16)
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)

    def attend(sequence, linear, queries, value, mask):
        return multi_head_gpu.attend(sequence, mask, linear, queries, value)

    if case == "inside shard_map":  # what all examples share is sent to each device
        arrays = *arrays[:2], given(20, 4, 64), arrays[3]

        def own(sequence, linear, queries, value, mask):
            queries = jnp.broadcast_to(queries, (len(sequence), *queries.shape))
            return multi_head_gpu.attend(sequence, mask, linear, queries, value)

        specs = P("data"), P("data"), P(), P(), P("data")
        attend = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P("data"))

    def loss(*arrays):
        return attend(*arrays).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*arrays, given(512, 200, dtype=bool))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2

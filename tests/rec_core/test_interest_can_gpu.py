"""The kernels, interpreted, against what XLA makes of the same co-action unit; which calls they get."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from ads_jax import ADS
from rec_core.interest import CAN, can_gpu, can_gpu_each
from rec_core.interest.can import by_layer, parameters, summed
from rec_core.interest.triton_gpu import Shape, Tuning

# size, groups, behaviours of a group, d, layers, powers, rows of a block forward and backward
CASES = {
    "one group of blocks that do not fit": (2, 1, 41, 16, (3, 2), 2, (16, 32)),
    "groups smaller than a block, the last block short": (3, 13, 3, 16, (5, 3), 3, (32, 16)),
    "groups larger than a block": (2, 3, 20, 32, (4,), 3, (16, 16)),
    "three layers": (2, 3, 10, 16, (3, 2, 2), 2, (32, 64)),
    "a micro-MLP for each behaviour": (3, 37, 1, 16, (4, 2), 3, (16, 32)),
    "three layers for each behaviour": (2, 16, 1, 32, (4, 2, 1), 2, (16, 16)),
    "a block larger than the sequence": (2, 2, 5, 16, (16, 1), 1, (64, 64)),
}


def draw(*shape, seed=0):
    # Numbers that bfloat16 has, so that all dtypes are given the same.
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(jnp.bfloat16).astype(np.float32)


def tuned(forward, backward):
    return Tuning(Shape(forward), Shape(backward), interpret=True)


def answers(case, dtype, kernels):
    """Values and gradients, by kernels or layer by layer."""
    size, groups, rows, d, hidden, orders, blocks = CASES[case]
    mask = np.random.default_rng(0).random((size, groups * rows)) < 0.7
    mask[0] = False
    sequence = jnp.asarray(np.where(mask[..., None], draw(size, groups * rows, d) / 2, 0), dtype)
    induction = jnp.asarray(draw(size, groups, parameters(d, hidden)) / 4, dtype)

    def read(sequence, induction):
        if kernels:
            return (can_gpu_each if rows == 1 else can_gpu).summed(
                sequence, mask, induction, hidden, orders, tuned(*blocks)
            )
        grouped, present = sequence.reshape(size, groups, rows, d), mask.reshape(size, groups, rows, 1)
        return summed(by_layer, hidden, orders, grouped, induction, present).astype(jnp.float32)

    @jax.jit
    def both(*given):
        out, back = jax.vjp(read, *given)
        return out, *back(draw(*out.shape, seed=1))

    with jax.default_matmul_precision("highest"):
        return jax.device_get(both(sequence, induction))


def off(got, wanted):
    """The largest difference in each array, in parts of its largest number."""
    return [np.abs(np.float64(a) - np.float64(b)).max() / np.abs(np.float64(b)).max() for a, b in zip(got, wanted)]


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_co_action_unit(case):
    got, wanted = answers(case, "float32", True), answers(case, "float32", False)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in wanted]
    assert max(off(got, wanted)) < 2e-5
    assert not any(x[0].any() for x in got)  # the example of padding only


@pytest.mark.parametrize(
    "case", ["groups smaller than a block, the last block short", "three layers", "a micro-MLP for each behaviour"]
)
def test_in_bfloat16_kernels_are_as_near_to_float32_as_xla(case):
    got, xla, truth = (answers(case, *how) for how in (("bfloat16", True), ("bfloat16", False), ("float32", False)))
    assert [x.dtype for x in got] == [x.dtype for x in xla]
    for ours, theirs in zip(off(got, truth), off(xla, truth), strict=True):
        assert ours < max(1.5 * theirs, 2**-8)


@pytest.mark.parametrize("of", ["CAN", "ADS"])
def test_modules_are_given_kernels(monkeypatch, of):
    """Also with an oldest chunk that is short, and whatever stands at padding."""
    unit, mask = CAN((3, 2), 2, dtype="float32"), np.random.default_rng(1).random((3, 23)) < 0.7
    mask[0] = False
    module = unit if of == "CAN" else ADS(unit, length=23, items=5, hidden=5)
    sequence = np.where(mask[..., None], draw(3, 23, 16) / 2, np.nan).astype(np.float32)
    given = (draw(3, 8), sequence, mask, draw(3, 4))[: 3 if of == "CAN" else 4]
    shapes = jax.eval_shape(module.init, jax.random.key(0), *given)
    params = jax.tree.map(lambda x: draw(*x.shape) / 4, shapes)

    def both(params):
        out, back = jax.vjp(lambda params: module.apply(params, *given), params)
        return out, back(draw(*out.shape))

    wanted = jax.jit(both)(params)
    monkeypatch.setattr(can_gpu, "runs", lambda *shapes: True)
    for name in ("DEFAULT", "GROUPED"):
        monkeypatch.setattr(can_gpu, name, tuned(16, 16))
    traced = jax.jit(lambda params: both(params)).trace(params)
    assert str(traced.jaxpr).count("pallas_call[") == 2
    got = traced.lower().compile()(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, wanted)


@pytest.mark.portable
def test_what_kernels_decline(monkeypatch):
    shape, induction = (4096, 200, 64), (4096, 20, 270)
    assert not can_gpu.runs("bfloat16", shape, induction, (4, 2))  # on this CPU
    monkeypatch.setattr(can_gpu, "serves", lambda dtype, shape: dtype == "bfloat16" and shape[2] == 64)
    assert can_gpu.runs("bfloat16", shape, induction, (4, 2)) and can_gpu.runs("bfloat16", shape, induction, (16,))
    assert not can_gpu.runs("float32", shape, induction, (4, 2))
    assert not can_gpu.runs("bfloat16", (4096, 200, 16), induction, (4, 2))
    assert not can_gpu.runs("bfloat16", shape, induction, (17, 2))
    assert not can_gpu.runs("bfloat16", shape, (4096, 100, 270), (4, 2))  # two behaviours a group
    monkeypatch.setattr(can_gpu_each, "serves", can_gpu.serves)
    assert can_gpu_each.runs("bfloat16", shape, (4096, 200, 270), (4, 2))
    assert not can_gpu_each.runs("bfloat16", shape, (4096, 100, 270), (4, 2))
    assert not can_gpu_each.runs("bfloat16", shape, (4096, 200, 270), (3, 2))
    assert not can_gpu_each.runs("bfloat16", shape, (4096, 200, 1100), (16, 2))
    assert not can_gpu.runs("bfloat16", (40_960, 1000, 64), (40_960, 200, 270), (4, 2))  # more than offsets reach


@pytest.mark.parametrize(("kernels", "groups"), [(can_gpu, 20), (can_gpu_each, 200)])
def test_lowers_for_a_gpu_without_a_warning(kernels, groups):
    def given(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def loss(sequence, induction, mask):
        return kernels.summed(sequence, mask, induction, (4, 2), 3).sum()

    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    arrays = given(512, 200, 64), given(512, groups, parameters(64, (4, 2))), given(512, 200, dtype=bool)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2

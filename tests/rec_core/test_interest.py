"""What holds for every interest module: the face, padding, order, gradients, candidates."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_core.interest import INTEREST, Average, Interest, candidates

B, T, D, C = 4, 5, 3, 3
LENGTHS = np.array([5, 2, 0, 1])
NAMES = sorted(INTEREST)
ORDERED = {"dien", "mimn"}
OPTIONS = {
    "din": {"hidden": (6, 4)},
    "mimn": {"hidden": (6, 4), "units": 5},
    "can": {"hidden": (4, 2)},
    "sdim": {"bits": 1},  # so that each behaviour shares the target's bucket in some round
}


def data(seed=0):
    draw = np.random.default_rng(seed)
    target, sequence = draw.normal(size=(B, D)).astype(np.float32), draw.normal(size=(B, T, D)).astype(np.float32)
    return target, sequence, np.arange(T) < LENGTHS[:, None], draw.exponential(1e5, (B, T)).astype(np.float32)


@functools.cache
def build(name):
    """A member, parameters of which none is zero so that a test sees every one of them, and its compiled call."""
    module = INTEREST[name](**OPTIONS.get(name, {}))
    target, sequence, mask, time = data()
    shapes = jax.eval_shape(module.init, jax.random.key(0), target, sequence, mask, time=time)
    leaves, tree = jax.tree.flatten(shapes)
    draw = np.random.default_rng(1)
    params = jax.tree.unflatten(tree, [0.5 * draw.normal(size=x.shape).astype(np.float32) for x in leaves])
    return module, params, jax.jit(lambda *arrays: module.apply(params, *arrays[:3], time=arrays[3]))


@pytest.mark.parametrize("name", NAMES)
def test_every_member_has_the_face(name):
    assert list(inspect.signature(INTEREST[name].__call__).parameters)[1:5] == ["target", "sequence", "mask", "time"]
    _, _, run = build(name)
    target, sequence, mask, time = data()
    out = run(target, sequence, mask, time)
    assert out.shape[0] == B and out.ndim == 2 and out.dtype == jnp.float32 and np.abs(out[0]).max() > 0
    np.testing.assert_array_equal(out[2], 0)  # padding only
    np.testing.assert_array_equal(run(target, *(x[:, :0] for x in (sequence, mask, time))), 0)  # no slots at all
    # One query per item, all the same, is the shared query, whatever stands at padding.
    repeated = np.where(mask[..., None], target[:, None], np.nan).astype(np.float32)
    np.testing.assert_allclose(run(repeated, sequence, mask, time), out, rtol=1e-5, atol=1e-6)
    # A query for some neighbouring items is that query for each of them.
    six = [np.concatenate([x, x[:, :1]], axis=1) for x in (sequence, mask, time)]
    queries = np.stack([target, -target, 2 * target], axis=1)
    np.testing.assert_allclose(run(queries, *six), run(np.repeat(queries, 2, axis=1), *six), rtol=1e-5, atol=1e-6)
    # An example does not depend on the others.
    flipped = run(target[::-1], sequence[::-1], mask[::-1], time[::-1])[::-1]
    np.testing.assert_allclose(flipped, out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_wherever_it_stands(name):
    _, _, run = build(name)
    target, sequence, mask, time = data()
    out = run(target, sequence, mask, time)
    spoilt = [np.where(m, x, np.nan).astype(np.float32) for m, x in ((mask[..., None], sequence), (mask, time))]
    np.testing.assert_array_equal(run(target, spoilt[0], mask, spoilt[1]), out)
    # The two behaviours of row 1 and the one of row 3 moved apart, their order kept.
    slots = np.array([[0, 1, 2, 3, 4], [2, 0, 3, 1, 4], [0, 1, 2, 3, 4], [1, 2, 3, 0, 4]])
    moved = [np.take_along_axis(x, slots.reshape(B, T, *[1] * (x.ndim - 2)), axis=1) for x in (sequence, mask, time)]
    np.testing.assert_array_equal(np.flatnonzero(moved[1][1]), [1, 3])
    np.testing.assert_allclose(run(target, *moved), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_recurrent_members_see_order_and_only_twin_sees_time(name):
    _, _, run = build(name)
    target, sequence, mask, time = data()
    out = np.asarray(run(target, sequence, mask, time))
    reversed_ = run(target, *(x[:, ::-1] for x in (sequence, mask, time)))
    older = run(target, sequence, mask, 100 * time)
    for other, seen in ((reversed_, name in ORDERED), (older, name == "twin")):
        if seen:
            assert np.abs(other - out)[:2].max() > 1e-3
        else:
            np.testing.assert_allclose(other, out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_and_zero_at_padding(name):
    module, params, _ = build(name)
    target, sequence, mask, time = data()
    spoilt = np.where(mask[..., None], sequence, np.nan).astype(np.float32)

    def loss(params, target, sequence):
        out = module.apply(params, target, sequence, mask, time=time)
        # Unequal weights: the length of an SDIM answer, for one, may not depend on the behaviours.
        return jnp.sum(out * jnp.arange(1, out.size + 1).reshape(out.shape))

    of_params, of_target, of_sequence = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, target, spoilt)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((of_params, of_target, of_sequence)))
    of_sequence = np.asarray(of_sequence)
    np.testing.assert_array_equal(of_sequence[~mask], 0)
    assert (np.abs(of_sequence[mask]).max(-1) > 0).all()
    assert (np.abs(of_target[0]).max() > 0) == (name not in ("average", "sdim"))


@pytest.mark.parametrize("name", NAMES)
def test_candidates_at_once_are_candidates_one_by_one(name):
    module, params, run = build(name)
    _, sequence, mask, time = data()
    targets = np.random.default_rng(3).normal(size=(B, C, D)).astype(np.float32)
    at_once = jax.jit(lambda *a: candidates(module, params, *a, time=time, chunk=2))(targets, sequence, mask)
    one_by_one = np.stack([run(targets[:, c], sequence, mask, time) for c in range(C)], axis=1)
    np.testing.assert_allclose(at_once, one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_computes_in_bfloat16_and_stays_close(name):
    _, params, run = build(name)
    target, sequence, mask, time = data()
    half = INTEREST[name](**OPTIONS.get(name, {}), dtype="bfloat16")
    out = jax.jit(half.apply)(params, target, sequence, mask, time=time)
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(run(target, sequence, mask, time))
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.03 * max(1.0, np.abs(exact).max()))


def test_candidates_encode_the_sequence_once_and_take_a_query_per_item():
    encoded = []

    class Counted(Average):
        def encode(self, *arrays, **options):
            encoded.append(arrays)
            return super().encode(*arrays, **options)

        def read(self, encoded, target):
            return super().read(encoded, target) * target.reshape(B, -1).sum(-1, keepdims=True)

    _, sequence, mask, _ = data()
    targets = np.arange(B * 7 * T * D).reshape(B, 7, T, D).astype(np.float32)
    out = candidates(Counted(), {}, targets, sequence, mask, chunk=2)
    assert len(encoded) == 1
    mean = Average().apply({}, targets[:, 0, 0], sequence, mask)
    np.testing.assert_allclose(out, mean[:, None] * targets.sum((2, 3))[..., None], rtol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    target, sequence, mask, time = data()

    def call(**changed):
        arrays = {"target": target, "sequence": sequence, "mask": mask, "time": time} | changed
        return Average().apply({}, arrays["target"], arrays["sequence"], arrays["mask"], time=arrays["time"])

    with pytest.raises(ValueError, match=r"target has shape \(4, 2, 3\).*candidates"):
        call(target=np.zeros((B, 2, D)))
    with pytest.raises(ValueError, match=r"mask has shape \(4, 4\), must be \(4, 5\)"):
        call(mask=mask[:, 1:])
    with pytest.raises(ValueError, match=r"time has shape \(4,\)"):
        call(time=time[:, 0])
    with pytest.raises(ValueError, match=r"sequence has shape \(4, 3\)"):
        call(sequence=target)
    with pytest.raises(ValueError, match=r"targets has shape \(4, 3\), must be \[B, C, d\]"):
        candidates(Average(), {}, target, sequence, mask)
    with pytest.raises(ValueError, match="chunk is 0"):
        candidates(Average(), {}, target[:, None], sequence, mask, chunk=0)


def test_options_out_of_range_are_named():
    target, sequence, mask, _ = data()
    for name, options, message in (
        ("multi_head", {"heads": 0}, "MultiHead: heads is 0, must be at least 1"),
        ("twin", {"top": 0}, "TWIN: top is 0"),
        ("twin", {"cross": (2, 1)}, "cross is .*, 3 entries of a sequence of width 3"),
        ("twin", {"ages": (2.0, 1.0)}, "ages is .* must be increasing"),
        ("eta", {"bits": 0}, "ETA: bits is 0"),
        ("sdim", {"bits": 17}, "SDIM: bits is 17, must be at most 16"),
        ("din", {"hidden": ()}, r"DIN: hidden is \(\), must be at least 1"),
        ("din", {"hidden": (4, 0)}, "DIN: hidden is .*, must be at least 1"),
        ("can", {"hidden": (4, 0)}, "CAN: hidden is .*, must be at least 1"),
        ("mimn", {"induction": 5}, "MIMN: induction is 5, must be from 0 to slots"),
        ("mimn", {"slots": 2, "induction": 0}, "MIMN: slots is 2, must be at least 3, or balance=False"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(INTEREST[name](**options).init, jax.random.key(0), target, sequence, mask)


def test_a_member_without_read_says_so():
    with pytest.raises(NotImplementedError, match="Interest defines no read"):
        Interest().apply({}, *data()[:3])
    assert INTEREST["din"]().apply({}, None, method="auxiliary") == {}

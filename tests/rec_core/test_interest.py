import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_core.interest import DIN, INTEREST

B, T, D = 4, 5, 3


def data(seed=0):
    draw = np.random.default_rng(seed)
    target, sequence = draw.normal(size=(B, D)).astype(np.float32), draw.normal(size=(B, T, D)).astype(np.float32)
    mask = np.arange(T) < np.array([5, 2, 0, 1])[:, None]
    time = draw.exponential(1e4, (B, T)).astype(np.float32)
    return target, sequence, mask, time


def perturbed(params, seed=1):
    """Parameters of which none is zero, so that a test sees every one of them."""
    leaves, tree = jax.tree.flatten(params)
    draw = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [x + 0.3 * draw.normal(size=x.shape).astype(np.float32) for x in leaves])


@functools.cache
def build(name, **options):
    module = INTEREST[name](**options)
    target, sequence, mask, time = data()
    return module, perturbed(jax.jit(module.init)(jax.random.key(0), target, sequence, mask, time=time))


def dice(s, alpha):
    centered = s - s.mean(-1, keepdims=True)
    p = 1 / (1 + np.exp(-centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)))
    return p * s + (1 - p) * alpha * s


def numpy_din(params, target, sequence, mask, softmax):
    """The paper's unit on the concatenation, one behaviour at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    out = np.zeros((B, D))
    for b in range(B):
        scores = []
        for t in range(T):
            q, k = (target[b] if target.ndim == 2 else target[b, t]), sequence[b, t]
            x = np.concatenate([q, k, q - k, q * k]).astype(np.float64)
            x = dice(x @ p["kernel_0"] + p["bias_0"], p["dice_0"]["alpha"])
            x = dice(x @ p["dense_1"]["kernel"] + p["dense_1"]["bias"], p["dice_1"]["alpha"])
            scores.append((x @ p["score"]["kernel"] + p["score"]["bias"])[0])
        present = np.flatnonzero(mask[b])
        if softmax:
            scores = np.where(mask[b], np.exp(scores), 0) / max(np.exp(np.array(scores)[present]).sum(), 1e-9)
        for t in present:
            out[b] += scores[t] * sequence[b, t]
    return out


@pytest.mark.portable
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("per_item", [False, True])
def test_din_is_the_papers_equation(softmax, per_item):
    module, params = build("din", hidden=(6, 4), softmax=softmax)
    target, sequence, mask, _ = data()
    if per_item:
        target = np.random.default_rng(5).normal(size=(B, T, D)).astype(np.float32)
    out = jax.jit(module.apply)(params, target, sequence, mask)
    np.testing.assert_allclose(out, numpy_din(params, target, sequence, mask, softmax), rtol=2e-5, atol=1e-6)


def test_din_by_hand():
    """One unit that passes q * k on. Dice standardises a single unit to 0: p = 1/2 and, alpha being 0, f(s) = s / 2."""
    params = {
        "params": DIN(hidden=(1,)).init(jax.random.key(0), *(jnp.zeros(s) for s in ((1, 1), (1, 2, 1), (1, 2))))[
            "params"
        ]
    }
    kernel = jnp.array([[0.0], [0.0], [0.0], [1.0]])
    score = {"kernel": jnp.array([[1.0]]), "bias": jnp.array([0.25])}
    params = {"params": params["params"] | {"kernel_0": kernel, "score": score}}
    out = DIN(hidden=(1,)).apply(params, jnp.array([[3.0]]), jnp.array([[[2.0], [-1.0]]]), jnp.ones((1, 2), bool))
    assert out[0, 0] == (6 / 2 + 0.25) * 2 + (-3 / 2 + 0.25) * -1


def test_average_by_hand():
    module, params = build("average")
    target, sequence, mask, _ = data()
    expected = [sequence[0].mean(0), sequence[1, :2].mean(0), np.zeros(D), sequence[3, 0]]
    np.testing.assert_allclose(module.apply(params, target, sequence, mask), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(INTEREST))
def test_every_member_has_the_face(name):
    assert list(inspect.signature(INTEREST[name].__call__).parameters)[1:5] == ["target", "sequence", "mask", "time"]
    module, params = build(name)
    target, sequence, mask, time = data()
    run = jax.jit(lambda *a: module.apply(params, *a, time=time))
    out = run(target, sequence, mask)
    assert out.shape[0] == B and out.ndim == 2 and np.abs(out[0]).max() > 0
    np.testing.assert_array_equal(out[2], 0)  # padding only
    # One query per item, all the same, is the shared query.
    repeated = np.repeat(target[:, None], T, axis=1)
    np.testing.assert_allclose(run(repeated, sequence, mask), out, rtol=1e-5, atol=1e-6)
    # What stands at padding does not matter, NaN included.
    spoilt = np.where(mask[..., None], sequence, np.nan).astype(np.float32)
    np.testing.assert_array_equal(run(target, spoilt, mask), out)
    # An example does not depend on the others.
    np.testing.assert_allclose(run(target[::-1], sequence[::-1], mask[::-1])[::-1], out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(INTEREST))
def test_gradients_are_finite_and_zero_at_padding(name):
    module, params = build(name)
    target, sequence, mask, time = data()

    def loss(params, sequence):
        return jnp.sum(module.apply(params, target, sequence, mask, time=time) ** 2)

    of_params, of_sequence = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, sequence)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((of_params, of_sequence)))
    np.testing.assert_array_equal(np.asarray(of_sequence)[~mask], 0)
    assert (np.abs(np.asarray(of_sequence)[mask]).max(-1) > 0).all()


@pytest.mark.parametrize("name", sorted(INTEREST))
def test_bfloat16_computes_in_bfloat16_and_stays_close(name):
    target, sequence, mask, time = data()
    exact, params = build(name)
    half = INTEREST[name](dtype="bfloat16")
    out = jax.jit(half.apply)(params, target, sequence, mask, time=time)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out.astype(np.float32), jax.jit(exact.apply)(params, target, sequence, mask, time=time), atol=0.15
    )

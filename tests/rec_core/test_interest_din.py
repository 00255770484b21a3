import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_core.interest import DIN, Average

B, T, D = 4, 5, 3
MASK = np.arange(T) < np.array([5, 2, 0, 1])[:, None]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dice(s, alpha):
    centered = s - s.mean(-1, keepdims=True)
    p = 1 / (1 + np.exp(-centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)))
    return p * s + (1 - p) * alpha * s


def numpy_din(params, target, sequence, softmax):
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
        present = np.flatnonzero(MASK[b])
        if softmax:
            scores = np.where(MASK[b], np.exp(scores), 0) / max(np.exp(np.array(scores)[present]).sum(), 1e-9)
        for t in present:
            out[b] += scores[t] * sequence[b, t]
    return out


@pytest.mark.portable
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("per_item", [False, True])
def test_din_is_the_papers_equation(softmax, per_item):
    module = DIN(hidden=(6, 4), softmax=softmax)
    target, sequence = draw(B, T, D, seed=5) if per_item else draw(B, D, seed=6), draw(B, T, D)
    shapes = jax.eval_shape(module.init, jax.random.key(0), target, sequence, MASK)
    params = jax.tree.map(lambda x: 0.5 * draw(*x.shape, seed=len(x.shape)), shapes)
    out = jax.jit(module.apply)(params, target, sequence, MASK)
    np.testing.assert_allclose(out, numpy_din(params, target, sequence, softmax), rtol=2e-5, atol=1e-5)


def test_din_by_hand():
    """One unit that passes q * k on. Dice standardises a single unit to 0: p = 1/2 and, alpha being 0, f(s) = s / 2."""
    shapes = ((1, 1), (1, 2, 1), (1, 2))
    params = DIN(hidden=(1,)).init(jax.random.key(0), *(jnp.zeros(shape) for shape in shapes))["params"]
    kernel = jnp.array([[0.0], [0.0], [0.0], [1.0]])
    score = {"kernel": jnp.array([[1.0]]), "bias": jnp.array([0.25])}
    params = {"params": params | {"kernel_0": kernel, "score": score}}
    out = DIN(hidden=(1,)).apply(params, jnp.array([[3.0]]), jnp.array([[[2.0], [-1.0]]]), jnp.ones((1, 2), bool))
    assert out[0, 0] == (6 / 2 + 0.25) * 2 + (-3 / 2 + 0.25) * -1


def test_queries_at_padding_do_not_reach_the_gradients():
    module, sequence, queries = DIN(hidden=(2,)), draw(B, T, D), draw(B, T, D, seed=5)
    params = module.init(jax.random.key(0), queries, sequence, MASK)
    gradient = jax.jit(jax.grad(lambda p, q: jnp.sum(module.apply(p, q, sequence, MASK))))
    spoilt = np.where(MASK[..., None], queries, np.nan).astype(np.float32)
    for got, expected in zip(jax.tree.leaves(gradient(params, spoilt)), jax.tree.leaves(gradient(params, queries))):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_average_by_hand():
    sequence = draw(B, T, D)
    expected = [sequence[0].mean(0), sequence[1, :2].mean(0), np.zeros(D), sequence[3, 0]]
    np.testing.assert_allclose(Average().apply({}, draw(B, D), sequence, MASK), expected, rtol=1e-5, atol=1e-7)

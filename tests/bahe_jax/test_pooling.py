"""F_p by hand: several texts in a row, holes between them, and one without tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bahe_jax.pooling import pool

X = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
QUERY = np.array([2.0, -1.0, 0.5, 3.0], np.float32)
MASK = np.array(
    [[[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], [[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 1]]], bool
)


def by_hand(states, pooling):
    if not len(states):
        return np.zeros(4)
    if pooling == "last":
        return states[-1]
    weights = np.exp(states @ QUERY / 2) if pooling == "attention" else np.ones(len(states))
    return weights @ states / weights.sum()


@pytest.mark.portable
@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
def test_pooling_is_as_by_hand_and_has_gradients(pooling):
    run = jax.jit(functools.partial(pool, mask=MASK, pooling=pooling, query=jnp.asarray(QUERY)))
    expected = [[by_hand(X[row][mask], pooling) for mask in MASK[row]] for row in range(2)]
    np.testing.assert_allclose(run(X), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x, query: jnp.sum(pool(x, MASK, pooling, query) ** 2), argnums=(0, 1)))
    of_x, of_query = jax.device_get(gradient(X, QUERY))
    assert np.isfinite(of_x).all() and np.isfinite(of_query).all() and of_query.any() == (pooling == "attention")
    used = MASK.any(axis=1) if pooling != "last" else np.array([[0, 1, 0, 0, 1], [1, 0, 0, 1, 1]], bool)
    np.testing.assert_array_equal(of_x.any(axis=2), used)


def test_a_learned_query_of_zeros_is_the_mean_in_half_precision_too():
    x = jnp.asarray(X, jnp.bfloat16)
    mean = pool(x, MASK, "mean")
    assert mean.dtype == jnp.bfloat16
    np.testing.assert_array_equal(pool(x, MASK, "attention", jnp.zeros(4)), mean)

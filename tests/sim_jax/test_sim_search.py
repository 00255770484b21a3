"""General search: by hand, exact against sorting, and equal to the behaviour tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_core.data.schema import EventLog
from sim_jax import search
from sim_jax.tree_table import TreeTable

MASK = jnp.array([[True, True, True, False, True, True]])
CATEGORY = jnp.array([[3, 5, 3, 3, 3, 0]])


@pytest.mark.portable
def test_hard_search_finds_the_newest_of_the_category_by_hand():
    position, found = search.hard(jnp.array([3]), CATEGORY, MASK, 2)
    np.testing.assert_array_equal(position, [[4, 2]])
    np.testing.assert_array_equal(found, [[True, True]])
    position, found = search.hard(jnp.array([5]), CATEGORY, MASK, 4)
    assert position[0, 0] == 1
    np.testing.assert_array_equal(found, [[True, False, False, False]])
    for nothing in (0, 9):  # no category, and one that the user never met
        assert not search.hard(jnp.array([nothing]), CATEGORY, MASK, 4)[1].any()


def test_hard_search_on_the_device_is_the_trees():
    rng = np.random.default_rng(0)
    users, length, k = 6, 40, 5
    item, category = rng.integers(2, 30, (users, length)), rng.integers(0, 4, (users, length))
    time = np.sort(rng.choice(10_000, (users, length), replace=False), axis=1)
    user = np.repeat(np.arange(users), length)
    log = EventLog(user, item.ravel(), time.ravel(), category.ravel().astype(np.int32))
    table = TreeTable.build(log)
    for target in range(5):
        before = int(rng.integers(4000, 10_000))
        wanted = table.lookup(np.arange(users), np.full(users, target), k, before)
        position, found = search.hard(jnp.full(users, target), category, jnp.asarray(time < before), k)
        np.testing.assert_array_equal(found, wanted.mask)
        got = np.take_along_axis(item, np.asarray(position), axis=1)
        np.testing.assert_array_equal(np.where(found, got, 0), np.where(wanted.mask, wanted.item, 0))


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**31))
def test_soft_search_is_sorting_whatever_the_recall(length, k, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((3, length)) < 0.7
    relevance = rng.integers(-2, 3, (3, length)).astype(np.float32)  # with ties
    exact, approximate = (search.soft(jnp.asarray(relevance), jnp.asarray(mask), k, recall=r) for r in (1.0, 0.9))
    for row in range(3):
        order = sorted(np.flatnonzero(mask[row]), key=lambda t: (-relevance[row, t], -t))[:k]  # the newest of equals
        np.testing.assert_array_equal(np.asarray(exact[0])[row][np.asarray(exact[1])[row]], order)
        got = np.asarray(approximate[0])[row][np.asarray(approximate[1])[row]]  # exact but for ties, off a TPU
        np.testing.assert_array_equal(relevance[row, got], relevance[row, order])


def test_relevance_is_the_papers_product_of_two_projections():
    rng = np.random.default_rng(1)
    target, sequence = rng.normal(size=(2, 5)), rng.normal(size=(2, 7, 5))
    module = search.SoftSearch(3)
    params = module.init(jax.random.key(0), jnp.asarray(target))
    first = params["params"]
    np.testing.assert_array_equal(first["w_a"], first["w_b"])  # at first: nearness in one projection
    np.testing.assert_allclose(first["w_a"].T @ first["w_a"], np.eye(3), atol=1e-6)
    params = {"params": {name: jnp.asarray(rng.normal(size=(5, 3)), jnp.float32) for name in ("w_a", "w_b")}}
    w_a, w_b = (np.asarray(params["params"][name], np.float64) for name in ("w_a", "w_b"))
    wanted = np.einsum("btw,bw->bt", sequence @ w_b, target @ w_a)
    got = search.relevance(module.apply(params, jnp.asarray(target)), jnp.asarray(sequence))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_pooling_by_hand_ignores_padding_and_survives_an_empty_row():
    r = jnp.array([[2.0, 5.0, jnp.nan], [1.0, 1.0, 1.0]])
    sequence = jnp.array([[[1.0, 0.0], [0.0, 1.0], [jnp.nan, 1.0]]] * 2)
    mask = jnp.array([[True, True, False], [False, False, False]])
    np.testing.assert_allclose(search.pool(r, sequence, mask), np.log1p([[2.0, 5.0], [0.0, 0.0]]), rtol=1e-6)
    drawn = search.pool(r, -sequence, mask, count=jnp.array([6.0, 0.0]))  # two of six
    np.testing.assert_allclose(drawn, -np.log1p([[6.0, 15.0], [0.0, 0.0]]), rtol=1e-6)


def test_a_sample_is_of_behaviours_each_once_and_new_for_each_key():
    mask = jnp.asarray(np.random.default_rng(2).random((4, 50)) < 0.5)
    seen = []
    for seed in range(3):
        position, found = search.sample(jax.random.key(seed), mask, 8)
        assert found.all() and np.take_along_axis(np.asarray(mask), np.asarray(position), axis=1).all()
        assert all(len(set(row)) == 8 for row in np.asarray(position).tolist())
        seen.append(np.asarray(position))
    assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()
    position, found = search.sample(jax.random.key(0), mask, 60)
    assert position.shape == (4, 50)
    np.testing.assert_array_equal(found.sum(axis=1), mask.sum(axis=1))


def test_bad_recall_is_refused():
    with pytest.raises(ValueError, match=r"recall is 1\.5, must be above 0 and at most 1"):
        search.soft(jnp.zeros((1, 3)), jnp.ones((1, 3), bool), 2, recall=1.5)

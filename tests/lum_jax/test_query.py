"""LUM step 2: grouped queries equal separate passes, cached ones equal recomputation, and nothing leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lum_examples import apply, ask, extend, init, packed, prefill, query, tiny

import lum_jax
from lum_jax import cache as caching

USERS = [[5, 9, 2, 7], [3, 8, 21]]
QUESTIONS = [(1, 2, 1), (2, 4, 3), (1, 5, 2), (2, 1, 1), (1, 1, 1)]  # (segment, category, domain)


def questions(rows=QUESTIONS, limit=None) -> lum_jax.Queries:
    table = np.array(rows, np.int32)
    return lum_jax.Queries(
        condition={"category": table[None, :, 1], "domain": table[None, :, 2]},
        segment_ids=table[None, :, 0],
        limit=None if limit is None else np.array([limit], np.int32),
    )


def one_by_one(params, config, items: list[int], category: int, domain: int):
    """A separate pass: the condition token of one more event behind the prefix."""
    last, batch = len(items), packed([[[*items, 1]]], 6)  # one shape, compiled once
    condition = {name: np.array(value) for name, value in batch.condition.items()}
    condition["category"][0, last], condition["domain"][0, last] = category, domain
    return apply(params, batch.replace(condition=condition), config).outputs[0, last]


@pytest.fixture(scope="module")
def trained():
    config = tiny()
    return config, init(jax.random.key(3), config)


@pytest.mark.portable
def test_grouped_queries_equal_one_by_one(trained):
    config, params = trained
    answers = query(params, packed([USERS], 8), questions(), config)[0]
    for answer, (segment, category, domain) in zip(answers, QUESTIONS):
        np.testing.assert_allclose(answer, one_by_one(params, config, USERS[segment - 1], category, domain), atol=2e-6)
    assert np.unique(np.round(np.asarray(answers), 4), axis=0).shape[0] == len(QUESTIONS)


def test_an_answer_as_of_an_earlier_time_equals_a_pass_over_the_events_before_it(trained):
    config, params = trained
    limits = [2, 0, 4, 3, 1]
    answers = query(params, packed([USERS], 8), questions(limit=limits), config)[0]
    for answer, (segment, category, domain), limit in zip(answers, QUESTIONS, limits):
        expected = one_by_one(params, config, USERS[segment - 1][:limit], category, domain)
        np.testing.assert_allclose(answer, expected, atol=2e-6)


def test_events_at_or_after_the_limit_change_no_answer(trained):
    config, params = trained
    changed = [[5, 9, 28, 29], [3, 8, 21]]
    limits = [2, 3, 2, 3, 2]
    a, b = (query(params, packed([u], 8), questions(limit=limits), config) for u in (USERS, changed))
    np.testing.assert_array_equal(a, b)


def test_a_query_never_touches_another_query(trained):
    config, params = trained
    base = query(params, packed([USERS], 8), questions(), config)
    other = [row if i != 2 else (1, 3, 3) for i, row in enumerate(QUESTIONS)]
    moved = query(params, packed([USERS], 8), questions(other), config)
    changed = np.asarray(base != moved)[0].any(-1)
    np.testing.assert_array_equal(changed, [False, False, True, False, False])

    # And by gradients with respect to every row of the condition table: only the query's own category and those of the
    # events before it matter.
    def answer(table, place):
        tables = params["tables"] | {"category": table}
        return query({**params, "tables": tables}, packed([USERS], 8), questions(), config)[0, place].sum()

    influence = np.abs(jax.jit(jax.grad(answer))(params["tables"]["category"], 1)).max(-1) > 0
    used = {4} | {1 + item % 5 for item in USERS[1]}
    np.testing.assert_array_equal(np.flatnonzero(influence), sorted(used))


def test_questions_of_padding_are_zero_and_unconditional_models_refuse(trained):
    config, params = trained
    answers = query(params, packed([USERS], 8), questions([(0, 1, 1), (1, 1, 1)]), config)[0]
    assert (np.asarray(answers[0]) == 0).all() and np.abs(answers[1]).max() > 0
    plain = tiny(condition_tokens=False)
    with pytest.raises(ValueError, match="condition_tokens=False"):
        lum_jax.query(params, packed([USERS], 8), questions(), plain)


def grid(rows) -> dict:
    return {"category": jnp.array([[2, 4, 1]] * rows), "domain": jnp.array([[1, 3, 2]] * rows)}


def test_cached_queries_equal_grouped_queries(trained):
    config, params = trained
    prefixes = packed([[u] for u in USERS], 4)
    cache = prefill(params, prefixes, config, capacity=6)
    np.testing.assert_array_equal(cache.length, [4, 3])
    asked = lum_jax.Queries(grid(2), jnp.ones((2, 3), jnp.int32))
    np.testing.assert_allclose(ask(params, cache, grid(2), config), query(params, prefixes, asked, config), atol=2e-6)


def test_an_extended_cache_equals_recomputation(trained):
    config, params = trained
    whole = prefill(params, packed([[[5, 9, 2, 7, 4, 11]], [[3, 8, 21, 6]]], 6), config, capacity=7)
    cache = prefill(params, packed([[[5, 9, 2]], [[3, 8, 21]]], 3), config, capacity=7)
    for new in ([[[7, 4]], [[6]]], [[[11]], [[]]]):  # ragged: the second user brings one event, then none
        batch = packed(new, 2)
        caching.check_room(cache, (batch.segment_ids > 0).sum(1), config)
        cache = extend(params, cache, batch, config)
    np.testing.assert_array_equal(cache.length, whole.length)
    np.testing.assert_allclose(ask(params, cache, grid(2), config), ask(params, whole, grid(2), config), atol=2e-6)


def test_a_full_cache_is_refused_by_row(trained):
    config, params = trained
    cache = prefill(params, packed([[[5, 9]], [[3]]], 2), config)
    with pytest.raises(ValueError, match="example 0: 4 cached and 2 new tokens do not fit"):
        caching.check_room(cache, np.array([1, 1]), config)
    with pytest.raises(ValueError, match="capacity=1 must be at least"):
        prefill(params, packed([[[5, 9]]], 2), config, capacity=1)

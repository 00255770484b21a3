"""Second keys: tables of items, questions asked once, unions of several keys, clusters of embeddings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_core.data import EventLog, Items, Ragged
from rec_core.store import open_store
from sim_jax.tree import BehaviorTree
from sim_jax.tree_keys import ItemKeys, clusters, distinct, expand, union


def ragged(*rows) -> Ragged:
    return Ragged(np.cumsum([0, *map(len, rows)]), np.array([x for row in rows for x in row], np.int64))


def rows(found: Ragged) -> list[list[int]]:
    return [found.row(i).tolist() for i in range(len(found.offsets) - 1)]


def test_keys_of_items_by_category_by_all_categories_and_by_any_function():
    items = Items(np.array([3, 5, 9]), np.array([1, 0, 2], np.int32), ragged([1, 4], [], [2, 2, 0]))
    assert rows(ItemKeys.category(items)([9, 3, 5, 4])) == [[2], [1], [], []]  # 5 has none, 4 is not known
    assert rows(ItemKeys.categories(items)([9, 3, 5, 4])) == [[2], [1, 4], [], []]
    by_parity = ItemKeys.of([9, 4, 3, 4], [1, 2, 1, -7])
    assert rows(by_parity([3, 4, 9])) == [[1], [-7, 2], [1]]
    assert rows(ItemKeys.of([], [])([3, 4])) == [[], []]
    with pytest.raises(ValueError, match="no category"):
        ItemKeys.category(Items(np.array([1])))
    with pytest.raises(ValueError, match="no lists of categories"):
        ItemKeys.categories(Items(np.array([1])))
    with pytest.raises(ValueError, match=r"item has shape \(2,\) and key \(1,\)"):
        ItemKeys.of([1, 2], [1])
    with pytest.raises(ValueError, match="must rise"):
        ItemKeys(np.array([2, 1]), ragged([1], [1]))


def test_related_keys_are_asked_for_too():
    related = ItemKeys.of([1, 1, 2], [4, 2, 1])
    assert rows(expand(ragged([1], [2, 1], [], [7]), related)) == [[1, 2, 4], [1, 2, 4], [], [7]]


def test_each_key_of_a_request_is_asked_once():
    asked = distinct(ragged([5], [3, 5], [], [3], [5]), [4, 1])
    assert rows(asked.keys) == [[3, 5], [5]]
    assert rows(asked.rows) == [[1], [0, 1], [], [0], [2]]
    one = distinct(ragged([5], [3, 5]))
    assert rows(one.keys) == [[3, 5]] and rows(one.rows) == [[1], [0, 1]]
    with pytest.raises(ValueError, match="add up to the 2 rows"):
        distinct(ragged([5], [3]), [1])


_events = st.tuples(st.integers(0, 2), st.integers(1, 12), st.integers(0, 40))


@given(
    events=st.lists(_events, max_size=60),
    candidates=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 14)), min_size=1, max_size=8),
    k=st.integers(0, 6),
    before=st.integers(0, 41),
)
def test_a_search_through_several_and_related_keys_is_the_definition(events, candidates, k, before):
    """Behaviours of a candidate: those that share one of its keys or a related one; the k newest, each once."""
    user, item, time = np.array(events, np.int64).reshape(-1, 3).T
    keys = {i: {i % 3, i % 4 + 10} - {0} for i in range(1, 13)}
    related = {10: {1}, 2: {11, 12}}
    key_of = ItemKeys.of(*np.array([(i, key) for i, several in keys.items() for key in several]).T)
    more = ItemKeys.of(*np.array([(key, other) for key, others in related.items() for other in others]).T)
    tree = BehaviorTree(open_store("memory:"), key="two moduli", block=3)
    tree.append(EventLog(user, item, time), key_of(item))

    candidates = sorted(candidates)
    who, what = np.array(candidates).T
    asked = distinct(expand(key_of(what), more), np.bincount(who, minlength=3))
    found = union(tree.lookup(np.arange(3), asked.keys, k, before), asked.rows, k)
    for row, (u, candidate) in enumerate(candidates):
        mine = keys.get(candidate, set())
        wanted = mine | {other for key in mine for other in related.get(key, set())}
        near = {(t, i) for v, i, t in events if v == u and t < before and keys[i] & wanted}
        pairs = list(zip(found.time[row].tolist(), found.item[row].tolist(), strict=True))
        assert pairs == sorted(near, reverse=True)[:k] + [(0, 0)] * (k - found.count[row])
        assert found.count[row] == min(k, len(near))


def test_clusters_find_what_lies_together_and_give_new_items_their_key():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, 600)
    where = rng.normal(size=(6, 8)) * 10
    embeddings = where[truth] + rng.normal(size=(600, 8))
    made = clusters(embeddings, 6, seed=1)
    key = made(embeddings)
    assert key.dtype == np.int64 and set(key.tolist()) == set(range(1, 7))  # 0 stays free: it is no key
    assert len(np.unique(np.stack([truth, key]), axis=1).T) == 6  # one to one
    np.testing.assert_array_equal(made(where + 0.1), [key[truth == i][0] for i in range(6)])
    np.testing.assert_array_equal(clusters(embeddings, 6, seed=1).centers, made.centers)
    assert not np.array_equal(clusters(embeddings, 6, seed=2).centers, made.centers)


def test_clusters_of_few_or_equal_rows_and_what_is_refused():
    assert sorted(clusters(np.eye(3), 3, seed=0)(np.eye(3)).tolist()) == [1, 2, 3]
    assert len(set(clusters(np.ones((5, 2)), 3, seed=0)(np.ones((5, 2))).tolist())) == 1
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n is {n}: from 1 cluster to one for each of the 3"):
            clusters(np.eye(3), n, seed=0)
    with pytest.raises(ValueError, match=r"embeddings\[1\] is not finite"):
        clusters([[1.0], [np.nan]], 1, seed=0)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        clusters(np.ones(3), 1, seed=0)
    with pytest.raises(ValueError, match="2 wide and the centres 3"):
        clusters(np.eye(3), 2, seed=0)(np.eye(2))

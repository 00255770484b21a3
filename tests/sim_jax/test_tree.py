"""The user behaviour tree answers as a plain list of events does: in each store, as arrays, whatever the order."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis_server import start_redis

from rec_core.data import DataError, EventLog, Ragged
from rec_core.data.schema import LAST_TIME
from rec_core.store import StoreError, open_store
from sim_jax.tree import Appended, BehaviorTree
from sim_jax.tree_table import TreeTable


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(params=["memory", "lmdb", "redis"])
def store(request, tmp_path):
    address = {"memory": lambda: "memory:", "lmdb": lambda: str(tmp_path / "tree")}.get(request.param)
    with open_store(address() if address else request.getfixturevalue("redis_server").address()) as opened:
        yield opened


def log(*events, label=None) -> EventLog:
    """A log of (user, category, time, item)."""
    user, category, time, item = np.array(events, np.int64).reshape(-1, 4).T
    return EventLog(user, item, time, category.astype(np.int32), label=label)


def pairs(found, *at) -> list[tuple[int, int]]:
    """The (time, item) of one row of an answer, which is zero after them."""
    count = found.count[at]
    assert not found.time[at][count:].any() and not found.item[at][count:].any()
    assert found.mask[at].tolist() == [i < count for i in range(found.item.shape[-1])]
    return list(zip(found.time[at][:count].tolist(), found.item[at][:count].tolist(), strict=True))


def expected(events, user, key, k, before):
    """The definition: distinct events of the user under the key before the time, newest first, k of them."""
    mine = {(t, i) for u, c, t, i in events if (u, c) == (user, key) and c != 0 and t < before}
    return sorted(mine, reverse=True)[:k]


def same(one, other):
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), strict=True)


USERS, KEYS = [-3, 0, 1, 2**40, 7], [0, 1, 2, -1, 9]
_events = st.tuples(
    st.sampled_from(USERS[:4]), st.sampled_from(KEYS[:4]), st.integers(0, 25), st.sampled_from([-(2**50), -1, 0, 5, 6])
)
_questions = given(
    batches=st.lists(st.lists(_events, max_size=40), max_size=4),
    block=st.integers(1, 4),
    k=st.integers(0, 9),
    before=st.lists(st.integers(0, 27), min_size=5, max_size=5),
)


def _answers_as_a_list_does(opened, batches, block, k, before):
    tree = BehaviorTree(opened, key="category", block=block)
    held = []
    for batch in batches:
        filed = {event for event in batch if event[1]}
        done = tree.append(log(*batch))
        new, without = len(filed - set(held)), sum(event[1] == 0 for event in batch)
        assert done == Appended(new, len(batch) - without - new, without)
        held += batch
    keys = np.tile(KEYS, (len(USERS), 1))
    found = tree.lookup(USERS, keys, k, np.array(before))
    assert found.item.shape == found.time.shape == (5, 5, k) and found.count.shape == (5, 5)
    for i, user in enumerate(USERS):
        for j, key in enumerate(KEYS):
            assert pairs(found, i, j) == expected(held, user, key, k, before[i])
    same(tree.snapshot().lookup(USERS, keys, k, np.array(before)), found)
    table = TreeTable.build(log(*held))
    same(table.lookup(USERS, keys, k, np.array(before)), found)
    assert len(table) == len(tree.snapshot())
    _check_blocks(opened, block)


def _check_blocks(opened, block):
    """Once there are sealed blocks, the head and all of them but the oldest hold `block` to 2 `block` - 1 events."""
    heads = {key[1:]: len(value) // 12 for key, value in opened.scan(b"h")}
    assert all(0 < size < 2 * block for size in heads.values())
    for key, value in opened.scan(b"s"):
        size = len(value) // 12
        assert heads[key[1:17]] >= block and size < 2 * block
        assert size >= block or not any(key[17:])


@_questions
def test_in_memory_the_tree_answers_as_a_list_of_events_does(batches, block, k, before):
    _answers_as_a_list_does(open_store("memory:"), batches, block, k, before)


@_questions
def test_on_lmdb_the_tree_answers_as_a_list_of_events_does(tmp_path_factory, batches, block, k, before):
    with open_store(tmp_path_factory.mktemp("lmdb") / "store") as opened:
        _answers_as_a_list_does(opened, batches, block, k, before)


@_questions
def test_on_redis_the_tree_answers_as_a_list_of_events_does(redis_server, batches, block, k, before):
    with open_store(redis_server.address()) as opened:
        _answers_as_a_list_does(opened, batches, block, k, before)


def history(n, seed=0, user=5):
    """One user's long history in a few categories, several events a second now and then."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(1_600_000_000, 1_600_000_000 + 2 * n, n))
    category = rng.integers(1, 6, n).astype(np.int32)
    return EventLog(np.full(n, user), rng.integers(2, 10_000, n), time, category)


def test_a_history_of_54000_events_in_any_order_of_arrival(store):
    whole = history(54_000)
    rng = np.random.default_rng(1)
    orders = {"as it was": np.arange(54_000), "at random": rng.permutation(54_000)}
    table = TreeTable.build(whole)
    times = np.quantile(whole.time, [0, 0.001, 0.3, 0.9, 1]).astype(np.int64)
    for name, index in orders.items():
        tree = BehaviorTree(open_store("memory:") if name == "at random" else store, key="category")
        filed = sum(tree.append(whole.take(part)).filed for part in np.array_split(index, 3))
        assert filed == len(table) == len(tree.snapshot())
        _check_blocks(tree.store, tree.block)
        for k in (1, 200, 1000):
            same(
                tree.lookup(np.full(5, 5), np.tile(np.arange(6), (5, 1)), k, times),
                table.lookup(np.full(5, 5), np.tile(np.arange(6), (5, 1)), k, times),
            )
    newest = table.lookup([5], [[3]], 200, LAST_TIME)
    assert newest.count[0, 0] == 200 and newest.time[0, 0, 0] == whole.time[whole.category == 3].max()


def test_events_in_reverse_keep_few_blocks(store):
    """Each event older than all before it: they gather in the oldest block, which is cut as it grows."""
    tree = BehaviorTree(store, key="category", block=4)
    for time in range(60, 0, -1):
        tree.append(log((1, 2, time, time)))
    assert pairs(tree.lookup([1], [[2]], 100, 100), 0, 0) == [(t, t) for t in range(60, 0, -1)]
    assert 60 / 7 <= store.count() <= 60 / 4
    _check_blocks(store, 4)


def test_what_happens_at_or_after_a_time_changes_no_answer_at_it(store):
    rng = np.random.default_rng(2)
    events = [(1, int(c), int(t), int(i)) for c, t, i in zip(*rng.integers(1, [[3], [50], [9]], (3, 120)), strict=True)]
    tree = BehaviorTree(store, key="category", block=5)
    answers = []
    for time in range(50):
        tree.append(log(*(event for event in events if event[2] == time)))
        answers.append([tree.lookup([1], [[1, 2]], 8, t) for t in range(time + 2)])
    for earlier, later in itertools.pairwise(answers):
        for one, other in zip(earlier, later, strict=False):
            same(one, other)
    assert answers[-1][30].count.all() and (answers[-1][30].time < 30).all()


def test_unknown_users_and_keys_key_0_and_k_0_find_nothing(store):
    tree = BehaviorTree(store, key="category")
    same(tree.lookup([1], [[2, 3]], 4, 10), tree.snapshot().lookup([1], [[2, 3]], 4, 10))  # an empty tree
    tree.append(log((1, 2, 5, 8), (1, 0, 6, 8)))
    found = tree.lookup([1, 1, 9], Ragged(np.array([0, 2, 2, 3]), np.array([2, 0, 2])), 2, 10)
    assert found.item.tolist() == [[8, 0], [0, 0], [0, 0]] and found.count.tolist() == [1, 0, 0]
    assert found.item.dtype == found.time.dtype == np.int64 and found.count.dtype == np.int32
    assert tree.lookup([1], [2], 0, 10).item.shape == (1, 0) and tree.lookup([1], [2], 0, 10).count.tolist() == [0]
    assert tree.lookup([], [], 3, 10).item.shape == (0, 3)
    assert tree.lookup([1], Ragged(np.array([0, 0]), np.array([], int)), 3, 10).item.shape == (0, 3)


def test_several_keys_of_an_event_are_each_a_way_to_it(store):
    tree = BehaviorTree(store, key="genres")
    events = EventLog(np.array([1, 1, 1]), np.array([7, 8, 9]), np.array([10, 11, 12]))
    done = tree.append(events, Ragged(np.array([0, 2, 2, 4]), np.array([3, 4, 4, 4])))
    assert done == Appended(filed=3, repeated=1, left_out=1)
    found = tree.lookup([1], [[3, 4]], 5, 100)
    assert pairs(found, 0, 0) == [(10, 7)] and pairs(found, 0, 1) == [(12, 9), (10, 7)]
    with pytest.raises(ValueError, match="no category column"):
        tree.append(events)


def test_an_event_stays_under_the_key_it_had_when_its_category_drifts(store):
    tree = BehaviorTree(store, key="category")
    tree.append(log((1, 2, 10, 7)))
    tree.append(log((1, 3, 20, 7)))  # the item has moved from category 2 to 3
    found = tree.lookup([1], [[2, 3]], 5, 100)
    assert pairs(found, 0, 0) == [(10, 7)] and pairs(found, 0, 1) == [(20, 7)]
    assert tree.append(log((1, 3, 10, 7))).filed == 1  # filed again under today's category, beside the old one
    found = tree.lookup([1], [[2, 3]], 5, 100)
    assert pairs(found, 0, 0) == [(10, 7)] and pairs(found, 0, 1) == [(20, 7), (10, 7)]


def test_what_was_shown_and_not_taken_is_no_behaviour(store):
    tree = BehaviorTree(store, key="category")
    events = log((1, 2, 10, 7), (1, 2, 11, 8), label=np.array([0, 1], np.uint8))
    assert tree.append(events) == Appended(filed=1, repeated=0, left_out=1)
    assert pairs(tree.lookup([1], [[2]], 5, 100), 0, 0) == [(11, 8)]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_log_that_breaks_the_rules_stores_nothing():
    with open_store("memory:") as opened:
        tree = BehaviorTree(opened, key="category")
        with pytest.raises(DataError, match=r"time -1 in row 1 .*not negative"):
            tree.append(log((1, 2, 5, 5), (1, 2, -1, 5)))
        with pytest.raises(DataError, match="milliseconds"):
            tree.append(log((1, 2, 5, 5), (1, 2, 1_600_000_000_000, 5)))
        with pytest.raises(ValueError, match="keys has 1 rows and the log 2 events"):
            tree.append(log((1, 2, 5, 5), (1, 2, 6, 5)), np.array([3]))
        with pytest.raises(ValueError, match=r"keys has dtype float64"):
            tree.append(log((1, 2, 5, 5)), np.array([3.0]))
        with pytest.raises(ValueError, match=r"keys\.offsets must rise from 0 to the number of values, 1"):
            tree.append(log((1, 2, 5, 5)), Ragged(np.array([0, 2]), np.array([3])))
        assert opened.count() == 0


@pytest.mark.parametrize("form", ["tree", "table"])
def test_questions_that_cannot_be_answered_are_refused(form):
    tree = BehaviorTree(open_store("memory:"), key="category") if form == "tree" else TreeTable.build(log((1, 2, 3, 4)))
    for users, keys, k, before, message in [
        ([1, 2], [[1]], 3, 5, "users are 2 and keys has 1 rows"),
        ([[1]], [[1]], 3, 5, r"users has shape \(1, 1\)"),
        ([1], [[1]], 3, [5, 6], r"before \(2,\)"),
        ([1], [[1]], 3, 1_600_000_000_000, "milliseconds"),
        ([1], [[1]], 3, -1, "before is -1"),
        ([1], [[1]], -1, 5, "k is -1"),
        ([1], [[1]], 2.0, 5, "k is 2.0"),
        ([1.5], [[1]], 3, 5, "users has dtype float64"),
        (np.array([2**63], np.uint64), [[1]], 3, 5, "fit into int64"),
        ([1], Ragged(np.array([0, 2, 1]), np.array([1])), 3, 5, r"keys\.offsets"),
    ]:
        with pytest.raises(ValueError, match=message):
            tree.lookup(users, keys, k, before)


def test_a_store_of_another_key_block_size_or_of_something_else_is_refused():
    with open_store("memory:") as opened:
        BehaviorTree(opened, key="category")
        for options, name in [({"key": "kmeans 7"}, "key kmeans 7"), ({"key": "category", "block": 9}, "blocks of 9")]:
            with pytest.raises(StoreError, match=rf"key category, blocks of 200' and opened for .*{name}"):
                BehaviorTree(opened, **options)
    with open_store("memory:") as other:
        other.put([(b"x", b"1")])
        with pytest.raises(StoreError, match="no stated version"):
            BehaviorTree(other, key="category")
        with pytest.raises(ValueError, match="key is ''"):
            BehaviorTree(other, key="")
        with pytest.raises(ValueError, match="block is 0"):
            BehaviorTree(other, key="category", block=0)


def test_a_damaged_block_is_named():
    with open_store("memory:") as opened:
        tree = BehaviorTree(opened, key="category")
        tree.append(log((3, 8, 20, 7), (4, 8, 20, 7)))
        key, value = next(opened.scan(b"h"))
        opened.put([(key, value[:-1])])
        for ask in (lambda: tree.lookup([3], [[8]], 1, 30), tree.snapshot, lambda: tree.append(log((3, 8, 30, 7)))):
            with pytest.raises(StoreError, match="a block of user 3, key 8 has 11 bytes and an event has 12"):
                ask()


def test_the_tree_imports_no_heavy_package():
    program = (
        "import sys, sim_jax.tree, sim_jax.tree_keys, sim_jax.tree_table; "
        "print(sorted({'scipy', 'lmdb', 'redis', 'polars', 'grain'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"

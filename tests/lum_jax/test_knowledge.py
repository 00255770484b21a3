"""The knowledge store: the time rule, one version only, bounded rounding, and a table that answers as the store."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lum_jax.knowledge import KnowledgeStore, KnowledgeTable
from rec_core.store import StoreError, open_store

NEVER = -1


@pytest.fixture(params=["memory", "lmdb"])
def store(request, tmp_path):
    with open_store("memory:" if request.param == "memory" else tmp_path / "knowledge") as opened:
        yield opened


def vectors(n, width=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def exact(n, width=4, seed=0):
    """Vectors that float16 and int8 both hold without rounding."""
    found = np.random.default_rng(seed).integers(-127, 128, (n, width)).astype(np.float32)
    found[:, 0] = 127
    return found


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_was_written_is_read(store, dtype):
    knowledge = KnowledgeStore(store, version="a", width=4, dtype=dtype)
    wrote = exact(3)
    assert knowledge.write([7, 7, 9], [1, 2, 1], [100, 100, 50], wrote) == 3
    found_vectors, found, as_of = knowledge.read([9, 7, 8], [[1, 2], [2, 1], [1, 2]], [60, 100, 100])
    assert found_vectors.dtype == np.float32 and found_vectors.shape == (3, 2, 4)
    assert found.tolist() == [[True, False], [True, True], [False, False]]
    assert as_of.dtype == np.int64 and as_of.tolist() == [[50, NEVER], [100, 100], [NEVER, NEVER]]
    zero = np.zeros(4)
    np.testing.assert_array_equal(found_vectors, [[wrote[2], zero], [wrote[1], wrote[0]], [zero, zero]])


def test_the_newest_entry_not_after_the_time_is_read(store):
    knowledge = KnowledgeStore(store, version="a", width=4)
    knowledge.write([1, 1, 1], [5, 5, 5], [10, 30, 20], exact(3))
    _, found, as_of = knowledge.read([1] * 6, [[5]] * 6, [0, 9, 10, 29, 30, 2**60])
    assert as_of[:, 0].tolist() == [NEVER, NEVER, 10, 20, 30, 30] and found[:, 0].tolist() == [False] * 2 + [True] * 4
    _, found, _ = knowledge.read([1, 2, 0], [[4, 6], [5, 5], [5, 5]], [2**60] * 3)
    assert not found.any()  # a neighbour in the key's order is not an answer


def test_events_at_or_after_a_time_change_nothing_that_is_read_at_it():
    """With a stand-in for the model: an entry is the sum of its user's events strictly before its as-of."""
    rng = np.random.default_rng(1)
    times = np.sort(rng.integers(0, 50, 30))
    checkpoints = np.arange(0, 60, 7)
    embeddings = exact(30, seed=2) // 64

    def knowledge_of(events, prefix):
        knowledge = KnowledgeStore(open_store("memory:"), version=prefix, width=4)
        entries = np.stack([events[times < a].sum(axis=0) for a in checkpoints])
        knowledge.write(np.zeros(len(checkpoints), int), np.ones(len(checkpoints), int), checkpoints, entries)
        return knowledge

    changed_something = False
    for t in range(60):
        tampered = np.where((times >= t)[:, None], -embeddings - 1, embeddings)
        before, after = (knowledge_of(events, "a").read([0], [[1]], [t]) for events in (embeddings, tampered))
        for left, right in zip(before, after, strict=True):
            np.testing.assert_array_equal(left, right)
        later = [knowledge_of(events, "a").read([0], [[1]], [100])[0] for events in (embeddings, tampered)]
        changed_something |= not np.array_equal(*later)
        assert before[2][0, 0] <= t
    assert changed_something


def test_a_rewritten_entry_is_replaced(store):
    knowledge = KnowledgeStore(store, version="a", width=4)
    wrote = exact(3)
    knowledge.write([1, 1], [1, 1], [5, 5], wrote[:2])
    np.testing.assert_array_equal(knowledge.read([1], [[1]], [5])[0][0, 0], wrote[1])
    knowledge.write([1], [1], [5], wrote[2:])
    np.testing.assert_array_equal(knowledge.read([1], [[1]], [5])[0][0, 0], wrote[2])
    assert len(knowledge.snapshot()) == 1


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_items_stand_beside_and_do_not_mix_with_knowledge(store, dtype):
    knowledge = KnowledgeStore(store, version="a", width=4, dtype=dtype)
    wrote = exact(3)
    knowledge.write_items([4, 1, 2**40], wrote)
    knowledge.write([1], [1], [1], exact(1, seed=5))
    found_vectors, found = knowledge.read_items([[1, 4], [3, 2**40]])
    assert found.tolist() == [[True, True], [False, True]] and found_vectors.dtype == np.float32
    np.testing.assert_array_equal(found_vectors, [[wrote[1], wrote[0]], [np.zeros(4), wrote[2]]])
    assert len(knowledge.snapshot()) == 1
    assert knowledge.read_items([])[0].shape == (0, 4)


# ---- versions and settings -------------------------------------------------------------------------------------------


def test_another_version_width_or_dtype_is_refused_by_name(store):
    KnowledgeStore(store, version="step-100", width=4).write([1], [1], [1], exact(1))
    with pytest.raises(StoreError, match="'step-100' and opened for 'step-200'"):
        KnowledgeStore(store, version="step-200", width=4)
    with pytest.raises(StoreError, match="width 4 and was opened for width 8"):
        KnowledgeStore(store, version="step-100", width=8)
    with pytest.raises(StoreError, match="dtype 'float16' and was opened for dtype 'int8'"):
        KnowledgeStore(store, version="step-100", width=4, dtype="int8")
    assert KnowledgeStore(store, version="step-100", width=4).read([1], [[1]], [1])[1].all()


@pytest.mark.parametrize("known", [True, False])
def test_an_entry_of_another_version_is_refused_when_read(known):
    old, new = open_store("memory:"), open_store("memory:")
    KnowledgeStore(old, version="step-100", width=4).write([3], [8], [20], exact(1))
    KnowledgeStore(old, version="step-100", width=4).write_items([12], exact(1))
    knowledge = KnowledgeStore(new, version="step-200", width=4)
    knowledge.write([3], [7], [20], exact(1))
    kinds = [b"k", b"i", b"version"] if known else [b"k", b"i"]
    for kind in kinds:  # as a careless copy of one store into the other would do
        new.put(old.scan(kind))
    written = "'step-100'" if known else "unknown"
    asks = [lambda: knowledge.read([3], [[7, 8]], [30]), knowledge.snapshot, lambda: knowledge.read_items([12])]
    for ask, name in zip(asks, ["user 3, condition 8, as of 20"] * 2 + ["item 12"], strict=True):
        with pytest.raises(StoreError, match=rf"\({name}\) was written by version {written}.* for 'step-200'"):
            ask()
    assert knowledge.read([3], [[7]], [30])[1].all()


def test_a_store_of_something_else_or_damaged_is_refused(tmp_path):
    with open_store(tmp_path / "a") as other:
        other.put([(b"x", b"1")])
        with pytest.raises(StoreError, match="no stated version"):
            KnowledgeStore(other, version="a", width=4)
    with open_store(tmp_path / "b", version="a") as other:
        other.put([(b"x", b"1")])
        with pytest.raises(StoreError, match="holds no knowledge"):
            KnowledgeStore(other, version="a", width=4)
    with open_store("memory:") as damaged:
        knowledge = KnowledgeStore(damaged, version="a", width=4)
        knowledge.write([3, 4], [8, 8], [20, 20], exact(2))
        key, value = next(damaged.scan(b"k"))
        damaged.put([(key, value[:-1])])
        with pytest.raises(StoreError, match=r"\(user 3, condition 8, as of 20\) has 15 bytes and 16 were expected"):
            knowledge.read([3], [[8]], [20])
        assert knowledge.read([4], [[8]], [20])[1].all()


def test_a_reader_needs_no_right_to_write(tmp_path):
    with open_store(tmp_path / "a") as store:
        KnowledgeStore(store, version="a", width=4).write([1], [1], [1], exact(1))
    with open_store(tmp_path / "a", readonly=True) as store:
        knowledge = KnowledgeStore(store, version="a", width=4)
        assert knowledge.read([1], [[1]], [1])[1].all() and len(knowledge.snapshot()) == 1
        with pytest.raises(StoreError, match="readonly"):
            knowledge.write([1], [1], [1], exact(1))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70000.0])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_vector_that_cannot_be_held_is_named_and_nothing_is_stored(store, value, dtype):
    knowledge = KnowledgeStore(store, version="a", width=4, dtype=dtype)
    bad = vectors(3)
    bad[1, 2] = value
    with pytest.raises(ValueError, match=r"vectors\[1, 2\] \(user 6, condition 3, as of 9\)"):
        knowledge.write([5, 6, 7], [3, 3, 3], [9, 9, 9], bad)
    with pytest.raises(ValueError, match=r"vectors\[1, 2\] \(item 6\)"):
        knowledge.write_items([5, 6, 7], bad)
    with pytest.raises(ValueError, match=r"vectors\[1, 2\] \(user 6, condition 3, as of 9\)"):
        KnowledgeTable.from_arrays([5, 6, 7], [3, 3, 3], [9, 9, 9], bad)
    assert len(knowledge.snapshot()) == 0 and not knowledge.read_items([5, 6, 7])[1].any()


def test_arguments_that_do_not_fit_are_named():
    knowledge = KnowledgeStore(open_store("memory:"), version="a", width=4)
    cases = [
        (lambda: knowledge.write([1], [1, 2], [1, 1], vectors(2)), r"users has shape \(1,\) and \(2,\)"),
        (lambda: knowledge.write([1, 1], [1, 2], [1, -5], vectors(2)), r"as_of\[1\] is -5"),
        (lambda: knowledge.write([1, 1], [1, 2], [1, 1], vectors(2, width=3)), r"shape \(2, 3\): \[n, 4\]"),
        (lambda: knowledge.write([1.0], [1], [1], vectors(1)), "users has dtype float64"),
        (lambda: knowledge.write([1], [1], [1], np.ones((1, 4), int)), "vectors has dtype int64"),
        (lambda: knowledge.write(np.array([2**64 - 1], np.uint64), [1], [1], vectors(1)), "fit into int64"),
        (lambda: knowledge.read([1], [1], [1]), r"conditions has shape \(1,\): \[B, N\]"),
        (lambda: knowledge.read([1, 2], [[1]], [1]), r"users has shape \(2,\)"),
        (lambda: knowledge.read([1], [[1]], [-1]), r"times\[0\] is -1"),
        (lambda: KnowledgeStore(open_store("memory:"), version="a", width=4, dtype="float32"), "dtype is 'float32'"),
        (lambda: KnowledgeStore(open_store("memory:"), version="a", width=0), "width is 0"),
        (lambda: KnowledgeStore(open_store("memory:"), version="", width=4), "version is ''"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert knowledge.write([], [], [], np.zeros((0, 4), np.float32)) == 0
    assert knowledge.read(np.zeros(0, int), np.zeros((0, 3), int), np.zeros(0, int))[0].shape == (0, 3, 4)


# ---- rounding --------------------------------------------------------------------------------------------------------


@given(
    scale=st.sampled_from([1e-9, 1e-6, 1e-3, 1.0, 100.0, 1e4]),
    seed=st.integers(0, 2**31),
    width=st.sampled_from([1, 16]),
)
def test_rounding_stays_within_the_stated_bounds(scale, seed, width):
    wrote = np.clip(vectors(20, width, seed) * scale, -65504, 65504)
    wrote[0] = 0
    half = 2.0**-11 * np.abs(wrote) + 2.0**-25
    step = np.abs(wrote).max(axis=1, keepdims=True) / 127
    # a value whose half step is rounded once more lies at most half a step further out, hence the factor
    bounds = {"float16": half, "int8": step / 2 * (1 + 2.0**-10) + half}
    for dtype, bound in bounds.items():
        knowledge = KnowledgeStore(open_store("memory:"), version="a", width=width, dtype=dtype)
        knowledge.write(np.arange(20), np.zeros(20, int), np.zeros(20, int), wrote)
        held = knowledge.read(np.arange(20), np.zeros((20, 1), int), np.zeros(20, int))[0][:, 0]
        assert np.isfinite(held).all()
        assert (np.abs(held.astype(np.float64) - wrote) <= bound).all()


def test_int8_takes_half_the_room_and_is_coarser():
    sizes, errors = {}, {}
    for dtype in ("float16", "int8"):
        with open_store("memory:") as store:
            KnowledgeStore(store, version="a", width=64, dtype=dtype).write([1], [1], [1], vectors(1, 64))
            sizes[dtype] = len(next(store.scan(b"k"))[1])
            held = KnowledgeStore(store, version="a", width=64, dtype=dtype).read([1], [[1]], [1])[0][0, 0]
            errors[dtype] = np.abs(held - vectors(1, 64)[0]).max()
    assert sizes == {"float16": 8 + 2 * 64, "int8": 8 + 4 + 64}
    assert 0 < errors["float16"] < errors["int8"]


# ---- the table in memory ---------------------------------------------------------------------------------------------

_small = st.integers(-2, 2)
_entries = st.lists(st.tuples(_small, _small, st.integers(0, 6)), max_size=25)


@given(entries=_entries, asked=st.lists(st.tuples(_small, _small, st.integers(0, 8)), max_size=25), data=st.data())
def test_store_snapshot_and_table_give_the_answer_of_a_plain_search(entries, asked, data):
    wrote = exact(len(entries), seed=3) / 8 + np.arange(len(entries), dtype=np.float32)[:, None]  # all different
    users, conditions, as_of = np.array(entries, int).reshape(-1, 3).T
    dtype = data.draw(st.sampled_from(["float16", "int8"]))
    knowledge = KnowledgeStore(open_store("memory:"), version="a", width=4, dtype=dtype)
    cut = data.draw(st.integers(0, len(entries)))
    for part in (slice(0, cut), slice(cut, None)):
        knowledge.write(users[part], conditions[part], as_of[part], wrote[part])
    snapshot, table = knowledge.snapshot(), KnowledgeTable.from_arrays(users, conditions, as_of, wrote)
    assert len(snapshot) == len(table) == len(set(entries)) and snapshot.version == "a"

    ask_users, ask_conditions, ask_times = np.array(asked, int).reshape(-1, 3).T
    from_store = knowledge.read(ask_users, ask_conditions[:, None], ask_times)
    for left, right in zip(from_store, snapshot.read(ask_users, ask_conditions[:, None], ask_times), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)

    rows = table.lookup(ask_users, ask_conditions, ask_times)
    np.testing.assert_array_equal(rows, snapshot.lookup(ask_users, ask_conditions, ask_times))
    for (user, condition, time), row in zip(asked, rows, strict=True):
        past = [e for e in entries if e[:2] == (user, condition) and e[2] <= time]
        if not past:
            assert row == -1
            continue
        newest = max(past)
        assert (table.users[row], table.conditions[row], table.as_of[row]) == newest
        last = len(entries) - 1 - entries[::-1].index(newest)  # what was written last under this key
        np.testing.assert_array_equal(table.vectors[row], wrote[last].astype(np.float16))


def test_lookup_broadcasts_and_answers_for_unknown_ones():
    table = KnowledgeTable.from_arrays([3, 3, 5], [1, 2, 1], [10, 10, 20], exact(3), version="v")
    rows = table.lookup(np.array([3, 5, 4])[:, None], np.array([1, 2, 9])[None], np.array([15, 25, 25])[:, None])
    assert rows.tolist() == [[0, 1, -1], [2, -1, -1], [-1, -1, -1]] and rows.dtype == np.int64
    assert table.lookup(3, 1, 9) == -1 and table.lookup(3, 1, 10) == 0
    assert table.vectors.dtype == np.float16 and table.version == "v"
    empty = KnowledgeTable.from_arrays([], [], [], np.zeros((0, 4), np.float32))
    assert empty.lookup([3], [1], [10]).tolist() == [-1] and len(empty) == 0
    assert empty.read([3], [[1, 2]], [10])[0].tolist() == [[[0.0] * 4] * 2]


def test_a_table_that_is_not_sorted_is_refused():
    table = KnowledgeTable.from_arrays([1, 2], [1, 1], [1, 1], exact(2))
    for users, as_of in (([2, 1], [1, 1]), ([1, 1], [2, 1]), ([1, 1], [1, 1])):
        with pytest.raises(ValueError, match="not sorted"):
            dataclasses.replace(table, users=np.array(users), as_of=np.array(as_of))


def test_a_snapshot_of_many_pages_is_whole():
    knowledge = KnowledgeStore(open_store("memory:"), version="a", width=2)
    rng = np.random.default_rng(0)
    n = 70_000  # more than one part of the snapshot
    users, conditions, as_of = rng.permutation(n), rng.integers(0, 3, n), rng.integers(0, 2**40, n)
    wrote = vectors(n, 2).astype(np.float16)
    knowledge.write(users, conditions, as_of, wrote)
    snapshot, table = knowledge.snapshot(), KnowledgeTable.from_arrays(users, conditions, as_of, wrote)
    for field in ("users", "conditions", "as_of", "vectors"):
        np.testing.assert_array_equal(getattr(snapshot, field), getattr(table, field))
    np.testing.assert_array_equal(table.vectors[table.lookup(users, conditions, as_of)], wrote)

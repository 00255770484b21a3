"""Windows cover the users' events, plans are first-fit-decreasing, gathered rows equal a slow reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_core.data import packing

counts_of_users = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


def slow_first_fit_decreasing(lengths, row_length):
    """Contents of the rows as sorted lists of lengths: each window into the first row with room."""
    rows = []
    for length in sorted(lengths, reverse=True):
        for row in rows:
            if sum(row) + length <= row_length:
                row.append(length)
                break
        else:
            rows.append([length])
    return sorted(rows)


def slow_gather(plan, windows, columns, rows):
    result = {name: np.zeros((len(rows), plan.row_length, *c.shape[1:]), c.dtype) for name, c in columns.items()}
    result["segment_ids"] = np.zeros((len(rows), plan.row_length), np.int32)
    result["positions"] = np.zeros((len(rows), plan.row_length), np.int32)
    for b, r in enumerate(rows):
        inside = sorted(np.flatnonzero(plan.row == r), key=lambda w: plan.offset[w])
        for segment, w in enumerate(inside, start=1):
            for i in range(windows.length[w]):
                slot = plan.offset[w] + i
                assert result["segment_ids"][b, slot] == 0, "two events in one slot"
                for name, column in columns.items():
                    result[name][b, slot] = column[windows.start[w] + i]
                result["segment_ids"][b, slot] = segment
                result["positions"][b, slot] = i
    return result


def make_offsets(counts):
    return np.concatenate([[0], np.cumsum(counts)])


# ---------------------------------------------------------------- windows


def test_windows_are_aligned_to_the_newest_event():
    windows = packing.plan_windows(make_offsets([7, 0, 3]), 3)
    np.testing.assert_array_equal(windows.user, [0, 0, 0, 2])
    np.testing.assert_array_equal(windows.start, [0, 1, 4, 7])
    np.testing.assert_array_equal(windows.length, [1, 3, 3, 3])
    assert (windows.events_dropped, windows.users_dropped) == (0, 1)


def test_overlapping_windows_step_back_by_the_stride():
    windows = packing.plan_windows(make_offsets([9]), 4, stride=2)
    np.testing.assert_array_equal(windows.start, [0, 1, 3, 5])
    np.testing.assert_array_equal(windows.length, [3, 4, 4, 4])


def test_newest_only_counts_the_events_that_it_leaves_out():
    windows = packing.plan_windows(make_offsets([9, 2]), 4, newest_only=True)
    np.testing.assert_array_equal(windows.start, [5, 9])
    np.testing.assert_array_equal(windows.length, [4, 2])
    assert windows.events_dropped == 5


def test_end_keeps_later_events_out():
    windows = packing.plan_windows(make_offsets([6, 4, 5]), 4, end=np.array([5, 6, 15]))
    np.testing.assert_array_equal(windows.user, [0, 0, 2, 2])
    np.testing.assert_array_equal(windows.start + windows.length, [1, 5, 11, 15])
    assert windows.users_dropped == 1


@given(counts_of_users, st.integers(1, 12), st.data())
@settings(max_examples=200)
def test_windows_cover_every_event_and_stay_inside_their_user(counts, max_length, data):
    offsets = make_offsets(counts)
    stride = data.draw(st.integers(1, max_length))
    windows = packing.plan_windows(offsets, max_length, stride=stride)
    assert windows.length.min() >= 1 and windows.length.max() <= max_length
    assert (windows.start >= offsets[windows.user]).all()
    assert (windows.start + windows.length <= offsets[windows.user + 1]).all()
    covered = np.zeros(offsets[-1], int)
    for start, length in zip(windows.start, windows.length):
        covered[start : start + length] += 1
    assert covered.min() >= 1
    if stride == max_length:
        assert covered.max() == 1
    assert windows.events_dropped == 0 and windows.users_dropped == counts.count(0)
    newest = np.flatnonzero(np.diff(windows.user, append=-1))
    np.testing.assert_array_equal((windows.start + windows.length)[newest], offsets[1:][windows.user[newest]])


@given(counts_of_users, st.integers(1, 12), st.data())
@settings(max_examples=100)
def test_what_min_length_leaves_out_is_counted(counts, max_length, data):
    offsets = make_offsets(counts)
    stride, min_length = data.draw(st.integers(1, max_length)), data.draw(st.integers(1, min(max_length, max(counts))))
    windows = packing.plan_windows(offsets, max_length, min_length=min_length, stride=stride)
    assert windows.length.min() >= min_length
    covered = np.zeros(offsets[-1], bool)
    for start, length in zip(windows.start, windows.length):
        covered[start : start + length] = True
    assert windows.events_dropped == (~covered).sum()
    assert windows.users_dropped == len(counts) - len(set(windows.user.tolist()))


@pytest.mark.parametrize(
    ("offsets", "options", "message"),
    [
        ([0], {}, r"offsets has shape \(1,\)"),
        ([0, 5, 3], {}, r"offsets of user 1 are 5 to 3"),
        ([0, 0, 0], {}, r"no window left: none of 2 users"),
        ([0, 2], {"min_length": 3}, r"min_length = 3 events \(the longest has 2\)"),
        ([0, 2], {"min_length": 5}, r"min_length is 5, outside of 1 to max_length = 4"),
        ([0, 2], {"stride": 5}, r"stride is 5, outside of 1 to max_length = 4"),
        ([0, 2], {"stride": 0}, r"stride is 0"),
        ([0, 2, 4], {"end": [2, 5]}, r"end of user 1 is 5, outside of its events 2 to 4"),
        ([0, 2, 4], {"end": [2]}, r"end has shape \(1,\)"),
    ],
)
def test_bad_windows_are_refused(offsets, options, message):
    with pytest.raises(ValueError, match=message):
        packing.plan_windows(np.array(offsets), 4, **options)


# ---------------------------------------------------------------- plans


@given(
    st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), min_size=1, max_size=60)))
)
@settings(max_examples=300)
def test_plan_is_first_fit_decreasing(case):
    row_length, lengths = case
    plan = packing.pack(np.array(lengths), row_length)
    rows = [sorted((lengths[w] for w in np.flatnonzero(plan.row == r)), reverse=True) for r in range(plan.rows)]
    assert sorted(rows) == slow_first_fit_decreasing(lengths, row_length)
    assert plan.waste == pytest.approx(1 - sum(lengths) / (plan.rows * row_length))


def test_large_plan_holds_every_window_once_and_wastes_little():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(96), 1.04, 50_000).astype(int) + 1, 512)
    plan = packing.pack(lengths, 512, order_seed=3)
    np.testing.assert_array_equal(np.sort(plan.order), np.arange(len(lengths)))
    np.testing.assert_array_equal(plan.length, lengths[plan.order])
    used = np.bincount(plan.row, weights=lengths)
    assert len(used) == plan.rows and used.min() > 0 and used.max() <= 512
    by_place = np.lexsort((plan.offset, plan.row))
    np.testing.assert_array_equal(by_place, plan.order)
    new_row = np.diff(plan.row[by_place], prepend=-1) > 0
    assert (plan.offset[by_place][new_row] == 0).all()
    end = (plan.offset + lengths)[by_place]
    np.testing.assert_array_equal(plan.offset[by_place][1:][~new_row[1:]], end[:-1][~new_row[1:]])
    assert plan.waste < 0.001


def test_plan_depends_on_the_seed_only_in_which_window_goes_where():
    lengths = np.repeat([3, 5, 8], [400, 300, 200])
    first, again, other = (packing.pack(lengths, 16, order_seed=s) for s in (7, 7, 8))
    np.testing.assert_array_equal(first.order, again.order)
    assert (first.order != other.order).mean() > 0.9
    np.testing.assert_array_equal(first.length, other.length)
    np.testing.assert_array_equal(first.starts, other.starts)


def test_the_order_is_pinned():
    """A saved run is continued with the plan made anew: these numbers must not change with versions or machines."""
    plan = packing.pack(np.array([2, 2, 2, 2, 1, 1, 1, 3]), 4, order_seed=5)
    np.testing.assert_array_equal(plan.order, [7, 6, 2, 0, 1, 3, 5, 4])
    np.testing.assert_array_equal(plan.starts, [0, 2, 4, 6, 8])


def test_windows_longer_than_16_bits_are_packed():
    plan = packing.pack(np.array([100_000, 1, 29_999, 70_000]), 100_000)
    np.testing.assert_array_equal(plan.row, [0, 1, 1, 1])
    np.testing.assert_array_equal(plan.offset, [0, 99_999, 70_000, 0])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint64])
def test_the_integer_type_of_lengths_does_not_matter(dtype):
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    np.testing.assert_array_equal(packing.pack(lengths.astype(dtype), 1000).order, packing.pack(lengths, 1000).order)


@pytest.mark.parametrize(
    ("lengths", "row_length", "message"),
    [
        ([], 4, r"lengths has shape \(0,\)"),
        ([3, 5, 9], 4, r"window 1 has length 5, outside of 1 to row_length = 4 \(2 such windows\)"),
        ([3, 0], 4, r"window 1 has length 0"),
        ([1, -2], 4, r"window 1 has length -2"),
        ([1.0, 2.0], 4, r"dtype float64"),
        ([1], 0, r"row_length is 0"),
    ],
)
def test_bad_lengths_are_refused(lengths, row_length, message):
    with pytest.raises(ValueError, match=message):
        packing.pack(np.array(lengths), row_length)


# ---------------------------------------------------------------- gathering


@given(counts_of_users, st.integers(1, 12), st.integers(0, 8), st.data())
@settings(max_examples=150)
def test_gather_equals_the_slow_reference(counts, max_length, longer, data):
    windows = packing.plan_windows(make_offsets(counts), max_length)
    plan = packing.pack(windows.length, max_length + longer, order_seed=data.draw(st.integers(0, 5)))
    events = sum(counts)
    columns = {
        "item": np.arange(1, events + 1, dtype=np.int32),
        "rating": np.linspace(0.5, 5, events, dtype=np.float32),
        "time": np.arange(events, dtype=np.int64) + (1 << 40),
        "vector": np.arange(events * 3, dtype=np.float64).reshape(events, 3) + 1,
    }
    rows = np.array(data.draw(st.lists(st.integers(0, plan.rows - 1), max_size=6)), np.int64)
    result = packing.gather(plan, windows, columns, rows)
    expected = slow_gather(plan, windows, columns, rows)
    assert result.keys() == expected.keys()
    for name in expected:
        assert result[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(result[name], expected[name], err_msg=name)


@given(counts_of_users, st.integers(1, 12), st.integers(0, 8))
@settings(max_examples=100)
def test_all_rows_hold_every_event_once(counts, max_length, longer):
    windows = packing.plan_windows(make_offsets(counts), max_length)
    plan = packing.pack(windows.length, max_length + longer)
    batch = packing.gather(plan, windows, {"event": np.arange(1, sum(counts) + 1)}, np.arange(plan.rows))
    assert (batch["event"] > 0).tolist() == (batch["segment_ids"] > 0).tolist()
    np.testing.assert_array_equal(np.sort(batch["event"][batch["event"] > 0]), np.arange(1, sum(counts) + 1))


def test_gather_refuses_rows_and_names_that_it_cannot_serve():
    windows = packing.plan_windows(np.array([0, 3, 5]), 3)
    plan = packing.pack(windows.length, 5)
    columns = {"item": np.arange(5)}
    for row in (-1, plan.rows):
        with pytest.raises(ValueError, match=rf"rows\[1\] is {row}, outside of the plan's 0 to 0"):
            packing.gather(plan, windows, columns, np.array([0, row]))
    with pytest.raises(ValueError, match="positions"):
        packing.gather(plan, windows, {"positions": np.arange(5)}, np.array([0]))


def test_mix_is_a_bijection_that_depends_on_the_key():
    values = np.arange(100_000, dtype=np.uint64)
    kept = values.copy()
    mixed = packing.mix(values, 1)
    np.testing.assert_array_equal(values, kept)
    assert len(np.unique(mixed)) == len(values)
    assert not np.isin(mixed, packing.mix(values, 2)).any()
    # Splitmix64's published first output for the seed 0.
    assert int(packing.mix(np.zeros(1, np.uint64), 0)[0]) == 0xE220A8397B1DCDAF

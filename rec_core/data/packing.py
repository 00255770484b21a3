"""Windows over the users' histories, and their packing into rows of one length.

Three steps, each a function of whole arrays:

1. `plan_windows` cuts every user's events into windows of at most `max_length` events, the newest one aligned to
   the user's last event;
2. `pack` puts the windows into rows of `row_length` slots, first-fit-decreasing (Johnson 1973: at most 11/9 of the
   best number of rows, plus one). First-fit over windows sorted by falling length fills each row with the longest
   remaining window that fits, again and again; so rows come in runs of one pattern, and a run is as long as the
   counts of its lengths allow. The plan is therefore made on the counts of lengths alone (at most row_length of them),
   and the windows are dealt out to the runs by array arithmetic;
3. `gather` reads the planned rows out of the event columns, with segment ids and positions.

Plans are made anew at every start and a resumed run must see the same rows, so shuffling among equal lengths uses
`mix`, a fixed bijection, and not NumPy's generators, whose streams may change with NumPy's version.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int, Integer, Shaped, UInt64

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment
_MASK = (1 << 64) - 1


def mix(values: UInt64[np.ndarray, "*n"], key: int) -> UInt64[np.ndarray, "*n"]:
    """A bijection of the 64-bit integers that looks random, one for each key (splitmix64, Steele et al. 2014).

    Args:
        values: uint64 array of any shape; not changed.
        key: any integer; its low 64 bits count.

    Returns:
        uint64 array of the same shape. Different values never give the same result.
    """
    x = values + np.uint64((_GOLDEN * (2 * key + 1)) & _MASK)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@dataclass(frozen=True, eq=False)
class Windows:
    """Stretches of consecutive events of one user each, ordered by user and then by time.

    Attributes:
        user: int64[n], the dense user id.
        start: int64[n], index of the first event in the event columns.
        length: int32[n], number of events, at least 1.
        events_dropped: events (before `end`) that lie in no window.
        users_dropped: users that have no window: without events (before `end`), or with too few.
    """

    user: Int[np.ndarray, " n"]
    start: Int[np.ndarray, " n"]
    length: Int[np.ndarray, " n"]
    events_dropped: int = 0
    users_dropped: int = 0

    def __len__(self) -> int:
        return len(self.length)


@dataclass(frozen=True, eq=False)
class Plan:
    """Which windows share a row, and where each begins. Every window is in exactly one row; rows have no holes.

    Attributes:
        row_length: slots of a row.
        order: int64[n], the windows row by row, in the order in which they lie in the row.
        length: int32[n], slots of each window, in the same order.
        starts: int64[rows + 1], row r holds the windows `order[starts[r]:starts[r + 1]]`.
        waste: share of slots that stay empty, 0 to 1.
    """

    row_length: int
    order: Int[np.ndarray, " n"]
    length: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " rows_and_one"]
    waste: float

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    @cached_property
    def row(self) -> Int[np.ndarray, " n"]:
        """int32[n], the row of each window, by window number."""
        row = np.empty(len(self.order), np.int32)
        row[self.order] = np.repeat(np.arange(self.rows), np.diff(self.starts))
        return row

    @cached_property
    def offset(self) -> Int[np.ndarray, " n"]:
        """int32[n], the slot of its row at which each window begins, by window number."""
        before = np.cumsum(self.length, dtype=np.int64) - self.length
        offset = np.empty(len(self.order), np.int32)
        offset[self.order] = before - np.repeat(before[self.starts[:-1]], np.diff(self.starts))
        return offset


def plan_windows(
    offsets: Integer[np.ndarray, " users_and_one"],
    max_length: int,
    *,
    min_length: int = 1,
    stride: int | None = None,
    end: Integer[np.ndarray, " users"] | None = None,
    newest_only: bool = False,
) -> Windows:
    """Cuts each user's events into windows, counted back from the newest event.

    The j-th newest window ends `j * stride` events before the user's end and holds `max_length` events, or what is
    left of them; only a user's oldest window can be shorter. With `stride` equal to `max_length` (the default) each
    event is in one window; with a smaller one windows overlap by `max_length - stride`.

    Args:
        offsets: user u has the events `offsets[u]` up to `offsets[u + 1]` of the columns.
        max_length: most events of a window.
        min_length: shorter windows are left out, their events counted in `events_dropped`.
        stride: events from one window to the next, 1 to max_length.
        end: for each user the index after the last event to use (a split by time); default: all of them.
        newest_only: one window a user, the newest; older events are counted in `events_dropped`.

    Returns:
        Windows ordered by user, and the oldest first within a user.

    Raises:
        ValueError: an option out of range, offsets that fall, an `end` outside of its user, or no window left.
    """
    offsets = np.asarray(offsets, np.int64)
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}: a window holds at least 1 event")
    stride = max_length if stride is None else stride
    if not 1 <= stride <= max_length:
        raise ValueError(
            f"stride is {stride}, outside of 1 to max_length = {max_length}: "
            "a larger stride would leave events in no window; lower it, or set newest_only"
        )
    if not 1 <= min_length <= max_length:
        raise ValueError(f"min_length is {min_length}, outside of 1 to max_length = {max_length}")
    if offsets.ndim != 1 or len(offsets) < 2:
        raise ValueError(f"offsets has shape {offsets.shape}: expected [users + 1] with at least one user")
    falls = np.flatnonzero(np.diff(offsets) < 0)
    if offsets[0] < 0 or len(falls):
        u = int(falls[0]) if len(falls) else 0
        raise ValueError(f"offsets of user {u} are {offsets[u]} to {offsets[u + 1]}: they must not fall or be negative")
    begin = offsets[:-1]
    if end is None:
        end = offsets[1:]
    else:
        end = np.asarray(end, np.int64)
        if end.shape != begin.shape:
            raise ValueError(f"end has shape {end.shape}: expected one index a user, {begin.shape}")
        outside = np.flatnonzero((end < begin) | (end > offsets[1:]))
        if len(outside):
            u = int(outside[0])
            raise ValueError(f"end of user {u} is {end[u]}, outside of its events {begin[u]} to {offsets[u + 1]}")

    events = end - begin
    count = np.where(events > 0, 1 - (-np.maximum(events - max_length, 0) // stride), 0)
    if newest_only:
        count = np.minimum(count, 1)
    user = np.repeat(np.arange(len(begin)), count)
    newer = np.repeat(np.cumsum(count), count) - 1 - np.arange(len(user))  # windows of the user that are newer
    stop = end[user] - newer * stride
    start = np.maximum(stop - max_length, begin[user])
    keep = stop - start >= min_length
    user, start, stop = user[keep], start[keep], stop[keep]
    if not len(user):
        raise ValueError(
            f"no window left: none of {len(begin)} users has min_length = {min_length} events "
            f"(the longest has {int(events.max())}); lower min_length, or use more data"
        )
    oldest = np.flatnonzero(np.diff(user, prepend=-1))
    covered = int((end[user[oldest]] - start[oldest]).sum())  # a user's windows leave no gap up to its end
    return Windows(
        user=user,
        start=start,
        length=(stop - start).astype(np.int32),
        events_dropped=int(events.sum()) - covered,
        users_dropped=len(begin) - len(oldest),
    )


def pack(lengths: Integer[np.ndarray, " n"], row_length: int, *, order_seed: int = 0) -> Plan:
    """Packs windows into rows, first-fit-decreasing.

    The same lengths, row length and seed give the same plan on every machine and with every version of NumPy.

    Args:
        lengths: slots that each window takes, 1 to row_length.
        row_length: slots of a row.
        order_seed: says which of the windows of one length goes to which of the rows that take this length; the
            number of rows and their fill do not depend on it.

    Returns:
        The plan, its `waste` included.

    Raises:
        ValueError: no windows, a length below 1 or above row_length (naming the window), a bad row_length.
    """
    lengths = np.asarray(lengths)
    if row_length < 1:
        raise ValueError(f"row_length is {row_length}: a row has at least 1 slot")
    if lengths.ndim != 1 or not len(lengths):
        raise ValueError(f"lengths has shape {lengths.shape}: expected [n] with at least one window to pack")
    if not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths has dtype {lengths.dtype}: expected integers")
    bad = np.flatnonzero((lengths < 1) | (lengths > row_length))
    if len(bad):
        w = int(bad[0])
        raise ValueError(
            f"window {w} has length {lengths[w]}, outside of 1 to row_length = {row_length} ({len(bad)} such windows); "
            "cut it with plan_windows(max_length=row_length), or use longer rows"
        )
    counts = np.bincount(lengths, minlength=row_length + 1)
    runs = _plan_runs(counts, row_length)
    size, repeats, multiple, slot, pattern, taken = runs.T  # one run: `multiple` windows of `size` in `repeats` rows
    by_length = _by_falling_length(lengths, row_length, order_seed)
    longer = len(lengths) - np.cumsum(counts)  # where in by_length the windows of each length begin

    first_run = np.flatnonzero(np.diff(pattern, prepend=-1))
    segments = np.add.reduceat(multiple, first_run)  # windows in one row of each pattern
    rows_of_pattern = repeats[first_run]
    pattern_start = np.cumsum(segments * rows_of_pattern) - segments * rows_of_pattern
    starts = np.concatenate([[0], np.cumsum(np.repeat(segments, rows_of_pattern))])

    # A share is what one row takes of one run: `multiple` windows that lie together in by_length and in the row.
    run = np.repeat(np.arange(len(runs)), repeats)
    nth = np.arange(len(run)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    share = multiple[run]
    place = (pattern_start[pattern] + slot)[run] + nth * segments[pattern][run]
    by_place = np.argsort(place, kind="stable")
    run, nth, share, place = run[by_place], nth[by_place], share[by_place], place[by_place]
    first = longer[size][run] + taken[run] + nth * share
    order = by_length[np.repeat(first - place, share) + np.arange(len(lengths))]
    length = np.repeat(size[run].astype(np.int32), share)
    waste = 1.0 - int(length.sum(dtype=np.int64)) / ((len(starts) - 1) * row_length)
    return Plan(row_length, order, length, starts, waste)


def _by_falling_length(lengths: Integer[np.ndarray, " n"], row_length: int, seed: int) -> Int[np.ndarray, " n"]:
    """Window numbers by falling length, shuffled among equal lengths: one sort of keys (length, hash, number)."""
    number_bits = (len(lengths) - 1).bit_length()
    hash_bits = max(0, 64 - number_bits - row_length.bit_length())
    number = np.arange(len(lengths), dtype=np.uint64)
    key = (row_length - lengths.astype(np.int64)).astype(np.uint64) << np.uint64(64 - row_length.bit_length())
    key |= mix(number, seed) >> np.uint64(64 - hash_bits) << np.uint64(number_bits)
    key |= number  # makes keys unique, so that every sorting algorithm gives the same order
    key.sort()
    return (key & np.uint64((1 << number_bits) - 1)).astype(np.int64)


def _plan_runs(counts: Int[np.ndarray, " lengths"], row_length: int) -> Int[np.ndarray, "runs 6"]:
    """First-fit-decreasing on counts: (length, rows, windows a row, windows before in the row, pattern, windows taken).

    A pattern is repeated until one of its lengths runs out or has fewer windows than the pattern takes, and such a
    remainder is used up by the next pattern that takes it; so there are at most about two patterns for each length.
    """
    sizes = [0, *np.flatnonzero(counts).tolist()]  # rising; index 0 stands for "nothing fits"
    left = [0, *counts[sizes[1:]].tolist()]
    taken = [0] * len(sizes)
    fits = (np.searchsorted(sizes, np.arange(row_length + 1), side="right") - 1).tolist()  # longest that fits a room
    below = list(range(len(sizes)))  # union-find: the longest length at or below that has windows left

    def available(i: int) -> int:
        while below[i] != i:
            below[i] = below[below[i]]
            i = below[i]
        return i

    runs = []
    pattern = 0
    longest = available(len(sizes) - 1)
    while longest:
        row = []
        room, slot, i = row_length, 0, longest
        while i:
            multiple = min(left[i], room // sizes[i])
            row.append((i, multiple, slot))
            room -= multiple * sizes[i]
            slot += multiple
            i = available(min(i - 1, fits[room]))
        repeats = min(left[i] // multiple for i, multiple, _ in row)
        for i, multiple, slot in row:
            runs.append((sizes[i], repeats, multiple, slot, pattern, taken[i]))
            taken[i] += repeats * multiple
            left[i] -= repeats * multiple
            if not left[i]:
                below[i] = i - 1
        pattern += 1
        longest = available(longest)
    return np.array(runs, np.int64)


def gather(
    plan: Plan,
    windows: Windows,
    columns: Mapping[str, Shaped[np.ndarray, "events *feature"]],
    rows: Integer[np.ndarray, " b"],
) -> dict[str, Shaped[np.ndarray, "b row_length *feature"]]:
    """Reads planned rows out of the event columns.

    Args:
        plan: made by `pack` from `windows.length`.
        windows: where each window's events lie.
        columns: name -> one value (or one vector) an event, of any dtype; names other than the two below.
        rows: row numbers, in any order, repeats allowed.

    Returns:
        Each column as [b, row_length, ...] in its own dtype, 0 where a slot is empty; `segment_ids` int32
        [b, row_length], 1, 2, ... in the order of the windows in the row and 0 where a slot is empty; `positions`
        int32 [b, row_length], the event's index in its window, 0 where a slot is empty.

    Raises:
        ValueError: a row that the plan does not have, or a column named like one of the two made here.
    """
    rows = np.asarray(rows, np.int64)
    clash = {"segment_ids", "positions"} & set(columns)
    if clash:
        raise ValueError(f"columns holds {sorted(clash)}: gather makes these itself; give the column another name")
    outside = np.flatnonzero((rows < 0) | (rows >= plan.rows))
    if len(outside):
        raise ValueError(f"rows[{outside[0]}] is {rows[outside[0]]}, outside of the plan's 0 to {plan.rows - 1}")

    # Each row is its windows and then one piece of padding, so the pieces cover the result without a gap.
    windows_of_row = plan.starts[rows + 1] - plan.starts[rows]
    last = np.cumsum(windows_of_row + 1) - 1
    segment = np.arange(1, last[-1] + 2 if len(last) else 1) - np.repeat(last - windows_of_row, windows_of_row + 1)
    place = np.repeat(plan.starts[rows], windows_of_row + 1) + segment - 1
    segment[last] = 0
    place[last] = 0
    length = plan.length[place]
    first = windows.start[plan.order[place]]
    # Windows are scattered over the columns, so reading is a wait for memory. Touching every window's two ends first,
    # in one loop of independent loads, lets the waits overlap: twice the speed where windows hold some 8 events.
    ends = np.concatenate([first, first + length - 1])
    length[last] = 0
    length[last] = plan.row_length - np.add.reduceat(length, last - windows_of_row) if len(rows) else 0
    begin = np.cumsum(length, dtype=np.int64) - length
    shift = first - begin

    shape = (len(rows), plan.row_length)
    slots = np.arange(len(rows) * plan.row_length)
    segment_ids = np.repeat(segment.astype(np.int32), length)
    positions = (slots - np.repeat(begin, length)).astype(np.int32)
    event = slots + np.repeat(shift, length)
    empty = np.flatnonzero(segment_ids == 0)
    positions[empty] = 0
    event[empty] = 0
    result = {}
    for name, column in columns.items():
        np.take(column, ends, axis=0)
        values = np.take(column, event, axis=0)
        values[empty] = 0
        result[name] = values.reshape(shape + column.shape[1:])
    result["segment_ids"] = segment_ids.reshape(shape)
    result["positions"] = positions.reshape(shape)
    return result

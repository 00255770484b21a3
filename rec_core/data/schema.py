"""The event log: one schema for every source, real or synthetic. NumPy only.

An event is (user, item, time) with optional category, domain, behavior, rating, label and probability. A log is
columns of one length. Two forms use the same class:

- raw, as a reader returns it: the source's own ids, the file's order;
- encoded, as `prepare` and the synthetic world write it: users 0 .. n-1, items from `FIRST_ITEM` (0 is padding, 1 any
  item too rare to have an id), categories and domains from 1 (0: none), behaviors from 0; sorted by (user, time,
  original order).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, UInt8

PAD = 0
UNKNOWN = 1
FIRST_ITEM = 2
BEHAVIORS = ("pv", "cart", "fav", "buy")
LAST_TIME = 4_133_980_799  # 2100-12-31 23:59:59 UTC: anything later is milliseconds or damage, not seconds

DTYPES: dict[str, type[np.generic]] = {
    "user": np.int64,
    "item": np.int64,
    "time": np.int64,
    "category": np.int32,
    "domain": np.int32,
    "behavior": np.int32,
    "rating": np.float32,
    "label": np.uint8,
    "probability": np.float32,
}


class DataError(ValueError):
    """Input that cannot be used: the message names what is wrong, where, and what to do."""


@dataclass(frozen=True)
class EventLog:
    """Columns of `n` events; a column that the source does not have is None."""

    user: Int64[np.ndarray, "n"]
    item: Int64[np.ndarray, "n"]
    time: Int64[np.ndarray, "n"]  # seconds since 1970 UTC
    category: Int32[np.ndarray, "n"] | None = None
    domain: Int32[np.ndarray, "n"] | None = None
    behavior: Int32[np.ndarray, "n"] | None = None  # index into the source's behavior names
    rating: Float32[np.ndarray, "n"] | None = None
    label: UInt8[np.ndarray, "n"] | None = None  # 1 positive, 0 shown and not taken; None: every event is positive
    probability: Float32[np.ndarray, "n"] | None = None  # true click probability; the synthetic world only

    def __len__(self) -> int:
        return len(self.user)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns that are present, by name, in the schema's order."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def take(self, index: Int[np.ndarray, "k"] | slice) -> "EventLog":
        """The events at `index` (integers, a mask or a slice), in that order."""
        return replace(self, **{name: column[index] for name, column in self.columns().items()})


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row i is `values[offsets[i]:offsets[i + 1]]`."""

    offsets: Int64[np.ndarray, "m+1"]
    values: Int32[np.ndarray, "k"]

    def row(self, i: int) -> Int32[np.ndarray, "k_i"]:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def take(self, index: Int[np.ndarray, "k"]) -> "Ragged":
        """Rows `index`, in that order; an index of -1 gives an empty row."""
        lengths = np.where(index >= 0, np.append(np.diff(self.offsets), 0)[index], 0)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        starts = np.where(index >= 0, self.offsets[index], 0)
        source = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(offsets, self.values[source])


@dataclass(frozen=True)
class Items:
    """What is known of each item. `item` is sorted and unique: raw ids from a reader, encoded ids in a dataset."""

    item: Int64[np.ndarray, "m"]
    category: Int32[np.ndarray, "m"] | None = None  # the one category; 0: none
    categories: Ragged | None = None  # all categories of an item, where a source has several
    text: Sequence[str] | None = None  # title or description

    def __len__(self) -> int:
        return len(self.item)

    def take(self, index: Int[np.ndarray, "k"], item: Int64[np.ndarray, "k"]) -> "Items":
        """Rows `index` under the ids `item`; an index of -1 gives category 0 and no text."""
        has = index >= 0
        category = None if self.category is None else np.where(has, np.append(self.category, 0)[index], 0)
        return Items(
            item,
            None if category is None else category.astype(np.int32),
            None if self.categories is None else self.categories.take(index),
            None if self.text is None else [self.text[i] if i >= 0 else "" for i in index.tolist()],
        )


def concatenate(logs: Sequence[EventLog]) -> EventLog:
    """One log after the other; all must have the same columns."""
    names = list(logs[0].columns())
    for log in logs[1:]:
        if list(log.columns()) != names:
            raise DataError(f"logs with different columns cannot be joined: {names} and {list(log.columns())}")
    if len(logs) == 1:
        return logs[0]
    return EventLog(**{name: np.concatenate([getattr(log, name) for log in logs]) for name in names})


def validate(
    log: EventLog,
    *,
    where: str = "event log",
    users: int | None = None,
    items: int | None = None,
    categories: int | None = None,
    domains: int | None = None,
    behaviors: int | None = None,
    encoded: bool = False,
) -> None:
    """Check a log; the first fault is raised as a DataError that names `where`, the column and the row (from 0).

    Always: one length, the schema's dtypes, times in 0 .. 2100, finite ratings, labels 0 or 1, probabilities in [0, 1].
    `encoded`: also items from UNKNOWN up, other ids from 0, below the given sizes, and events sorted by (user, time).
    """
    columns = log.columns()
    for name, column in columns.items():
        if not isinstance(column, np.ndarray) or column.ndim != 1 or column.dtype != DTYPES[name]:
            found = f"{column.dtype}{list(column.shape)}" if isinstance(column, np.ndarray) else type(column).__name__
            raise DataError(
                f"{where}: column '{name}' must be a NumPy array {np.dtype(DTYPES[name])}[n], found {found}; "
                f"convert it with np.asarray(..., np.{np.dtype(DTYPES[name])})"
            )
        if len(column) != len(log.user):
            raise DataError(
                f"{where}: column '{name}' has {len(column)} rows and 'user' has {len(log.user)}; "
                "all columns of a log have one row an event"
            )
    _reject(where, log, "time", log.time < 0, "times are seconds since 1970, not negative")
    _reject(where, log, "time", log.time > LAST_TIME, "times are seconds up to 2100 (milliseconds? divide by 1000)")
    if log.rating is not None:
        _reject(where, log, "rating", ~np.isfinite(log.rating), "ratings are finite numbers; leave the event out")
    if log.label is not None:
        _reject(where, log, "label", log.label > 1, "labels are 0 or 1")
    if log.probability is not None:
        inside = (log.probability >= 0) & (log.probability <= 1)  # False for NaN
        _reject(where, log, "probability", ~inside, "probabilities lie in [0, 1]")
    if not encoded:
        return
    sizes = {"user": users, "item": items, "category": categories, "domain": domains, "behavior": behaviors}
    for name, size in sizes.items():
        if name not in columns:
            continue
        low = UNKNOWN if name == "item" else 0
        high = np.iinfo(np.int32).max if size is None else size
        bad = (columns[name] < low) | (columns[name] >= high)
        _reject(where, log, name, bad, f"encoded ids of '{name}' lie in {low} .. {high - 1}")
    same = log.user[1:] == log.user[:-1]
    _reject(where, log, "user", _shift(log.user[1:] < log.user[:-1]), "an encoded log is sorted by user")
    _reject(where, log, "time", _shift(same & (log.time[1:] < log.time[:-1])), "times of a user must not go backwards")


def _shift(bad: np.ndarray) -> np.ndarray:
    """A fault between rows i and i + 1 belongs to row i + 1."""
    return np.concatenate([[False], bad]) if len(bad) else bad


def _reject(where: str, log: EventLog, name: str, bad: np.ndarray, rule: str) -> None:
    if not bad.any():
        return
    row = int(np.argmax(bad))
    value = getattr(log, name)[row]
    event = f"user {log.user[row]}, item {log.item[row]}, time {log.time[row]}"
    raise DataError(f"{where}: {name} {value} in row {row} ({event}): {rule} ({int(bad.sum())} such rows)")

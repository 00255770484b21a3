"""The user behaviour tree as arrays: the form for training, where whole batches are looked up at once. NumPy only."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int64

from rec_core.data.schema import LAST_TIME, EventLog, Ragged, validate
from sim_jax.tree_blocks import Filings, Found, changes, integers, newest


@dataclass(frozen=True, eq=False)
class TreeTable:
    """The tree itself, level by level: user i has the keys at `pairs[i]:pairs[i + 1]`, pair j the events at
    `events[j]:events[j + 1]`, each level sorted. 12 bytes an event, 16 a pair, 16 a user."""

    user: Int64[np.ndarray, "u"]
    pairs: Int64[np.ndarray, "u+1"]
    key: Int64[np.ndarray, "p"]
    events: Int64[np.ndarray, "p+1"]
    event: np.ndarray  # EVENT[n]

    @classmethod
    def build(cls, log: EventLog, keys: Ragged | Int[np.ndarray, "n"] | None = None) -> "TreeTable":
        """The table of a log: the answers of a `BehaviorTree` that had the same log appended. Errors as there."""
        return cls.of(Filings.of(*filings(log, keys)[0]))

    @classmethod
    def of(cls, ordered: Filings) -> "TreeTable":
        first = ordered.pairs()
        user = ordered.user[first]
        pairs = np.flatnonzero(changes(user))
        return cls(
            user[pairs], np.append(pairs, len(first)), ordered.key[first], np.append(first, len(ordered)), ordered.event
        )

    def __len__(self) -> int:
        """The number of filings: events, each counted once a key."""
        return len(self.event)

    def lookup(
        self,
        users: Int[np.ndarray, "B"],
        keys: Ragged | Int[np.ndarray, "B *c"],
        k: int,
        before: int | Int[np.ndarray, "B"],
    ) -> Found:
        """As `BehaviorTree.lookup`."""
        shape, user, key, time = questions(users, keys, k, before)
        known, place = _equal(self.user, np.searchsorted(self.user, user), user)
        pair = _lower_bound(self.key, self.pairs[place], np.where(known, self.pairs[place + known], 0), key)
        there, pair = _equal(self.key, pair, key)
        known &= there & (pair >= self.pairs[place]) & (pair < self.pairs[place + known])
        pair = np.where(known, pair, 0)
        first = np.where(known, self.events[pair], 0)
        end = _lower_bound(self.event["time"], first, np.where(known, self.events[pair + known], 0), time)
        found = newest(self.event, first, end, k)
        return Found(found.item.reshape(*shape, k), found.time.reshape(*shape, k), found.count.reshape(shape))


def filings(
    log: EventLog, keys: Ragged | Int[np.ndarray, "n"] | None = None
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], int]:
    """Columns user, key, time, item of a log's behaviours under their second keys, and how many events are left out.

    Left out: events of key 0 or of no key, and of label 0 (shown and not taken).

    Raises:
      DataError: the log breaks the schema's rules. ValueError: no keys, or as many rows of them as the log has not.
    """
    validate(log)
    if keys is None:
        if log.category is None:
            raise ValueError("the log has no category column: give the second key of each event as keys")
        keys = log.category
    if isinstance(keys, Ragged):
        n, key = len(keys.offsets) - 1, integers("keys.values", keys.values)
        row = np.repeat(np.arange(n), row_lengths("keys", keys))
    else:
        key = integers("keys", keys)
        n = len(key) if key.ndim == 1 else -1
        row = np.arange(n)
    if n != len(log):
        raise ValueError(f"keys has {key.shape if n < 0 else n} rows and the log {len(log)} events: one row an event")
    kept = key != 0
    if log.label is not None:
        kept &= log.label[row] != 0
    if not isinstance(keys, Ragged) and kept.all():  # the usual log, without a copy of its columns
        return (log.user, key, log.time, log.item), 0
    row, key = row[kept], key[kept]
    left_out = n - int(np.count_nonzero(np.bincount(row, minlength=n)))
    return (log.user[row], key, log.time[row], log.item[row]), left_out


def row_lengths(name: str, rows: Ragged) -> Int64[np.ndarray, "m"]:
    """The lengths of ragged rows; a ValueError if their offsets do not divide their values."""
    offsets, size = np.asarray(rows.offsets), len(rows.values)
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 0).any():
        raise ValueError(f"{name}.offsets must rise from 0 to the number of values, {size}; found {offsets}")
    return np.diff(offsets)


def questions(
    users: Int[np.ndarray, "B"], keys: Ragged | Int[np.ndarray, "B *c"], k: int, before: int | Int[np.ndarray, "B"]
) -> tuple[tuple[int, ...], Int64[np.ndarray, "n"], Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """The checked arguments of a look-up: the answer's shape without k, and user, key and time of each row."""
    user, time = integers("users", users), integers("before", before)
    if user.ndim != 1 or time.shape not in ((), user.shape):
        raise ValueError(
            f"users has shape {user.shape} and before {time.shape}: [B], and [B] or one for all, are needed"
        )
    wrong = (time < 0) | (time > LAST_TIME + 1)
    if wrong.any():
        raise ValueError(f"before is {time[wrong].flat[0]}: seconds from 0 to 2100 are needed (milliseconds? / 1000)")
    if not isinstance(k, int | np.integer) or k < 0:
        raise ValueError(f"k is {k!r}: the number of behaviours a key is an integer >= 0")
    if isinstance(keys, Ragged):
        length, key = row_lengths("keys", keys), integers("keys.values", keys.values)
        shape: tuple[int, ...] = (len(key),)
    else:
        key = integers("keys", keys)
        shape, key = key.shape, key.ravel()
        length = np.full(shape[0] if shape else 0, int(np.prod(shape[1:])))
    if len(length) != len(user):
        raise ValueError(f"users are {len(user)} and keys has {len(length)} rows: a row for each user is needed")
    return shape, np.repeat(user, length), key, np.repeat(np.broadcast_to(time, user.shape), length)


def _lower_bound(values: np.ndarray, first: np.ndarray, end: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The first place of each sorted range [first, end) whose value is not below what is asked, or its end."""
    while (is_open := first < end).any():  # as often as a range can be halved: 16 times for 54,000 behaviours
        middle = (first + end) // 2
        below = is_open & (values[np.where(is_open, middle, 0)] < asked)
        first, end = np.where(below, middle + 1, first), np.where(is_open & ~below, middle, end)
    return first


def _equal(values: np.ndarray, place: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which places hold what was asked, and the places, 0 where they do not."""
    inside = place < len(values)
    place = np.where(inside, place, 0)
    same = inside & (values[place] == asked) if len(values) else inside
    return same, np.where(same, place, 0)

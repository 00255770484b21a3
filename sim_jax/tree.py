"""The user behaviour tree (SIM, arXiv 2006.05639, section 4.1 and figure 3): user -> second key -> behaviours.

Hard search is an index: `lookup(users, keys, k, before)` gives, for each user and second key, the k newest behaviours
before a time, as raw ids and times. The second key is any function of an item (`tree_keys.py`). One class stands on
`rec_core.store`, so LMDB, Redis and memory answer alike; `snapshot()` gives the same tree as arrays for training.

What is defined:
- an event is (user, key, item, time). Repeats are kept once, so that appending again after a lost acknowledgement is
  harmless; order of arrival does not matter, the answer is sorted by time, within a second by item, newest first;
- nothing at or after `before` is returned (strictly earlier only). An unknown user or key, and k = 0, find nothing;
- key 0 is no key: an event without one is left out, and asking for it finds nothing. So is a label of 0 (shown and
  not taken), which is no behaviour;
- an event stays filed under the key that its item had when it was appended. Where categories drift, build a new tree
  from the log, or append again, which files the events under the new keys beside the old ones;
- when `append` returns, its events are stored (LMDB: synced). If it raises or the process dies, some may be stored and
  some not, and no block is torn: append the same events again. A batch of up to 32,000 events, at most 16,384 of them
  late (older than their full head), is one transaction: all or none. Any number of writers may append at once, to the
  same users too. A reader that meets a writer finds, of each key, all that was appended before it asked.
"""

from itertools import batched, chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rec_core.data.schema import EventLog, Ragged
from rec_core.store import Store
from sim_jax.tree_blocks import (
    BLOCK,
    EVENT,
    HEAD,
    PREFIX,
    SEALED,
    Blocks,
    Change,
    Filings,
    Found,
    add,
    before,
    counts,
    decode,
    head_keys,
    just_before,
    newest,
    oldest_key,
    parse,
    sealed_keys,
)
from sim_jax.tree_table import TreeTable, filings, questions

_PART = 1 << 21  # events of one transaction: some 50 MB, and thirty thousand blocks where each gets one event
_LATE = 1 << 14  # late events of one transaction: each may need another block of 2 B events, 80 MB in all


class Appended(NamedTuple):
    """What became of a log's events, an event of several keys counted once for each."""

    filed: int
    repeated: int  # were there already, or twice in the log
    left_out: int  # without a key, or shown and not taken


class BehaviorTree:
    """Behaviours by user and second key in a `rec_core.store.Store`.

    Args:
      store: an open store that nothing else uses. An empty one takes `key` and `block`; another must agree.
      key: names the second key, with its version ("category 2024-05", "kmeans 7"): trees of two keys do not mix.
      block: B, events a block. The newest B of a (user, key) are one read.

    Raises:
      StoreError: the store holds something else, or a tree of another key or block size (both are named).
    """

    def __init__(self, store: Store, *, key: str, block: int = BLOCK) -> None:
        if not isinstance(key, str) or not key:
            raise ValueError(f"key is {key!r}: it must be a non-empty name of the second key")
        if not isinstance(block, int) or block < 1:
            raise ValueError(f"block is {block!r}: it must be a positive integer")
        self.store, self.key, self.block = store, key, block
        store.claim(f"user behaviour tree 1, key {key}, blocks of {block}")

    def append(self, log: EventLog, keys: Ragged | Int[np.ndarray, "n"] | None = None) -> Appended:
        """Files the log's events, in any order; on an empty store this is the build. Safe once it returns.

        Args:
          log: n events of any ids, times in seconds. Many at once are fast: a transaction costs some milliseconds.
          keys: the second key of each event, 0 for none, or a row of keys for each; None: `log.category`.

        Raises:
          DataError, ValueError: a log that breaks the schema's rules, or keys that do not go with it; nothing is
            stored.
          StoreError: the store failed; append the same log again.
        """
        found, left_out = filings(log, keys)
        total = found[0].size
        ordered = Filings.of(*found)
        filed = sum(self._append(part) for part in ordered.parts(_PART))
        return Appended(filed, total - filed, left_out)

    def lookup(
        self,
        users: Int[np.ndarray, "B"],
        keys: Ragged | Int[np.ndarray, "B *c"],
        k: int,
        before: int | Int[np.ndarray, "B"],
    ) -> Found:
        """The k newest behaviours of each user under each of its keys, strictly before a time.

        Args:
          keys: a row of n_b second keys for each user (`tree_keys.distinct` makes them from candidates), n in all; or
            an array with B in front, in which 0 may pad.
          k: K >= 0.
          before: seconds, 0 .. 2100: one for all or one a user.

        Returns:
          Found of item and time [n, K], count [n]; with an array of keys, its shape in the place of n.

        Raises:
          ValueError: arguments that do not go together, a time that is no second. StoreError: the store failed.
        """
        shape, user, key, time = questions(users, keys, k, before)
        if k == 0 or not len(user):
            return Found(np.zeros((*shape, k), np.int64), np.zeros((*shape, k), np.int64), np.zeros(shape, np.int32))
        names = head_keys(user, key)
        values = [value or b"" for value in self.store.get(names)]
        count = counts(names, values, self.store.name)
        event = decode(values)
        end = np.cumsum(count)
        valid = _earlier(event, end - count, end, time)
        more = np.flatnonzero((valid < k) & (count >= self.block))
        if len(more):
            sealed_of = self._sealed(user[more], key[more], event[(end - count)[more]], time[more], k)
            for row, sealed in zip(more.tolist(), sealed_of, strict=True):
                values[row] = b"".join([*reversed(sealed), values[row]])
            count = counts(names, values, self.store.name)
            event = decode(values)
            end = np.cumsum(count)
            valid = _earlier(event, end - count, end, time)
        found = newest(event, end - count, end - count + valid, k)
        return Found(found.item.reshape(*shape, k), found.time.reshape(*shape, k), found.count.reshape(shape))

    def snapshot(self) -> TreeTable:
        """The whole tree as arrays in memory (12 bytes an event) that answer exactly as `lookup` does."""
        parts: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, EVENT))]
        # heads first: an event that is sealed meanwhile is then read twice and kept once, and none is missed
        for entries in batched(chain(self.store.scan(HEAD), self.store.scan(SEALED)), 1 << 16):
            keys, values = [key[:PREFIX] for key, _ in entries], [value for _, value in entries]
            count = counts(keys, values, self.store.name)
            parts.append((*(np.repeat(column, count) for column in parse(keys)), decode(values)))
        user, key, event = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return TreeTable.of(Filings.of(user, key, event["time"], event["item"]))

    def _append(self, part: Filings) -> int:
        """Adds filings in one transaction and returns how many were new."""
        first = part.pairs()
        count = np.diff(first, append=len(part))
        heads = head_keys(part.user[first], part.key[first])
        while True:  # again if another writer has changed one of these blocks; one of the two always gets through
            moment = self.store.moment()
            blocks = Blocks.of(heads, self.store.get(heads), self.store.name)
            late = self._late(blocks, part.event, count)
            if late is None:
                change = add(blocks, part.event, count, self.block)
            elif np.count_nonzero(late) > _LATE:
                return sum(map(self._append, part.halves()))
            else:
                now = np.add.reduceat(~late, first, dtype=np.int64)
                change = add(blocks.some(now > 0), part.event[~late], now[now > 0], self.block)
                old = self._add_late(part.user[late], part.key[late], part.event[late])
                change = Change(change.writes | old.writes, change.read + old.read, change.added + old.added)
            if not change.writes or self.store.put_if(change.writes, change.expected, since=moment):
                return change.added

    def _late(self, heads: Blocks, event: np.ndarray, count: Int[np.ndarray, "p"]) -> np.ndarray | None:
        """Which events, `count` of each head, are older than their full head, so that they belong to a sealed block;
        None: no event is."""
        full = np.flatnonzero(heads.events >= self.block)
        if not len(full):
            return None
        oldest = np.zeros(len(heads.names), EVENT)
        oldest["item"] = np.iinfo(np.int64).min  # before this comes nothing
        oldest[full] = decode(heads.values[i][: EVENT.itemsize] for i in full.tolist())
        late = before(event, np.repeat(oldest, count))
        return late if late.any() else None

    def _add_late(self, user: np.ndarray, key: np.ndarray, event: np.ndarray) -> Change:
        """Adds events to the sealed blocks that they fall into, or to the oldest block of what is before them all."""
        asked = sealed_keys(user, key, event)
        names: list[bytes] = []
        held: list[bytes | None] = []
        count: list[int] = []
        for name, found in zip(asked, self.store.floor(asked, PREFIX), strict=True):
            block, value = found or (oldest_key(name), None)
            if not names or names[-1] != block:
                names.append(block)
                held.append(value)
                count.append(0)
            count[-1] += 1
        return add(Blocks.of(names, held, self.store.name), event, np.array(count), self.block)

    def _sealed(
        self, user: np.ndarray, key: np.ndarray, first: np.ndarray, time: np.ndarray, k: int
    ) -> list[list[bytes]]:
        """The newest sealed blocks below the heads' first events and below the times, enough for k events each."""
        bound = first.copy()
        earlier = time <= first["time"]
        bound["time"][earlier] = time[earlier]
        bound["item"][earlier] = np.iinfo(np.int64).min
        asked = [just_before(name) for name in sealed_keys(user, key, bound)]
        # every block but the oldest has B events, and the newest of them may begin with one that is early enough
        limit = -(-k // self.block) + 1
        found = iter(self.store.floors([name for name in asked if name is not None], PREFIX, limit))
        return [[value for _, value in next(found)] if name is not None else [] for name in asked]


def _earlier(event: np.ndarray, first: np.ndarray, end: np.ndarray, time: np.ndarray) -> np.ndarray:
    """How many events of each range [first, end) are before its time."""
    total = np.concatenate([[0], np.cumsum(event["time"] < np.repeat(time, end - first))])
    return total[end] - total[first]

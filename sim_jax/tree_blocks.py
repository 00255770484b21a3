"""The user behaviour tree's events in order, its keys and its blocks: bytes and arrays, no store (SIM, section 4.1).

A filing is an event under one second key: (user, key, time, item). Filings are ordered by these four, and two that
agree in all four are one. For a (user, key) the store holds

    b"h" user key              the head: the newest events, fewer than 2 B of them
    b"s" user key time item    sealed blocks: events from (time, item) up to the next block's, B to 2 B - 1 of them

in integers that sort as bytes do. Once there is a sealed block the head has at least B events, so the newest B are
one read. Events that are older than all sealed blocks lie in one at (time, item) = (0, least), which may be shorter.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from rec_core.store import StoreError

BLOCK = 200  # B: a usual K is one read, and a value of 2.4 to 4.8 KB is one or two pages of a disk
EVENT = np.dtype([("time", "<u4"), ("item", "<i8")])  # 12 bytes, packed
PREFIX = 17  # bytes of a sealed block's key before its time: kind, user, key
HEAD, SEALED = b"h", b"s"
_SIGN = np.uint64(1 << 63)
_HEAD = np.dtype([("kind", "S1"), ("user", ">u8"), ("key", ">u8")])
_SEALED = np.dtype([*_HEAD.descr, ("time", ">u4"), ("item", ">u8")])


@dataclass(frozen=True, eq=False)
class Found:
    """What a look-up gives: the newest events of each row first, zeros after them."""

    item: Int64[np.ndarray, "*s k"]
    time: Int64[np.ndarray, "*s k"]  # seconds since 1970 UTC
    count: Int32[np.ndarray, "*s"]  # how many of the k are events

    @property
    def mask(self) -> Bool[np.ndarray, "*s k"]:
        return np.arange(self.item.shape[-1]) < self.count[..., None]


@dataclass(frozen=True, eq=False)
class Filings:
    """n filings in order, each once."""

    user: Int64[np.ndarray, "n"]
    key: Int64[np.ndarray, "n"]
    event: np.ndarray  # EVENT[n]

    @classmethod
    def of(cls, *columns: Int[np.ndarray, "n"]) -> "Filings":
        """The filings of columns user, key, time, item in any order, with repeats."""
        index = order(*columns)
        user, key, time, item = (column[index] for column in columns)
        new = changes(user, key, time, item)
        if not new.all():
            user, key, time, item = user[new], key[new], time[new], item[new]
        event = np.empty(len(user), EVENT)
        event["time"], event["item"] = time, item
        return cls(user, key, event)

    def __len__(self) -> int:
        return len(self.user)

    def pairs(self) -> Int64[np.ndarray, "p"]:
        """The first row of each (user, key)."""
        return np.flatnonzero(changes(self.user, self.key))

    def parts(self, size: int) -> Iterator["Filings"]:
        """Consecutive parts of whole (user, key) pairs, of some `size` events and at most `size` / 64 pairs each."""
        bounds = np.append(self.pairs(), len(self))
        # a pair costs about as much as 64 events, and one that is larger than a part is not cut
        part = (bounds[1:] + 64 * np.arange(1, len(bounds))) // size
        for rows in np.split(bounds[:-1], np.flatnonzero(np.diff(part)) + 1) if len(self) else []:
            whole = slice(rows[0], bounds[np.searchsorted(bounds, rows[-1], side="right")])
            yield self.rows(whole)

    def halves(self) -> tuple["Filings", "Filings"]:
        return self.rows(slice(len(self) // 2)), self.rows(slice(len(self) // 2, None))

    def rows(self, which: slice) -> "Filings":
        return Filings(self.user[which], self.key[which], self.event[which])


def changes(*columns: np.ndarray) -> Bool[np.ndarray, "n"]:
    """Which rows differ from the row before them; the first one does."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = False
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return new


def order(*columns: Int[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """The permutation that sorts rows by the first column, then the second, ...; `lexsort` with fewer passes.

    Columns are packed into as few 64-bit words as their ranges allow: for most logs user, key and time are one word.
    """
    words: list[np.ndarray] = []
    left = 0
    for column in columns:
        low = column.min() if len(column) else 0
        offset = column.astype(np.uint64) - np.uint64(int(low) % (1 << 64))  # exact modulo 2^64
        bits = int(offset.max() if len(column) else 0).bit_length()
        if not bits:  # one value throughout
            continue
        if bits > left:
            words.append(offset)
            left = 64 - bits
        else:
            words[-1] = (words[-1] << np.uint64(bits)) | offset
            left -= bits
    if not words:
        return np.arange(len(columns[0]))
    index = np.argsort(words[0])
    first = words[0][index]
    same = first[1:] == first[:-1]
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same)) if len(same) else np.zeros(0, np.int64)
    if len(words) > 1 and len(tied):
        rows = index[tied]
        index[tied] = rows[np.lexsort([word[rows] for word in reversed(words)])]
    return index


def newest(event: np.ndarray, first: Int[np.ndarray, "n"], end: Int[np.ndarray, "n"], k: int) -> Found:
    """The last k of each range [first, end) of EVENT[m], the last one first."""
    count = np.minimum(end - first, k)
    back = np.arange(k)
    there = back < count[:, None]
    if not there.any():
        return Found(np.zeros(there.shape, np.int64), np.zeros(there.shape, np.int64), count.astype(np.int32))
    rows = event.take(np.where(there, end[:, None] - 1 - back, 0))
    time = rows["time"].astype(np.int64)
    return Found(np.where(there, rows["item"], 0), np.where(there, time, 0), count.astype(np.int32))


# ---- keys and values -------------------------------------------------------------------------------------------------


def head_keys(user: Int64[np.ndarray, "n"], key: Int64[np.ndarray, "n"]) -> list[bytes]:
    rows = np.empty(len(user), _HEAD)
    rows["kind"], rows["user"], rows["key"] = HEAD, _turned(user), _turned(key)
    return rows.view(f"V{_HEAD.itemsize}").tolist()


def sealed_keys(user: Int64[np.ndarray, "n"], key: Int64[np.ndarray, "n"], event: np.ndarray) -> list[bytes]:
    """The keys of blocks that begin with `event` (EVENT[n]); as a bound, the greatest key of what holds that event."""
    rows = np.empty(len(user), _SEALED)
    rows["kind"], rows["user"], rows["key"] = SEALED, _turned(user), _turned(key)
    rows["time"], rows["item"] = event["time"], _turned(event["item"])
    return rows.view(f"V{_SEALED.itemsize}").tolist()


def just_before(key: bytes) -> bytes | None:
    """The greatest key below a sealed block's; None where its (user, key) has none."""
    tail = int.from_bytes(key[PREFIX:], "big")
    return key[:PREFIX] + (tail - 1).to_bytes(len(key) - PREFIX, "big") if tail else None


def oldest_key(key: bytes) -> bytes:
    """The key of the block of what is older than all sealed blocks, from a sealed block's key."""
    return key[:PREFIX] + bytes(len(key) - PREFIX)


def parse(keys: Sequence[bytes]) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """User and second key of heads' or sealed blocks' keys."""
    rows = np.frombuffer(b"".join(key[:PREFIX] for key in keys), _HEAD)
    return _turned(rows["user"]).view(np.int64), _turned(rows["key"]).view(np.int64)


def counts(keys: Sequence[bytes], values: Sequence[bytes], where: str) -> Int64[np.ndarray, "n"]:
    """How many events each value holds; a StoreError if its length is no number of events."""
    size = np.fromiter(map(len, values), np.int64, len(values))
    odd = np.flatnonzero(size % EVENT.itemsize)
    if len(odd):
        user, key = parse([keys[odd[0]]])
        raise StoreError(
            f"{where}: a block of user {user[0]}, key {key[0]} has {size[odd[0]]} bytes and an event has "
            f"{EVENT.itemsize}: it is damaged or was not written by this class; build the tree again from its log"
        )
    return size // EVENT.itemsize


def decode(values: Iterable[bytes]) -> np.ndarray:
    """The events of all values, one after the other: EVENT[m]."""
    return np.frombuffer(b"".join(values), EVENT)


def _turned(column: np.ndarray) -> np.ndarray:
    """int64 as uint64 of the same order, and back."""
    return column.astype(np.uint64) ^ _SIGN


# ---- adding events to blocks -----------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Blocks by name, as a store holds them."""

    names: list[bytes]
    held: list[bytes | None]
    values: list[bytes]  # b"" for None
    events: Int64[np.ndarray, "b"]  # how many

    @classmethod
    def of(cls, names: list[bytes], held: list[bytes | None], where: str) -> "Blocks":
        values = [value or b"" for value in held]
        return cls(names, held, values, counts(names, values, where))

    def some(self, which: Bool[np.ndarray, "b"]) -> "Blocks":
        names, values = list(compress(self.names, which)), list(compress(self.values, which))
        return Blocks(names, list(compress(self.held, which)), values, self.events[which])


class Change(NamedTuple):
    """What to write to blocks that were read, and how many events they gain."""

    writes: dict[bytes, bytes]
    read: list[Blocks]
    added: int

    def expected(self) -> dict[bytes, bytes | None]:
        """What the store must still hold for the writes to be right."""
        return dict(chain.from_iterable(zip(blocks.names, blocks.held, strict=True) for blocks in self.read))


def before(a: np.ndarray, b: np.ndarray) -> Bool[np.ndarray, "n"]:
    """Which events of `a` come strictly before those of `b`."""
    return (a["time"] < b["time"]) | ((a["time"] == b["time"]) & (a["item"] < b["item"]))


def add(blocks: Blocks, new: np.ndarray, count: Int64[np.ndarray, "b"], block: int) -> Change:
    """The blocks with the new events (EVENT[n] in order, `count` of them a block) in them.

    A block that comes to 2 `block` events or more is cut into blocks of `block`, the last one keeping the rest. The
    name stays with the newest part of a head and with the oldest part of a sealed block; other parts are named by
    their first event.
    """
    names, _, old, old_count = blocks
    end = np.cumsum(count)
    follows = old_count == 0
    has = np.flatnonzero(~follows)
    last = decode(old)[np.cumsum(old_count)[has] - 1]
    follows[has] = before(last, new[(end - count)[has]])
    plain = follows & (old_count + count < 2 * block)
    # In daily use nearly all blocks get a few events at their end: these lines are what an append costs, so no block
    # is decoded, and each step is one pass in C over all of them.
    data = new.tobytes()
    ends = (EVENT.itemsize * end).tolist()
    longer = [value + data[a:b] for value, a, b in zip(old, [0, *ends], ends, strict=False)]
    if plain.all():
        return Change(dict(zip(names, longer, strict=True)), [blocks], len(new))
    writes = dict(compress(zip(names, longer, strict=True), plain))
    rest = np.flatnonzero(~plain)  # few blocks in daily use, all of them when a tree of long histories is built
    select = rest.tolist()
    some = new[np.repeat(~plain, count)]
    cut, gained = _merge([names[i] for i in select], [old[i] for i in select], some, count[rest], block)
    writes.update(cut)
    return Change(writes, [blocks], int(count[plain].sum()) + gained)


def _merge(
    names: list[bytes], old: list[bytes], new: np.ndarray, count: Int64[np.ndarray, "b"], block: int
) -> tuple[dict[bytes, bytes], int]:
    """`add` for blocks whose events are to be merged, freed of repeats or cut: what to write, how many are gained."""
    held = decode(old)
    old_count = np.fromiter(map(len, old), np.int64, len(old)) // EVENT.itemsize
    owner = np.concatenate([np.repeat(np.arange(len(names)), n) for n in (old_count, count)])
    events = np.concatenate([held, new])
    merged = Filings.of(owner, np.zeros(len(owner), np.int64), events["time"], events["item"])
    total = np.bincount(merged.user, minlength=len(names))
    first = np.cumsum(total) - total
    changed = np.flatnonzero(total > old_count)
    pieces = np.maximum(total[changed] // block, 1)
    inner = np.repeat(changed, pieces)
    step = np.arange(len(inner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    newest_piece = step == np.repeat(pieces, pieces) - 1
    begin = first[inner] + step * block
    stop = np.where(newest_piece, (first + total)[inner], begin + block)
    user, key = parse(names)
    own = sealed_keys(user[inner], key[inner], merged.event[begin])
    is_head = np.fromiter((name.startswith(HEAD) for name in names), bool, len(names))
    keeps = np.where(is_head[inner], newest_piece, step == 0)
    cuts = ((EVENT.itemsize * ends).tolist() for ends in (begin, stop))
    data = merged.event.tobytes()
    writes = {
        names[at] if keep else name: data[a:b]
        for at, keep, name, a, b in zip(inner.tolist(), keeps.tolist(), own, *cuts, strict=True)
    }
    return writes, int((total - old_count).sum())


def integers(name: str, values: Any) -> Int64[np.ndarray, "*s"]:
    """`values` as int64; a ValueError if they are anything else than integers that fit."""
    found = np.asarray(values)
    if found.size == 0 and not isinstance(values, np.ndarray):
        found = found.astype(np.int64)  # an empty list is of floats
    if not np.issubdtype(found.dtype, np.integer) or (found.dtype == np.uint64 and (found >> np.uint64(63)).any()):
        raise ValueError(f"{name} has dtype {found.dtype}: integers that fit into int64 are needed")
    return found.astype(np.int64)

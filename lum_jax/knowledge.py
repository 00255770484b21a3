"""LUM step 2's store: what a user answered under a condition, as of a time (arXiv 2502.08309, knowledge querying).

The time rule. An entry with as-of time `a` is made from events strictly before `a`. A look-up at time `t` returns the
newest entry with `a <= t`, so nothing made from an event at or after `t` is ever returned: training on yesterday's
samples cannot read today's knowledge. Whoever writes keeps the first half, `read` and `lookup` keep the second.

One store holds the vectors of one model version, for users and for items, since sim(o_q, e_i) needs both from one
model; each entry names its version, and another version is an error when writing and when reading.

Two forms give the same answers: `KnowledgeStore` (a `rec_core.store.Store`: LMDB, Redis, memory) for serving, and its
`snapshot()`, a `KnowledgeTable` of sorted arrays with a vectorised look-up, for training.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Float16, Float32, Int, Int64

if TYPE_CHECKING:  # the store's own module imports LMDB and Redis; this one needs numpy only
    from rec_core.store import Store, StoreError

DTYPES = ("float16", "int8")
LARGEST = 65504.0  # float16's largest value
_SIGN = np.uint64(1 << 63)
_PREFIX = 17  # bytes of a knowledge key before its time: kind, user, condition


class KnowledgeStore:
    """Knowledge vectors and item token embeddings of one model version in a `rec_core.store.Store`.

    Args:
      store: an open store that nothing else uses. An empty one takes version, width and dtype; another must agree.
      version: names the model (its checkpoint) that made the vectors.
      width: d, the vectors' length.
      dtype: "float16", with an error of at most 2^-11 |x| + 2^-25 a value; or "int8" with a float32 scale a vector,
        s = max|x| / 127, half the size, and an error of at most s/2 (1 + 2^-10) + 2^-11 |x| + 2^-25.

    Raises:
      StoreError: the store holds another version, width or dtype (both are named), or other things.
    """

    def __init__(self, store: "Store", *, version: str, width: int, dtype: str = "float16") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width is {width!r}: it must be a positive integer")
        if not isinstance(version, str) or not version:
            raise ValueError(f"version is {version!r}: it must be a non-empty string")
        self.store, self.version, self.width, self.dtype = store, version, width, dtype
        self._digest = np.frombuffer(hashlib.blake2b(version.encode(), digest_size=8).digest(), "V8")[0]
        vector = ("vector", "<f2" if dtype == "float16" else "i1", (width,))
        scale = [] if dtype == "float16" else [("scale", "<f4")]
        self._entry: np.dtype[Any] = np.dtype([("version", "V8"), *scale, vector])
        store.claim(version)
        wanted = {"format": 1, "width": width, "dtype": dtype}
        held = store.get([b"settings"])[0]
        if held is None and not store.readonly and store.count() == 0:
            held = json.dumps(wanted).encode()
            store.put([(b"settings", held), (b"version" + self._digest.tobytes(), version.encode())])
        if held is None:
            raise _error(f"{store.name}: holds no knowledge: it is empty, or something else wrote it")
        found = json.loads(held)
        for name, value in wanted.items():
            if found.get(name) != value:
                raise _error(
                    f"{store.name}: is a knowledge store of {name} {found.get(name)!r} and was opened for {name} "
                    f"{value!r}: open it as it was written, or use another store"
                )

    def write(
        self,
        users: Int[np.ndarray, "n"],
        conditions: Int[np.ndarray, "n"],
        as_of: Int[np.ndarray, "n"],
        vectors: Float[np.ndarray, "n d"],
    ) -> int:
        """Stores n entries in one transaction: all or none, and safe once this returns. Returns n.

        `vectors[i]` must be made from events of `users[i]` strictly before `as_of[i]` (seconds, >= 0). An entry that is
        already there is replaced; of equal ones in a batch the last wins.

        Raises:
          ValueError: lengths that differ, a negative time, a value that is not finite or too large for float16.
        """
        vectors = np.asarray(vectors)
        n = len(vectors) if vectors.ndim else 0
        user, condition = _integers("users", users, (n,)), _integers("conditions", conditions, (n,))
        time = _times("as_of", as_of, (n,))
        _check_vectors(vectors, self.width, lambda i: f"user {user[i]}, condition {condition[i]}, as of {time[i]}")
        return self.store.put(zip(_keys(b"k", user, condition, time), self._encode(vectors), strict=True))

    def read(
        self, users: Int[np.ndarray, "B"], conditions: Int[np.ndarray, "B N"], times: Int[np.ndarray, "B"]
    ) -> tuple[Float32[np.ndarray, "B N d"], Bool[np.ndarray, "B N"], Int64[np.ndarray, "B N"]]:
        """The newest entry with as-of <= time for each (user, condition): vectors, found, as_of.

        The entry was made from events strictly before its as-of, so nothing from events at or after `times` comes back.
        Where there is none: zeros, False, -1.

        Raises:
          StoreError: an entry of another version (both are named) or a damaged one.
        """
        shape, user, condition, time = _questions(users, conditions, times)
        hits = self.store.floor(_keys(b"k", user, condition, time), _PREFIX)
        found = np.fromiter((hit is not None for hit in hits), bool, len(hits))
        entries = [hit for hit in hits if hit is not None]
        vectors = np.zeros((len(hits), self.width), np.float32)
        as_of = np.full(len(hits), -1, np.int64)
        if entries:
            keys = [key for key, _ in entries]
            vectors[found] = self._decode(keys, [value for _, value in entries])
            as_of[found] = _parse(keys)[2]
        return vectors.reshape(*shape, self.width), found.reshape(shape), as_of.reshape(shape)

    def write_items(self, items: Int[np.ndarray, "n"], vectors: Float[np.ndarray, "n d"]) -> int:
        """Stores the items' token embeddings e_i in one transaction; returns n. Errors as in `write`."""
        vectors = np.asarray(vectors)
        ids = _integers("items", items, (len(vectors) if vectors.ndim else 0,))
        _check_vectors(vectors, self.width, lambda i: f"item {ids[i]}")
        return self.store.put(zip(_keys(b"i", ids), self._encode(vectors), strict=True))

    def read_items(
        self, items: Int[np.ndarray, "*s"]
    ) -> tuple[Float32[np.ndarray, "*s d"], Bool[np.ndarray, "*s"]]:  # fmt: skip
        """The items' token embeddings, and which were found; zeros where not. `items` has any shape."""
        ids = _integers("items", items, None)
        keys = _keys(b"i", ids.ravel())
        values = self.store.get(keys)
        found = np.fromiter((value is not None for value in values), bool, len(values))
        vectors = np.zeros((len(values), self.width), np.float32)
        if found.any():
            here = [(key, value) for key, value in zip(keys, values, strict=True) if value is not None]
            vectors[found] = self._decode([key for key, _ in here], [value for _, value in here])
        return vectors.reshape(*ids.shape, self.width), found.reshape(ids.shape)

    def snapshot(self) -> "KnowledgeTable":
        """All knowledge entries as a table in memory (2 d + 48 bytes an entry) that answers exactly as `read` does."""
        parts: list[tuple[np.ndarray, ...]] = []
        keys: list[bytes] = []
        values: list[bytes] = []

        def flush() -> None:
            if keys:
                parts.append((*_parse(keys), self._decode(keys, values).astype(np.float16)))
                keys.clear()
                values.clear()

        for key, value in self.store.scan(b"k"):
            keys.append(key)
            values.append(value)
            if len(keys) == 1 << 16:
                flush()
        flush()
        empty = np.zeros(0, np.int64)
        if not parts:
            parts.append((empty, empty, empty, np.zeros((0, self.width), np.float16)))
        users, conditions, as_of, vectors = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return KnowledgeTable(users, conditions, as_of, vectors, self.version)

    def _encode(self, vectors: np.ndarray) -> list[bytes]:
        rows = np.zeros(len(vectors), self._entry)
        rows["version"] = self._digest
        if self.dtype == "int8":
            exact = vectors.astype(np.float32)
            scale = (np.abs(exact).max(axis=1) / 127).astype(np.float32)
            rows["scale"] = scale
            steps = exact / np.where(scale > 0, scale, 1)[:, None]
            rows["vector"] = np.clip(np.rint(steps), -127, 127)
        else:
            rows["vector"] = vectors
        return rows.view(f"V{self._entry.itemsize}").tolist()

    def _decode(self, keys: list[bytes], values: list[bytes]) -> np.ndarray:
        size = self._entry.itemsize
        if set(map(len, values)) != {size}:
            key, value = next(pair for pair in zip(keys, values, strict=True) if len(pair[1]) != size)
            raise _error(
                f"{self.store.name}: entry ({_name(key)}) has {len(value)} bytes and {size} were expected for width "
                f"{self.width} in {self.dtype}: it is damaged or was not written by this class"
            )
        rows = np.frombuffer(b"".join(values), self._entry)
        wrong = np.flatnonzero(rows["version"] != self._digest)
        if len(wrong):
            digest = rows["version"][wrong[0]].tobytes()
            written = self.store.get([b"version" + digest])[0]
            name = repr(written.decode()) if written is not None else f"unknown (digest {digest.hex()})"
            raise _error(
                f"{self.store.name}: entry ({_name(keys[wrong[0]])}) was written by version {name} and is read for "
                f"{self.version!r}; vectors of two versions do not mix: compute this store again ({len(wrong)} such "
                f"of {len(keys)} read)"
            )
        if self.dtype == "float16":
            return rows["vector"].astype(np.float32)
        # rounded to float16 so that a table, which holds float16, gives the same numbers
        return (rows["vector"] * rows["scale"][:, None]).astype(np.float16).astype(np.float32)


@dataclass(frozen=True, eq=False)
class KnowledgeTable:
    """Knowledge in memory: n entries sorted by (user, condition, as_of), each of which occurs once.

    Made by `KnowledgeStore.snapshot` or `KnowledgeTable.from_arrays`, which sorts. `vectors` may go to the device as
    a table; `lookup` gives the rows to gather from it.
    """

    users: Int64[np.ndarray, "n"]
    conditions: Int64[np.ndarray, "n"]
    as_of: Int64[np.ndarray, "n"]
    vectors: Float16[np.ndarray, "n d"]
    version: str | None = None
    _index: tuple[np.ndarray, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        same_user = self.users[1:] == self.users[:-1]
        same_pair = same_user & (self.conditions[1:] == self.conditions[:-1])
        sorted_ = np.where(same_user, self.conditions[1:] >= self.conditions[:-1], self.users[1:] > self.users[:-1])
        if not np.all(sorted_ & (~same_pair | (self.as_of[1:] > self.as_of[:-1]))):
            raise ValueError("entries are not sorted by (user, condition, as_of), once each: use from_arrays")
        # (user, condition, time) -> one integer that sorts alike, through ranks: at most n^2, so it never overflows
        user, user_rank = np.unique(self.users, return_inverse=True)
        condition, condition_rank = np.unique(self.conditions, return_inverse=True)
        time, time_rank = np.unique(self.as_of, return_inverse=True)
        pair, pair_rank = np.unique(user_rank * len(condition) + condition_rank, return_inverse=True)
        code = pair_rank * len(time) + time_rank
        object.__setattr__(self, "_index", (user, condition, time, pair, code))

    @classmethod
    def from_arrays(
        cls,
        users: Int[np.ndarray, "n"],
        conditions: Int[np.ndarray, "n"],
        as_of: Int[np.ndarray, "n"],
        vectors: Float[np.ndarray, "n d"],
        *,
        version: str | None = None,
    ) -> "KnowledgeTable":
        """A table of entries in any order; of equal (user, condition, as_of) the last wins. Errors as in `write`."""
        vectors = np.asarray(vectors)
        n = len(vectors) if vectors.ndim else 0
        user, condition = _integers("users", users, (n,)), _integers("conditions", conditions, (n,))
        time = _times("as_of", as_of, (n,))
        _check_vectors(vectors, None, lambda i: f"user {user[i]}, condition {condition[i]}, as of {time[i]}")
        order = np.lexsort((time, condition, user))  # stable, so the last of equal ones is the one written last
        user, condition, time = user[order], condition[order], time[order]
        differs = (user[1:] != user[:-1]) | (condition[1:] != condition[:-1]) | (time[1:] != time[:-1])
        last = np.append(differs, np.ones(min(n, 1), bool))
        return cls(user[last], condition[last], time[last], vectors[order[last]].astype(np.float16), version)

    def __len__(self) -> int:
        return len(self.users)

    def lookup(
        self, users: Int[np.ndarray, "*s"], conditions: Int[np.ndarray, "*s"], times: Int[np.ndarray, "*s"]
    ) -> Int64[np.ndarray, "*s"]:
        """The row of the newest entry with as_of <= time, -1 where there is none. The arguments broadcast.

        The entry was made from events strictly before its as_of, so nothing at or after `times` is ever returned.
        """
        asked = (
            _integers("users", users, None),
            _integers("conditions", conditions, None),
            _times("times", times, None),
        )
        shape = np.broadcast_shapes(*(x.shape for x in asked))
        if not len(self):
            return np.full(shape, -1, np.int64)
        user, condition, time, pair, code = self._index
        # ranks before broadcasting: a user that is asked about N conditions is searched once
        user_rank, user_known = _rank(user, asked[0])
        condition_rank, condition_known = _rank(condition, asked[1])
        time_rank = np.searchsorted(time, asked[2], side="right") - 1
        pair_rank, pair_known = _rank(pair, user_rank * len(condition) + condition_rank)
        row = np.searchsorted(code, pair_rank * len(time) + time_rank, side="right") - 1
        # time_rank is -1 before every entry: then the row before may be the last one of another pair
        known = user_known & condition_known & pair_known & (row >= 0) & (code[row] >= pair_rank * len(time))
        return np.where(known, row, -1)

    def read(
        self, users: Int[np.ndarray, "B"], conditions: Int[np.ndarray, "B N"], times: Int[np.ndarray, "B"]
    ) -> tuple[Float32[np.ndarray, "B N d"], Bool[np.ndarray, "B N"], Int64[np.ndarray, "B N"]]:
        """As `KnowledgeStore.read`: vectors, found, as_of (zeros, False, -1 where there is none)."""
        shape, user, condition, time = _questions(users, conditions, times)
        row = self.lookup(user, condition, time).reshape(shape)
        found = row >= 0
        vectors = np.zeros((*shape, self.vectors.shape[1]), np.float32)
        vectors[found] = self.vectors[row[found]]
        as_of = np.full(shape, -1, np.int64)
        as_of[found] = self.as_of[row[found]]
        return vectors, found, as_of


def _rank(known: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each value's place among the sorted `known` ones, and whether it is one of them."""
    rank = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return rank, known[rank] == asked


def _error(text: str) -> "StoreError":
    from rec_core.store import StoreError

    return StoreError(text)


def _integers(name: str, values: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    found = np.asarray(values)
    if found.size == 0 and not isinstance(values, np.ndarray):
        found = found.astype(np.int64)  # an empty list is of floats
    if not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{name} has dtype {found.dtype}: integers are needed")
    if shape is not None and found.shape != shape:
        raise ValueError(f"{name} has shape {found.shape} and {shape} is needed to go with the other arguments")
    if found.dtype == np.uint64 and found.size and found.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {found.max()}: it must fit into int64")
    return found.astype(np.int64)


def _times(name: str, values: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    found = _integers(name, values, shape)
    if found.size and found.min() < 0:
        at = tuple(int(i) for i in np.argwhere(found < 0)[0])
        raise ValueError(f"{name}{list(at)} is {found[at]}: times are seconds >= 0")
    return found


def _questions(users: Any, conditions: Any, times: Any) -> tuple[tuple[int, ...], np.ndarray, np.ndarray, np.ndarray]:
    condition = _integers("conditions", conditions, None)
    if condition.ndim != 2:
        raise ValueError(f"conditions has shape {condition.shape}: [B, N] is needed")
    user, time = _integers("users", users, condition.shape[:1]), _times("times", times, condition.shape[:1])
    n = condition.shape[1]
    return condition.shape, np.repeat(user, n), condition.ravel(), np.repeat(time, n)


def _check_vectors(vectors: np.ndarray, width: int | None, name: Any) -> None:
    if vectors.ndim != 2 or (width is not None and vectors.shape[1] != width):
        raise ValueError(f"vectors has shape {vectors.shape}: [n, {width or 'd'}] is needed")
    if not np.issubdtype(np.asarray(vectors).dtype, np.floating) and str(vectors.dtype) != "bfloat16":
        raise ValueError(f"vectors has dtype {vectors.dtype}: floating point is needed")
    with np.errstate(invalid="ignore"):
        bad = ~(np.abs(vectors) <= LARGEST)  # true for NaN as well
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"vectors[{row}, {column}] ({name(row)}) is {vectors[row, column]}: values must be finite and at most "
            f"{LARGEST:.0f} in size; nothing was stored ({int(bad.any(axis=1).sum())} such vectors of {len(vectors)})"
        )


def _keys(kind: bytes, *columns: np.ndarray) -> list[bytes]:
    """Keys that sort as the int64 columns do: the kind, then each column big-endian with its sign bit turned."""
    out = np.empty((len(columns[0]), 1 + 8 * len(columns)), np.uint8)
    out[:, 0] = kind[0]
    for i, column in enumerate(columns):
        turned = (np.ascontiguousarray(column).view(np.uint64) ^ _SIGN).astype(">u8")
        out[:, 1 + 8 * i : 9 + 8 * i] = turned.view(np.uint8).reshape(-1, 8)
    return out.view(f"V{out.shape[1]}")[:, 0].tolist()


def _parse(keys: list[bytes]) -> tuple[np.ndarray, ...]:
    """The int64 columns of keys of one kind."""
    width = len(keys[0])
    rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), width)[:, 1:]
    columns = np.ascontiguousarray(rows).view(">u8").astype(np.uint64) ^ _SIGN
    return tuple(np.ascontiguousarray(column) for column in columns.view(np.int64).T)


def _name(key: bytes) -> str:
    names = ("user", "condition", "as of") if key[:1] == b"k" else ("item",)
    return ", ".join(f"{name} {column[0]}" for name, column in zip(names, _parse([key]), strict=True))

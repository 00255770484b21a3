"""`open_store` and `Store`: what callers see of a store, whatever place holds it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rec_core.store.base import MAX_KEY, MAX_VALUE, Backend, Entry, StoreError, without_password


def open_store(
    address: str | os.PathLike[str], *, version: str | None = None, readonly: bool = False, map_size: int = 64 << 20
) -> Store:
    """Opens the store at `address` (see the package's first lines) and makes it if absent and not `readonly`.

    Args:
      version: what wrote the entries (a model's version). An empty store takes it into its header; a store that holds
        another one, or entries of no stated version, is refused. None: any version is accepted (`store.version`).
      readonly: nothing can be written through this object, and an absent store is an error.
      map_size: LMDB only, bytes of address space to start with; it doubles whenever it is full.

    Raises:
      StoreError: absent, not a store, damaged, unreachable, or of another version.
      ValueError: an address or a version that cannot be one.
    """
    text = os.fspath(address)
    if version is not None and (not isinstance(version, str) or not version):
        raise ValueError(f"version is {version!r}: it must be a non-empty string, or None")
    backend: Backend  # imported where it is wanted: LMDB and Redis are needed by those that use them only
    if text == "memory:":
        if readonly:
            raise StoreError("memory: starts empty, so there is nothing to read: open it without readonly=True")
        from rec_core.store.memory import MemoryBackend

        backend, name = MemoryBackend(), text
    elif re.match(r"rediss?://", text):
        name = without_password(text)
        try:
            from rec_core.store.redis import RedisBackend
        except ImportError as error:
            raise StoreError(f"{name}: needs the package redis: install the extra [redis]") from error
        backend = RedisBackend(text, readonly)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text) or not text:
        raise ValueError(f"address {text!r}: expected 'memory:', a folder, or 'redis://host:port/db/name'")
    else:
        if map_size < 1 << 16:
            raise ValueError(f"map_size is {map_size}: at least {1 << 16} bytes are needed for an empty store")
        from rec_core.store.lmdb import LmdbBackend

        backend, name = LmdbBackend(Path(text), readonly, map_size), str(Path(text))
    store = Store(backend, name, readonly)
    if version is not None:
        try:
            store.claim(version)
        except BaseException:
            store.close()
            raise
    return store


class Store:
    """An open store; made by `open_store`, closed by `close` or by leaving its `with` block. Safe between threads."""

    def __init__(self, backend: Backend, name: str, readonly: bool) -> None:
        self._backend: Backend | None = backend
        self.name = name
        self.readonly = readonly

    def put(self, items: Iterable[Entry] | Mapping[bytes, bytes]) -> int:
        """Writes the pairs in one transaction (all or none; of equal keys the last wins) and returns their number."""
        backend = self._writable("put")
        batch = self._batch("put", items)
        if batch:
            backend.put(batch)
        return len(batch)

    def put_if(
        self,
        items: Iterable[Entry] | Mapping[bytes, bytes],
        expected: Mapping[bytes, bytes | None] | Callable[[], Mapping[bytes, bytes | None]],
        *,
        since: int | None = None,
    ) -> bool:
        """`put`, if each key of `expected` still has that value (None: is absent); else writes nothing, returns False.

        What was read and changed is written back so, without losing what another writer put between. Where only the
        acknowledgement was lost, the same call again finds its own values and returns False: read again.

        Args:
          expected: or a function that makes it, called only where the values are compared.
          since: a `moment()` from before `expected` was read. Where nothing at all was written since, the values are
            not compared (on LMDB: not read a second time, a fifth of the time of a batch of small values).
        """
        backend = self._writable("put_if")
        if callable(expected):
            return backend.put_if(self._batch("put_if", items), lambda: _expected(expected()), since)
        held = _expected(expected)
        return backend.put_if(self._batch("put_if", items), lambda: held, since)

    def moment(self) -> int | None:
        """What to give `put_if` as `since`: a number that changes with every write, None where the place has none."""
        return self._open().moment()

    def _batch(self, what: str, items: Iterable[Entry] | Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        try:
            batch = dict(items)
        except (TypeError, ValueError) as error:
            wanted = f"{self.name}: {what} takes an iterable of (key, value) pairs of bytes"
            raise ValueError(f"{wanted}: {error}") from error
        _checked(batch)
        values = batch.values()
        if set(map(type, values)) <= {bytes} and max(set(map(len, values)), default=0) <= MAX_VALUE:
            return batch
        for key, value in batch.items():
            if type(value) is not bytes or len(value) > MAX_VALUE:
                found = f"{len(value)} bytes" if type(value) is bytes else type(value).__name__
                raise ValueError(f"the value of key {key!r} is {found}: it must be bytes, at most {MAX_VALUE} of them")
        return batch

    def get(self, keys: Iterable[bytes]) -> list[bytes | None]:
        """The value of each key, in order; None where there is none."""
        return self._open().get(_checked(keys))

    def floor(self, keys: Iterable[bytes], prefix_length: int) -> list[Entry | None]:
        """For each key the entry with the greatest stored key <= it that shares its first `prefix_length` bytes.

        With keys that end in a big-endian time this is the newest entry not after a time. None where there is none.
        """
        return [found[0] if found else None for found in self.floors(keys, prefix_length, 1)]

    def floors(self, keys: Iterable[bytes], prefix_length: int, limit: int) -> list[list[Entry]]:
        """For each key the `limit` greatest entries that `floor` chooses from, by falling key; all of one moment on
        LMDB and in memory, on Redis of one moment a key."""
        asked = _checked(keys)
        if limit < 1:
            raise ValueError(f"limit is {limit}: at least one entry a key must be asked for")
        shortest = min(map(len, asked), default=prefix_length)
        if not 0 <= prefix_length <= shortest:
            raise ValueError(f"prefix_length is {prefix_length}: it must lie in 0..{shortest} (the shortest key)")
        return self._open().floors(asked, prefix_length, limit)

    def scan(self, prefix: bytes = b"", *, limit: int | None = None) -> Iterator[Entry]:
        """The entries whose keys start with `prefix`, by rising key, at most `limit` of them.

        Read in pages of 1,024: a page is one moment's state, and what is written meanwhile may show in later pages.
        """
        if type(prefix) is not bytes:
            raise ValueError(f"prefix is {prefix!r}: it must be bytes")
        self._open()
        return self._scan(prefix, limit)

    def _scan(self, prefix: bytes, left: int | None) -> Iterator[Entry]:
        after: bytes | None = None
        while left is None or left > 0:
            size = 1024 if left is None else min(1024, left)
            page = self._open().page(prefix, after, size)
            yield from page
            if len(page) < size:
                return
            after = page[-1][0]
            left = None if left is None else left - len(page)

    def delete(self, keys: Iterable[bytes]) -> int:
        """Removes the keys in one transaction and returns how many there were."""
        backend = self._writable("delete")
        asked = list(dict.fromkeys(_checked(keys)))
        return backend.delete(asked) if asked else 0

    def count(self) -> int:
        """The number of entries."""
        return self._open().count()

    @property
    def version(self) -> str | None:
        """What wrote the entries, as claimed when the store was empty; None if nobody said."""
        return self._open().version()

    @property
    def durable(self) -> bool:
        """Whether an acknowledged put survives a loss of power: LMDB yes, memory no, Redis as its server is set
        (`appendonly yes` and `appendfsync always`; False if the server does not tell)."""
        return self._open().durable()

    def claim(self, version: str) -> None:
        """Takes `version` into an empty store's header; raises StoreError if the store has another version."""
        backend = self._open()
        held = backend.version() if self.readonly else backend.claim(version)
        if held is None:
            raise StoreError(f"{self.name}: holds entries of no stated version, not of {version!r}: use another store")
        if held != version:
            raise StoreError(
                f"{self.name}: was written by version {held!r} and opened for {version!r}; entries of two versions do "
                "not mix: use another store, or compute this one again"
            )

    def close(self) -> None:
        """Closes the store; closing twice is harmless."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self.name!r}, readonly={self.readonly}{', closed' if self._backend is None else ''})"

    def _open(self) -> Backend:
        if self._backend is None:
            raise StoreError(f"{self.name}: this store is closed")
        return self._backend

    def _writable(self, what: str) -> Backend:
        backend = self._open()
        if self.readonly:
            raise StoreError(f"{self.name}: {what} on a store opened with readonly=True")
        return backend


def _expected(expected: Mapping[bytes, bytes | None]) -> dict[bytes, bytes | None]:
    held = dict(expected)
    _checked(held)
    if not set(map(type, held.values())) <= {bytes, type(None)}:
        key, value = next((k, v) for k, v in held.items() if v is not None and type(v) is not bytes)
        raise ValueError(f"the expected value of key {key!r} is {type(value).__name__}: it is bytes or None")
    return held


def _check_key(key: bytes) -> None:
    if type(key) is not bytes or not 0 < len(key) <= MAX_KEY:
        what = f"{len(key)} bytes" if type(key) is bytes else type(key).__name__
        raise ValueError(f"key {key!r} is {what}: it must be bytes, 1 to {MAX_KEY} of them")


def _checked(keys: Iterable[bytes]) -> list[bytes]:
    asked = list(keys)
    if set(map(type, asked)) <= {bytes}:  # a tenth of the time of a call a key
        lengths = set(map(len, asked))
        if not lengths or (min(lengths) > 0 and max(lengths) <= MAX_KEY):
            return asked
    for key in asked:
        _check_key(key)
    return asked

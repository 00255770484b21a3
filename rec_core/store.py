"""Ordered bytes -> bytes stores for what is computed offline and read online.

Three users share this one small interface: a behaviour tree (user, key -> behaviours), knowledge (user, condition,
as-of time -> vector) and a text table (text hash, model version -> vector). Three places hold it and answer alike:

    open_store("memory:")                                  a dictionary: tests, one process, gone with it
    open_store("/path/folder")                             LMDB, the embedded default: crash-safe, many processes
    open_store("redis://user:password@host:port/db/name")  Redis, where many machines share it (rediss:// with TLS)

`put` is one transaction: after it returns, every pair of the batch is stored (on LMDB: synced to disk); if it raises
or the process dies inside it, none is, or, where only the acknowledgement was lost, all are. Writing again is harmless.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import re
import shutil
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

MAX_KEY = 511  # bytes: LMDB's limit, held everywhere so that a store can move
MAX_VALUE = 512 << 20  # bytes: Redis' limit
FORMAT = b"1"

T = TypeVar("T")
Entry = tuple[bytes, bytes]


class StoreError(RuntimeError):
    """A store could not be opened, read or written; the message names the store, the reason and the remedy."""


def open_store(
    address: str | os.PathLike[str], *, version: str | None = None, readonly: bool = False, map_size: int = 64 << 20
) -> Store:
    """Opens the store at `address` (see the module's first lines) and makes it if absent and not `readonly`.

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
    backend: _Backend
    if text == "memory:":
        if readonly:
            raise StoreError("memory: starts empty, so there is nothing to read: open it without readonly=True")
        backend, name = _Memory(), text
    elif re.match(r"rediss?://", text):
        backend, name = _Redis(text, readonly), _without_password(text)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text) or not text:
        raise ValueError(f"address {text!r}: expected 'memory:', a folder, or 'redis://host:port/db/name'")
    else:
        if map_size < 1 << 16:
            raise ValueError(f"map_size is {map_size}: at least {1 << 16} bytes are needed for an empty store")
        backend = _Lmdb(Path(text), readonly, map_size)
        name = str(Path(text))
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

    def __init__(self, backend: _Backend, name: str, readonly: bool) -> None:
        self._backend: _Backend | None = backend
        self.name = name
        self.readonly = readonly

    def put(self, items: Iterable[Entry]) -> int:
        """Writes the pairs in one transaction (all or none; of equal keys the last wins) and returns their number."""
        backend = self._writable("put")
        batch = self._batch("put", items)
        if batch:
            backend.put(batch)
        return len(batch)

    def put_if(self, items: Iterable[Entry], expected: Mapping[bytes, bytes | None]) -> bool:
        """`put`, if each key of `expected` still has that value (None: is absent); else writes nothing, returns False.

        What was read and changed is written back so, without losing what another writer put between. Where only the
        acknowledgement was lost, the same call again finds its own values and returns False: read again.
        """
        backend = self._writable("put_if")
        held = dict(expected)
        _checked(held)
        for key, value in held.items():
            if value is not None and type(value) is not bytes:
                raise ValueError(f"the expected value of key {key!r} is {type(value).__name__}: it is bytes or None")
        return backend.put_if(self._batch("put_if", items), held)

    def _batch(self, what: str, items: Iterable[Entry]) -> dict[bytes, bytes]:
        try:
            batch = dict(items)
        except (TypeError, ValueError) as error:
            wanted = f"{self.name}: {what} takes an iterable of (key, value) pairs of bytes"
            raise ValueError(f"{wanted}: {error}") from error
        _checked(batch)
        values = batch.values()
        if set(map(type, values)) <= {bytes} and max(map(len, values), default=0) <= MAX_VALUE:
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

    def _open(self) -> _Backend:
        if self._backend is None:
            raise StoreError(f"{self.name}: this store is closed")
        return self._backend

    def _writable(self, what: str) -> _Backend:
        backend = self._open()
        if self.readonly:
            raise StoreError(f"{self.name}: {what} on a store opened with readonly=True")
        return backend


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


class _Backend(Protocol):
    """What `Store` needs from a place, its arguments already checked."""

    def put(self, batch: dict[bytes, bytes]) -> None: ...
    def put_if(self, batch: dict[bytes, bytes], expected: dict[bytes, bytes | None]) -> bool: ...
    def get(self, keys: list[bytes]) -> list[bytes | None]: ...
    def floors(self, keys: list[bytes], prefix_length: int, limit: int) -> list[list[Entry]]: ...
    def page(self, prefix: bytes, after: bytes | None, limit: int) -> list[Entry]: ...
    def delete(self, keys: list[bytes]) -> int: ...
    def count(self) -> int: ...
    def version(self) -> str | None: ...
    def claim(self, version: str) -> str | None: ...
    def durable(self) -> bool: ...
    def close(self) -> None: ...


# ---- memory ----------------------------------------------------------------------------------------------------------


class _Memory:
    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._values: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []  # sorted
        self._version: str | None = None

    def put(self, batch: dict[bytes, bytes]) -> None:
        with self._lock:
            new = [key for key in batch if key not in self._values]
            self._values.update(batch)
            if len(new) < 32:
                for key in new:
                    bisect.insort(self._keys, key)
            else:
                self._keys.extend(new)
                self._keys.sort()

    def put_if(self, batch: dict[bytes, bytes], expected: dict[bytes, bytes | None]) -> bool:
        with self._lock:
            same = self.get(list(expected)) == list(expected.values())
            if same:
                self.put(batch)
        return same

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        with self._lock:
            return [self._values.get(key) for key in keys]

    def floors(self, keys: list[bytes], prefix_length: int, limit: int) -> list[list[Entry]]:
        found = []
        with self._lock:
            for key in keys:
                at = bisect.bisect_right(self._keys, key)
                near = reversed(self._keys[max(at - limit, 0) : at])
                found.append([(k, self._values[k]) for k in near if k[:prefix_length] == key[:prefix_length]])
        return found

    def page(self, prefix: bytes, after: bytes | None, limit: int) -> list[Entry]:
        with self._lock:
            at = bisect.bisect_left(self._keys, prefix) if after is None else bisect.bisect_right(self._keys, after)
            near = self._keys[at : at + limit]
            return [(key, self._values[key]) for key in near if key.startswith(prefix)]

    def delete(self, keys: list[bytes]) -> int:
        with self._lock:
            gone = {key for key in keys if self._values.pop(key, None) is not None}
            self._keys = [key for key in self._keys if key not in gone] if gone else self._keys
        return len(gone)

    def count(self) -> int:
        with self._lock:
            return len(self._keys)

    def version(self) -> str | None:
        return self._version

    def claim(self, version: str) -> str | None:
        with self._lock:
            if self._version is None and not self._keys:
                self._version = version
            return self._version

    def durable(self) -> bool:
        return False

    def close(self) -> None:
        pass


# ---- LMDB ------------------------------------------------------------------------------------------------------------


class _Environment:
    """The one LMDB environment that a process may have open for a folder; shared by its stores, counted in `users`."""

    def __init__(self, folder: Path, readonly: bool, map_size: int) -> None:
        import lmdb

        data = folder / "data.mdb"
        new = not data.exists()
        if new:
            if readonly:
                raise StoreError(f"{folder}: there is no store to read: write it first, or check the path")
            _new_folder(folder)
        self.folder, self.readonly, self.users, self.pid = folder, readonly, 0, os.getpid()
        self._gate = threading.Condition()
        self._active, self._resizing = 0, False
        size = max(map_size, 0 if new else 2 * data.stat().st_size)
        try:
            self.env = lmdb.open(
                str(folder), map_size=size, readonly=readonly, max_dbs=2, max_readers=1022, sync=True, metasync=True,
                lock=not readonly or os.access(folder, os.W_OK),
            )  # fmt: skip
        except lmdb.Error as error:
            raise StoreError(f"{folder}: cannot be opened as an LMDB store: {error}") from error
        try:
            _refuse_cut_file(self.env, data)
            if not readonly:
                self.env.reader_check()  # frees the slots of readers that were killed
            while True:
                try:
                    self.header, self.entries = self._databases()
                    break
                except lmdb.MapResizedError:  # another process has grown the store since its size was looked at
                    self.env.set_mapsize(0)
            if new:
                _sync_folder(folder)  # the file's name must survive a loss of power as well
        except lmdb.Error as error:
            self.env.close()
            raise StoreError(f"{folder}: not a store, or damaged: {error}") from error
        except BaseException:
            self.env.close()
            raise
        self.file = _file_id(data)

    def _databases(self) -> tuple[Any, Any]:
        """Header and entries, made where the store is new; a StoreError if this is no store of ours."""
        with self.env.begin() as txn:
            if txn.stat()["entries"] and txn.get(b"header") is None:
                raise StoreError(f"{self.folder}: holds an LMDB database that is not a store: name another folder")
        header, entries = (self.env.open_db(name, create=not self.readonly) for name in (b"header", b"entries"))
        with self.env.begin(write=not self.readonly) as txn:
            written = txn.get(b"format", db=header)
            if written is None and not self.readonly:
                txn.put(b"format", FORMAT, db=header)
            elif written != FORMAT:
                raise StoreError(f"{self.folder}: has store format {written!r} and this code reads {FORMAT!r}")
        return header, entries

    def run(self, body: Callable[[Any], T], write: bool = False) -> T:
        """`body(transaction)` in one transaction, again after the map has grown (here or by another process)."""
        import lmdb

        if self.pid != os.getpid():
            raise StoreError(
                f"{self.folder}: opened by process {self.pid} and used in {os.getpid()}: LMDB does not survive a fork, "
                "open the store again in the child"
            )
        while True:
            with self._gate:
                self._gate.wait_for(lambda: not self._resizing)
                self._active += 1
                size = self.env.info()["map_size"]
            try:
                with self.env.begin(write=write, db=self.entries) as txn:
                    return body(txn)
            except lmdb.MapFullError:
                size *= 2
            except lmdb.MapResizedError:
                size = 0  # adopt the size that another process has set
            except lmdb.Error as error:
                raise StoreError(f"{self.folder}: {self._explain(error, write)}") from error
            finally:
                with self._gate:
                    self._active -= 1
                    self._gate.notify_all()
            self._resize(size)

    def _resize(self, size: int) -> None:
        import lmdb

        with self._gate:
            self._gate.wait_for(lambda: not self._resizing)
            self._resizing = True
            try:
                self._gate.wait_for(lambda: self._active == 0)  # LMDB moves the map: no transaction may be open
                if size == 0 or size > self.env.info()["map_size"]:
                    self.env.set_mapsize(size)
            except lmdb.Error as error:
                raise StoreError(f"{self.folder}: the map cannot grow to {size} bytes: {error}") from error
            finally:
                self._resizing = False
                self._gate.notify_all()

    def _explain(self, error: Exception, write: bool) -> str:
        if not write:
            return f"cannot be read: {error}"
        free = shutil.disk_usage(self.folder).free
        return (
            f"cannot be written, nothing of this batch was stored, earlier batches are safe: {error}; the disk has "
            f"{free} bytes free ({free >> 20} MiB): if it is full, or a quota is, make room and put again"
        )


_ENVIRONMENTS: dict[Path, _Environment] = {}
_ENVIRONMENTS_LOCK = threading.Lock()


def _environment(folder: Path, readonly: bool, map_size: int) -> _Environment:
    folder = folder.absolute().resolve()
    with _ENVIRONMENTS_LOCK:
        held = _ENVIRONMENTS.get(folder)
        if held is not None and held.pid != os.getpid():
            held.env.close()  # our copy of what was open before a fork; the parent keeps its own
            held = None
        if held is not None and held.file != _file_id(folder / "data.mdb"):  # the folder was removed or replaced
            held = None
        if held is None:
            held = _ENVIRONMENTS[folder] = _Environment(folder, readonly, map_size)
        elif held.readonly and not readonly:
            raise StoreError(f"{folder}: is open for reading in this process: close that store before opening to write")
        held.users += 1
        return held


def _release(held: _Environment) -> None:
    with _ENVIRONMENTS_LOCK:
        held.users -= 1
        if held.users == 0 and held.pid == os.getpid():
            held.env.close()
            if _ENVIRONMENTS.get(held.folder) is held:
                del _ENVIRONMENTS[held.folder]


def _new_folder(folder: Path) -> None:
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            _sync_folder(path.parent)
        others = sorted(set(os.listdir(folder)) - {"data.mdb", "lock.mdb"})
    except OSError as error:
        raise StoreError(f"{folder}: cannot be made a store's folder: {error}") from error
    if others:
        raise StoreError(f"{folder}: holds other files ({others[0]!r}, ...) and no store: name a folder of its own")


def _file_id(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse_cut_file(env: Any, data: Path) -> None:
    """Reading past the end of a cut-off file would kill the process (SIGBUS), so look before.

    A sound file may be a few pages short, because LMDB does not write pages that were freed in the transaction that
    made them; only then, which is rare, the tree is walked to tell the two apart.
    """
    need = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    size = data.stat().st_size
    if size >= need:
        return
    try:
        from lmdb.verify import VerifyError, verify  # lmdb >= 3
    except ImportError:
        return
    try:
        lost = [line for line in verify(str(data.parent)) if "beyond" in line]
    except VerifyError as error:
        lost = [str(error)]
    if lost:
        raise StoreError(f"{data}: is cut off, {size} of {need} bytes ({lost[0]}): restore it, or compute it again")


class _Lmdb:
    def __init__(self, folder: Path, readonly: bool, map_size: int) -> None:
        self._held = _environment(folder, readonly, map_size)

    def put(self, batch: dict[bytes, bytes]) -> None:
        pairs = sorted(batch.items())  # in order the pages fill one after the other

        def body(txn: Any) -> None:
            txn.cursor().putmulti(pairs)

        self._held.run(body, write=True)

    def put_if(self, batch: dict[bytes, bytes], expected: dict[bytes, bytes | None]) -> bool:
        pairs, keys, values = sorted(batch.items()), list(expected), list(expected.values())

        def body(txn: Any) -> bool:
            same = list(map(txn.get, keys)) == values
            if same:
                txn.cursor().putmulti(pairs)
            return same

        return self._held.run(body, write=True)

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        return self._held.run(lambda txn: list(map(txn.get, keys)))

    def floors(self, keys: list[bytes], prefix_length: int, limit: int) -> list[list[Entry]]:
        def body(txn: Any) -> list[list[Entry]]:
            found = []
            with txn.cursor() as cursor:
                for key in keys:
                    prefix = key[:prefix_length]
                    near: list[Entry] = []
                    if cursor.set_range(key):  # the first key >= key
                        more = cursor.key() == key or cursor.prev()
                    else:
                        more = cursor.last()
                    while more and len(near) < limit and cursor.key().startswith(prefix):
                        near.append(cursor.item())
                        more = cursor.prev()
                    found.append(near)
            return found

        return self._held.run(body)

    def page(self, prefix: bytes, after: bytes | None, limit: int) -> list[Entry]:
        def body(txn: Any) -> list[Entry]:
            found: list[Entry] = []
            with txn.cursor() as cursor:
                more = cursor.set_range(after or prefix) if after or prefix else cursor.first()
                if more and after is not None and cursor.key() == after:
                    more = cursor.next()
                while more and len(found) < limit and cursor.key().startswith(prefix):
                    found.append(cursor.item())
                    more = cursor.next()
            return found

        return self._held.run(body)

    def delete(self, keys: list[bytes]) -> int:
        return self._held.run(lambda txn: sum(txn.delete(key) for key in keys), write=True)

    def count(self) -> int:
        return self._held.run(lambda txn: int(txn.stat(self._held.entries)["entries"]))

    def version(self) -> str | None:
        held = self._held.run(lambda txn: txn.get(b"version", db=self._held.header))
        return None if held is None else held.decode()

    def claim(self, version: str) -> str | None:
        held = self.version()
        if held is not None:
            return held

        def body(txn: Any) -> str | None:
            held = txn.get(b"version", db=self._held.header)  # another process may have been faster
            if held is not None:
                return str(held.decode())
            if txn.stat(self._held.entries)["entries"]:
                return None
            txn.put(b"version", version.encode(), db=self._held.header)
            return version

        return self._held.run(body, write=True)

    def durable(self) -> bool:
        flags = self._held.env.flags()
        return bool(flags["sync"] and flags["metasync"] and not flags["writemap"])

    def close(self) -> None:
        _release(self._held)


# ---- Redis -----------------------------------------------------------------------------------------------------------

_CHUNK = 1024
_LOST = "this batch was not acknowledged (all of it or nothing is stored: put it again)"

# One sorted set holds the keys (equal scores sort by bytes), one hash the values; a script reads both at one moment.
_FLOORS = """
local found = {}
for i = 3, #ARGV do
  local low = '-'
  if ARGV[1] ~= '0' then low = '[' .. string.sub(ARGV[i], 1, tonumber(ARGV[1])) end
  local near = {}
  for j, key in ipairs(redis.call('ZREVRANGEBYLEX', KEYS[1], '[' .. ARGV[i], low, 'LIMIT', 0, tonumber(ARGV[2]))) do
    near[2 * j - 1] = key
    near[2 * j] = redis.call('HGET', KEYS[2], key)
  end
  found[i - 2] = near
end
return found
"""
# The values that were read are compared by their SHA-1 ('': absent), so that they do not travel a second time.
_PUT_IF = """
local asked = tonumber(ARGV[1])
for i = 2, 2 * asked, 2 do
  local held = redis.call('HGET', KEYS[2], ARGV[i])
  if (held and redis.sha1hex(held) or '') ~= ARGV[i + 1] then return 0 end
end
for i = 2 * asked + 2, #ARGV, 2 do
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  redis.call('ZADD', KEYS[1], 0, ARGV[i])
end
return 1
"""
_PAGE = """
local found = {}
for i, key in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], ARGV[1], ARGV[2], 'LIMIT', 0, tonumber(ARGV[3]))) do
  found[2 * i - 1] = key
  found[2 * i] = redis.call('HGET', KEYS[2], key)
end
return found
"""


def _without_password(address: str) -> str:
    return re.sub(r"//[^@/]*@", "//", address)


def _after_prefix(prefix: bytes) -> bytes:
    """The upper bound, in ZRANGEBYLEX' form, of the keys that start with `prefix`."""
    head = prefix.rstrip(b"\xff")
    return b"(" + head[:-1] + bytes([head[-1] + 1]) if head else b"+"


class _Redis:
    """All keys of a store carry one hash tag, so a store lies on one node of a cluster."""

    def __init__(self, address: str, readonly: bool) -> None:
        self.name = _without_password(address)
        try:
            import redis
            from redis.backoff import ExponentialBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise StoreError(f"{self.name}: needs the package redis: install the extra [redis]") from error
        try:
            url = urllib.parse.urlsplit(address)
            port = url.port or 6379
        except ValueError as error:
            raise ValueError(f"address {self.name!r}: {error}") from error
        match = re.fullmatch(r"/(\d+)/(.+)", url.path)
        if match is None or not url.hostname or url.query or url.fragment:
            raise ValueError(f"address {self.name!r}: expected the form redis://localhost:6379/0/name")
        base = "userscale:{" + match[2] + "}:"
        self._order, self._values, self._header = base + "keys", base + "values", base + "header"
        self._redis: Any = redis.Redis(
            host=url.hostname, port=port, db=int(match[1]), ssl=url.scheme == "rediss",
            username=urllib.parse.unquote(url.username) if url.username else None,
            password=urllib.parse.unquote(url.password) if url.password else None,
            socket_timeout=60, socket_connect_timeout=5, retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 2),
        )  # fmt: skip
        try:
            with self._errors():
                memory = self._redis.info("memory")
                if memory.get("maxmemory") and str(memory.get("maxmemory_policy", "")).startswith("allkeys"):
                    raise StoreError(
                        f"{self.name}: the server drops keys when memory is short (maxmemory-policy "
                        f"{memory['maxmemory_policy']}): set it to noeviction"
                    )
                if not readonly:
                    self._redis.hsetnx(self._header, "format", FORMAT)
                written = self._redis.hget(self._header, "format")
            if written is None:
                raise StoreError(f"{self.name}: there is no store to read: write it first, or check the name")
            if written != FORMAT:
                raise StoreError(f"{self.name}: has store format {written!r} and this code reads {FORMAT!r}")
        except BaseException:
            self._redis.close()
            raise

    @contextmanager
    def _errors(self, what: str = "cannot be read") -> Iterator[None]:
        import redis

        try:
            yield
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise StoreError(f"{self.name}: {what}, the connection failed or was lost: {error}") from error
        except redis.RedisError as error:
            raise StoreError(f"{self.name}: {what}, the server refused: {error}") from error

    def put(self, batch: dict[bytes, bytes]) -> None:
        pairs = list(batch.items())
        with self._errors(_LOST), self._redis.pipeline(transaction=True) as pipe:
            for at in range(0, len(pairs), _CHUNK):
                part = dict(pairs[at : at + _CHUNK])
                pipe.hset(self._values, mapping=part)
                pipe.zadd(self._order, dict.fromkeys(part, 0))
            pipe.execute()

    def put_if(self, batch: dict[bytes, bytes], expected: dict[bytes, bytes | None]) -> bool:
        said: list[bytes | int | str] = [len(expected)]
        for key, value in expected.items():
            said += (key, "" if value is None else hashlib.sha1(value).hexdigest())
        said += (x for pair in batch.items() for x in pair)
        with self._errors(_LOST):
            return bool(self._redis.eval(_PUT_IF, 2, self._order, self._values, *said))

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        with self._errors(), self._redis.pipeline(transaction=False) as pipe:
            for at in range(0, len(keys), _CHUNK):
                pipe.hmget(self._values, keys[at : at + _CHUNK])
            return [value for part in pipe.execute() for value in part]

    def floors(self, keys: list[bytes], prefix_length: int, limit: int) -> list[list[Entry]]:
        with self._errors(), self._redis.pipeline(transaction=False) as pipe:
            for at in range(0, len(keys), _CHUNK):
                part = keys[at : at + _CHUNK]
                pipe.eval(_FLOORS, 2, self._order, self._values, prefix_length, limit, *part)
            return [self._pairs(near) for part in pipe.execute() for near in part]

    def page(self, prefix: bytes, after: bytes | None, limit: int) -> list[Entry]:
        low = b"(" + after if after is not None else b"[" + prefix if prefix else b"-"
        with self._errors():
            flat = self._redis.eval(_PAGE, 2, self._order, self._values, low, _after_prefix(prefix), limit)
        return self._pairs(flat)

    def _pairs(self, flat: list[Any]) -> list[Entry]:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        for key, value in pairs:
            if value is None:
                raise StoreError(f"{self.name}: key {key!r} has lost its value: something else wrote or evicted it")
        return pairs

    def delete(self, keys: list[bytes]) -> int:
        lost = "this delete was not acknowledged (all of it or nothing is done: delete again)"
        with self._errors(lost), self._redis.pipeline(transaction=True) as pipe:
            for at in range(0, len(keys), _CHUNK):
                pipe.zrem(self._order, *keys[at : at + _CHUNK])
                pipe.hdel(self._values, *keys[at : at + _CHUNK])
            return sum(pipe.execute()[1::2])

    def count(self) -> int:
        with self._errors():
            return int(self._redis.zcard(self._order))

    def version(self) -> str | None:
        with self._errors():
            held = self._redis.hget(self._header, "version")
        return None if held is None else held.decode()

    def claim(self, version: str) -> str | None:
        held = self.version()
        if held is None and self.count() == 0:
            with self._errors("the version was not acknowledged"):
                self._redis.hsetnx(self._header, "version", version)
            held = self.version()  # another process may have been faster
        return held

    def durable(self) -> bool:
        import redis

        with self._errors():
            try:
                settings = self._redis.config_get("append*")
            except redis.ResponseError:  # many hosted servers do not tell
                return False
        return bool(settings.get("appendonly") == "yes" and settings.get("appendfsync") == "always")

    def close(self) -> None:
        self._redis.close()

"""LMDB environments: one a process and folder, its map growing as it fills, refused where a read could kill."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from rec_core.store.base import FORMAT, StoreError

T = TypeVar("T")


class Environment:
    """The one LMDB environment that a process may have open for a folder; shared by its stores, counted in `users`."""

    def __init__(self, folder: Path, readonly: bool, map_size: int) -> None:
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

    def last_write(self) -> int:
        """The number of the last transaction that wrote; at most that of the state that is read next."""
        return self.run(lambda txn: int(txn.id()))

    def _resize(self, size: int) -> None:
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


_ENVIRONMENTS: dict[Path, Environment] = {}
_ENVIRONMENTS_LOCK = threading.Lock()


def environment(folder: Path, readonly: bool, map_size: int) -> Environment:
    folder = folder.absolute().resolve()
    with _ENVIRONMENTS_LOCK:
        held = _ENVIRONMENTS.get(folder)
        if held is not None and held.pid != os.getpid():
            held.env.close()  # our copy of what was open before a fork; the parent keeps its own
            held = None
        if held is not None and held.file != _file_id(folder / "data.mdb"):  # the folder was removed or replaced
            held = None
        if held is None:
            held = _ENVIRONMENTS[folder] = Environment(folder, readonly, map_size)
        elif held.readonly and not readonly:
            raise StoreError(f"{folder}: is open for reading in this process: close that store before opening to write")
        held.users += 1
        return held


def release(held: Environment) -> None:
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

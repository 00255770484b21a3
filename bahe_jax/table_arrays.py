"""A table's rows as two mapped NumPy arrays in a folder, beside the manifest that says how many of them count.

    FOLDER/part-00000/manifest.json    settings, and the rows that were committed
                      index.npy        key and length of each row
                      vectors.npy      [rows, d] or [rows, K, d]

Rows are appended and synced to disk before the manifest is replaced, so a process that dies leaves the rows that were
committed, and what it wrote behind them is written over. Each process writes a part of its own.
"""

import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int, UInt64

from rec_core.data.files import writing
from rec_core.store import StoreError

_INDEX = np.dtype([("key", "V16"), ("length", "<u4")])
_MANIFEST = "manifest.json"


def check_settings(name: str, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    """StoreError if a table was made with other settings."""
    for field, value in wanted.items():
        if held.get(field) != value:
            raise StoreError(
                f"{name}: holds a table of {field} {held.get(field)!r} and was opened for {value!r}; vectors of two "
                "kinds do not mix: open it as it was made, or make a new table elsewhere"
            )


class ArrayRows:
    """Rows of all parts; see `open_table`. A part that another process writes is read as it was when this opened it."""

    def __init__(
        self, folder: str, settings: dict[str, Any], entry: np.dtype[Any], *, readonly: bool, part: int
    ) -> None:  # fmt: skip
        root = Path(folder)
        self.name = f"array:{folder}"
        self._entry = entry
        self._writer: _Part | None = None
        self._parts: list[_Part] = []
        if part < 0 or not folder:
            raise ValueError(f"array table {folder!r}, part {part}: a folder and a part of at least 0 are needed")
        own = root / f"part-{part:05}"
        try:
            if not readonly:
                own.mkdir(parents=True, exist_ok=True)
                self._writer = _Part(own, settings, entry, write=True)
                self._parts.append(self._writer)
            for other in sorted(root.glob("part-*")):
                if (other != own or readonly) and (other / _MANIFEST).exists():
                    self._parts.append(_Part(other, settings, entry, write=False))
        except BaseException:
            self.close()
            raise
        if not self._parts:
            raise StoreError(f"{self.name}: is not there, or holds no table of behaviours")

    def get(self, keys: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The rows, zeros where there are none, and which were found."""
        rows, found = np.zeros(len(keys), self._entry), np.zeros(len(keys), bool)
        asked = _halves(np.frombuffer(b"".join(keys), "V16"))
        for part in self._parts:
            place = part.find(asked)
            here = (place >= 0) & ~found
            rows["length"][here] = part.index["length"][place[here]]
            rows["vector"][here] = part.vectors[place[here]]
            found |= here
        return rows, found

    def put(self, keys: list[bytes], rows: np.ndarray) -> None:
        """Appends rows to this process's part, and returns when they are on disk."""
        if self._writer is None:
            raise StoreError(f"{self.name}: was opened with readonly=True")
        self._writer.append(np.frombuffer(b"".join(keys), "V16"), rows)

    def __len__(self) -> int:
        return sum(len(part.index) for part in self._parts)

    def close(self) -> None:
        for part in self._parts:
            part.close()
        self._parts, self._writer = [], None


class _Part:
    """One folder: read through memory maps, appended to by the process that holds its lock."""

    def __init__(self, folder: Path, settings: dict[str, Any], entry: np.dtype[Any], *, write: bool) -> None:
        self._folder, self._settings = folder, settings
        self._types: dict[str, np.dtype[Any]] = {"index": _INDEX, "vectors": entry["vector"]}
        self._files: dict[str, BinaryIO] = {}
        self._lock: BinaryIO | None = None
        self._order = np.zeros(0, np.int64)
        self._high, self._low = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        if write:
            self._lock = (folder / "lock").open("ab")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._lock.close()
                raise StoreError(f"{folder}: another process writes this part: give each process its own") from error
        try:
            self._map(self._committed())
            if write:
                for name, dtype in self._types.items():
                    path = self._path(name)
                    path.touch()
                    self._files[name] = path.open("r+b")
                    if not path.stat().st_size:
                        self._files[name].write(_header(dtype, 0))
        except BaseException:
            self.close()
            raise

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def _committed(self) -> int:
        file = self._folder / _MANIFEST
        try:
            held = json.loads(file.read_text())
            check_settings(str(self._folder), held, self._settings)
            if type(held["rows"]) is not int or held["rows"] < 0:
                raise ValueError(f"rows is {held['rows']!r}")
            return int(held["rows"])
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise StoreError(f"{file}: cannot be read ({error}): restore it, or make a new table") from error

    def _map(self, rows: int) -> None:
        """Maps the first `rows` rows, and sorts the keys of those that are new by their first half."""
        maps: dict[str, np.ndarray] = {}
        for name, dtype in self._types.items():
            base, inner = (dtype.base, dtype.shape)
            path, offset = self._path(name), len(_header(dtype, 0))
            size = path.stat().st_size if path.exists() else 0
            if rows and size < offset + rows * dtype.itemsize:
                raise StoreError(
                    f"{path}: has {size} bytes, too few for the {rows} rows of its manifest: it is damaged; restore "
                    f"it, or remove {self._folder} and encode its texts again"
                )
            shape = (rows, *inner)
            maps[name] = np.memmap(path, base, "r", offset, shape) if rows else np.zeros(shape, base)
        self.index, self.vectors = maps["index"], maps["vectors"]
        # New keys go between those that are sorted: sorting all again would make a long run's time quadratic.
        first = len(self._order)
        high, low = _halves(np.ascontiguousarray(self.index["key"][first:]))
        order = np.argsort(high, kind="stable")
        at = np.searchsorted(self._high, high[order], side="right")
        self._order = np.insert(self._order, at, first + order)
        self._high, self._low = np.insert(self._high, at, high[order]), np.insert(self._low, at, low[order])

    def find(self, keys: tuple[UInt64[np.ndarray, " n"], UInt64[np.ndarray, " n"]]) -> Int[np.ndarray, " n"]:
        """The row of each key, -1 where there is none."""
        high, low = keys
        out, count = np.full(len(high), -1), len(self._order)
        at = np.searchsorted(self._high, high)
        left = np.arange(len(high))
        while len(left):  # once more for each key that shares its first half with another
            left = left[at[left] < count]
            left = left[self._high[at[left]] == high[left]]
            same = self._low[at[left]] == low[left]
            out[left[same]] = self._order[at[left[same]]]
            left = left[~same]
            at[left] += 1
        return out

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Writes rows behind those that are committed, and commits them."""
        total = len(self.index) + len(keys)
        index = np.zeros(len(keys), _INDEX)
        index["key"], index["length"] = keys, rows["length"]
        with writing(self._folder, lambda: rows.nbytes):
            self._write("vectors", np.ascontiguousarray(rows["vector"]))
            self._write("index", index)
            partial = self._folder / f".{_MANIFEST}"
            with partial.open("wb") as manifest:
                manifest.write(json.dumps(self._settings | {"rows": total}, indent=2).encode())
                _sync(manifest)
            os.replace(partial, self._folder / _MANIFEST)
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            for name, dtype in self._types.items():  # for other readers of the arrays; ours go by the manifest
                self._files[name].seek(0)
                self._files[name].write(_header(dtype, total))
                self._files[name].flush()
        self._map(total)

    def _write(self, name: str, values: np.ndarray) -> None:
        file, dtype = self._files[name], self._types[name]
        file.seek(len(_header(dtype, 0)) + len(self.index) * dtype.itemsize)
        file.write(values.tobytes())
        file.truncate()
        _sync(file)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _header(dtype: np.dtype[Any], rows: int) -> bytes:
    """The start of an .npy file of so many rows; NumPy leaves room, so that all have one size."""
    stream = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype.base), "fortran_order": False, "shape": (rows, *dtype.shape)}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def _halves(keys: np.ndarray) -> tuple[UInt64[np.ndarray, " n"], UInt64[np.ndarray, " n"]]:
    """Keys of 16 bytes as two columns of integers."""
    pair = keys.view(">u8").reshape(-1, 2).astype(np.uint64)
    return pair[:, 0], pair[:, 1]


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

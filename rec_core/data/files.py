"""Files that appear whole or not at all, and a full disk that says so."""

import errno
import hashlib
import os
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rec_core.data.schema import DataError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(path: Path, needed: Callable[[], int]) -> Iterator[None]:
    """Turn a failed write into a DataError that names the path; for a full disk, also `needed()` bytes."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError with the system's message
        code = error.errno if isinstance(error, OSError) else None
        if code in _FULL or any(os.strerror(full) in str(error) for full in _FULL):
            free = shutil.disk_usage(_nearest(path)).free
            raise DataError(
                f"{path}: the disk is full or a file-size limit is met ({error}); about {needed():,} bytes are needed, "
                f"{free:,} are free there; nothing was left behind, make room or name another folder"
            ) from error
        raise DataError(f"{path}: cannot be written: {error}") from error


@contextmanager
def creating(out: Path, taken: Callable[[], bool]) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends without an error, and vanishes otherwise.

    An `out` that exists is replaced. `taken`: asked when another process made `out` meanwhile; True: theirs is as good.
    """
    partial = out.with_name(f".{out.name}.partial-{socket.gethostname()}-{os.getpid()}")
    with writing(out, lambda: 0):
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(out)
        partial.mkdir()
    try:
        yield partial
        with writing(out, lambda: sum(file.stat().st_size for file in partial.iterdir())):
            for file in partial.iterdir():
                _sync(file)
            _sync(partial)
            old = out.with_name(f"{partial.name}-old")
            if out.exists():
                os.rename(out, old)
            try:
                os.rename(partial, out)
            except OSError as error:
                if old.exists():
                    os.rename(old, out)
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not taken():
                    raise
            _sync(out.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_dead(out: Path) -> None:
    """Partial folders of runs of this machine that were killed."""
    prefix = f".{out.name}.partial-{socket.gethostname()}-"
    for folder in out.parent.glob(f"{prefix}*"):
        pid = folder.name.removeprefix(prefix).removesuffix("-old")
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _nearest(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz of arrays and lists of strings (kept as UTF-8 bytes and offsets; nothing is pickled)."""
    plain: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        if isinstance(value, np.ndarray):
            plain[name] = value
        else:
            parts = [text.encode("utf-8", "replace") for text in value]
            plain[f"{name}.utf8"] = np.frombuffer(b"".join(parts), np.uint8)
            plain[f"{name}.ends"] = np.cumsum([len(part) for part in parts], dtype=np.int64)
    with path.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **plain)


def load_arrays(path: Path, sha256: str) -> dict[str, Any]:
    """What `save_arrays` wrote; a file that is damaged or gone is a DataError."""
    try:
        if digest(path) != sha256:
            raise DataError(f"{path}: is damaged (its checksum differs); prepare the dataset again or restore the file")
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    for name in [n.removesuffix(".utf8") for n in arrays if n.endswith(".utf8")]:
        arrays[name] = _texts(arrays.pop(f"{name}.utf8"), arrays.pop(f"{name}.ends"))
    return arrays


def _texts(data: np.ndarray, ends: np.ndarray) -> Sequence[str]:
    raw, start, texts = data.tobytes(), 0, []
    for end in ends.tolist():
        texts.append(raw[start:end].decode())
        start = end
    return texts

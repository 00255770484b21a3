"""Official sources by name, downloaded once, checked and unpacked. Nothing is downloaded unless it is asked for."""

import http.client
import shutil
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rec_core.data.files import creating, digest, writing
from rec_core.data.schema import DataError


@dataclass(frozen=True)
class Download:
    """An official file and what proves that it is whole."""

    url: str
    files: tuple[str, ...]  # what the reader needs of it
    md5: str | None = None  # None: the publisher gives none, and `lines` of the file are counted instead
    lines: int | None = None


SOURCES: dict[str, Download] = {
    "ml-1m": Download(
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        ("ratings.dat", "movies.dat", "users.dat"),
        md5="c4d9eecfca2ab87c1945afe126590906",
    ),
    "ml-20m": Download(
        "https://files.grouplens.org/datasets/movielens/ml-20m.zip",
        ("ratings.csv", "movies.csv"),
        md5="cd245b17a1ae2cc31bb14903e1204af3",
    ),
    "amazon-2014-books": Download(
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/ratings_Books.csv",
        ("ratings_Books.csv",),
        lines=22_507_155,
    ),
}
BY_HAND = {
    "taobao": "its site asks for a login; take UserBehavior.csv.zip from https://tianchi.aliyun.com/dataset/649, "
    "unpack it and name its folder",
}


def download(
    name: str, out_dir: str | Path, *, source: Download | None = None, log: Callable[[str], None] = print
) -> Path:
    """Download `name` into `out_dir / name`, check it, unpack it, and return that folder; a complete one is kept.

    source: another place or file under that name; None: the official one.
    Raises DataError: unknown name, no network, a wrong checksum, a damaged archive, a full disk.
    """
    if source is None:
        if name in BY_HAND:
            raise DataError(f"{name} cannot be downloaded: {BY_HAND[name]}")
        if name not in SOURCES:
            raise DataError(f"no source is called {name!r}; known are {', '.join([*SOURCES, *BY_HAND])}")
        source = SOURCES[name]
    folder = Path(out_dir) / name
    if all((folder / file).is_file() for file in source.files):
        log(f"{folder}: already there")
        return folder
    if folder.exists() and any(folder.iterdir()):
        missing = [file for file in source.files if not (folder / file).is_file()]
        raise DataError(f"{folder}: exists without {', '.join(missing)}; remove it or name another folder")
    with creating(folder, lambda: True) as fresh:
        archive = fresh / source.url.rsplit("/", 1)[-1]
        log(f"{name}: downloading {source.url}")
        _fetch(source.url, archive)
        _check(source, archive)
        if archive.suffix == ".zip":
            _unpack(source, archive, fresh)
            archive.unlink()
    log(f"{folder}: {', '.join(source.files)}")
    return folder


def _fetch(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as stream:
            length = int(response.headers.get("Content-Length") or 0)
            while block := response.read(1 << 20):
                with writing(path, lambda: length):
                    stream.write(block)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{url}: cannot be downloaded ({getattr(error, 'reason', error)}); take it to this machine another way, "
            "unpack it and name its folder"
        ) from error


def _check(source: Download, path: Path) -> None:
    if source.md5 is not None and (found := digest(path, "md5")) != source.md5:
        raise DataError(
            f"{source.url}: md5 {found} of {path.stat().st_size:,} bytes, the publisher's is {source.md5}: the "
            "download was cut short or the file was changed; try again"
        )
    if source.lines is not None:
        with path.open("rb") as stream:
            lines = sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 24), b""))
        if lines != source.lines:
            raise DataError(f"{source.url}: {lines:,} lines, the publisher says {source.lines:,}; try again")


def _unpack(source: Download, archive: Path, folder: Path) -> None:
    """Every file of the archive's one folder, by its bare name: no path inside the archive is trusted."""
    try:
        with zipfile.ZipFile(archive) as stored:
            for member in stored.infolist():
                if member.is_dir():
                    continue
                target = folder / Path(member.filename).name
                needed = partial(int, member.file_size)
                with writing(target, needed), stored.open(member) as data, target.open("wb") as out:
                    shutil.copyfileobj(data, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive.name}: not a whole zip archive ({error}); try again") from error
    missing = [file for file in source.files if not (folder / file).is_file()]
    if missing:
        raise DataError(f"{source.url}: the archive has no {', '.join(missing)}")

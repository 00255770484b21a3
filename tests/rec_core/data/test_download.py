"""Downloads: checked, whole or not at all. Only file:// addresses are used here."""

import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from rec_core.data.download import SOURCES, Download, download
from rec_core.data.schema import DataError


def archive(folder: Path, files: dict[str, bytes]) -> tuple[str, str]:
    """file:// address and md5 of a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as stored:
        for name, data in files.items():
            stored.writestr(name, data)
    path = folder / "made.zip"
    path.write_bytes(buffer.getvalue())
    return path.as_uri(), hashlib.md5(buffer.getvalue()).hexdigest()


def test_a_checked_archive_is_unpacked_once(tmp_path: Path) -> None:
    url, md5 = archive(tmp_path, {"ml/ratings.dat": b"1::2::3::4\n", "../../evil.txt": b"x"})
    source, lines = Download(url, ("ratings.dat",), md5=md5), []
    folder = download("ml", tmp_path / "data", source=source, log=lines.append)
    assert (folder / "ratings.dat").read_bytes() == b"1::2::3::4\n"
    assert not (folder / "made.zip").exists() and not list(
        tmp_path.glob("evil.txt")
    )  # no path of the archive is followed
    (tmp_path / "made.zip").unlink()
    assert download("ml", tmp_path / "data", source=source, log=lines.append) == folder
    assert "already there" in lines[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"md5": "0" * 32}, r"md5 [0-9a-f]{32} of [\d,]+ bytes, the publisher's is 0{32}"),
        ({"url": "file:///no/such/made.zip"}, r"cannot be downloaded .*another way"),
        ({"files": ("movies.dat",)}, r"the archive has no movies\.dat"),
        ({"md5": None, "lines": 5}, r"lines, the publisher says 5"),
    ],
)
def test_a_failed_download_leaves_nothing(tmp_path: Path, change: dict, message: str) -> None:
    url, md5 = archive(tmp_path, {"ratings.dat": b"1::2::3::4\n"})
    source = Download(**{"url": url, "files": ("ratings.dat",), "md5": md5} | change)
    with pytest.raises(DataError, match=message):
        download("ml", tmp_path / "data", source=source, log=lambda _: None)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_plain_files_are_checked_by_their_lines(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("a\nb\n")
    source = Download((tmp_path / "ratings.csv").as_uri(), ("ratings.csv",), lines=2)
    folder = download("books", tmp_path / "data", source=source, log=lambda _: None)
    assert (folder / "ratings.csv").read_text() == "a\nb\n"


def test_names_and_what_cannot_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no source is called 'netflix'; known are ml-1m, ml-20m"):
        download("netflix", tmp_path)
    with pytest.raises(DataError, match=r"taobao cannot be downloaded: .*login"):
        download("taobao", tmp_path)
    assert all(source.md5 or source.lines for source in SOURCES.values())
    (tmp_path / "ml-1m").mkdir()
    (tmp_path / "ml-1m" / "ratings.dat").touch()
    with pytest.raises(DataError, match=r"exists without movies\.dat, users\.dat"):
        download("ml-1m", tmp_path)

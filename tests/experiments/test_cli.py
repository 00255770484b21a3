"""The command line as a user types it: own data in, a report out; what is wrong is named, and nothing is lost."""

import os
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments import quickstart, results
from experiments.__main__ import main
from rec_core.checkpoint import CheckpointError
from rec_core.training import DivergedError

ROOT = Path(__file__).parents[2]
COLUMNS = ("--columns", "user=who", "item=what", "time=when")


def table(path: Path, rows: list[str], header: str = "when,who,what,note") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 60 users x 30 events: no ratings, no categories, columns under names of its own."""
    rng = np.random.default_rng(0)
    time = np.sort(rng.integers(1_600_000_000, 1_608_000_000, (60, 30)), axis=1)
    item = (rng.integers(0, 40, (60, 1)) + np.cumsum(rng.integers(0, 3, (60, 30)), axis=1)) % 40
    rows = [f"{time[u, k]},u{u:02},sku-{item[u, k]},x" for u in range(60) for k in range(30)]
    return table(tmp_path_factory.mktemp("own") / "log.csv", rows)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must end with status 1 says; its first line is the error."""
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = said.splitlines()
    assert lines[0].startswith("error: ") and len(lines) <= 3, said
    return lines[0].removeprefix("error: ")


def prepare(file: Path, out: Path, *options: str, columns: tuple[str, ...] = COLUMNS) -> list[str]:
    return ["prepare", "--data", "table", "--data-dir", str(file), "--prepared", str(out), *columns, *options]


def noted(error: Exception, note: str) -> Exception:
    error.add_note(note)
    return error


GOOD = "10,ann,hat,x"


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([GOOD, "11,bob,hat"], (), "log.csv:3: expected 4 fields separated by ',', got 3: '11,bob,hat'"),
        ([GOOD, GOOD, "-5,bob,hat,x"], (), "log.csv:4: time '-5' is before 1970: '-5,bob,hat,x'"),
        ([GOOD, "1600000000000,bob,hat,x"], (), "log.csv:3: time '1600000000000' is after 2100"),
        ([GOOD, "noon,bob,hat,x"], (), "log.csv:3: time 'noon' is not a whole number"),
        ([GOOD, "11,,hat,x"], (), "log.csv:3: user is empty"),
        (["10,ann,hat,4", "11,bob,hat,nan"], ("rating=note",), "log.csv:3: rating 'nan' is not finite"),
        ([GOOD], ("rating=stars",), "log.csv: no column 'stars'; the columns are ['when', 'who', 'what', 'note']"),
        ([GOOD], ("colour=note",), "no field is called 'colour'; fields are user, item, time"),
        ([GOOD], ("rating",), "give field=column pairs"),
        ([], (), "log.csv: no rows"),
    ],
)
def test_bad_rows_and_columns_are_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str], columns: tuple[str, ...], message: str
) -> None:
    file = table(tmp_path / "log.csv", rows)
    assert message in refused(prepare(file, tmp_path / "out", columns=(*COLUMNS, *columns)), capsys)
    assert not (tmp_path / "out").exists()


def test_a_process_ends_with_status_1_one_line_and_no_traceback(tmp_path: Path) -> None:
    file = table(tmp_path / "log.csv", [GOOD, "11,bob"])
    command = [sys.executable, "-m", "experiments", *prepare(file, tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {file}:3: expected 4 fields separated by ',', got 2: '11,bob'\n")
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--seeds", "0"], "seeds=0 must be at least 1"),
        (["quickstart", "--seeds", "many"], "invalid literal for int() with base 10: 'many'"),
        (["quickstart", "--lum-share", "0"], "lum_share=0.0 must be above 0 and at most 1"),
        (["quickstart", "--sweep-lengths", "8", "16"], "at least 3 values each"),
        (["quickstart", "--sede", "1"], "--sede"),
        (["quickfinish"], "quickfinish"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:  # as argparse does: status 2, and a box that points to --help
        main(arguments)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert message in re.sub(r"[\s│]+", " ", said.out + said.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "--data", "table"], "data='table' needs data_dir"),
        (["prepare", "--data", "table", "--data-dir", "absent.csv", *COLUMNS], "absent.csv: no such file"),
        (["prepare", "--data", "prepared"], "data='prepared' needs data_dir"),
        (["quickstart", "--data", "prepared", "--data-dir", "."], "not a prepared dataset"),
        (["prepare", "--data", "ml-1m", "--data-dir", "."], "ratings.dat: no such file (found there: nothing)"),
        (["prepare", "--data", "ml-1m", "--data-dir", ".", "--columns", "user=a"], "only data='table' names columns"),
        (["compare", "a.json", "b.json"], "a.json: no such file"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(arguments, capsys)


def test_prepare_says_what_there_is_and_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: Path
) -> None:
    assert main(prepare(own, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "log: 60 users, 40 items, 1,800 events" in said and "min 30, median 30, mean 30.0" in said
    rows = ["10,ann,hat,x", "5,ann,cap,x", "7,bob,hat,x", "7,bob", "9,bob,cap,x", "8,bob,hat,x"]
    file = table(tmp_path / "mixed.csv", rows)
    assert main(prepare(file, tmp_path / "out", "--on-bad", "skip", "--max-events", "2")) == 0
    said = capsys.readouterr().out
    assert "mixed: 2 users, 2 items, 4 events" in said
    assert "malformed rows left out: 1" in said and "rows back in time that were sorted: 2" in said
    assert "truncated: 1 events (20.0%) of 1 users" in said


def test_a_damaged_shard_is_named_by_file_and_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: Path
) -> None:
    assert main(prepare(own, tmp_path)) == 0
    (shard,) = (tmp_path / "log").glob("events-*")
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    shard.write_bytes(raw)
    run = ["quickstart", "--data", "prepared", "--data-dir", str(tmp_path / "log"), "--out", str(tmp_path / "run")]
    message = refused(run, capsys)
    assert re.search(
        rf"{re.escape(str(shard))}: record 0 (is damaged|cannot be read).*prepare the dataset again", message
    )
    shard.write_bytes(raw[:-10])
    assert re.search(rf"{re.escape(str(shard))}: has [\d,]+ bytes, written were [\d,]+", refused(run, capsys))
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_full_disk_is_named_and_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: Path
) -> None:
    other = table(tmp_path / "log.csv", [GOOD])
    assert main(prepare(other, tmp_path / "out")) == 0
    before = (tmp_path / "out" / "log" / "meta.json").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may grow beyond it, as on a full disk
    try:
        message = refused(prepare(own, tmp_path / "out"), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "out") in message and "bytes are needed" in message
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["log"]
    assert (tmp_path / "out" / "log" / "meta.json").read_bytes() == before


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (DivergedError(3, float("nan"), 2.0, "runs/lum (step 3)"), ["error: .* diverged at step 3: loss nan, .*"]),
        (noted(ValueError("item[2] is 99: must be in [0, 64)"), "in the batch of step 7"),
         [r"error: item\[2\] is 99: .*", "  in the batch of step 7"]),
        (CheckpointError("runs/lum/4 is of another configuration: config.width: 8 in the checkpoint, 4 now"),
         ["error: .*config.width: 8 in the checkpoint, 4 now"]),
    ],
    ids=["diverged", "bad batch", "another configuration"],
)  # fmt: skip
def test_what_ends_a_training_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, lines: list[str]
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("experiments.tools.compare", fail)
    assert main(["compare", "a.json", "b.json"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(lines) and all(re.fullmatch(want, line) for want, line in zip(lines, said)), said


class Page(HTMLParser):
    """What a page refers to, and its figures' captions and drawings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]


def test_quickstart_on_a_table_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own: Path
) -> None:
    """No ratings and no categories: negatives are sampled, items get classes of popularity, and it is said."""
    for name, value in (("lum_events", 2_000), ("lum_length", 16)):  # the sweep's, so that a step is compiled less
        monkeypatch.setitem(quickstart.QUICK, name, value)
    arguments = ["quickstart", "--quick", "--data", "table", "--data-dir", str(own), *COLUMNS]
    folders = ["--prepared", str(tmp_path / "prepared"), "--out", str(tmp_path / "run")]
    assert main([*arguments, *folders]) == 0
    said = capsys.readouterr()
    assert "log: 60 users, 40 items, 1,800 events" in said.out and "0 categories" in said.out
    found = results.read(tmp_path / "run" / "result.json")
    assert found.experiment == "quickstart_log" and found.seconds > 0
    ranking = [row for row in found.rows if row["kind"] == "ranking"]
    assert {(row["system"], row["seed"]) for row in ranking} == {(s, n) for s in ("DIN", "DIN + LUM") for n in (0, 1)}
    sweep = {(row["size"], row["length"]): row for row in found.rows if row["kind"] == "sweep"}
    assert sweep.keys() == {(size, length) for size in ("6k", "25k", "100k") for length in (4, 8, 16)}
    assert all(0 <= row["recall_at_10"] <= row["recall_at_50"] <= 1 for row in sweep.values())
    for name in ("din_auc", "din_lum_auc"):
        assert 0.3 < found.figures[name] < 1
    assert found.figures["gain_auc_low"] <= found.figures["gain_auc"] <= found.figures["gain_auc_high"]
    np.testing.assert_allclose(
        found.figures["gain_auc"], found.figures["din_lum_auc"] - found.figures["din_auc"], atol=1e-6
    )
    assert "oracle_auc" not in found.figures  # only the synthetic world knows it
    contains_zero = found.figures["gain_auc_low"] <= 0 <= found.figures["gain_auc_high"]
    assert ("The interval contains zero" in said.out) == contains_zero

    text = (tmp_path / "run" / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("figure") == page.tags.count("svg") == 5
    for title in ("Ranking", "Recall over model size", "Recall over length", "Pre-training", "Ranking losses"):
        assert title in text
    assert page.links and not [link for link in page.links if not link.startswith(("#", "data:"))]
    assert not re.search(r"@import|url\((?!#)|<script|<iframe", text)
    assert "Negatives were sampled" in text
    assert "Traceback" not in said.err and "done, " in said.err
    assert os.listdir(tmp_path / "run" / "knowledge")

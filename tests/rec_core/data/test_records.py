"""Prepared datasets: what is written is what is read; damage, a full disk and a kill are never silent."""

import errno
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_core.data import writer
from rec_core.data.records import Dataset, open_dataset
from rec_core.data.schema import DataError, EventLog, Items
from rec_core.data.writer import write


def make_log(lengths: list[int], seed: int = 0) -> EventLog:
    """An encoded log with these history lengths; values random, incompressible."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    user = np.repeat(np.arange(len(lengths)), lengths).astype(np.int64)
    time = rng.integers(0, 2**31, n)
    return EventLog(
        user, rng.integers(1, 500, n), time[np.lexsort((time, user))], domain=rng.integers(0, 4, n).astype(np.int32),
        label=rng.integers(0, 2, n).astype(np.uint8), probability=rng.random(n, np.float32),
    )  # fmt: skip


def in_blocks(log: EventLog, users: list[int]) -> list[EventLog]:
    """The log in blocks of so many users."""
    bounds = np.searchsorted(log.user, np.cumsum([0, *users, 1 << 30]))
    return [log.take(slice(a, b)) for a, b in pairwise(bounds)]


ITEMS = Items(np.arange(2, 500), category=(np.arange(2, 500) % 7).astype(np.int32))
META = {"source": "made", "options": {"seed": 0}}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset of several records in two shards, which tests damage and mend."""
    log = make_log([900] * 40)
    return write([log], ITEMS, tmp_path_factory.mktemp("d") / "set", meta=META, shards=2, block_events=9000)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40), st.lists(st.integers(0, 9), max_size=6), st.integers(1, 200),
    st.integers(1, 3),
)  # fmt: skip
def test_what_is_written_is_read_whatever_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], users: list[int], block_events: int, shards: int
) -> None:
    log, out = make_log(lengths), tmp_path_factory.mktemp("d") / "set"
    dataset = write(in_blocks(log, users), ITEMS, out, meta=META, shards=shards, block_events=block_events)
    columns = dataset.columns()
    assert list(columns) == ["user", "item", "time", "domain", "label", "probability", "category"]
    for name, expected in log.columns().items():
        assert np.array_equal(columns[name], expected)
    assert np.array_equal(columns["category"], np.append([0, 0], ITEMS.category)[log.item])
    assert columns["item"].dtype == columns["user"].dtype == np.int32
    assert np.diff(dataset.offsets).tolist() == lengths and dataset.domains == log.domain.max() + 1
    events = dataset.meta["records"]["events"]
    assert all(n >= block_events for n in events[:-1]) and sum(events) == len(log)
    start = 0
    for i in range(dataset.block_count):  # whole users, in order, in the schema's own form
        block = dataset.block(i)
        for name, expected in log.columns().items():
            part = getattr(block, name)
            assert part.dtype == expected.dtype and np.array_equal(part, expected[start : start + len(block)])
        start += len(block)
    assert start == len(log)


@given(st.lists(st.integers(0, 50), min_size=30, max_size=300))
def test_split_by_time_is_the_exact_quantile(tmp_path_factory: pytest.TempPathFactory, times: list[int]) -> None:
    scale = 40_000_000 if times[0] % 2 else 1  # also a range wider than one pass of counting resolves
    time = np.sort(np.array(times, np.int64)) * scale
    log = EventLog(np.zeros(len(time), np.int64), np.full(len(time), 2), time)
    dataset = write([log], ITEMS, tmp_path_factory.mktemp("d") / "set", meta=META)
    at = [int(time[min(round(f * len(time)), len(time) - 1)]) for f in (0.8, 0.9)]
    if time[0] < at[0] < at[1]:
        assert dataset.split() == tuple(at)
    else:
        with pytest.raises(DataError, match="cannot be split"):
            dataset.split()
    with pytest.raises(DataError, match="three positive shares"):
        dataset.split((0.8, 0.2, 0.0))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([EventLog(np.array([0, 2]), np.array([2, 2]), np.array([1, 1]))], r"block 0: user 2 in row 1 follows user 0"),
        ([EventLog(np.array([1]), np.array([2]), np.array([1]))], r"block 0: user 1 in row 0 follows user -1"),
        ([EventLog(np.array([0]), np.array([2]), np.array([1]))] * 2, r"block 1: user 0 in row 0 follows user 0"),
        ([EventLog(np.array([0]), np.array([500]), np.array([1]))], r"block 0: item 500 in row 0 .*lie in 1 \.\. 499"),
        ([EventLog(np.array([0]), np.array([0]), np.array([1]))], r"block 0: item 0 in row 0"),
        ([EventLog(np.array([0, 0]), np.array([2, 2]), np.array([2, 1]))], r"time 1 in row 1 .*not go backwards"),
        ([], "no events to write"),
    ],
)
def test_blocks_that_are_not_encoded_logs_are_refused(tmp_path: Path, blocks: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(blocks, ITEMS, tmp_path / "set", meta=META)
    assert list(tmp_path.iterdir()) == []


def test_side_tables_are_checked(tmp_path: Path) -> None:
    log = make_log([3, 4])
    with pytest.raises(DataError, match=r"items\.item: ids must be sorted"):
        write([log], Items(np.array([3, 2, 499])), tmp_path / "set", meta=META)
    with pytest.raises(DataError, match=r"items.category: ids 0 \.\. 6 must lie in 0 \.\. 2"):
        write([log], ITEMS, tmp_path / "set", meta=META | {"categories": 3})
    with pytest.raises(DataError, match=r"user feature 'age' has shape \(3,\), there are 2 users"):
        write([log], ITEMS, tmp_path / "set", meta=META, user_features={"age": np.zeros(3, np.int32)})
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_of_the_same_identity_is_not_generated_again(tmp_path: Path) -> None:
    first = write([make_log([3, 4])], ITEMS, tmp_path / "set", meta=META)

    def never() -> object:
        raise AssertionError("generated again")
        yield

    assert write(never(), ITEMS, tmp_path / "set", meta=META).meta == first.meta
    with pytest.raises(DataError, match="another options"):
        write(never(), ITEMS, tmp_path / "set", meta=META | {"options": {"seed": 1}})


@given(st.data())
def test_a_flipped_byte_is_an_error_or_changes_nothing(damaged: Dataset, data: st.DataObject) -> None:
    whole = damaged.columns()
    files = sorted(p for p in damaged.path.iterdir() if p.name != "meta.json")
    file = data.draw(st.sampled_from(files))
    original = file.read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    broken = bytearray(original)
    broken[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(broken)
    try:
        dataset = open_dataset(damaged.path)
        columns = dataset.columns()
        for name, column in whole.items():
            assert np.array_equal(columns[name], column)
    except DataError as error:
        assert str(file) in str(error)
    finally:
        file.write_bytes(original)


def test_damage_in_a_record_names_file_and_record(damaged: Dataset) -> None:
    file = damaged.path / "events-00001-of-00002.arrayrecord"
    original = file.read_bytes()
    file.write_bytes(original[: len(original) // 2] + bytes(64) + original[len(original) // 2 + 64 :])
    try:
        damaged.block(0)  # the other shard is whole
        with pytest.raises(
            DataError, match=r"events-00001-of-00002\.arrayrecord: record \d+ (is damaged|cannot be read)"
        ):
            damaged.columns(["item"])
    finally:
        file.write_bytes(original)
    assert damaged.block_count == 4


def test_truncated_and_missing_files_are_found_at_opening(damaged: Dataset) -> None:
    for file in [p for p in damaged.path.iterdir() if p.name != "meta.json"]:
        original = file.read_bytes()
        try:
            file.write_bytes(original[:-1])
            with pytest.raises(DataError, match=rf"{file.name}: has [\d,]+ bytes, written were [\d,]+"):
                open_dataset(damaged.path)
            file.unlink()
            with pytest.raises(DataError, match=f"{file.name}: is missing"):
                open_dataset(damaged.path)
        finally:
            file.write_bytes(original)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], r"meta\.json: damaged"),
        (lambda text: text.replace('"version": 1', '"version": 9'), r"format .*9\), this version reads"),
        (lambda text: text.replace('"checksum": "', '"checksum": "0', 1), "checksum does not match"),
        (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "files"}), "damaged .KeyError"),
        (lambda text: json.dumps(json.loads(text) | {"users": 3}), "users and events are not those"),
    ],
)
def test_a_damaged_meta_is_refused(damaged: Dataset, change, message: str) -> None:
    file = damaged.path / "meta.json"
    original = file.read_text()
    try:
        file.write_text(change(original))
        with pytest.raises(DataError, match=message):
            open_dataset(damaged.path)
    finally:
        file.write_text(original)


def test_unknown_columns_blocks_and_folders(damaged: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'price'; the columns are user, item, time, domain"):
        damaged.columns(["price"])
    with pytest.raises(DataError, match=r"no block 4; blocks are 0 \.\. 3"):
        damaged.block(4)
    with pytest.raises(DataError, match="not a prepared dataset"):
        open_dataset(tmp_path)


def test_a_full_disk_leaves_nothing_and_says_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log([900] * 40)

    class Full(writer.ArrayRecordWriter):  # type: ignore[misc,name-defined]
        written = 0

        def write(self, data: bytes) -> None:
            Full.written += 1
            if Full.written == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().write(data)

    monkeypatch.setattr(writer, "ArrayRecordWriter", Full)
    with pytest.raises(DataError, match=r"events-00000.*: the disk is full .*about [\d,]{7,} bytes are needed"):
        write([log], ITEMS, tmp_path / "set", meta=META, block_events=9000, expected_events=len(log))
    assert Full.written == 3 and list(tmp_path.iterdir()) == []


SCRIPT = """
import os, resource, signal, sys
sys.path.insert(0, {here!r})
from test_records import ITEMS, META, in_blocks, make_log
from rec_core.data.writer import write
def blocks():
    for i, block in enumerate(in_blocks(make_log([900] * 40), [8] * 4)):
        if i == 3 and sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        yield block
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
write(blocks(), ITEMS, sys.argv[1], meta=META, block_events=4000)
"""


def run_script(out: Path, what: str) -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(here=str(Path(__file__).parent))
    return subprocess.run([sys.executable, "-c", code, str(out), what], capture_output=True, text=True, timeout=120)


def test_a_file_that_may_not_grow_is_reported_by_the_real_writer(tmp_path: Path) -> None:
    done = run_script(tmp_path / "set", "limit")
    assert done.returncode == 1 and "DataError" in done.stderr and "File too large" in done.stderr
    assert "bytes are needed" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_dataset_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert run_script(out, "kill").returncode == -signal.SIGKILL
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1  # the partial folder
    with pytest.raises(DataError, match="not a prepared dataset"):
        open_dataset(out)
    log = make_log([900] * 40)
    dataset = write([log], ITEMS, out, meta=META)
    assert np.array_equal(dataset.columns(["time"])["time"], log.time)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]

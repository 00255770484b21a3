"""Prepared datasets: sharded ArrayRecord files of columnar blocks, read with checksums (`writer` writes them).

A dataset is a folder: `events-*.arrayrecord` (record i of the dataset is record `i // shards` of shard `i % shards`; a
record is an .npz of the columns of whole users), `offsets.npz`, `items.npz`, and if known `vocabulary.npz` and
`users.npz`; `meta.json` says how it was made, its sizes and the checksum of everything beside it.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int32, Int64

from rec_core.data.files import load_arrays
from rec_core.data.schema import DTYPES, DataError, EventLog, Items, Ragged

FORMAT = "userscale-events"
VERSION = 1
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BINS = 1 << 16
_REMEDY = "prepare the dataset again (overwrite=True) or restore the file"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared dataset. Users are 0 .. users-1, events in the order (user, time, file order)."""

    path: Path
    meta: Mapping[str, Any]
    offsets: Int64[np.ndarray, "users+1"]  # the events of user u are offsets[u] .. offsets[u + 1] - 1

    @property
    def users(self) -> int:
        return self.meta["users"]

    @property
    def items(self) -> int:
        """Rows of an item table: every item id is below it; 0 is padding and 1 the unknown item."""
        return self.meta["items"]

    @property
    def events(self) -> int:
        return self.meta["events"]

    @property
    def categories(self) -> int:
        """Rows of a category table, 0 (none) included; likewise `domains`. `behaviors` counts from 0."""
        return self.meta["categories"]

    @property
    def domains(self) -> int:
        return self.meta["domains"]

    @property
    def behaviors(self) -> int:
        return self.meta["behaviors"]

    @property
    def block_count(self) -> int:
        return len(self.meta["records"]["events"])

    def block(self, i: int) -> EventLog:
        """Record `i`: all events of users first_user[i] .. first_user[i] + users[i] - 1."""
        if not 0 <= i < self.block_count:
            raise DataError(f"{self.path}: no block {i}; blocks are 0 .. {self.block_count - 1}")
        _, arrays = next(self._records([i], None))
        lengths, first = arrays.pop("length"), self.meta["records"]["first_user"][i]
        user = np.repeat(np.arange(first, first + len(lengths), dtype=np.int64), lengths)
        return EventLog(user=user, **{name: column.astype(DTYPES[name], copy=False) for name, column in arrays.items()})

    def columns(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Whole columns in memory, [events] each; None: all. Ids are int32, as models take them; others as in EventLog.

        `user` is made from the offsets, and `category` from the item table where events have none of their own.
        """
        stored: list[str] = self.meta["columns"]
        present = ["user", *stored] + (["category"] if "category" not in stored and self.categories > 1 else [])
        names = present if names is None else list(names)
        for name in names:
            if name not in present:
                raise DataError(f"{self.path}: no column '{name}'; the columns are {', '.join(present)}")
        wanted = [name for name in names if name in stored]
        derived = "category" in names and "category" not in stored
        read = list(dict.fromkeys([*wanted, *(["item"] if derived else [])]))
        result = {name: np.empty(self.events, stored_dtype(name)) for name in read}
        if read:
            for i, arrays in self._records(range(self.block_count), read):
                first = self.meta["records"]["first_user"][i]
                start = self.offsets[first]
                for name in read:
                    result[name][start : start + len(arrays[name])] = arrays[name]
        if "user" in names:
            result["user"] = np.repeat(np.arange(self.users, dtype=np.int32), np.diff(self.offsets))
        if derived:
            category = self.item_table.category
            assert category is not None
            result["category"] = category[result["item"]]
        return {name: result[name] for name in names}

    def split(self, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> tuple[int, int]:
        """(t_train_end, t_valid_end) of a global split by time: train is time < t_train_end, test is time >=
        t_valid_end, validation between. Events of one second stay together, so shares are met up to ties."""
        if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise DataError(f"fractions={fractions}: three positive shares (train, valid, test) that sum to 1")
        train_end = self._time_at(round(fractions[0] * self.events))
        valid_end = self._time_at(round((fractions[0] + fractions[1]) * self.events))
        first, last = self.meta["time"]
        if not first < train_end < valid_end <= last:
            raise DataError(
                f"{self.path}: times {first} .. {last} cannot be split {fractions}: the boundaries would be "
                f"{train_end} and {valid_end}; the events share too few distinct times"
            )
        return train_end, valid_end

    @cached_property
    def item_table(self) -> Items:
        """Side table by item id: `item` is 0 .. items-1 (rows 0 and 1: category 0, no text)."""
        arrays = self._side("items.npz")
        ragged = Ragged(arrays["offsets"], arrays["values"]) if "offsets" in arrays else None
        return Items(np.arange(self.items, dtype=np.int64), arrays.get("category"), ragged, arrays.get("text"))

    @cached_property
    def vocabulary(self) -> dict[str, Any]:
        """Raw ids: `user` by user id, `item` by item id minus FIRST_ITEM; {} where the source had no others."""
        return self._side("vocabulary.npz") if "vocabulary.npz" in self.meta["files"] else {}

    @cached_property
    def user_features(self) -> dict[str, Int32[np.ndarray, "users"]] | None:
        """Side information by user id, 0 unknown; sizes are in meta["user_feature_sizes"]. None where there is none."""
        return self._side("users.npz") if "users.npz" in self.meta["files"] else None

    def _side(self, name: str) -> dict[str, Any]:
        return load_arrays(self.path / name, self.meta["files"][name]["sha256"])

    def _records(
        self, blocks: Iterable[int], names: Sequence[str] | None
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(block number, arrays) of the blocks asked for, each checked; `names` limits the columns that are decoded."""
        shards: int = self.meta["shards"]
        readers: dict[int, Any] = {}
        with ExitStack() as stack:
            for i in blocks:
                shard = i % shards
                path = self.path / shard_name(shard, shards)
                try:
                    if shard not in readers:
                        readers[shard] = stack.enter_context(_reader(path))
                    data = readers[shard].read([i // shards])[0]
                except (RuntimeError, ValueError, IndexError, OSError) as error:
                    raise DataError(f"{path}: record {i // shards} cannot be read ({error}); {_REMEDY}") from error
                if checksum(data) != self.meta["records"]["checksum"][i]:
                    raise DataError(f"{path}: record {i // shards} is damaged (its checksum differs); {_REMEDY}")
                with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                    yield i, {name: arrays[name] for name in (arrays.files if names is None else names)}

    def _time_at(self, rank: int) -> int:
        """The time of the event of this rank (from 0) in the order of time, by counting: no sort, no whole column."""
        low, high = self.meta["time"]
        rank = min(max(rank, 0), self.events - 1)
        while low < high:
            width = -(-(high - low + 1) // _BINS)
            counts = np.zeros(_BINS, np.int64)
            for _, arrays in self._records(range(self.block_count), ["time"]):
                time = arrays["time"]
                counts += np.bincount((time[(time >= low) & (time <= high)] - low) // width, minlength=_BINS)
            below = np.concatenate([[0], np.cumsum(counts)])
            bin_ = int(np.searchsorted(below, rank, side="right")) - 1
            rank -= int(below[bin_])
            low, high = low + bin_ * width, min(high, low + (bin_ + 1) * width - 1)
        return low


def open_dataset(folder: str | Path) -> Dataset:
    """Open a prepared dataset: every file must be there in full length. Record contents are checked when read."""
    folder = Path(folder)
    file = folder / "meta.json"
    if not file.is_file():
        raise DataError(f"{folder}: not a prepared dataset (no meta.json); run prepare on a source first")
    try:
        meta = json.loads(file.read_text())
        form = (meta["format"], meta["version"])
        if form != (FORMAT, VERSION):
            raise DataError(f"{file}: format {form}, this version reads {(FORMAT, VERSION)}; prepare the dataset again")
        for name, entry in meta["files"].items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != entry["bytes"]:
                state = "is missing" if size is None else f"has {size:,} bytes, written were {entry['bytes']:,}"
                raise DataError(f"{folder / name}: {state}; {_REMEDY}")
        if total(meta["records"]["checksum"]) != meta["checksum"]:
            raise DataError(f"{file}: the checksum does not match its records'; {_REMEDY}")
        offsets = load_arrays(folder / "offsets.npz", meta["files"]["offsets.npz"]["sha256"])["offsets"]
        if len(offsets) != meta["users"] + 1 or offsets[-1] != meta["events"]:
            raise DataError(f"{file}: its numbers of users and events are not those of offsets.npz; {_REMEDY}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file}: damaged ({type(error).__name__}: {error}); {_REMEDY}") from error
    return Dataset(folder, meta, offsets)


def existing(out_dir: Path, identity: Mapping[str, Any], *, overwrite: bool) -> Dataset | None:
    """The dataset at `out_dir` if it has this identity; None if a new one may be written there; else an error."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    if not (out_dir / "meta.json").is_file():
        raise DataError(f"{out_dir}: exists and is not a prepared dataset; name another folder")
    if overwrite:
        return None
    dataset = open_dataset(out_dir)
    for key, value in identity.items():
        if dataset.meta.get(key) != value:
            raise DataError(
                f"{out_dir}: holds a dataset with another {key}: {dataset.meta.get(key)}, asked for {value}; "
                "name another folder, or pass overwrite=True to replace it"
            )
    return dataset


def shard_name(shard: int, shards: int) -> str:
    return f"events-{shard:05d}-of-{shards:05d}.arrayrecord"


def stored_dtype(name: str) -> type[np.generic]:
    """Ids are stored as int32 (the writer checks that they fit); everything else as in the schema."""
    return np.int32 if name in ("user", "item") else DTYPES[name]


def checksum(data: bytes) -> str:
    """Of one record, 64 bits."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def total(checksums: Sequence[str]) -> str:
    """Of a dataset's records, in order."""
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


@contextmanager
def _reader(path: Path) -> Iterator[ArrayRecordReader]:
    reader = ArrayRecordReader(str(path), _OPTIONS)
    try:
        yield reader
    finally:
        with suppress(RuntimeError):  # a damaged file raises again when it is closed; the first error says more
            reader.close()

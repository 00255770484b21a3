"""Writes a prepared dataset from encoded event logs, block by block. See `records` for what is in the folder."""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int32, Int64

from rec_core.data import records
from rec_core.data.files import creating, digest, save_arrays, writing
from rec_core.data.schema import FIRST_ITEM, DataError, EventLog, Items, concatenate, validate

_OPTIONS = "group_size:1,zstd:3"


def write(
    log_blocks: Iterable[EventLog],
    items: Items,
    out_dir: str | Path,
    *,
    meta: Mapping[str, Any],
    shards: int = 1,
    block_events: int = 65536,
    vocabulary: Mapping[str, Any] | None = None,
    user_features: Mapping[str, Int32[np.ndarray, "users"]] | None = None,
    expected_events: int | None = None,
    overwrite: bool = False,
    log: Callable[[str], None] | None = None,
) -> records.Dataset:
    """Write encoded events; memory is one block and `block_events`, whatever the total (and 8 bytes a user).

    log_blocks: encoded logs of whole users in user order, ids consecutive from 0, all with the same columns.
    items: side table by encoded id.
    meta: JSON. `source` and `options` identify the dataset: one that is at `out_dir` already and has the same is
        returned as it is, another is an error unless `overwrite`. `items`, `categories`, `domains` and `behaviors` (or
        `category_names` ...) fix the sizes of tables; without them sizes follow from `items` and the ids seen.
    vocabulary: raw ids, arrays of integers or lists of strings. user_features: integers by user id.
    expected_events: how many will come, for the message when the disk is full.

    The folder appears complete or not at all. Raises DataError: ids out of range, users that are not consecutive or
    have no events, an unsorted block (naming block and row), a full disk (naming path and bytes).
    """
    if shards < 1 or block_events < 1:
        raise DataError(f"shards={shards}, block_events={block_events}: both are at least 1")
    out_dir = Path(out_dir)
    given = json.loads(json.dumps(dict(meta)))
    identity = {"source": given.get("source"), "options": given.get("options")}
    found = records.existing(out_dir, identity, overwrite=overwrite)
    if found is not None:
        if log:
            log(f"{out_dir}: already prepared from the same source with the same options; reused")
        return found
    limits = _limits(given, items)
    with creating(out_dir, lambda: records.existing(out_dir, identity, overwrite=False) is not None) as folder:
        tally = _write_events(log_blocks, limits, folder, shards, block_events, expected_events)
        sizes = {name: limits[name] or tally.sizes.get(name, 0) for name in limits}
        sizes["items"] = max(sizes["items"], FIRST_ITEM)
        sizes["categories"] = limits["categories"] or max(sizes["categories"], _highest_category(items) + 1)
        sizes["domains"] = max(sizes["domains"], 1)
        lengths = np.concatenate(tally.lengths)
        with writing(folder, lambda: tally.bytes):
            save_arrays(folder / "offsets.npz", {"offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])})
            save_arrays(folder / "items.npz", _item_arrays(items, sizes["items"], sizes["categories"]))
            if vocabulary:
                save_arrays(folder / "vocabulary.npz", vocabulary)
            if user_features:
                save_arrays(folder / "users.npz", _user_arrays(user_features, len(lengths)))
            files = {
                file.name: {"bytes": file.stat().st_size} | ({"sha256": digest(file)} if file.suffix == ".npz" else {})
                for file in sorted(folder.iterdir())
            }
            full = {
                "format": records.FORMAT,
                "version": records.VERSION,
                **given,
                "users": len(lengths),
                "events": int(lengths.sum()),
                **sizes,
                "time": [tally.first_time, tally.last_time],
                "positives": tally.positives,
                "columns": tally.columns,
                "shards": shards,
                "checksum": records.total(tally.records["checksum"]),
                "files": files,
                "records": tally.records,
            }
            (folder / "meta.json").write_text(json.dumps(full) + "\n")
    return records.open_dataset(out_dir)


@dataclass
class _Tally:
    """What is known of the events written so far."""

    columns: list[str] = field(default_factory=list)
    lengths: list[Int64[np.ndarray, "u"]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    first_time: int = 1 << 62
    last_time: int = -1
    positives: int = 0
    bytes: int = 0
    records: dict[str, list] = field(
        default_factory=lambda: {"first_user": [], "users": [], "events": [], "checksum": []}
    )


def _limits(given: Mapping[str, Any], items: Items) -> dict[str, int | None]:
    """Table sizes that are fixed beforehand."""
    names = {"categories": "category_names", "domains": "domain_names", "behaviors": "behavior_names"}
    limits: dict[str, int | None] = {"items": given.get("items") or (int(items.item[-1]) + 1 if len(items) else None)}
    for name, source in names.items():
        limits[name] = given.get(name) or (len(given[source]) if given.get(source) else None)
    return limits


def _write_events(
    blocks: Iterable[EventLog],
    limits: Mapping[str, int | None],
    folder: Path,
    shards: int,
    block_events: int,
    expected_events: int | None,
) -> _Tally:
    tally = _Tally()
    first_user = 0

    def needed() -> int:
        events = sum(tally.records["events"])
        return tally.bytes * max(expected_events or 0, events) // events if events else tally.bytes

    with ExitStack() as stack:
        paths = [folder / records.shard_name(shard, shards) for shard in range(shards)]
        writers = [stack.enter_context(_writer(path, needed)) for path in paths]
        for number, record in enumerate(_cut(_checked(blocks, limits, tally), block_events)):
            lengths = np.bincount(record.user - first_user)
            data = _encode(record, lengths)
            tally.lengths.append(lengths)
            tally.bytes += len(data)
            row = (first_user, len(lengths), len(record), records.checksum(data))
            for name, value in zip(tally.records, row):
                tally.records[name].append(value)
            first_user += len(lengths)
            with writing(paths[number % shards], needed):
                writers[number % shards].write(data)
                if not writers[number % shards].ok():
                    writers[number % shards].close()  # raises with the reason
        if not tally.lengths:
            raise DataError("no events to write; a dataset needs at least one user with an event")
    return tally


@contextmanager
def _writer(path: Path, needed: Callable[[], int]) -> Iterator[ArrayRecordWriter]:
    with writing(path, needed):
        writer = ArrayRecordWriter(str(path), _OPTIONS)
    try:
        yield writer
    except BaseException:
        with suppress(RuntimeError):
            writer.close()
        raise
    with writing(path, needed):
        writer.close()


def _checked(blocks: Iterable[EventLog], limits: Mapping[str, int | None], tally: _Tally) -> Iterator[EventLog]:
    """The blocks, once they are known to be encoded, sorted and of consecutive whole users; sizes go to `tally`."""
    user = -1
    for number, log in enumerate(blocks):
        if not len(log):
            continue
        where = f"block {number}"
        validate(log, where=where, encoded=True, **limits)
        tally.columns = tally.columns or [name for name in log.columns() if name != "user"]
        if ["user", *tally.columns] != list(log.columns()):
            raise DataError(f"{where}: columns {list(log.columns())}, the blocks before had {['user', *tally.columns]}")
        step = np.diff(log.user, prepend=user)
        wrong = step > 1
        wrong[0] |= step[0] != 1
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"{where}: user {log.user[row]} in row {row} follows user {log.user[row] - step[row]}: a block holds "
                "whole users, ids are consecutive from 0 and every user has an event"
            )
        user = int(log.user[-1])
        for name, size in zip(("item", "category", "domain", "behavior"), limits):
            if (column := getattr(log, name)) is not None:
                tally.sizes[size] = max(tally.sizes.get(size, 0), int(column.max()) + 1)
        tally.first_time = min(tally.first_time, int(log.time.min()))
        tally.last_time = max(tally.last_time, int(log.time.max()))
        tally.positives += len(log) if log.label is None else int(log.label.sum())
        yield log


def _cut(blocks: Iterable[EventLog], block_events: int) -> Iterator[EventLog]:
    """Whole users, `block_events` events or more a record (the last may have fewer)."""
    waiting: list[EventLog] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) < block_events:
            continue
        log = concatenate(waiting)
        ends = np.append(np.flatnonzero(np.diff(log.user)) + 1, len(log))
        start = 0
        while len(log) - start >= block_events:
            end = int(ends[np.searchsorted(ends, start + block_events)])
            yield log.take(slice(start, end))
            start = end
        waiting = [log.take(slice(start, None))] if start < len(log) else []
    if waiting:
        yield concatenate(waiting)


def _encode(log: EventLog, lengths: Int64[np.ndarray, "u"]) -> bytes:
    arrays = {"length": lengths.astype(np.int32)}
    for name, column in log.columns().items():
        if name != "user":
            arrays[name] = column.astype(records.stored_dtype(name), copy=False)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _highest_category(items: Items) -> int:
    columns = [items.category, None if items.categories is None else items.categories.values]
    return max((int(column.max(initial=0)) for column in columns if column is not None), default=0)


def _item_arrays(items: Items, size: int, categories: int) -> dict[str, Any]:
    """The side table spread over all item ids; ids that it does not have get category 0 and no text."""
    if len(items) and (np.any(np.diff(items.item) <= 0) or items.item[0] < 0 or items.item[-1] >= size):
        raise DataError(f"items.item: ids must be sorted, unique and in 0 .. {size - 1}")
    where = np.full(size, -1, np.int64)
    where[items.item] = np.arange(len(items))
    arrays: dict[str, Any] = {}
    all_values = None if items.categories is None else items.categories.values
    for name, values in (("category", items.category), ("categories", all_values)):
        if values is not None and len(values) and not 0 <= values.min() <= values.max() < categories:
            raise DataError(f"items.{name}: ids {values.min()} .. {values.max()} must lie in 0 .. {categories - 1}")
    spread = items.take(where, np.arange(size))
    if spread.category is not None:
        arrays["category"] = spread.category
    if spread.categories is not None:
        arrays |= {"offsets": spread.categories.offsets, "values": spread.categories.values}
    if spread.text is not None:
        arrays["text"] = spread.text
    return arrays


def _user_arrays(features: Mapping[str, np.ndarray], users: int) -> dict[str, np.ndarray]:
    for name, column in features.items():
        if column.shape != (users,):
            raise DataError(f"user feature '{name}' has shape {column.shape}, there are {users} users")
    return {name: column.astype(np.int32) for name, column in features.items()}

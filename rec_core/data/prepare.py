"""From a source to a prepared dataset: encode ids, filter, sort by (user, time, file order), write, report.

Nothing is lost silently: every event, user and item that is left out or replaced is counted, printed and kept in
`meta["report"]`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int64

from rec_core.data.records import Dataset, existing
from rec_core.data.schema import FIRST_ITEM, UNKNOWN, DataError, EventLog, Items, validate
from rec_core.data.writer import write

if TYPE_CHECKING:  # readers need Polars; what is prepared already does not
    from rec_core.data.readers import Source


def prepare(
    source: "Source",
    out_dir: str | Path,
    *,
    name: str | None = None,
    positive: float | Sequence[str] | None = None,
    behaviors: Sequence[str] | None = None,
    min_item_count: int = 1,
    min_user_events: int = 1,
    max_events: int | None = None,
    block_events: int = 65536,
    shards: int = 1,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> Dataset:
    """Prepare a source once; training reads only what is written here.

    positive: a rating above which an event is positive (3 on MovieLens), or the behaviors that are; it makes the column
        `label`. None: the source's own labels, or every event is positive.
    behaviors: keep only events of these.
    min_item_count: items with fewer events become the unknown item (id 1); their events stay.
    min_user_events: users with fewer events are left out. max_events: keep each user's newest.

    Ids: items from 2 by falling count (ties: by raw id), users from 0 in the order of raw ids. A dataset of the same
    source and options that is at `out_dir` already is returned as it is.
    """
    if min_item_count < 1 or min_user_events < 1 or (max_events is not None and max_events < 1):
        given = f"min_item_count={min_item_count}, min_user_events={min_user_events}, max_events={max_events}"
        raise DataError(f"{given}: each is at least 1 (max_events may be None)")
    validate(source.log, where=f"source '{source.name}'")
    options = {
        "positive": list(positive) if isinstance(positive, Sequence) else positive,
        "behaviors": list(behaviors) if behaviors is not None else None,
        "min_item_count": min_item_count,
        "min_user_events": min_user_events,
        "max_events": max_events,
        "block_events": block_events,
        "shards": shards,
    }
    identity: dict[str, Any] = {
        "source": {"name": source.name, "events": len(source.log), "sha256": fingerprint(source)},
        "options": options,
    }
    found = existing(Path(out_dir), identity, overwrite=overwrite)
    if found is not None:
        log(f"{out_dir}: already prepared from the same source with the same options; reused")
    else:
        made = _encode(source, positive, behaviors, min_item_count, min_user_events, max_events)
        meta = identity | made.meta | {"name": name or source.name}
        found = write(
            _users(made.log), made.items, out_dir, meta=meta, shards=shards, block_events=block_events,
            vocabulary=made.vocabulary, user_features=made.user_features, expected_events=len(made.log),
            overwrite=overwrite,
        )  # fmt: skip
    for line in describe(found):
        log(line)
    return found


def describe(dataset: Dataset) -> list[str]:
    """What is in a prepared dataset and what was left out, in lines to print."""
    meta, lengths = dataset.meta, np.diff(dataset.offsets)
    low, median, p95, high = np.quantile(lengths, [0, 0.5, 0.95, 1])
    dates = [datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M") for t in meta["time"]]
    lines = [
        f"{meta.get('name', dataset.path.name)}: {dataset.users:,} users, {dataset.items - FIRST_ITEM:,} items, "
        f"{dataset.events:,} events ({meta['positives'] / dataset.events:.1%} positive), "
        f"{dataset.categories - 1:,} categories, {dataset.domains - 1:,} domains",
        f"  events a user: min {low:,.0f}, median {median:,.0f}, mean {lengths.mean():,.1f}, p95 {p95:,.0f}, "
        f"max {high:,.0f}",
        f"  time: {dates[0]} to {dates[1]} UTC",
    ]
    report = meta.get("report", {})
    if report:
        cut, whole = report["events_truncated"], report["events_truncated"] + dataset.events
        lines.append(f"  truncated: {cut:,} events ({cut / whole:.1%}) of {report['users_truncated']:,} users")
    rest = {k: v for k, v in report.items() if k not in ("events_truncated", "users_truncated") and v}
    lines += [f"  {key.replace('_', ' ')}: {value:,}" for key, value in rest.items()]
    return lines


def fingerprint(source: "Source") -> str:
    """sha256 of all that a source holds, so that the same input is known again."""
    sha = hashlib.sha256()
    features = source.user_features
    parts: list[Any] = [*source.log.columns().items(), source.items.item, source.items.category, source.items.text]
    ragged = source.items.categories
    parts += [ragged.offsets, ragged.values] if ragged is not None else [None]
    parts += [source.user_names, source.item_names, source.category_names, source.domain_names, source.behavior_names]
    parts += [features.user, *features.columns.items(), sorted(features.sizes.items())] if features else [None]
    for part in parts:
        label, value = part if isinstance(part, tuple) and isinstance(part[-1], np.ndarray) else ("", part)
        data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode("utf-8", "replace")
        sha.update(f"{label}:{len(data)}:".encode())
        sha.update(data)
    return sha.hexdigest()


@dataclass(frozen=True)
class _Encoded:
    log: EventLog
    items: Items
    vocabulary: dict[str, Any]
    user_features: dict[str, np.ndarray] | None
    meta: dict[str, Any]


def _encode(
    source: "Source",
    positive: float | Sequence[str] | None,
    behaviors: Sequence[str] | None,
    min_item_count: int,
    min_user_events: int,
    max_events: int | None,
) -> _Encoded:
    raw = source.log
    backward = _backward(raw)
    all_users = np.unique(raw.user)
    if behaviors is not None:
        raw = raw.take(_has_behavior(source, raw, behaviors, "behaviors"))
    if positive is not None:
        raw = _labelled(source, raw, positive)

    items, item, counts = np.unique(raw.item, return_inverse=True, return_counts=True)
    order = np.lexsort((items, -counts))
    known = order[counts[order] >= min_item_count]
    ids = np.full(len(items), UNKNOWN, np.int64)
    ids[known] = np.arange(FIRST_ITEM, FIRST_ITEM + len(known))

    users, user, events = np.unique(raw.user, return_inverse=True, return_counts=True)
    long_enough = events >= min_user_events
    if not long_enough.any():
        asked = f"min_user_events={min_user_events}, behaviors={behaviors and list(behaviors)}"
        raise DataError(
            f"source '{source.name}': no user is left of {len(all_users):,} with {asked} (the longest history has "
            f"{events.max(initial=0):,} events); ask for less"
        )
    dense = np.cumsum(long_enough) - 1
    rows = np.flatnonzero(long_enough[user])
    rows = rows[np.lexsort((raw.time[rows], user[rows]))]  # stable: the file's order decides ties
    before = len(rows)
    lengths = events[long_enough]
    if max_events is not None:
        from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(rows))
        rows = rows[from_end <= max_events]
    log = replace(raw.take(rows), user=dense[user[rows]], item=ids[item[rows]])
    features = source.user_features
    without = 0 if features is None else int((~_find(all_users, features.user)[1]).sum())
    side, missing = _side(source.items, items[known])
    report = {
        "malformed_rows_left_out": source.skipped,
        "rows_back_in_time_that_were_sorted": backward,
        "events_of_other_behaviors_left_out": len(source.log) - len(raw),
        "users_without_such_events_left_out": len(all_users) - len(users),
        "users_below_min_user_events_left_out": int((~long_enough).sum()),
        "events_of_these_users_left_out": len(raw) - before,
        "users_of_the_side_table_without_events": without,
        "users_truncated": int((lengths > (max_events or np.inf)).sum()),
        "events_truncated": before - len(rows),
        "items_too_rare_for_an_id": len(items) - len(known),
        "events_of_these_items": int((log.item == UNKNOWN).sum()),
        "items_of_the_side_table_without_events": int((~_find(items, source.items.item)[1]).sum()),
        "items_missing_in_the_side_table": missing,
    }
    meta: dict[str, Any] = {"items": FIRST_ITEM + len(known)}
    for key in ("category_names", "domain_names", "behavior_names"):
        if getattr(source, key) is not None:
            meta[key] = list(getattr(source, key))
    kept = users[long_enough]
    of_users = None
    if features is not None:
        at, has = _find(features.user, kept)
        of_users = {name: np.where(has, column[at], 0).astype(np.int32) for name, column in features.columns.items()}
        meta["user_feature_sizes"] = dict(features.sizes)
    vocabulary = {"user": _names(kept, source.user_names), "item": _names(items[known], source.item_names)}
    return _Encoded(log, side, vocabulary, of_users, meta | {"report": report})


def _users(log: EventLog, block: int = 1 << 20) -> Iterator[EventLog]:
    """An encoded log in blocks of whole users."""
    ends = np.append(np.flatnonzero(np.diff(log.user)) + 1, len(log))
    start = 0
    while start < len(log):
        end = int(ends[min(int(np.searchsorted(ends, start + block)), len(ends) - 1)])
        yield log.take(slice(start, end))
        start = end


def _backward(log: EventLog) -> int:
    """Rows whose time is before that of the same user's row above them in the file."""
    order = np.argsort(log.user, kind="stable")
    return int(((np.diff(log.time[order]) < 0) & (np.diff(log.user[order]) == 0)).sum())


def _has_behavior(source: "Source", log: EventLog, names: Sequence[str], option: str) -> Bool[np.ndarray, "n"]:
    known = source.behavior_names
    if log.behavior is None or known is None:
        columns = ", ".join(log.columns())
        raise DataError(f"{option}={list(names)}: source '{source.name}' has no behaviors; its columns are {columns}")
    for name in names:
        if name not in known:
            has = ", ".join(known)
            raise DataError(f"{option}={list(names)}: no behavior {name!r} in '{source.name}'; it has {has}")
    return np.isin(log.behavior, [list(known).index(name) for name in names])


def _labelled(source: "Source", log: EventLog, positive: float | Sequence[str]) -> EventLog:
    if log.label is not None:
        raise DataError(f"positive={positive!r}: source '{source.name}' has labels of its own; leave positive=None")
    if isinstance(positive, str) or not isinstance(positive, float | int | Sequence):
        raise DataError(f"positive={positive!r}: a rating (events above it are positive) or a list of behaviors")
    if isinstance(positive, Sequence):
        label = _has_behavior(source, log, positive, "positive")
    elif log.rating is None:
        columns = ", ".join(log.columns())
        raise DataError(f"positive={positive}: source '{source.name}' has no ratings; its columns are {columns}")
    else:
        label = log.rating > positive
    return replace(log, label=label.astype(np.uint8))


def _side(items: Items, raw: Int64[np.ndarray, "k"]) -> tuple[Items, int]:
    """The side table of the items `raw`, by encoded id, and how many of them it does not have."""
    at, has = _find(items.item, raw)
    where = np.where(has, at, -1)
    return items.take(where, np.arange(FIRST_ITEM, FIRST_ITEM + len(raw))), int((~has).sum())


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[Int64[np.ndarray, "k"], Bool[np.ndarray, "k"]]:
    """Where each key stands in a sorted table, and whether it does."""
    if not len(table):
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


def _names(ids: Int64[np.ndarray, "k"], names: Sequence[str] | None) -> Int64[np.ndarray, "k"] | list[str]:
    return ids if names is None else [names[i] for i in ids]

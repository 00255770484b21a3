"""Readers: a public dataset, or any CSV or Parquet with named columns, as one raw event log. Owns Polars with `tables`.

Every reader returns a `Source`: events in the file's order with raw ids, and the items' side table. `prepare` encodes
and sorts it. Malformed rows are errors that name file and line; `on_bad="skip"` leaves them out and counts them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from jaxtyping import Int32, Int64

from rec_core.data.schema import BEHAVIORS, DTYPES, DataError, EventLog, Items, Ragged
from rec_core.data.tables import UNITS, BadRows, Kind, read_parquet, read_text

OnBad = Literal["error", "skip"]
FIELDS: dict[str, Kind] = {  # what `table` can map
    "user": "id",
    "item": "id",
    "time": "time",
    "category": "text",
    "domain": "text",
    "behavior": "text",
    "rating": "rating",
    "label": "label",
    "text": "text",
}
AGES = (1, 18, 25, 35, 45, 50, 56)  # MovieLens-1M's age codes: under 18, 18-24, 25-34, ...
NO_GENRE = "(no genres listed)"


@dataclass(frozen=True)
class UserFeatures:
    """Side information of users: one small integer a feature, 0 unknown. `user` holds raw ids, sorted."""

    user: Int64[np.ndarray, "u"]
    columns: Mapping[str, Int32[np.ndarray, "u"]]
    sizes: Mapping[str, int]  # values lie in 0 .. size - 1


@dataclass(frozen=True)
class Source:
    """What a reader found. Ids that are strings are held as indices into `user_names` / `item_names` (sorted)."""

    name: str
    log: EventLog
    items: Items
    user_names: Sequence[str] | None = None
    item_names: Sequence[str] | None = None
    category_names: Sequence[str] | None = None  # by category id; 0 is ""
    domain_names: Sequence[str] | None = None
    behavior_names: Sequence[str] | None = None
    user_features: UserFeatures | None = None
    skipped: int = 0  # malformed rows left out
    skipped_first: tuple[str, ...] = ()


def movielens_1m(folder: str | Path, *, on_bad: OnBad = "error") -> Source:
    """MovieLens-1M in its official layout: ratings.dat, movies.dat and (if it is there) users.dat, split by `::`.

    category = the first genre (ids from 1 in the alphabet's order), categories = all genres, text = the title.
    """
    folder, bad = Path(folder), BadRows(on_bad)
    kinds: dict[str, Kind] = {"user": "integer", "item": "integer", "rating": "rating", "time": "time"}
    ratings = read_text(_need(folder, "ratings.dat"), kinds, bad, separator="::")
    movies = read_text(
        _need(folder, "movies.dat"), {"item": "integer", "text": "text", "genres": "text"}, bad, separator="::",
        fallback="latin-1",
    )  # fmt: skip
    users = _users_dat(folder / "users.dat", bad) if (folder / "users.dat").exists() else None
    items, names = _movies(movies, folder / "movies.dat")
    return _source("ml-1m", ratings, bad, items=items, category_names=names, user_features=users)


def movielens_20m(folder: str | Path, *, on_bad: OnBad = "error") -> Source:
    """MovieLens-20M in its official layout: ratings.csv and movies.csv with headers. Fields as in `movielens_1m`."""
    folder, bad = Path(folder), BadRows(on_bad)
    columns = {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"}
    kinds: dict[str, Kind] = {"user": "integer", "item": "integer", "rating": "rating", "time": "time"}
    ratings = read_text(_need(folder, "ratings.csv"), kinds, bad, columns=columns)
    movies = read_text(
        _need(folder, "movies.csv"), {"item": "integer", "text": "text", "genres": "text"}, bad,
        columns={"item": "movieId", "text": "title", "genres": "genres"},
    )  # fmt: skip
    items, names = _movies(movies, folder / "movies.csv")
    return _source("ml-20m", ratings, bad, items=items, category_names=names)


def taobao(path: str | Path, *, on_bad: OnBad = "error") -> Source:
    """Taobao UserBehavior.csv (user, item, category, behavior, time; no header), the file or its folder.

    behavior: pv 0, cart 1, fav 2, buy 3. The official file holds a few rows with impossible times: on_bad="skip".
    """
    path, bad = Path(path), BadRows(on_bad)
    file = _need(path, "UserBehavior.csv") if path.is_dir() else _need(path.parent, path.name)
    kinds: dict[str, Kind] = {"user": "integer", "item": "integer", "category": "integer"}
    kinds |= {"behavior": "text", "time": "time"}
    frame = read_text(file, kinds, bad, allowed={"behavior": BEHAVIORS})
    codes = pl.DataFrame({"behavior": BEHAVIORS, "code": range(len(BEHAVIORS))}, schema_overrides={"code": pl.Int32})
    behavior = frame.select("behavior").join(codes, on="behavior", how="left", maintain_order="left")["code"]
    frame = frame.with_columns(behavior.alias("behavior"))
    return _source("taobao", frame, bad, behavior_names=BEHAVIORS)


def amazon_2014(path: str | Path, *, on_bad: OnBad = "error") -> Source:
    """Amazon's ratings of 2014: `ratings_*.csv` (user, item, rating, time; no header), or a folder in Parquet form
    with interactions.parquet (UserID, ItemID, Timestamp) and items.parquet (ItemID, Title)."""
    path, bad = Path(path), BadRows(on_bad)
    if not path.is_dir():
        kinds: dict[str, Kind] = {"user": "id", "item": "id", "rating": "rating", "time": "time"}
        return _source("amazon-2014", read_text(_need(path.parent, path.name), kinds, bad), bad)
    columns = {"user": "UserID", "item": "ItemID", "time": "Timestamp"}
    frame = read_parquet(_need(path, "interactions.parquet"), {f: FIELDS[f] for f in columns}, bad, columns=columns)
    file = _need(path, "items.parquet")
    titles = read_parquet(file, {"item": "id", "text": "text"}, bad, columns={"item": "ItemID", "text": "Title"})
    if titles["item"].dtype != frame["item"].dtype:
        raise DataError(f"{file}: ItemID holds {titles['item'].dtype}, interactions.parquet {frame['item'].dtype}")
    return _source(path.name, frame, bad, titles=_unique(titles, file))


def table(
    path: str | Path,
    columns: Mapping[str, str],
    *,
    name: str | None = None,
    separator: str = ",",
    time_unit: Literal["s", "ms", "us", "ns"] = "s",
    sorted: bool = False,
    on_bad: OnBad = "error",
) -> Source:
    """Any CSV with a header (`.csv`, `.tsv`, `.txt`, also `.gz`) or Parquet, a file or a folder of such files.

    columns: field -> name of its column. Fields: user, item, time (required); category, domain, behavior, rating,
        label (0 or 1), text (the item's; its first occurrence counts). Ids, categories, domains and behaviors may be
        numbers or strings; categories and domains are encoded from 1 (empty: 0), behaviors from 0, in sorted order.
    sorted: declare that each user's events stand in the order of time; a row that goes back is then an error.
    """
    path, bad = Path(path), BadRows(on_bad)
    unknown = [f for f in columns if f not in FIELDS]
    missing = [f for f in ("user", "item", "time") if f not in columns]
    if unknown or missing:
        what = f"no field is called {unknown[0]!r}" if unknown else f"field {missing[0]!r} is not mapped to a column"
        raise DataError(f"columns={dict(columns)}: {what}; fields are {', '.join(FIELDS)}, the first three required")
    if time_unit not in UNITS:
        raise DataError(f"time_unit={time_unit!r}: it is one of {', '.join(UNITS)}")
    kinds = {f: FIELDS[f] for f in FIELDS if f in columns}
    frames = []
    for file in _files(path):
        if file.suffix == ".parquet":
            frames.append(read_parquet(file, kinds, bad, columns=columns, unit=time_unit))
        else:
            tab = "\t" if ".tsv" in file.suffixes and separator == "," else separator
            frames.append(read_text(file, kinds, bad, separator=tab, columns=columns, unit=time_unit))
        frames[-1] = frames[-1].with_columns(file=pl.lit(str(file)).cast(pl.Categorical))
    frame = pl.concat(frames, how="vertical_relaxed")
    names: dict[str, Any] = {}
    for f, start in (("category", 1), ("domain", 1), ("behavior", 0)):
        if f in columns:
            codes, found = _dense(frame[f], start)
            frame = frame.with_columns(codes)
            names[f"{f}_names"] = found
    return _source(name or path.stem, frame, bad, check_order=sorted, **names)


READERS: dict[str, Callable[..., Source]] = {
    "ml-1m": movielens_1m,
    "ml-20m": movielens_20m,
    "taobao": taobao,
    "amazon-2014": amazon_2014,
}


def _source(
    name: str,
    frame: pl.DataFrame,
    bad: BadRows,
    *,
    items: Items | None = None,
    titles: pl.DataFrame | None = None,
    check_order: bool = False,
    category_names: Sequence[str] | None = None,
    **names: Any,
) -> Source:
    """Typed columns -> Source. Without `items`, category and text of an item are those of its first event."""
    user, user_names = _identify(frame["user"])
    item, item_names = _identify(frame["item"])
    if check_order:
        _check_order(frame, user)
    if items is None:
        if "category" in frame.columns and category_names is None:
            codes, category_names = _dense(frame["category"], 1)
            frame = frame.with_columns(codes)
        items = _items(frame.with_columns(pl.Series("item", item)), titles, item_names)
    rest = [f for f in ("category", "domain", "behavior", "rating", "label") if f in frame.columns]
    columns = {f: np.ascontiguousarray(frame[f].to_numpy(), DTYPES[f]) for f in rest}
    log = EventLog(user, item, frame["time"].to_numpy(), **columns)
    return Source(
        name, log, items, user_names=user_names, item_names=item_names, category_names=category_names,
        skipped=bad.count, skipped_first=tuple(bad.first), **names,
    )  # fmt: skip


def _identify(column: pl.Series) -> tuple[Int64[np.ndarray, "n"], Sequence[str] | None]:
    """Ids as integers: the numbers themselves, or the rank of each string among the sorted distinct ones."""
    if column.dtype != pl.String:
        return column.cast(pl.Int64).to_numpy(), None
    if column.str.contains(r"^(0|-?[1-9][0-9]{0,17})$").all():  # "007" stays a string: it is not 7
        return column.cast(pl.Int64).to_numpy(), None
    names = column.unique().sort()
    return column.rank("dense").cast(pl.Int64).to_numpy() - 1, names.to_list()


def _dense(column: pl.Series, start: int) -> tuple[pl.Series, list[str]]:
    """Names or numbers -> ids from `start` in sorted order, and the names by id; with start 1, 0 is the empty name."""
    names = column.unique().sort()
    if names.dtype == pl.String and names.str.contains(r"^(0|-?[1-9][0-9]{0,17})?$").all():
        names = names.cast(pl.Int64, strict=False).sort().cast(pl.String).fill_null("")  # 2 before 10
    if start:
        names = names.filter(names.cast(pl.String) != "")
    ids = pl.DataFrame({"key": names, "id": np.arange(start, start + len(names), dtype=np.int32)})
    joined = column.to_frame("key").join(ids, on="key", how="left", maintain_order="left")
    return joined["id"].fill_null(0).alias(column.name), [""] * start + names.cast(pl.String).to_list()


def _items(frame: pl.DataFrame, titles: pl.DataFrame | None, item_names: Sequence[str] | None) -> Items:
    columns = [c for c in ("item", "category", "text") if c in frame.columns]
    first = frame.select(columns).unique("item", keep="first", maintain_order=True)
    if titles is not None:
        if item_names is not None:
            ids = pl.DataFrame({"name": item_names, "id": np.arange(len(item_names))})
            titles = titles.join(ids, left_on="item", right_on="name").select(pl.col("id").alias("item"), "text")
        first = first.join(titles.select("item", "text"), on="item", how="left")
    first = first.sort("item")
    return Items(
        first["item"].to_numpy(),
        np.ascontiguousarray(first["category"].to_numpy(), np.int32) if "category" in first.columns else None,
        None,
        first["text"].fill_null("").to_list() if "text" in first.columns else None,
    )


def _movies(frame: pl.DataFrame, file: Path) -> tuple[Items, list[str]]:
    frame = _unique(frame, file).sort("item")
    genres = [[g for g in row.split("|") if g and g != NO_GENRE] for row in frame["genres"]]
    names = ["", *sorted({g for row in genres for g in row})]
    ids = {name: i for i, name in enumerate(names)}
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in genres])]).astype(np.int64)
    values = np.array([ids[g] for row in genres for g in row], np.int32)
    first = np.array([ids[row[0]] if row else 0 for row in genres], np.int32)
    return Items(frame["item"].to_numpy(), first, Ragged(offsets, values), frame["text"].to_list()), names


def _users_dat(file: Path, bad: BadRows) -> UserFeatures:
    kinds: dict[str, Kind] = {"user": "integer", "gender": "text", "age": "integer"}
    kinds |= {"occupation": "integer", "zip": "text"}
    frame = _unique(read_text(file, kinds, bad, separator="::", fallback="latin-1"), file, "user").sort("user")
    known = {"gender": ("F", "M"), "age": AGES, "occupation": range(21)}
    columns = {}
    for name, values in known.items():
        wrong = frame.filter(~pl.col(name).is_in(list(values)))
        if len(wrong):
            line, value = wrong[0, "line"], wrong[0, name]
            raise DataError(f"{file}:{line}: {name} {value!r} is not one of {', '.join(map(str, values))}")
        columns[name] = frame[name].replace_strict(list(values), range(1, len(values) + 1), return_dtype=pl.Int32)
    sizes = {name: len(values) + 1 for name, values in known.items()}
    return UserFeatures(frame["user"].to_numpy(), {n: c.to_numpy() for n, c in columns.items()}, sizes)


def _check_order(frame: pl.DataFrame, user: Int64[np.ndarray, "n"]) -> None:
    order = np.argsort(user, kind="stable")
    time = frame["time"].to_numpy()[order]
    back = (np.diff(time) < 0) & (np.diff(user[order]) == 0)
    if back.any():
        pairs = np.flatnonzero(back)
        at = int(pairs[np.argmin(order[pairs + 1])])  # the first in the file
        row, before = frame.row(int(order[at + 1]), named=True), frame.row(int(order[at]), named=True)
        raise DataError(
            f"{row['file']}:{row['line']}: user {row['user']!r} goes back in time from {before['time']} (line "
            f"{before['line']}) to {row['time']}, {len(pairs)} such rows, in a source declared sorted; "
            "sort it, or leave sorted=False and prepare sorts it"
        )


def _unique(frame: pl.DataFrame, file: Path, key: str = "item") -> pl.DataFrame:
    twice = frame.filter(pl.col(key).is_duplicated())
    if len(twice):
        raise DataError(f"{file}:{twice[-1, 'line']}: {key} {twice[-1, key]} has more than one row; keep one of them")
    return frame


def _need(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        present = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
        raise DataError(f"{folder / name}: no such file (found there: {present or 'nothing'})")
    return folder / name


def _files(path: Path) -> list[Path]:
    kinds = (".parquet", ".csv", ".tsv", ".txt", ".gz")
    if path.is_file():
        if path.suffix not in kinds:
            raise DataError(f"{path}: unknown kind of file {path.suffix!r}; known are {', '.join(kinds)}")
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix in kinds) if path.is_dir() else []
    if not found:
        raise DataError(f"{path}: no such file, or a folder without {', '.join(kinds)} files")
    return found

"""Delimited text and Parquet as typed columns, every malformed row named by file and line.

Text is read in blocks of whole lines, so that a file of any size needs memory for its typed columns only. The kind of
a field says what it may hold:

    "id"       a whole number or a non-empty string     "time"    whole seconds (or `unit`) in 1970 .. 2100
    "integer"  a whole number that fits in 64 bits      "rating"  a finite number
    "text"     any string, the empty one included       "label"   0 or 1
"""

import csv
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import polars as pl

from rec_core.data.schema import LAST_TIME, DataError

Kind = Literal["id", "integer", "time", "rating", "label", "text"]
Fault = tuple[pl.Expr, str]  # which rows, and what to say of one: a format of its columns

BLOCK_BYTES = 1 << 24
BLOCK_ROWS = 1 << 18
SHOWN = 5  # malformed rows that an error quotes
UNDECODED = "\uffff"  # a noncharacter, so no real text holds it
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass
class BadRows:
    """Malformed rows of a source: how many, and the first few."""

    on_bad: Literal["error", "skip"]
    count: int = 0
    first: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_bad not in ("error", "skip"):
            raise DataError(f"on_bad={self.on_bad!r}: 'error' refuses the source, 'skip' leaves out and counts")

    def add(self, count: int, messages: Sequence[str]) -> None:
        self.count += count
        self.first.extend(messages[: SHOWN - len(self.first)])

    def close(self, where: str, rows: int) -> None:
        """Raise for malformed rows unless they may be skipped, and for a source without any row left."""
        if self.count and self.on_bad == "error":
            more = f"\n  and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
            raise DataError(
                "\n  ".join(self.first) + more + f"\n{self.count} malformed in all: correct the file, or pass "
                "on_bad='skip' to leave such rows out (they are counted in the report)"
            )
        if rows == 0:
            left = f" left after {self.count} malformed ones, the first: {self.first[0]}" if self.count else ""
            raise DataError(f"{where}: no rows{left}; an event log needs at least one event")


def read_text(
    path: Path,
    kinds: Mapping[str, Kind],
    bad: BadRows,
    *,
    separator: str = ",",
    columns: Mapping[str, str] | None = None,
    fallback: str | None = None,
    unit: str = "s",
    allowed: Mapping[str, Sequence[str]] | None = None,
) -> pl.DataFrame:
    """The fields of `kinds`, typed, with `line` (from 1), of a delimited file; `.gz` is unpacked on the way.

    columns: None: the file has no header and exactly the fields of `kinds`; else field -> name in the header.
    fallback: the encoding of a file that is not UTF-8; without one a row that is not UTF-8 is malformed.
    allowed: the values that a text field may take.
    Raises DataError for unknown columns, and (through `bad`) for malformed rows and a file without rows.
    """
    names: list[str] | None = None if columns else list(kinds)
    frames: list[pl.DataFrame] = []
    for block in _blocks(path, separator, fallback):
        if names is None:
            assert columns is not None
            names = [name.strip() for name in block["fields"][0]]
            _require(str(path), columns, names)
            block = block[1:]
        at = {f: names.index(columns[f] if columns else f) for f in kinds}
        raw = block.select(
            "line", "_text", *(pl.col("fields").list.get(i, null_on_oob=True).alias(f) for f, i in at.items()),
            _width=pl.col("fields").list.len(),
        )  # fmt: skip
        expected = f"expected {len(names)} fields separated by '{separator}', got {{_width}}"
        faults: list[Fault] = [(pl.col("_width") != len(names), expected)]
        if fallback is None:
            faults.append((pl.col("_text").str.contains(UNDECODED, literal=True), "not UTF-8 text"))
        frames.append(_typed(raw, kinds, bad, f"{path}:", unit, allowed or {}, faults))
    rows = sum(len(frame) for frame in frames)
    bad.close(str(path), rows)
    return pl.concat(frames)


def read_parquet(
    path: Path, kinds: Mapping[str, Kind], bad: BadRows, *, columns: Mapping[str, str], unit: str = "s",
) -> pl.DataFrame:  # fmt: skip
    """As `read_text` for a Parquet file; `line` is the row, from 1. Date columns count as times."""
    try:
        names = pl.read_parquet_schema(path)
        _require(str(path), columns, list(names))
        raw = pl.read_parquet(path, columns=sorted(set(columns.values())))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    raw = raw.select(pl.col(columns[f]).alias(f) for f in kinds).with_row_index("line", offset=1)
    frame = _typed(raw, kinds, bad, f"{path}: row ", unit, {}, [])
    bad.close(str(path), len(frame))
    return frame


def _require(where: str, columns: Mapping[str, str], present: Sequence[str]) -> None:
    missing = [name for name in columns.values() if name not in present]
    if missing:
        raise DataError(f"{where}: no column {', '.join(map(repr, missing))}; the columns are {list(present)}")
    twice = [name for name in columns.values() if list(present).count(name) > 1]
    if twice:
        raise DataError(f"{where}: column {twice[0]!r} appears twice; rename one of them")


def _typed(
    raw: pl.DataFrame,
    kinds: Mapping[str, Kind],
    bad: BadRows,
    place: str,
    unit: str,
    allowed: Mapping[str, Sequence[str]],
    faults: Sequence[Fault],
) -> pl.DataFrame:
    """Columns of any type -> the kinds' types; rows with a fault go to `bad` and are left out."""
    casts = [_cast(f, kind, raw.schema[f], unit, place).alias(f"{f}_typed") for f, kind in kinds.items()]
    frame = raw.with_columns(casts)
    every = [*faults, *(fault for f, kind in kinds.items() for fault in _faults(f, kind, allowed.get(f)))]
    index = pl.lit(None, dtype=pl.Int32)
    for i, (mask, _) in reversed(list(enumerate(every))):
        index = pl.when(mask).then(i).otherwise(index)
    frame = frame.with_columns(index.alias("fault"))
    wrong = frame.filter(pl.col("fault").is_not_null())
    if len(wrong):
        messages = []
        for row in wrong.head(SHOWN).to_dicts():
            quoted = f": {row['_text'][:120]!r}" if "_text" in raw.columns else ""
            messages.append(f"{place}{row['line']}: {every[row['fault']][1].format_map(row)}{quoted}")
        bad.add(len(wrong), messages)
        frame = frame.filter(pl.col("fault").is_null())
    return frame.select("line", *(pl.col(f"{f}_typed").alias(f) for f in kinds))


def _cast(name: str, kind: Kind, dtype: pl.DataType, unit: str, place: str) -> pl.Expr:
    column = pl.col(name)
    if kind == "time" and dtype.is_temporal() and dtype != pl.Duration and dtype != pl.Time:
        return column.dt.epoch("s")
    if not (dtype.is_numeric() or dtype in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)):
        where = place.removesuffix(" row ")
        raise DataError(f"{where} the column of '{name}' holds {dtype}; a {kind} is a number or a string")
    if kind == "text":
        return column.cast(pl.String).fill_null("")
    if kind == "id" and not dtype.is_numeric():
        return column.cast(pl.String).str.strip_chars()
    if dtype in (pl.Categorical, pl.Enum, pl.String):
        column = column.cast(pl.String).str.strip_chars()
    if kind == "rating":
        return column.cast(pl.Float64, strict=False)
    if dtype.is_float():  # a fraction is a fault, not a rounding
        column = pl.when(column == column.round()).then(column)
    whole = column.cast(pl.Int64, strict=False)
    return whole.floordiv(UNITS[unit]) if kind == "time" else whole


def _faults(name: str, kind: Kind, allowed: Sequence[str] | None) -> Iterator[Fault]:
    typed, value = pl.col(f"{name}_typed"), f"{name} {{{name}!r}}"
    if kind == "id":
        yield typed.is_null() | (typed.cast(pl.String) == ""), f"{name} is empty"
    elif kind in ("integer", "time", "label"):
        yield typed.is_null(), f"{value} is not a whole number"
    elif kind == "rating":
        yield typed.is_null(), f"{value} is not a number"
        yield ~typed.is_finite(), f"{value} is not finite"
    elif allowed is not None:
        yield ~typed.is_in(list(allowed)), f"{value} is not one of {', '.join(allowed)}"
    if kind == "time":
        yield typed < 0, f"{value} is before 1970"
        yield typed > LAST_TIME, f"{value} is after 2100 (if it is not in seconds, name its time unit)"
    if kind == "label":
        yield ~typed.is_in([0, 1]), f"{value} is not 0 or 1"


def _blocks(path: Path, separator: str, fallback: str | None) -> Iterator[pl.DataFrame]:
    """Blocks of `line` (from 1), `_text` (the line) and `fields` (its parts); blank lines are no rows."""
    schema: dict[str, Any] = {"line": pl.UInt32, "_text": pl.String, "fields": pl.List(pl.String)}
    try:
        with _open(path) as stream:
            line = 1
            while chunk := stream.read(BLOCK_BYTES):
                chunk += stream.readline()
                if line == 1:
                    chunk = chunk.removeprefix(b"\xef\xbb\xbf")
                if len(separator) == 1 and b'"' in chunk:  # quoting matters from here on: exact and slow
                    lines = (_decode(part, fallback) for part in itertools.chain(io.BytesIO(chunk), stream))
                    for rows in _quoted(lines, separator, line, path):
                        yield pl.DataFrame(rows, schema=schema, orient="row")
                    return
                frame = pl.DataFrame({"_text": _decode(chunk, fallback).split("\n")}, schema={"_text": pl.String})
                frame = frame.with_row_index("line", offset=line)
                line += chunk.count(b"\n")
                frame = frame.with_columns(pl.col("_text").str.strip_chars_end("\r"))
                frame = frame.filter(pl.col("_text").str.strip_chars() != "")
                if len(frame):
                    yield frame.with_columns(fields=pl.col("_text").str.split(separator))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _decode(chunk: bytes, fallback: str | None) -> str:
    try:
        return chunk.decode()
    except UnicodeDecodeError:
        if fallback:
            return chunk.decode(fallback)
        return re.sub("[\udc80-\udcff]", UNDECODED, chunk.decode(errors="surrogateescape"))


def _quoted(lines: Iterator[str], separator: str, line: int, path: Path) -> Iterator[list[tuple[int, str, list[str]]]]:
    reader = csv.reader(lines, delimiter=separator)
    start, rows = line, []
    try:
        for fields in reader:
            if fields:
                rows.append((start, separator.join(fields), fields))
            start = line + reader.line_num  # a quoted field may span lines
            if len(rows) == BLOCK_ROWS:
                yield rows
                rows = []
    except csv.Error as error:
        raise DataError(f"{path}:{start}: {error} (a quote that is never closed?)") from error
    if rows:
        yield rows

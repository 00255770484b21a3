"""Data for experiments by name: the synthetic world, a public set, or the user's own file."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rec_core.data.prepare import describe, prepare
from rec_core.data.records import Dataset, existing, open_dataset
from rec_core.data.schema import BEHAVIORS, DataError
from rec_core.data.world import World, blocks, items_of
from rec_core.data.writer import write

if TYPE_CHECKING:  # Polars is imported where a source is read; the world and prepared data do without
    from rec_core.data.readers import Source

ENVIRONMENT = "USERSCALE_DATA"  # a folder that holds sources by name, such as $USERSCALE_DATA/ml-1m


@dataclass(frozen=True)
class Data:
    """Which data.

    Attributes:
      data: "world" is generated; "ml-1m", "ml-20m", "taobao" and "amazon" are read in their official layouts; "table"
        is any CSV or Parquet; "prepared" is a folder that `prepare` has written.
      data_dir: folder (or file) of the source; a folder that `prepare` has written from it serves too. Without it,
        $USERSCALE_DATA/<name> is taken where it exists; else the source is downloaded and checked.
      columns: for "table", field=column pairs such as user=uid item=sku time=ts rating=stars. Fields: user, item,
        time, category, domain, behavior, rating, label, text.
      positive: rating above which an event is positive. Default: 3 for MovieLens; with Taobao, any behaviour but a
        view.
      on_bad: "skip" leaves malformed rows out and counts them.
      min_item_count: items with fewer events share the unknown item.
      max_events: keep each user's newest.
      prepared: where prepared datasets are kept.
    """

    data: Literal["world", "ml-1m", "ml-20m", "taobao", "amazon", "table", "prepared"] = "world"
    data_dir: Path | None = None
    columns: tuple[str, ...] = ()
    positive: float | None = None
    on_bad: Literal["error", "skip"] = "error"
    min_item_count: int = 1
    max_events: int | None = None
    prepared: Path = Path("data/prepared")


def load(data: Data, *, world: World | None = None, log: Callable[[str], None] = print) -> Dataset:
    """The prepared dataset, made where it is not there yet."""
    if data.data == "world":
        return make_world(world or World(), data.prepared, log=log)
    if data.data == "prepared" and data.data_dir is None:
        raise DataError("data='prepared' needs data_dir: a folder that `python -m experiments prepare` has written")
    if data.data_dir is not None and (data.data == "prepared" or (data.data_dir / "meta.json").is_file()):
        found = open_dataset(data.data_dir)
        source = found.meta.get("name")
        if data.data not in ("prepared", "table") and not str(source).startswith(data.data):
            raise DataError(f"{data.data_dir} was prepared from {source!r}, asked for was {data.data!r}")
        for line in describe(found):
            log(line)
        return found
    source = read(data, log)
    positive: float | list[str] | None = data.positive
    if positive is None and source.log.rating is not None and data.data in ("ml-1m", "ml-20m"):
        positive = 3.0
    if positive is None and data.data == "taobao":
        positive = [name for name in BEHAVIORS if name != "pv"]
    return prepare(
        source,
        data.prepared / source.name,
        positive=positive,
        min_item_count=data.min_item_count,
        max_events=data.max_events,
        overwrite=True,
        log=log,
    )


def make_world(world: World, prepared: Path, *, log: Callable[[str], None] = print) -> Dataset:
    """The synthetic world as a prepared dataset, generated block by block."""
    identity = {"source": {"name": "world", "config": {k: v for k, v in vars(world).items()}}, "options": {}}
    folder = prepared / "world"
    found = existing(folder, identity, overwrite=True)
    if found is None:
        meta = identity | {"name": "world", "items": world.items + 2, "domains": world.domains + 1}
        found = write(blocks(world), items_of(world), folder, meta=meta, overwrite=True)
    for line in describe(found):
        log(line)
    return found


def read(data: Data, log: Callable[[str], None] = print) -> "Source":
    """The source as its reader gives it."""
    from rec_core.data import download, readers

    if data.data == "table":
        return _table(data)
    if data.columns:
        raise DataError(f"columns={' '.join(data.columns)}: only data='table' names columns; {data.data} has its own")
    folder = data.data_dir
    if folder is None and (root := os.environ.get(ENVIRONMENT)) and (Path(root) / data.data).exists():
        folder = Path(root) / data.data
    if folder is None:
        folder = download.download(data.data, data.prepared.parent / "downloads", log=log)
    reader = {
        "ml-1m": readers.movielens_1m,
        "ml-20m": readers.movielens_20m,
        "taobao": readers.taobao,
        "amazon": readers.amazon_2014,
    }[data.data]
    return reader(folder, on_bad=data.on_bad)


def _table(data: Data) -> "Source":
    from rec_core.data import readers

    if data.data_dir is None:
        raise DataError("data='table' needs data_dir: the CSV or Parquet file, or a folder of such files")
    pairs = [pair.split("=", 1) for pair in data.columns]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        given = " ".join(data.columns) or "none"
        raise DataError(f"columns={given}: give field=column pairs, at least user=..., item=... and time=...")
    return readers.table(data.data_dir, dict(pairs), on_bad=data.on_bad)

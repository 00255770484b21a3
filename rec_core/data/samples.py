"""From an event log to what models read: behaviour sequences, labelled samples, and sampled negatives.

Two views of one dataset. `Behaviors` are the events that make up the users' sequences; `Samples` are the labelled
events that a ranking model learns from, each pointing at the behaviours of its user that are *strictly* older:
behaviours at the sample's own second are not its history, since logs often stamp many events alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from rec_core.data.records import Dataset
from rec_core.data.schema import FIRST_ITEM, DataError

MONTH = 30 * 86_400
# Seconds since the user's previous behaviour; bucket 0 is kept for "unknown" and 1 for a user's first behaviour.
GAP_BOUNDARIES = (60, 600, 3600, 6 * 3600, 86_400, 7 * 86_400, MONTH)
GAPS = len(GAP_BOUNDARIES) + 3
LIKED, DISLIKED = 1, 2
_TIME_BITS = 33  # times are seconds up to the year 2100


@dataclass(frozen=True, eq=False)
class Behaviors:
    """The users' sequences as flat columns sorted by (user, time).

    Attributes:
      offsets: int64[users + 1]; user u has the behaviours `offsets[u]` up to `offsets[u + 1]`.
      columns: `item`, `time`, `category` (0 none), `gap` (bucket of the time since the one before), where the source
        has them `domain`, and `feedback` (LIKED or DISLIKED) where disliked events are part of the sequences.
      sizes: for each id column, one above its largest possible id.
    """

    offsets: Int[np.ndarray, " users_and_one"]
    columns: dict[str, np.ndarray]
    sizes: dict[str, int]

    def __len__(self) -> int:
        return len(self.columns["item"])

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    def before(self, user: Int[np.ndarray, " n"], time: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Index one past the last behaviour of `user` that is strictly older than `time`."""
        owner = np.repeat(np.arange(self.users, dtype=np.int64), np.diff(self.offsets))
        return np.searchsorted(_key(owner, self.columns["time"]), _key(user, time))

    def history(
        self, start: Int[np.ndarray, " b"], end: Int[np.ndarray, " b"], length: int
    ) -> tuple[Int[np.ndarray, "b length"], Bool[np.ndarray, "b length"]]:
        """Indices of the newest `length` behaviours of `[start, end)`, oldest first, the newest in the last slot.

        Returns:
          indices (0 in unused slots) and a mask of the used ones.
        """
        index = end[:, None] - length + np.arange(length)
        mask = index >= start[:, None]
        return np.where(mask, index, 0), mask


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled events, sorted by (user, time); sample i may read the behaviours `start[i]` up to `end[i]`.

    Attributes:
      user, item, category, domain, time, label: one value a sample.
      start, end: the user's behaviours strictly older than the sample.
      probability: the true click probability, where the source knows it.
    """

    user: np.ndarray
    item: np.ndarray
    category: np.ndarray
    domain: np.ndarray
    time: np.ndarray
    label: np.ndarray
    start: np.ndarray
    end: np.ndarray
    probability: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: np.ndarray) -> "Samples":
        """The samples at `index` (integers or a mask)."""
        columns = {name: value[index] for name, value in vars(self).items() if value is not None}
        return Samples(**columns)


def gap_bucket(seconds: np.ndarray, first: np.ndarray) -> Int[np.ndarray, " n"]:
    """Bucket of the time since the user's previous behaviour: 1 for a first one, then 2 .. GAPS - 1 as it grows."""
    bucket = 2 + np.searchsorted(GAP_BOUNDARIES, np.maximum(seconds, 0), side="right")
    return np.where(first, 1, bucket).astype(np.int32)


def item_category(dataset: Dataset, *, until: int, buckets: int = 8) -> Int[np.ndarray, " items"]:
    """The category of each item id, `[dataset.items]`, 0 for none.

    A source without categories gets popularity classes instead, which are a function of the item as well: items cut in
    `buckets` classes of equal event counts by events before `until` (class 1 the most popular; unseen items the last).
    """
    if dataset.categories > 1:
        known = dataset.item_table.category
        assert known is not None  # a source with categories has them by item
        return known
    category = np.zeros(dataset.items, np.int32)
    columns = dataset.columns(("item", "time"))
    counts = np.bincount(columns["item"][columns["time"] < until], minlength=dataset.items)
    order = np.argsort(-counts[FIRST_ITEM:], kind="stable")
    sorted_counts = counts[FIRST_ITEM:][order]
    more_popular = np.cumsum(sorted_counts) - sorted_counts  # events of more popular items
    share = more_popular / max(1, int(sorted_counts.sum()))
    category[FIRST_ITEM + order] = 1 + np.minimum(buckets - 1, (share * buckets).astype(np.int32))
    return category


def behaviors(
    dataset: Dataset, category: Int[np.ndarray, " items"], *, which: Literal["auto", "positive", "all"] = "auto"
) -> Behaviors:
    """The users' sequences.

    Args:
      dataset: prepared events.
      category: of each item id, from `item_category`.
      which: "positive" takes events whose label is 1, "all" takes every event and tells them apart by `feedback`;
        "auto" is "all" where the source has ratings (a low rating was a choice too) and "positive" where it has
        impressions.
    """
    columns = _present(dataset, "item", "time", "domain", "label")
    label = columns.pop("label", None)
    if which == "auto":
        which = "all" if "rating" in dataset.meta["columns"] else "positive"
    owner = np.repeat(np.arange(dataset.users, dtype=np.int64), np.diff(dataset.offsets))
    if label is not None and which == "positive":
        keep = label == 1
        owner, columns = owner[keep], {name: column[keep] for name, column in columns.items()}
    elif label is not None:
        columns["feedback"] = np.where(label == 1, LIKED, DISLIKED).astype(np.int32)
    if not len(owner):
        raise DataError(f"{dataset.path}: no event is positive; lower the threshold given to prepare")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=dataset.users))])
    columns["category"] = category[columns["item"]]
    first = np.zeros(len(owner), bool)
    first[offsets[:-1][np.diff(offsets) > 0]] = True
    columns["gap"] = gap_bucket(np.diff(columns["time"], prepend=columns["time"][0]), first)
    sizes = {
        "item": dataset.items,
        "category": int(category.max()) + 1,
        "gap": GAPS,
        "feedback": 3,
        "domain": dataset.domains,
    }
    return Behaviors(offsets, columns, {name: sizes[name] for name in columns if name in sizes})


def samples(dataset: Dataset, sequences: Behaviors, category: Int[np.ndarray, " items"]) -> Samples:
    """Every event as a labelled sample (label 1 where the source has none)."""
    columns = _present(dataset, "item", "time", "domain", "label", "probability")
    user = np.repeat(np.arange(dataset.users, dtype=np.int64), np.diff(dataset.offsets))
    item = columns["item"]
    return Samples(
        user=user,
        item=item,
        category=category[item],
        domain=columns.get("domain", np.zeros(len(user), np.int32)),
        time=columns["time"],
        label=columns.get("label", np.ones(len(user), np.uint8)),
        start=sequences.offsets[user],
        end=sequences.before(user, columns["time"]),
        probability=columns.get("probability"),
    )


def add_negatives(
    positives: Samples,
    category: Int[np.ndarray, " items"],
    *,
    ratio: int = 1,
    seed: int = 0,
    tries: int = 50,
    log: Callable[[str], None] = print,
) -> Samples:
    """Negatives for a source that has none: `ratio` a positive, at its user and time.

    A negative is drawn in proportion to the items' counts within the same 30 days, so that popularity alone cannot tell
    it from a positive, among items that the user has at no time. A positive whose user has had (nearly) everything of
    that month is left out with a line that counts such samples.
    """
    rng = np.random.default_rng(seed)
    size = len(category)
    seen = np.unique(positives.user * size + positives.item)
    month = positives.time // MONTH
    order = np.argsort(month, kind="stable")
    first = np.searchsorted(month[order], month, side="left")
    count = np.searchsorted(month[order], month, side="right") - first
    drawn = np.zeros((ratio, len(positives)), np.int32)
    for row in drawn:
        open_ = np.arange(len(positives))
        for _ in range(tries):
            pick = first[open_] + (rng.random(len(open_)) * count[open_]).astype(np.int64)
            candidate = positives.item[order[pick]]
            fresh = ~_contains(seen, positives.user[open_] * size + candidate)
            row[open_[fresh]] = candidate[fresh]
            open_ = open_[~fresh]
            if not len(open_):
                break
    complete = (drawn > 0).all(axis=0)
    if not complete.all():
        log(f"negatives: {int((~complete).sum())} of {len(positives)} samples left out: no unseen item in their month")
    kept = positives.take(complete)
    parts = [vars(kept)]
    for row in drawn:
        item = row[complete]
        parts.append(vars(kept) | {"item": item, "category": category[item], "label": np.zeros(len(kept), np.uint8)})
    joined = {
        name: np.concatenate([part[name] for part in parts]) for name, value in vars(kept).items() if value is not None
    }
    return Samples(**joined).take(np.lexsort((joined["label"], joined["time"], joined["user"])))


def _present(dataset: Dataset, *names: str) -> dict[str, np.ndarray]:
    return dataset.columns([name for name in names if name in dataset.meta["columns"]])


def _key(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    return (user.astype(np.int64) << _TIME_BITS) | time


def _contains(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    return sorted_values[place] == values

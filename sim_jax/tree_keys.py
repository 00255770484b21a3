"""Second keys of the user behaviour tree: any function of an item, one or several keys each (SIM, section 4.1).

    key_of = ItemKeys.categories(items)                       # or of(item, key), or clusters of embeddings
    tree.append(log, key_of(log.item))
    asked = distinct(key_of(candidates))                      # each key of a request once
    found = tree.lookup([user], asked.keys, k, now)           # [n, K] for n distinct keys
    mine = union(found, asked.rows, k)                        # [N, K] for N candidates, of all keys of each

Where every candidate has one key, `asked.rows.values` says which of the n sequences is its own, and no union is needed.
Related keys are asked for, not filed: `expand(key_of(candidates), related)`.
"""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64

from rec_core.data.schema import Items, Ragged
from sim_jax.tree_blocks import Filings, Found, changes, integers, newest, order
from sim_jax.tree_table import row_lengths


@dataclass(frozen=True, eq=False)
class ItemKeys:
    """Keys by id: `item` is sorted and unique, row i of `keys` has those of `item[i]`. Key 0 is no key."""

    item: Int64[np.ndarray, "m"]
    keys: Ragged

    def __post_init__(self) -> None:
        if (np.diff(self.item) <= 0).any() or len(row_lengths("keys", self.keys)) != len(self.item):
            raise ValueError(f"{len(self.item)} items: they must rise, with a row of keys each: use ItemKeys.of")

    @classmethod
    def of(cls, item: Int[np.ndarray, "n"], key: Int[np.ndarray, "n"]) -> "ItemKeys":
        """From (item, key) pairs in any order; an item may occur with several keys, a repeated pair counts once."""
        item, key = integers("item", item), integers("key", key)
        if item.ndim != 1 or item.shape != key.shape:
            raise ValueError(f"item has shape {item.shape} and key {key.shape}: one key for each item is needed")
        item, key, _ = _unique(item[key != 0], key[key != 0])
        first = np.flatnonzero(changes(item))
        return cls(item[first], Ragged(np.append(first, len(item)), key))

    @classmethod
    def category(cls, items: Items) -> "ItemKeys":
        """The one category of each item."""
        if items.category is None:
            raise ValueError("these items have no category: use their categories, or clusters of their embeddings")
        return cls.of(items.item, items.category)

    @classmethod
    def categories(cls, items: Items) -> "ItemKeys":
        """All categories of each item, where the source has several."""
        if items.categories is None:
            raise ValueError("these items have no lists of categories: use their category")
        return cls.of(np.repeat(items.item, row_lengths("categories", items.categories)), items.categories.values)

    def __call__(self, items: Int[np.ndarray, "n"]) -> Ragged:
        """The keys of each item; an unknown item has none."""
        items = integers("items", items)
        if not len(self.item):
            return Ragged(np.zeros(len(items) + 1, np.int64), np.zeros(0, np.int64))
        place = np.minimum(np.searchsorted(self.item, items), len(self.item) - 1)
        return self.keys.take(np.where(self.item[place] == items, place, -1))


def expand(keys: Ragged, related: ItemKeys) -> Ragged:
    """Each row's keys and the keys related to them, each once, rising."""
    row = np.repeat(np.arange(len(keys.offsets) - 1), row_lengths("keys", keys))
    more = related(keys.values)
    rows = np.append(row, np.repeat(row, row_lengths("related", more)))
    row, key, _ = _unique(rows, np.append(keys.values, more.values))
    return Ragged(np.searchsorted(row, np.arange(len(keys.offsets))), key)


class Distinct(NamedTuple):
    """A request's questions: `keys` to ask the tree for, and for each candidate the rows of the answer that are its."""

    keys: Ragged  # B rows, n values
    rows: Ragged  # N rows of places among the n


def distinct(keys: Ragged, candidates: Int[np.ndarray, "B"] | None = None) -> Distinct:
    """The distinct keys of each user's candidates.

    Args:
      keys: N rows, the keys of all users' candidates one after the other.
      candidates: how many candidates each user has, N in all; None: one user has them all.
    """
    n = len(keys.offsets) - 1
    many = np.array([n]) if candidates is None else integers("candidates", candidates)
    if many.ndim != 1 or (many < 0).any() or many.sum() != n:
        raise ValueError(f"candidates is {candidates}: numbers of candidates that add up to the {n} rows of keys")
    lengths = row_lengths("keys", keys)
    if len(many) == 1:  # a request while somebody waits: a column alone takes NumPy a fifth of the time
        key, place = np.unique(keys.values, return_inverse=True)
        return Distinct(Ragged(np.array([0, len(key)]), key), Ragged(keys.offsets, place))
    user = np.repeat(np.repeat(np.arange(len(many)), many), lengths)
    user, key, place = _unique(user, keys.values)
    return Distinct(Ragged(np.searchsorted(user, np.arange(len(many) + 1)), key), Ragged(keys.offsets, place))


def _unique(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct pairs in order, and the place of each given pair among them (NumPy's, by rows, takes .3 ms)."""
    index = order(first, second)
    new = changes(first[index], second[index])
    place = np.empty(len(index), np.int64)
    place[index] = np.cumsum(new) - 1
    return first[index][new], second[index][new], place


def union(found: Found, rows: Ragged, k: int) -> Found:
    """For each of N ragged rows of places in `found` ([n, K]), the k newest behaviours of them all, each once.

    With `k` at most the K that was looked up this is exactly what one key for all of them would have found.
    """
    owner = np.repeat(np.arange(len(rows.offsets) - 1), row_lengths("rows", rows))
    mask = found.mask[rows.values]
    behaviors = (
        np.repeat(owner, found.count[rows.values]),
        found.time[rows.values][mask],
        found.item[rows.values][mask],
    )
    ordered = Filings.of(behaviors[0], np.zeros(len(behaviors[0]), np.int64), *behaviors[1:])
    bounds = np.searchsorted(ordered.user, np.arange(len(rows.offsets)))
    return newest(ordered.event, bounds[:-1], bounds[1:], k)


# ---- where there is no category --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Clusters:
    """Centres of clusters; key i + 1 belongs to centre i."""

    centers: Float[np.ndarray, "n d"]

    def __call__(self, embeddings: Float[np.ndarray, "m d"]) -> Int64[np.ndarray, "m"]:
        """The key, 1 .. n, of the centre nearest to each embedding; new items are given theirs without clustering."""
        from scipy.cluster.vq import vq

        embeddings = _finite(embeddings)
        if embeddings.shape[1] != self.centers.shape[1]:
            raise ValueError(f"embeddings are {embeddings.shape[1]} wide and the centres {self.centers.shape[1]}")
        return vq(embeddings, self.centers, check_finite=False)[0].astype(np.int64) + 1


def clusters(embeddings: Float[np.ndarray, "m d"], n: int, seed: int, *, steps: int = 20) -> Clusters:
    """n clusters of item embeddings by k-means, the second key where there is no category.

    The same seed gives the same clusters. Embeddings that are compared by direction should have unit length.
    Clusters that lose all members keep their centre.
    """
    from scipy.cluster.vq import kmeans2

    embeddings = _finite(embeddings)
    if not 1 <= n <= len(embeddings):
        raise ValueError(f"n is {n}: from 1 cluster to one for each of the {len(embeddings)} embeddings can be made")
    start = _spread(embeddings, n, np.random.default_rng(seed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        centers, _ = kmeans2(embeddings, start, iter=steps, minit="matrix", check_finite=False)
    return Clusters(centers)


def _spread(embeddings: np.ndarray, n: int, rng: np.random.Generator) -> Float[np.ndarray, "n d"]:
    """k-means++'s first centres (Arthur & Vassilvitskii 2007), from a sample of 16 rows a cluster.

    SciPy's own computes all distances to all centres at each step: 18 s for 100 clusters of 100,000 rows.
    """
    rows = embeddings[rng.choice(len(embeddings), min(len(embeddings), 16 * n), replace=False)]
    chosen = [0]
    far = np.full(len(rows), np.inf)
    while len(chosen) < n:
        far = np.minimum(far, ((rows - rows[chosen[-1]]) ** 2).sum(axis=1, dtype=np.float64))
        total = np.cumsum(far)
        drawn = np.searchsorted(total, rng.random() * total[-1], side="right")
        chosen.append(min(int(drawn), len(rows) - 1))  # the last row where all rows equal a centre
    return rows[chosen]


def _finite(embeddings: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m d"]:
    found = np.asarray(embeddings, np.float32)
    if found.ndim != 2:
        raise ValueError(f"embeddings has shape {found.shape}: [m, d] is needed")
    bad = ~np.isfinite(found).all(axis=1)
    if bad.any():
        raise ValueError(f"embeddings[{int(np.argmax(bad))}] is not finite ({int(bad.sum())} such rows)")
    return found

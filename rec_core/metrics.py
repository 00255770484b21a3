"""Metrics of ranking (clicks) and retrieval (full catalogue).

Exact click metrics are host functions on whole columns. `ClickSums` is their streaming form: sums that are updated
on the device and merge by addition. Retrieval metrics come from exact ranks or exact top-k lists, computed a chunk
of the catalogue at a time; `hit_rate`, `ndcg` and `recall` give `(sum, weight)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rec_core.losses import bce_with_logits

_LOGIT_RANGE = 20.0  # of the streaming histogram: beyond, probabilities differ by less than 2e-9


def auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Area under the ROC curve: the weighted share of (positive, negative) pairs in the right order, ties half.

    Args:
      labels: 1 or 0, `[n]`. scores: any monotone form. weights: at least 0, default 1.

    Raises:
      ValueError: one class only, a NaN score, or a label that is neither 0 nor 1, with its row.
    """
    labels, scores, weights = _columns(labels, scores, weights)
    order = np.argsort(scores, kind="stable")
    labels, scores, weights = labels[order], scores[order], weights[order]
    start = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
    positive, negative = np.add.reduceat(weights * labels, start), np.add.reduceat(weights * (1 - labels), start)
    return _pairs(positive, negative)[0]


class GroupedAuc(NamedTuple):
    value: float  # mean of the users' AUC, weighted by their impressions
    users: int  # users with both classes
    left_out: int  # users with one class only, for whom no AUC exists
    impressions_left_out: float


def gauc(users: np.ndarray, labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> GroupedAuc:
    """AUC within each user, averaged with the users' impressions as weights (arXiv 1706.06978, equation 7).

    ValueError where no user has both classes.
    """
    _, value, impressions = _by_group("users", users, labels, scores, weights)
    both = np.isfinite(value)
    if not both.any():
        raise ValueError(f"GAUC: none of {both.size} users has both clicked and unclicked impressions")
    mean = np.average(value[both], weights=impressions[both])
    return GroupedAuc(float(mean), int(both.sum()), int((~both).sum()), float(impressions[~both].sum()))


def auc_by_group(groups: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> dict[Any, tuple[float, int]]:
    """AUC and impressions of each group, such as a domain, those of most impressions first.

    Groups with one class only have no AUC and are left out. `gauc` is the mean over groups.

    Args:
      groups: `[n]`, of any kind that sorts. labels, scores: as for `auc`.
    """
    names, value, impressions = _by_group("groups", groups, labels, scores, None)
    largest = np.argsort(-impressions, kind="stable")
    return {names[i].item(): (float(value[i]), int(impressions[i])) for i in largest if np.isfinite(value[i])}


def imp(auc: float, base: float) -> float:
    """`((AUC - .5) / (AUC_base - .5) - 1) * 100 %`: how much more than the base a model tells, of what chance leaves.

    ADS, arXiv 2502.05523, equation 14 (also known as RelaImp).

    Raises:
      ValueError: an AUC outside of [0, 1], or a base of .5 or less, over which no improvement is defined.
    """
    for name, value in (("auc", auc), ("base", base)):
        if not 0 <= value <= 1:
            raise ValueError(f"Imp: {name} is {value}, must be an AUC in [0, 1]")
    if base <= 0.5:
        raise ValueError(f"Imp: base is {base}, must be above .5; compare AUCs by their difference instead")
    return ((auc - 0.5) / (base - 0.5) - 1) * 100


def log_loss(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean binary cross-entropy in nats, float64. Probabilities are kept 1e-7 away from 0 and 1."""
    labels, probabilities, weights = _columns(labels, probabilities, weights, probability=True)
    p = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return float(np.average(-labels * np.log(p) - (1 - labels) * np.log1p(-p), weights=weights))


class Calibration(NamedTuple):
    ratio: float  # predicted clicks / clicks; 1 is calibrated, 2 promises twice too many
    error: float  # expected calibration error: mean |mean p - click rate| over bins of equal width in p


def calibration(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None, *, bins: int = 20
) -> Calibration:
    """ValueError where there is no positive: the ratio does not exist."""
    labels, probabilities, weights = _columns(labels, probabilities, weights, probability=True)
    cell = np.minimum((probabilities * bins).astype(int), bins - 1)
    clicks = np.bincount(cell, weights * labels, bins)
    return _calibration(np.bincount(cell, weights * probabilities, bins), clicks, weights.sum())


@struct.dataclass
class ClickSums:
    """Sums for AUC, log loss and calibration over any number of batches. Leaves add up: see `merge`.

    Sums are float32 on the device, good to about 1e-6 over some 10 M examples; for more, merge states of that size on
    the host in float64 (`jax.tree.map(np.float64, sums)`).
    """

    positive: Float[Array, " bins"]  # weight by bin of the logit
    negative: Float[Array, " bins"]
    predicted: Float[Array, " bins"]  # sum of p by bin
    loss: Float[Array, ""]
    invalid: Float[Array, ""]  # examples with a NaN logit


class ClickMetrics(NamedTuple):
    auc: float
    auc_bound: float  # the exact AUC is within auc +- auc_bound
    log_loss: float
    calibration: Calibration
    weight: float


def click_sums(bins: int = 8192) -> ClickSums:
    """The empty sums. Bins have equal width in the logit, `40 / bins`, over [-20, 20] with the rest in the end bins."""
    if bins < 2:
        raise ValueError(f"bins is {bins}, must be at least 2")
    empty = jnp.zeros(bins, jnp.float32)
    return ClickSums(empty, empty, empty, jnp.float32(0), jnp.float32(0))


def add_clicks(
    sums: ClickSums,
    labels: Float[Array, "..."],
    logits: Float[Array, "..."],
    weights: Float[Array, "..."] | None = None,
) -> ClickSums:
    """The sums with one more batch in them; pure, jittable. Entries of weight 0 are not looked at."""
    bins = sums.positive.shape[0]
    logits, labels = logits.astype(jnp.float32), jnp.asarray(labels, jnp.float32)
    weights = jnp.ones_like(logits) if weights is None else jnp.broadcast_to(weights, logits.shape).astype(jnp.float32)
    invalid = jnp.isnan(logits) & (weights > 0)
    weights = jnp.where(invalid, 0, weights)
    logits = jnp.where(weights > 0, logits, 0)
    cell = jnp.floor((logits + _LOGIT_RANGE) * (bins / (2 * _LOGIT_RANGE)))
    cell = jnp.clip(cell, 0, bins - 1).astype(jnp.int32)

    def add(total: Array, amount: Array) -> Array:
        return total.at[cell].add(amount * weights)

    return ClickSums(
        add(sums.positive, labels),
        add(sums.negative, 1 - labels),
        add(sums.predicted, jax.nn.sigmoid(logits)),
        sums.loss + bce_with_logits(logits, labels, weights)[0],
        sums.invalid + jnp.sum(invalid),
    )


def merge(a: ClickSums, b: ClickSums) -> ClickSums:
    """Sums of both; associative and commutative."""
    return jax.tree.map(lambda x, y: x + y, a, b)


def click_metrics(sums: ClickSums, *, bins: int = 20) -> ClickMetrics:
    """Metrics of the sums, on the host in float64.

    Pairs in one bin count half, so the exact AUC differs by at most half the share of such pairs, `auc_bound`. The
    calibration error is over `bins` bins in p, put together from the logit's bins by their mean p.

    Raises:
      ValueError: NaN logits were added, or one class only.
    """
    positive, negative, predicted, loss, invalid = (
        np.asarray(x, np.float64) for x in (sums.positive, sums.negative, sums.predicted, sums.loss, sums.invalid)
    )
    if invalid > 0:
        raise ValueError(f"{int(invalid)} logits were NaN; the model or its input is broken")
    area, bound = _pairs(positive, negative)
    count = positive + negative
    p = np.divide(predicted, count, out=np.zeros_like(count), where=count > 0)
    cell = np.minimum((p * bins).astype(int), bins - 1)
    fit = _calibration(np.bincount(cell, predicted, bins), np.bincount(cell, positive, bins), count.sum())
    return ClickMetrics(area, bound, float(loss / count.sum()), fit, float(count.sum()))


def ranks(
    queries: Float[Array, "B d"],
    items: Float[Array, "V d"],
    target: Int[Array, " B"],
    *,
    seen: Int[Array, "B S"] | None = None,
    valid: Bool[Array, " V"] | None = None,
    ties: str = "pessimistic",
    chunk: int = 8192,
) -> Float[Array, " B"]:
    """Rank, from 1, of each target among all items by dot product, in float32; memory `O(B chunk)`.

    Args:
      seen: ids to take out of each row's ranking, filled up with -1. The target itself always stays in.
      valid: False takes an item out of all rankings (padding and unknown rows).
      ties: "pessimistic" ranks the target behind its equals, so that a constant score ranks last; "half" in their
        middle, which may be fractional. A NaN score counts as an equal; a target that is no row of `items` ranks last.
    """
    if ties not in ("pessimistic", "half"):
        raise ValueError(f"ties is {ties!r}, must be 'pessimistic' or 'half'")
    score_chunk, starts = _chunks(queries, items, seen, valid, chunk)
    rows = jnp.arange(queries.shape[0])

    # The target's score is read from the same chunked product: another product would round differently.
    def find(score: Array, start: Array) -> tuple[Array, None]:
        scores, ids, _ = score_chunk(start)
        inside = (target >= ids[0]) & (target <= ids[-1])
        return jnp.where(inside, scores[rows, jnp.clip(target - ids[0], 0, ids.size - 1)], score), None

    score, _ = jax.lax.scan(find, jnp.full(target.shape, jnp.nan, jnp.float32), starts)

    def count(rank: Array, start: Array) -> tuple[Array, None]:
        scores, ids, candidate = score_chunk(start)
        candidate = candidate & (ids[None] != target[:, None])
        better = jnp.sum(candidate & (scores > score[:, None]), axis=1)
        equal = jnp.sum(candidate & ~(scores > score[:, None]) & ~(scores < score[:, None]), axis=1)  # NaN included
        return rank + better + (equal if ties == "pessimistic" else equal / 2), None

    return jax.lax.scan(count, jnp.ones(target.shape, jnp.float32), starts)[0]


def top_k(
    queries: Float[Array, "B d"],
    items: Float[Array, "V d"],
    k: int,
    *,
    seen: Int[Array, "B S"] | None = None,
    valid: Bool[Array, " V"] | None = None,
    chunk: int = 8192,
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Scores and ids of the k best items by dot product, exact; equal scores by rising id. Options as in `ranks`.

    Where fewer than k items are left, the rest is id -1 with score -inf. An item whose score is NaN is not listed.
    """
    if not 1 <= k <= items.shape[0]:
        raise ValueError(f"k is {k}, must be from 1 to the number of items, {items.shape[0]}")
    score_chunk, starts = _chunks(queries, items, seen, valid, chunk)

    def step(best: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        scores, ids, candidate = score_chunk(start)
        candidate = candidate & ~jnp.isnan(scores)  # NaN would sort first
        scores = jnp.concatenate([best[0], jnp.where(candidate, scores, -jnp.inf)], axis=1)
        ids = jnp.concatenate([best[1], jnp.where(candidate, ids[None], -1)], axis=1)
        scores, where = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(ids, where, axis=1)), None

    shape = (queries.shape[0], k)
    empty = jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, -1, jnp.int32)
    return jax.lax.scan(step, empty, starts)[0]


def ranks_in(ids: Int[Array, "B k"], target: Int[Array, " B"]) -> Float[Array, " B"]:
    """Rank of the target in a top-k list, from 1; infinity where it is not in it."""
    hit = ids == target[:, None]
    return jnp.where(hit.any(axis=1), jnp.argmax(hit, axis=1) + 1.0, jnp.inf)


def hit_rate(ranks: Float[Array, " B"], k: int, weights: Float[Array, " B"] | None = None) -> tuple[Array, Array]:
    """HR@K: share of targets among the first k. `(sum, weight)`."""
    return _weighted((ranks <= k).astype(jnp.float32), weights)


def ndcg(ranks: Float[Array, " B"], k: int, weights: Float[Array, " B"] | None = None) -> tuple[Array, Array]:
    """NDCG@K with one relevant item a row: `1 / log2(1 + rank)` within the first k. `(sum, weight)`."""
    return _weighted(jnp.where(ranks <= k, 1 / jnp.log2(1 + ranks), 0.0), weights)


def recall(
    ids: Int[Array, "B k"], relevant: Int[Array, "B R"], k: int, weights: Float[Array, " B"] | None = None
) -> tuple[Array, Array]:
    """Recall@K: share of each row's distinct relevant items (filled up with -1) in the first k of a top list.

    `(sum, weight)`; rows without a relevant item have no recall and weigh nothing.
    """
    if k > ids.shape[1]:
        raise ValueError(f"Recall@{k} needs lists of {k} items or more, got {ids.shape[1]}")
    same = relevant[:, :, None] == relevant[:, None, :]
    first = (relevant >= 0) & (jnp.argmax(same, axis=2) == jnp.arange(relevant.shape[1]))
    found = jnp.any(relevant[:, :, None] == ids[:, None, :k], axis=2) & first
    total = jnp.sum(first, axis=1)
    weights = jnp.ones(ids.shape[0]) if weights is None else weights
    return _weighted(jnp.sum(found, axis=1) / jnp.maximum(total, 1), jnp.where(total > 0, weights, 0))


def _weighted(values: Array, weights: Array | None) -> tuple[Array, Array]:
    weights = jnp.ones_like(values) if weights is None else weights.astype(values.dtype)
    return jnp.sum(jnp.where(weights > 0, values, 0) * weights), jnp.sum(weights)


def _chunks(
    queries: Array, items: Array, seen: Array | None, valid: Array | None, chunk: int
) -> tuple[Callable[[Array], tuple[Array, Array, Array]], Array]:
    """A function from a chunk's nominal start to its scores `[B, c]`, ids `[c]` and candidates `[B, c]`."""
    count, rows = items.shape[0], jnp.arange(queries.shape[0])
    chunk = min(chunk, count)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk} for {count} items, both must be at least 1")

    def score(start: Array) -> tuple[Array, Array, Array]:
        # The last chunk is moved back instead of padding the catalogue; what it repeats is no candidate.
        first = jnp.minimum(start, count - chunk)
        part = jax.lax.dynamic_slice_in_dim(items, first, chunk)
        # On accelerators the default would round float32 to fewer bits and make ties.
        scores = jnp.matmul(queries, part.T, precision="highest", preferred_element_type=jnp.float32)
        ids = first + jnp.arange(chunk, dtype=jnp.int32)
        candidate = jnp.broadcast_to(ids >= start, scores.shape)
        if valid is not None:
            candidate &= jax.lax.dynamic_slice_in_dim(valid, first, chunk)[None]
        if seen is not None:
            place = jnp.where((seen >= first) & (seen < first + chunk), seen - first, chunk)
            candidate = candidate.at[rows[:, None], place].set(False, mode="drop")
        return scores, ids, candidate

    return score, jnp.arange(0, count, chunk, dtype=jnp.int32)


def _by_group(
    name: str, groups: np.ndarray, labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The groups, in order; AUC within each, NaN where a class is missing; and impressions, by weight."""
    labels, scores, weights = _columns(labels, scores, weights)
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    if group.shape != labels.shape:
        raise ValueError(f"{name} has shape {group.shape}, labels {labels.shape}")
    order = np.lexsort((scores, group))
    group, labels, scores, weights = group[order], labels[order], scores[order], weights[order]
    tie = np.flatnonzero(np.r_[True, (scores[1:] != scores[:-1]) | (group[1:] != group[:-1])])
    positive, negative = np.add.reduceat(weights * labels, tie), np.add.reduceat(weights * (1 - labels), tie)
    owner = group[tie]
    positives, negatives = np.bincount(owner, positive), np.bincount(owner, negative)
    below = np.cumsum(negative) - negative
    first = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    below = below - below[first][owner]  # negatives of this group with a lower score
    right = np.bincount(owner, positive * (below + negative / 2))
    both = (positives > 0) & (negatives > 0)
    value = np.divide(right, positives * negatives, out=np.full(len(names), np.nan), where=both)
    return names, value, positives + negatives


def _pairs(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """Weighted AUC of cells in rising order of score, ties within a cell half, and half the share of tied pairs."""
    if not positive.sum() > 0 or not negative.sum() > 0:
        raise ValueError(
            f"AUC needs both classes, got weight {positive.sum():g} of positives and {negative.sum():g} of negatives"
        )
    pairs, tied = positive.sum() * negative.sum(), (positive * negative).sum() / 2
    below = np.cumsum(negative) - negative
    return float(((positive * below).sum() + tied) / pairs), float(tied / pairs)


def _calibration(predicted: np.ndarray, clicks: np.ndarray, weight: float) -> Calibration:
    if not clicks.sum() > 0:
        raise ValueError("calibration needs at least one positive: predicted over observed clicks does not exist")
    return Calibration(float(predicted.sum() / clicks.sum()), float(np.abs(predicted - clicks).sum() / weight))


def _columns(
    labels: Any, scores: Any, weights: Any, *, probability: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    weights = np.ones(labels.shape) if weights is None else np.asarray(weights, np.float64)
    if not labels.ndim == 1 or not labels.shape == scores.shape == weights.shape or not labels.size:
        raise ValueError(
            f"labels {labels.shape}, scores {scores.shape} and weights {weights.shape} must be columns of one length, "
            "which is not 0"
        )
    for name, column, wrong, rule in (
        ("label", labels, (labels != 0) & (labels != 1), "0 or 1"),
        ("score", scores, np.isnan(scores), "a number"),
        ("probability", scores, probability & ~((scores >= 0) & (scores <= 1)), "in [0, 1]"),
        ("weight", weights, ~((weights >= 0) & np.isfinite(weights)), "finite and at least 0"),
    ):
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"{name} {column[row]} in row {row} must be {rule} ({int(wrong.sum())} such)")
    if not weights.sum() > 0:
        raise ValueError("all weights are 0")
    return labels, scores, weights

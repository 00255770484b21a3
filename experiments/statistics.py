"""Intervals for what an experiment measured: paired bootstrap over users and seeds, and means across seeds.

Two systems are scored on the same samples, each trained with the same seeds. A resample draws users with replacement
(all of a user's samples together: they are not independent) and seeds with replacement, and computes both systems'
metric on the same draw, so that what makes a draw easy cancels in the difference. The interval is the percentile
interval (Efron and Tibshirani, 1993, chapter 13). The spread over S seeds of a bootstrap is too small by the factor
(S - 1) / S, which matters at S = 3: the deviations are scaled by sqrt(S / (S - 1)). With one seed only the users vary,
and the interval says nothing about another training run.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.special import stdtrit

MAX_REDRAWS = 100


@dataclass(frozen=True)
class Interval:
    """A mean and its interval. `users` or `seeds` is 0 where nothing was drawn over them."""

    mean: float
    low: float
    high: float
    level: float  # .95 for a 95 % interval
    method: str  # how it was made, in words
    per_seed: tuple[float, ...] = ()  # the statistic of each seed, all users
    users: int = 0
    seeds: int = 0
    samples: int = 0
    resamples: int = 0
    contains_zero: bool = field(init=False)

    def __post_init__(self) -> None:
        if not (np.isfinite([self.mean, self.low, self.high]).all() and self.low <= self.high):
            raise ValueError(f"interval [{self.low}, {self.high}] around {self.mean}: not finite, or low above high")
        object.__setattr__(self, "contains_zero", self.low <= 0.0 <= self.high)

    def row(self) -> dict[str, Any]:
        """A flat dictionary, for `results.record(rows=...)`; one `seed_<i>` for each seed's value."""
        flat = asdict(self)
        per_seed = flat.pop("per_seed")
        return {**flat, **{f"seed_{i}": value for i, value in enumerate(per_seed)}}

    def describe(self, digits: int = 4, *, signed: bool = True) -> str:
        """`+0.0123 [+0.0011, +0.0235], 95 % interval (...)`, and whether it contains zero."""
        sign = "+" if signed else ""
        numbers = f"{self.mean:{sign}.{digits}f} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"
        text = f"{numbers}, {self.level * 100:.4g} % interval ({self.method})"
        return text + ("; the interval contains zero" if self.contains_zero else "")


def auc_difference(
    labels: Num[np.ndarray, "N"],
    scores_a: Float[np.ndarray, "S N"],
    scores_b: Float[np.ndarray, "S N"],
    users: Int[np.ndarray, "N"],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """AUC of b minus AUC of a on the same samples, with its interval over users and seeds.

    Args: `labels` 0 or 1; `scores_*` a row per seed (or [N] for one), any monotone scale, ties count half; `users` the
    user id of each sample. Row s of both must come from the same seed.

    Raises ValueError for shapes that differ, scores that are not finite, labels of one class only.
    """
    a, b = _per_seed("scores_a", scores_a), _per_seed("scores_b", scores_b)
    if a.shape != b.shape:
        raise ValueError(f"scores_a is {a.shape} and scores_b {b.shape}; both need a row per seed on the same samples")
    return _auc(labels, [(a, b)], users, resamples, seed, level)


def mean_auc_difference(
    labels: Num[np.ndarray, "N"],
    pairs: Sequence[tuple[Float[np.ndarray, "S N"], Float[np.ndarray, "S N"]]],
    users: Int[np.ndarray, "N"],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The mean of `auc_difference` over several pairs (a, b) of systems: users and seeds are drawn for all at once.

    Raises ValueError as there, and where there is no pair or their shapes differ.
    """
    scores = [(_per_seed("a", a), _per_seed("b", b)) for a, b in pairs]
    shapes = {x.shape for pair in scores for x in pair}
    if len(shapes) != 1:
        raise ValueError(f"the systems' scores are {sorted(shapes)}; all need a row per seed on the same samples")
    return _auc(labels, scores, users, resamples, seed, level)


def auc_interval(
    labels: Num[np.ndarray, "N"],
    scores: Float[np.ndarray, "S N"],
    users: Int[np.ndarray, "N"],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """AUC of one system (see `auc_difference`). To compare two systems use the difference, not two such intervals."""
    return _auc(labels, [(_per_seed("scores", scores),)], users, resamples, seed, level)


def mean_difference(
    values_a: Float[np.ndarray, "S N"],
    values_b: Float[np.ndarray, "S N"],
    users: Int[np.ndarray, "N"],
    *,
    weights: Float[np.ndarray, "N"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The same for any metric that is a weighted mean of values per sample or per user.

    Log loss (a value a sample), recall or NDCG at K (a value a target), GAUC (a user's AUC, weighted by impressions).
    """
    a, b = _per_seed("values_a", values_a), _per_seed("values_b", values_b)
    if a.shape != b.shape:
        raise ValueError(f"values_a is {a.shape} and values_b {b.shape}; both need a row per seed on the same samples")
    return _mean(b - a, users, weights, resamples, seed, level)


def mean_interval(
    values: Float[np.ndarray, "S N"],
    users: Int[np.ndarray, "N"],
    *,
    weights: Float[np.ndarray, "N"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The weighted mean of one system's values, with its interval over users and seeds."""
    return _mean(_per_seed("values", values), users, weights, resamples, seed, level)


def across_seeds(values: Float[np.ndarray, "S"], *, level: float = 0.95) -> Interval:
    """Mean of one number per seed and its t-interval: what another training run would give, on the same users.

    Raises ValueError for fewer than 2 seeds: one run says nothing about another.
    """
    values = np.asarray(values, np.float64)
    _check_level(level)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values has shape {values.shape}; an interval across seeds needs 2 seeds or more")
    _finite("values", values)
    n = len(values)
    half = float(stdtrit(n - 1, 0.5 + level / 2) * values.std(ddof=1) / np.sqrt(n))
    mean = float(values.mean())
    text = f"t-interval across {n} seeds"
    return Interval(mean, mean - half, mean + half, level, text, tuple(values.tolist()), seeds=n)


def together[K](jobs: Mapping[K, Callable[[], Interval]], *, worth: float = 10.0) -> dict[K, Interval]:
    """Intervals that do not wait for each other, by name: in processes where they would take more than `worth` seconds.

    Args:
      jobs: what gives each, such as `functools.partial(auc_interval, ...)`: it and its arrays are pickled.
    """
    found: dict[K, Interval] = {}
    began = time.perf_counter()
    for name, job in jobs.items():
        spent, left = time.perf_counter() - began, len(jobs) - len(found)
        if found and left > 1 and spent / len(found) * left > worth:
            break
        found[name] = job()
    waiting = {name: job for name, job in jobs.items() if name not in found}
    if waiting:
        # Spawned: a fork of a process that runs JAX's threads may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(len(waiting), os.cpu_count() or 1), mp_context=context) as pool:
            begun = {name: pool.submit(job) for name, job in waiting.items()}
            found |= {name: future.result() for name, future in begun.items()}
    return found


def _auc(
    labels: np.ndarray,
    compared: Sequence[tuple[np.ndarray, ...]],
    users: np.ndarray,
    resamples: int,
    seed: int,
    level: float,
) -> Interval:
    """Of one system (a,), or of the last less the first (a, b); the mean over what is compared."""
    labels = np.asarray(labels)
    seeds, samples = compared[0][0].shape
    index, count = _user_index(users, samples)
    if labels.shape != (samples,) or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels has shape {labels.shape}; expected [{samples}] values, each 0 or 1")
    positive = labels == 1
    if positive.all() or not positive.any():
        raise ValueError(f"all {len(labels)} labels are {int(labels[0])}; AUC needs both classes")
    prepared = [[[_Ranks.of(row, positive, index) for row in scores] for scores in systems] for systems in compared]
    per_class = [np.bincount(index[mask], minlength=count) for mask in (positive, ~positive)]

    def statistic(user_weights: np.ndarray) -> np.ndarray:
        # [compared, 1 or 2, S]
        auc = np.array([[[ranks.auc(user_weights) for ranks in rows] for rows in systems] for systems in prepared])
        found: np.ndarray = (auc[:, -1] - auc[:, 0] if auc.shape[1] > 1 else auc[:, 0]).mean(axis=0)
        return found

    rng = np.random.default_rng(seed)
    _check(resamples, level)
    draws = np.empty((resamples, seeds))
    for r in range(resamples):
        for _ in range(MAX_REDRAWS):  # a draw without a positive or a negative has no AUC; likely with few users only
            user_weights = _draw_users(rng, count)
            if all((user_weights * totals).any() for totals in per_class):
                break
        else:
            raise ValueError(f"{count} users: {MAX_REDRAWS} draws in a row held one class only; use more users")
        draws[r] = statistic(user_weights)
    return _interval(statistic(np.ones(count, np.int32)), draws, rng, level, users=count, samples=samples)


def _mean(
    values: np.ndarray, users: np.ndarray, weights: np.ndarray | None, resamples: int, seed: int, level: float
) -> Interval:
    index, count = _user_index(users, values.shape[1])
    weights = np.ones(values.shape[1]) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != values.shape[1:] or not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(f"weights has shape {weights.shape}; expected [{values.shape[1]}] finite values, none below 0")
    if not weights.any():
        raise ValueError("all weights are 0; a mean needs a sample that counts")
    _check(resamples, level)
    sums = np.stack([np.bincount(index, weights * row, minlength=count) for row in values], axis=1)  # [U, S]
    totals = np.bincount(index, weights, minlength=count)
    sums, totals = sums[totals > 0], totals[totals > 0]  # users whose samples all weigh 0 are not part of the test
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, len(values)))
    for r in range(resamples):
        user_weights = _draw_users(rng, len(totals))
        draws[r] = (user_weights[:, None] * sums).sum(0) / (user_weights * totals).sum()
    counted = int(np.count_nonzero(weights))
    return _interval(sums.sum(0) / totals.sum(), draws, rng, level, users=len(totals), samples=counted)


@dataclass(frozen=True)
class _Ranks:
    """One scoring, sorted once, so that its AUC under any user weights is one cumulative sum (Mann and Whitney, 1947).

    A positive beats the negatives below it and draws with those tied: .5 * (cumulative weight of negatives strictly
    below + of negatives not above).
    """

    negative_users: np.ndarray  # user of each negative, by ascending score
    positive_users: np.ndarray
    below: np.ndarray  # for each positive: how many negatives score lower
    not_above: np.ndarray  # ... or the same

    @staticmethod
    def of(scores: np.ndarray, positive: np.ndarray, index: np.ndarray) -> "_Ranks":
        order = np.argsort(scores[~positive], kind="stable")
        negatives = scores[~positive][order]
        rank = np.argsort(scores[positive], kind="stable")  # neighbours read neighbouring sums
        positives = scores[positive][rank]
        below, not_above = (np.searchsorted(negatives, positives, side) for side in ("left", "right"))
        return _Ranks(index[~positive][order], index[positive][rank], below, not_above)

    def auc(self, user_weights: np.ndarray) -> float:
        """`user_weights` int32: whole numbers make it exact, and keep threads out of a sum of many short ones."""
        cumulative = np.zeros(len(self.negative_users) + 1, np.int64)
        np.cumsum(user_weights[self.negative_users], out=cumulative[1:])
        weights = user_weights[self.positive_users]
        beaten = int((weights * (cumulative[self.below] + cumulative[self.not_above])).sum())
        return 0.5 * beaten / (int(weights.sum()) * int(cumulative[-1]))


def _interval(
    values: np.ndarray, draws: np.ndarray, rng: np.random.Generator, level: float, *, users: int, samples: int
) -> Interval:
    """Draws seeds within each resample of users (`draws` [R, S]) and takes the percentiles of the mean over seeds."""
    resamples, seeds = draws.shape
    center = draws.mean(axis=1)
    if seeds > 1:
        chosen = rng.integers(0, seeds, (resamples, seeds))
        drawn = np.take_along_axis(draws, chosen, axis=1).mean(axis=1)
        center = center + (drawn - center) * np.sqrt(seeds / (seeds - 1))
    low, high = np.quantile(center, [0.5 - level / 2, 0.5 + level / 2])
    over = f"{users:,} users and {seeds} seeds" if seeds > 1 else f"{users:,} users, one seed"
    method = f"paired bootstrap over {over}, {resamples:,} resamples"
    return Interval(
        float(values.mean()), float(low), float(high), level, method, tuple(np.asarray(values).tolist()),
        users=users, seeds=seeds, samples=samples, resamples=resamples,
    )  # fmt: skip


def _draw_users(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.bincount(rng.integers(0, count, count), minlength=count).astype(np.int32)


def _user_index(users: np.ndarray, samples: int) -> tuple[np.ndarray, int]:
    users = np.asarray(users)
    if users.shape != (samples,):
        raise ValueError(f"users has shape {users.shape}; expected one user id for each of {samples} samples")
    ids, index = np.unique(users, return_inverse=True)
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} users; a bootstrap over users needs at least 2")
    return index, len(ids)


def _per_seed(name: str, values: np.ndarray) -> np.ndarray:
    values = np.atleast_2d(np.asarray(values, np.float64))
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} has shape {values.shape}; expected [seeds, samples], neither of them 0")
    _finite(name, values)
    return values


def _finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"{name}{list(where)} is {values[where]}; scores and values must be finite")


def _check(resamples: int, level: float) -> None:
    if resamples < 20:
        raise ValueError(f"resamples is {resamples}; percentiles need at least 20, better 1,000")
    _check_level(level)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1, such as .95")

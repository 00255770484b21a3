"""One replayed log under DCAF, with true and with estimated gains, against the best that one action for all can do."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from experiments.results import Row
from sim_jax.dcaf import multiplier, replay

BUDGETS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5)  # of the baseline's compute
NEARLY = 0.95  # of the largest mean gain of one action for all, that the baseline reaches
CURVES = ("DCAF, true gains", "DCAF, estimated gains", "the same for all", "cut at random")


@dataclass(frozen=True)
class Compared:
    """What DCAF does on one log; percentages are of the baseline, gains those of ranking (see `dcaf_requests.gains`).

    Attributes:
      baseline: the action that all requests get.
      true, estimated: the replays.
      cuts: the change of gain when the compute of `true.equal_gain` is spent uniformly and at random, among the
        frontier's actions alone.
      clicks: expected clicks of a request with the baseline, the first stage's included.
      carried: spend and gain in percent of the baseline when the multiplier was solved on the earlier period's
        estimates and kept.
      r2: share of the gains' variance over requests that the estimates explain.
      curves: gain over the baseline's at `BUDGETS`, for each of `CURVES`.
    """

    seed: int
    baseline: int
    true: replay.Replay
    estimated: replay.Replay
    cuts: tuple[float, float] | None
    clicks: float
    carried: tuple[float, float]
    r2: float
    curves: Float[np.ndarray, "curves budgets"]

    def figures(self) -> dict[str, float | None]:
        """Named numbers, None for cuts where even the true gains do not reach the baseline's with less compute."""
        requests = sum(self.true.baseline.counts)
        added = {  # in percent of all clicks
            name: 100 * (each.equal_compute.gain - each.baseline.gain) / requests / self.clicks
            for name, each in (("", self.true), ("_estimated", self.estimated))
        }
        return {
            "gain_equal_compute_pct": self.true.gain_equal_compute_pct,
            "gain_equal_compute_estimated_pct": self.estimated.gain_equal_compute_pct,
            "compute_saved_pct": self.true.compute_saved_pct,
            # Where estimates do not reach the baseline's gain, the baseline is what a system keeps.
            "compute_saved_estimated_pct": self.estimated.compute_saved_pct or 0.0,
            "uniform_cut_pct": None if self.cuts is None else self.cuts[0],
            "random_cut_pct": None if self.cuts is None else self.cuts[1],
            "gain_equal_compute_of_clicks_pct": added[""],
            "gain_equal_compute_estimated_of_clicks_pct": added["_estimated"],
            "carried_spend_pct": self.carried[0],
            "carried_gain_pct": self.carried[1],
            "estimate_r2": self.r2,
        }

    def row(self, names: Sequence[str]) -> Row:
        return {"seed": self.seed, "baseline": names[self.baseline], **self.figures()}


def compare(
    seed: int,
    earlier: Float[np.ndarray, "N J"],
    later: tuple[Float[np.ndarray, "M J"], Float[np.ndarray, "M J"]],
    costs: Float[np.ndarray, " J"],
    first_stage: float,
    *,
    front: Int[np.ndarray, " F"],
    base: int,
) -> Compared:
    """Replays `later`, (gains, estimates); the multiplier that is carried over is solved on `earlier`'s estimates.

    Args:
      costs: seconds a request. first_stage: expected clicks of the first stage's page in the later period.
      front: actions for blind cuts, from `frontier`. base: the baseline, one of them.
    """
    gains, estimates = later
    true = replay.replay(gains, costs, base, seed=seed)
    estimated = replay.replay(gains, costs, base, estimates=estimates, seed=seed)
    few, place = gains[:, front], int(np.flatnonzero(front == base)[0])
    cuts = None
    if true.equal_gain is not None:
        spend, start = true.equal_gain.spend, true.baseline.gain
        uniform = replay.uniform_cut(few, costs[front], spend, seed=seed).gain
        random = replay.random_cut(few, costs[front], place, spend, seed=seed).gain
        cuts = 100 * (uniform / start - 1), 100 * (random / start - 1)
    price = multiplier.solve(earlier, costs, len(earlier) * costs[base]).multiplier
    kept = multiplier.allocate(estimates, costs, float(price or 0.0), outcomes=gains)
    curves = np.empty((len(CURVES), len(BUDGETS)))
    for i, share in enumerate(BUDGETS):
        budget = share * true.baseline.spend
        curves[:, i] = (
            multiplier.solve(gains, costs, budget).gain,
            multiplier.solve(estimates, costs, budget, outcomes=gains).gain,
            replay.uniform_cut(few, costs[front], budget, seed=seed).gain,
            replay.random_cut(few, costs[front], place, budget, seed=seed).gain,
        )
    return Compared(
        seed=seed,
        baseline=base,
        true=true,
        estimated=estimated,
        cuts=cuts,
        clicks=first_stage + true.baseline.gain / len(gains),
        carried=(100 * kept.spend / true.baseline.spend, 100 * kept.gain / true.baseline.gain),
        r2=r_squared(estimates, gains),
        curves=curves / true.baseline.gain,
    )


def frontier(gain: Float[np.ndarray, " J"], costs: Float[np.ndarray, " J"]) -> Int[np.ndarray, " F"]:
    """Actions on the upper hull of (cost, mean gain) from a skip at (0, 0) to the largest gain, by rising cost.

    What one action for all can reach at a budget, or a mix of two in blind shares, lies on it. Raises ValueError where
    no action gains anything: then skipping is best, and nothing is to be allocated.
    """
    if not (gain > 0).any():
        raise ValueError("no action gains anything over the first stage's page; train the rankers on more samples")
    found: list[int] = []
    x, y, left = 0.0, 0.0, np.flatnonzero(gain > 0)
    while len(left):
        slope = (gain[left] - y) / (costs[left] - x)
        best = int(left[np.lexsort((-costs[left], slope))[-1]])
        found.append(best)
        x, y = costs[best], gain[best]
        left = left[(gain[left] > y) & (costs[left] > x)]
    return np.array(found)


def baseline(gain: Float[np.ndarray, " J"], front: Int[np.ndarray, " F"]) -> int:
    """The cheapest action of the frontier that reaches `NEARLY` all of the largest mean gain."""
    return int(front[np.flatnonzero(gain[front] >= NEARLY * gain[front].max())[0]])


def r_squared(estimates: Float[np.ndarray, "N J"], gains: Float[np.ndarray, "N J"]) -> float:
    """Share of the variance of the gains over requests, within actions, that the estimates explain."""
    error = np.square(gains - estimates).sum()
    return float(1 - error / np.square(gains - gains.mean(axis=0)).sum())

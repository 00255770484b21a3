"""Replay of a log (arXiv 2006.09684, section 5): DCAF against giving every request the same, and against blind cuts.

The log holds the gain of every action for every request, true as far as replay can tell. The baseline gives all
requests one action. DCAF is measured at the baseline's compute (more gain) and at the baseline's gain (less compute);
that smaller compute is then also spent uniformly and at random. With estimates the choice is by them and the account by
the true gains. Published, on the authors' log: +3.7 % gain, 49 % less compute (at which a random cut loses 36.8 %).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sim_jax.dcaf import multiplier, policy
from sim_jax.dcaf.multiplier import Allocation


@dataclass(frozen=True)
class Replay:
    """The same log under five allocations, and what the paper reports of them, in percent of the baseline.

    `baseline` one action for all; `equal_compute` DCAF within the baseline's spend; `equal_gain` DCAF with the least
    spend that keeps the baseline's gain, and `uniform_cut` and `random_cut` within that spend. The last three, and
    their percentages, are None where choosing by these estimates reaches the baseline's gain at no multiplier.
    """

    baseline: Allocation
    equal_compute: Allocation
    equal_gain: Allocation | None
    uniform_cut: Allocation | None
    random_cut: Allocation | None

    @property
    def gain_equal_compute_pct(self) -> float:
        return 100 * (self.equal_compute.gain / self.baseline.gain - 1)

    @property
    def compute_saved_pct(self) -> float | None:
        return None if self.equal_gain is None else 100 * (1 - self.equal_gain.spend / self.baseline.spend)

    @property
    def uniform_cut_pct(self) -> float | None:
        """Change of gain, negative for a loss; so is `random_cut_pct`."""
        return None if self.uniform_cut is None else 100 * (self.uniform_cut.gain / self.baseline.gain - 1)

    @property
    def random_cut_pct(self) -> float | None:
        return None if self.random_cut is None else 100 * (self.random_cut.gain / self.baseline.gain - 1)


def replay(
    gains: Float[Any, "N J"],
    costs: Float[Any, " J"],
    baseline: int,
    *,
    estimates: Float[Any, "N J"] | None = None,
    seed: int = 0,
) -> Replay:
    """Replays the log.

    Args:
      gains: Q_ij. costs: q_j. Both as in `multiplier.solve`.
      baseline: the action that all requests get today.
      estimates: what DCAF knows beforehand of the gains; None lets it know them.
      seed: of the cuts.

    Raises ValueError for a log that is not sound, and for a baseline without cost or gain, of which nothing is a share.
    """
    start = constant(gains, costs, baseline)
    if start.spend <= 0 or start.gain <= 0:
        raise ValueError(
            f"action {baseline} spends {start.spend} and gains {start.gain}, must be above 0; choose another action"
        )
    chosen_by = gains if estimates is None else estimates
    multiplier.check(chosen_by, costs, "gains" if estimates is None else "estimates")
    same_spend = multiplier.solve(chosen_by, costs, start.spend, outcomes=gains)
    same_gain = multiplier.solve_gain(chosen_by, costs, start.gain, outcomes=gains)
    if same_gain is None:
        return Replay(start, same_spend, None, None, None)
    return Replay(
        start,
        same_spend,
        same_gain,
        uniform_cut(gains, costs, same_gain.spend, seed=seed),
        random_cut(gains, costs, baseline, same_gain.spend, seed=seed),
    )


def constant(gains: Float[Any, "N J"], costs: Float[Any, " J"], action: int) -> Allocation:
    """The same action for every request."""
    if not 0 <= action < len(costs):
        raise ValueError(f"action is {action}, must be in 0 to {len(costs) - 1}")
    multiplier.check(gains, costs)
    return multiplier.account(np.full(len(gains), action), gains, costs)


def uniform_cut(gains: Float[Any, "N J"], costs: Float[Any, " J"], budget: float, *, seed: int = 0) -> Allocation:
    """The same for all, as far as actions come in steps: the dearest action (or none) that all can have within the
    budget, and for as many requests as the rest allows, drawn at random, the next dearer one."""
    costs, requests = _checked(gains, costs, budget)
    choices, prices = _ladder(costs)
    # A hair above, since a budget is often a sum of these very costs.
    step = int(np.searchsorted(prices * requests, budget * (1 + 1e-9), side="right")) - 1
    action = np.full(requests, choices[step])
    if step + 1 < len(choices):
        dearer = prices[step + 1] - prices[step]
        share = max(0, int((budget - prices[step] * requests) / dearer))
        action[np.random.default_rng(seed).permutation(requests)[:share]] = choices[step + 1]
    return multiplier.account(action, gains, costs, budget=budget)


def random_cut(
    gains: Float[Any, "N J"], costs: Float[Any, " J"], baseline: int, budget: float, *, seed: int = 0
) -> Allocation:
    """A cut that looks at no request: from the baseline for all, requests in random order are sent to an action drawn
    from the cheaper ones, none included, until the budget fits; those that were cut are cut again if it takes that."""
    costs, requests = _checked(gains, costs, budget)
    if not 0 <= baseline < len(costs) or costs[baseline] == 0:
        raise ValueError(f"baseline is {baseline}, must be one of the actions that cost something, of costs {costs}")
    draw = np.random.default_rng(seed)
    choices, prices = _ladder(costs)
    start = int(np.searchsorted(prices, costs[baseline]))
    choices[start] = baseline  # of equal costs it need not be the first
    place = np.full(requests, start)
    while (over := prices[place].sum() - budget * (1 + 1e-9)) > 0:
        order = draw.permutation(requests)
        lower = draw.integers(0, np.maximum(place[order], 1))
        saved = np.cumsum(prices[place[order]] - prices[lower])
        cut = int(np.searchsorted(saved, over)) + 1
        place[order[:cut]] = lower[:cut]
    return multiplier.account(choices[place], gains, costs, budget=budget)


def _checked(gains: Any, costs: Any, budget: float) -> tuple[np.ndarray, int]:
    multiplier.check(gains, costs)
    if not np.isfinite(budget) or budget < 0:
        raise ValueError(f"budget is {budget}, must be finite and at least 0")
    return np.asarray(costs, np.float64), len(gains)


def _ladder(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A skip and an action of each distinct cost above 0 (the first), by rising cost, and these costs."""
    prices, first = np.unique(costs, return_index=True)
    paid = prices > 0
    return np.concatenate([[policy.SKIP], first[paid]]), np.concatenate([[0.0], prices[paid]])

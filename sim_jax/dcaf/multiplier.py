"""DCAF's multiplier lambda on a log of requests (arXiv 2006.09684, section 4): the price of a unit of compute.

    max sum_ij x_ij Q_ij   subject to   sum_ij x_ij q_j <= C,  sum_j x_ij <= 1,  x in {0, 1}

By the Lagrangian dual each request takes `argmax_j (Q_ij - lambda q_j)` (`policy.choose`). The total cost does not
increase with lambda, whatever Q is, since ties go to the cheaper action (the paper assumes that Q_ij grows with j and
`Q_ij / q_j` shrinks; nothing here needs it). So a bisection finds the lambda that spends C. It runs over the float32
numbers themselves, in their order: after at most 31 passes over the log the answer is the smallest float32 that fits.

The log stays on the device and comes back as one count for each action: spend and budget are compared in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rec_core.features import check_not_nan
from sim_jax.dcaf import policy

_LARGEST = int(np.float32(np.finfo(np.float32).max).view(np.int32))  # the order of the non-negative floats
_ROUNDING = 1e-9  # of the budget: three times 0.1 fits into 0.3


@dataclass(frozen=True)
class Allocation:
    """What a log of requests was given.

    Attributes:
      spend: total cost. gain: total gain, by the true outcomes where those were given.
      counts: requests for each action. skipped: requests without any.
      multiplier: lambda, None for an allocation that has none.
      left: of the budget; 0 where there was none.
    """

    spend: float
    gain: float
    counts: tuple[int, ...]
    skipped: int
    multiplier: float | None = None
    left: float = 0.0

    @property
    def bound(self) -> float:
        """No allocation within the budget, requests split into fractions included, gains more than this.

        It is the dual's value, `lambda C + sum_i max_j (Q_ij - lambda q_j)`. Not for a choice by estimates, whose
        `gain` is counted in other numbers than it was chosen by.
        """
        if self.multiplier is None:
            raise ValueError("bound is the dual's value, and this allocation has no multiplier; take it from solve")
        return self.gain + self.multiplier * self.left


def solve(
    gains: Float[Any, "N J"],
    costs: Float[Any, " J"],
    budget: float,
    *,
    floor: float = 0.0,
    cap: float = float("inf"),
    outcomes: Float[Any, "N J"] | None = None,
) -> Allocation:
    """The smallest multiplier whose spend is within the budget, and what it allocates.

    Spend jumps where requests change their action. At a jump across the budget the feasible side is taken and `left`
    is what it leaves: much only where many requests are exactly alike. With a budget for everybody's best action the
    multiplier is 0.

    Args:
      gains: Q_ij of a log of requests, finite; NumPy, or JAX where it lies. Read in float32.
      costs: q_j, finite and at least 0. budget: C, for the whole log, in the same unit; kept to a relative 1e-9.
      floor, cap: limits of a request's cost, see `policy.choose`.
      outcomes: true gains, where `gains` are estimates: `gain` is then what the choice really gains.

    Raises ValueError for gains or costs that are not finite, a negative cost, limits that cross, and a budget below
    what the floor forces every request to spend.
    """
    log = _Log(gains, costs, floor, cap, outcomes)
    if not np.isfinite(budget) or budget < 0:
        raise ValueError(f"budget is {budget}, must be finite and at least 0")
    least = least_spend(costs, log.requests, floor=floor, cap=cap)
    if least > budget * (1 + _ROUNDING):
        raise ValueError(
            f"budget is {budget}, but {log.requests} requests under floor={floor} spend at least {least}; raise the "
            "budget or lower the floor"
        )
    found = log.allocation(_smallest(lambda value: log.spend(value) <= budget * (1 + _ROUNDING)), budget)
    if found.left < -_ROUNDING * budget:
        raise ValueError(
            f"no float32 multiplier brings the spend of {found.spend} to the budget of {budget}; rescale gains (up to "
            f"{float(np.abs(gains).max())}) and costs to moderate numbers"
        )
    return found


def solve_gain(
    gains: Float[Any, "N J"],
    costs: Float[Any, " J"],
    target: float,
    *,
    floor: float = 0.0,
    cap: float = float("inf"),
    outcomes: Float[Any, "N J"] | None = None,
) -> Allocation | None:
    """The least compute for a total gain of at least `target`: the largest multiplier that still reaches it.

    Arguments as in `solve`. The gain does not increase with the multiplier as long as it is counted in the gains that
    are chosen by; in `outcomes` it need not, and a multiplier is then found that reaches the target while the next
    float32 does not. None where even multiplier 0 falls short.
    """
    log = _Log(gains, costs, floor, cap, outcomes)
    if not np.isfinite(target):
        raise ValueError(f"target is {target}, must be a finite gain")
    if log.gain(0.0) < target:
        return None
    short = _smallest(lambda value: log.gain(value) < target)
    found = log.allocation(short)
    # Where no price is high enough to miss the target, the cheapest allocation reaches it.
    return found if found.gain >= target else log.allocation(float(np.nextafter(np.float32(short), np.float32(0))))


def allocate(
    gains: Float[Any, "N J"],
    costs: Float[Any, " J"],
    multiplier: float,
    *,
    floor: float = 0.0,
    cap: float = float("inf"),
    outcomes: Float[Any, "N J"] | None = None,
) -> Allocation:
    """What a known multiplier allocates, such as yesterday's on today's log. Arguments as in `solve`."""
    if not np.isfinite(multiplier) or multiplier < 0:
        raise ValueError(f"multiplier is {multiplier}, must be finite and at least 0; take it from solve")
    return _Log(gains, costs, floor, cap, outcomes).allocation(multiplier)


def account(
    action: Int[Any, " N"],
    gains: Float[Any, "N J"],
    costs: Float[Any, " J"],
    *,
    multiplier: float | None = None,
    budget: float | None = None,
) -> Allocation:
    """Spend and gain, in float64, of any choice of actions (`policy.SKIP` for none)."""
    costs = np.asarray(costs, np.float64)
    action = np.asarray(action)
    if action.ndim != 1 or np.shape(gains) != (len(action), len(costs)):
        raise ValueError(
            f"action {action.shape}, gains {np.shape(gains)} and costs {costs.shape} must be [N], [N, J], [J]"
        )
    wrong = np.flatnonzero((action < policy.SKIP) | (action >= len(costs)))
    if wrong.size:
        raise ValueError(
            f"action is {action[wrong[0]]} at request {wrong[0]}, must be {policy.SKIP} to {len(costs) - 1}"
        )
    counts = np.bincount(action + 1, minlength=len(costs) + 1)
    spend = _dot(counts[1:], costs)
    gain = np.sum(np.asarray(_taken(gains, action)), dtype=np.float64)
    left = 0.0 if budget is None else budget - spend
    return Allocation(spend, float(gain), tuple(map(int, counts[1:])), int(counts[0]), multiplier, left)


def check(gains: Float[Any, "N J"], costs: Float[Any, " J"], name: str = "gains") -> int:
    """The number of requests of a sound log; ValueError naming what is wrong, and where, of any other. `name` is what
    the message calls the gains."""
    costs = np.asarray(costs, np.float64)
    if costs.ndim != 1 or not costs.size:
        raise ValueError(f"costs has shape {costs.shape}, must be [J] with at least one action")
    check_not_nan("costs", costs, finite=True)
    if (costs < 0).any():
        j = int(np.flatnonzero(costs < 0)[0])
        raise ValueError(f"costs[{j}] is {costs[j]}, must be at least 0")
    return _check_gains(name, gains, len(costs))


def least_spend(costs: Float[Any, " J"], requests: int, *, floor: float = 0.0, cap: float = float("inf")) -> float:
    """What so many requests spend at the least under these limits: 0 unless there is a floor."""
    costs = np.asarray(costs, np.float64)
    below = costs[costs <= cap]
    floor = min(floor, below.max(initial=0.0))
    return requests * float(below[below >= floor].min()) if floor > 0 else 0.0


class _Log:
    """A checked log, on the device with its actions leading."""

    def __init__(self, gains: Any, costs: Any, floor: float, cap: float, outcomes: Any) -> None:
        self.costs = np.asarray(costs, np.float64)
        self.requests = check(gains, costs)
        if not 0 <= floor <= cap:
            raise ValueError(f"floor is {floor} and cap is {cap}, must be 0 <= floor <= cap")
        if outcomes is not None and _check_gains("outcomes", outcomes, len(self.costs)) != self.requests:
            raise ValueError(f"outcomes has shape {np.shape(outcomes)}, must be that of gains, {np.shape(gains)}")
        self.outcomes = gains if outcomes is None else outcomes
        self._by_action = _actions_leading(gains)
        self._limits = {"floor": np.float32(floor), "cap": np.float32(cap)}

    def spend(self, multiplier: float) -> float:
        counts = _counts(self._by_action, np.float32(self.costs), np.float32(multiplier), **self._limits)
        return _dot(np.asarray(counts)[1:], self.costs)

    def actions(self, multiplier: float) -> Int[Array, " N"]:
        return _choose(self._by_action, np.float32(self.costs), np.float32(multiplier), **self._limits)

    def gain(self, multiplier: float) -> float:
        return float(np.sum(np.asarray(_taken(self.outcomes, self.actions(multiplier))), dtype=np.float64))

    def allocation(self, multiplier: float, budget: float | None = None) -> Allocation:
        chosen = self.actions(multiplier)
        return account(chosen, self.outcomes, self.costs, multiplier=multiplier, budget=budget)


def _smallest(holds: Callable[[float], bool]) -> float:
    """The smallest non-negative float32 that holds, of a condition that goes on to hold; the largest if none does."""
    low, high = -1, _LARGEST  # it does not hold at low, or there is no such number
    middle = 0
    while high - low > 1:
        if holds(float(np.int32(middle).view(np.float32))):
            high = middle
        else:
            low = middle
        middle = (low + high) // 2
    return float(np.int32(high).view(np.float32))


def _check_gains(name: str, gains: Any, actions: int) -> int:
    """The number of requests of a sound log."""
    shape = np.shape(gains)
    if len(shape) != 2 or shape[1] != actions or not shape[0]:
        raise ValueError(f"{name} has shape {shape}, must be [N, {actions}] as there are {actions} costs, N at least 1")
    if not _finite(gains):
        check_not_nan(name, np.asarray(gains, np.float32), finite=True)
    return shape[0]


def _dot(counts: np.ndarray, costs: np.ndarray) -> float:
    return float(counts.astype(np.float64) @ costs)


@jax.jit
def _finite(gains: Array) -> Array:
    return jnp.all(jnp.isfinite(jnp.asarray(gains, jnp.float32)))


@jax.jit
def _actions_leading(gains: Array) -> Array:
    return jnp.asarray(gains, jnp.float32).T


@jax.jit
def _choose(by_action: Array, costs: Array, multiplier: Array, *, floor: Array, cap: Array) -> Array:
    return policy.choose_by_action(by_action, costs, multiplier, floor=floor, cap=cap)


@jax.jit
def _counts(by_action: Array, costs: Array, multiplier: Array, *, floor: Array, cap: Array) -> Array:
    """Requests that skip, then requests for each action: integers, of which a sum of any length is exact."""
    chosen = policy.choose_by_action(by_action, costs, multiplier, floor=floor, cap=cap)
    return jnp.bincount(chosen - policy.SKIP, length=by_action.shape[0] + 1)


@jax.jit
def _taken(values: Array, action: Array) -> Array:
    return policy.taken(values, action)

"""DCAF's multiplier by itself: how long it takes, and how far its allocation is from the best one."""

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy import optimize, sparse

from experiments.results import Row
from sim_jax.dcaf import multiplier

ACTIONS = 20
_SHARES = (0.1, 0.3, 0.6)  # of what everybody's best action costs, as budgets


def random_log(requests: int, actions: int, seed: int) -> tuple[Float[np.ndarray, "N J"], Float[np.ndarray, " J"]]:
    """Gains, float32, that rise with cost at rates of the request's own, and are rough."""
    draw = np.random.default_rng(seed)
    costs = np.linspace(1, 20, actions)
    worth, rate = draw.gamma(0.7, 1.4, (requests, 1)), draw.uniform(0.05, 0.5, (requests, 1))
    rough = draw.uniform(0.8, 1.2, (requests, actions))
    return (worth * (1 - np.exp(-rate * costs)) * rough).astype(np.float32), costs


def times(requests: int, repeats: int = 5) -> dict[str, float]:
    """Seconds to solve for the multiplier on a log of so many requests and `ACTIONS` actions, from host memory.

    `multiplier_1m_s` is the median of `repeats` calls (their range beside it), `..._first_s` the first, with what it
    compiles, and `..._device_s` the median where the log is on the device already.
    """
    gains, costs = random_log(requests, ACTIONS, 0)
    budget = 0.4 * requests * float(costs.mean())

    def seconds(log: object) -> float:
        began = time.perf_counter()
        multiplier.solve(log, costs, budget)
        return time.perf_counter() - began

    first = seconds(gains)
    warm = sorted(seconds(gains) for _ in range(repeats))
    resident = jax.block_until_ready(jnp.asarray(gains))
    return {
        "multiplier_1m_s": float(np.median(warm)),
        "multiplier_1m_s_low": warm[0],
        "multiplier_1m_s_high": warm[-1],
        "multiplier_1m_first_s": first,
        "multiplier_1m_device_s": float(np.median([seconds(resident) for _ in range(repeats)])),
        "multiplier_requests": requests,
    }


def gaps(
    logs: Mapping[str, tuple[Float[np.ndarray, "N J"], Float[np.ndarray, " J"]]],
) -> list[Row]:
    """For each log and several budgets: how much less DCAF gains than the exact linear relaxation, in percent.

    The relaxation may split requests between actions, so no allocation gains more; `bound_pct` is how far the dual's
    own bound is above it.
    """
    rows: list[Row] = []
    for name, (gains, costs) in logs.items():
        most = multiplier.allocate(gains, costs, 0.0).spend
        for share in _SHARES:
            found = multiplier.solve(gains, costs, share * most)
            exact = relaxation(gains, costs, share * most)
            rows.append(
                {
                    "kind": "gap",
                    "log": name,
                    "requests": len(gains),
                    "actions": len(costs),
                    "budget_of_best": share,
                    "gap_pct": 100 * (1 - found.gain / exact),
                    "bound_pct": 100 * (found.bound / exact - 1),
                }
            )
    return rows


def relaxation(gains: Float[np.ndarray, "N J"], costs: Float[np.ndarray, " J"], budget: float) -> float:
    """The largest gain within the budget with requests split into fractions, by HiGHS (SciPy)."""
    requests, actions = gains.shape
    one_each = sparse.kron(sparse.eye(requests), np.ones(actions))
    rows = sparse.vstack([one_each, np.tile(costs / costs.max(), requests)[None]], format="csr")
    limits = np.append(np.ones(requests), budget / costs.max())
    done = optimize.linprog(-gains.astype(np.float64).ravel(), A_ub=rows, b_ub=limits, bounds=(0, 1), method="highs")
    if not done.success:
        raise RuntimeError(f"HiGHS did not solve the relaxation of {requests} x {actions}: {done.message}")
    return float(-done.fun)

"""The report of `dcaf-replay`: gain against compute, costs of actions, and the controller's trace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from experiments import figures, report
from experiments.progress import table
from experiments.results import Result, Row
from experiments.statistics import Interval, across_seeds
from experiments.steps.dcaf_compare import BUDGETS, CURVES, Compared
from experiments.steps.dcaf_costs import Costs
from experiments.steps.dcaf_log import Log
from experiments.steps.dcaf_traffic import TUNED, Runs
from sim_jax.dcaf.simulator import Trace

PUBLISHED = {  # arXiv 2006.09684, section 5: their log, not a threshold
    "gain_equal_compute_pct": "+3.7",
    "compute_saved_pct": "49",
    "compute_saved_estimated_pct": "25 (online)",
    "random_cut_pct": "-36.8",
}
SAYS = {
    "gain_equal_compute_pct": "gain at equal compute, true gains",
    "gain_equal_compute_estimated_pct": "gain at equal compute, estimated gains",
    "compute_saved_pct": "compute saved at equal gain, true gains",
    "compute_saved_estimated_pct": "compute saved at equal gain, estimated gains",
    "uniform_cut_pct": "gain when that compute is spent uniformly",
    "random_cut_pct": "gain when that compute is cut at random",
    "gain_equal_compute_of_clicks_pct": "gain at equal compute, of all clicks",
    "gain_equal_compute_estimated_of_clicks_pct": "the same, estimated gains",
}


@dataclass(frozen=True)
class Measured:
    """Costs of the actions: rankers first, then numbers of candidates."""

    rankers: tuple[str, ...]
    counts: tuple[int, ...]
    costs: Costs


def cost_rows(
    names: Sequence[str],
    costs: Mapping[str, Costs],
    logs: Sequence[Log],
    compared: Sequence[Compared],
    front: Int[np.ndarray, " F"],
) -> list[Row]:
    """A row an action: milliseconds by the kind of costs, mean gain, and how often DCAF takes it (means over seeds)."""
    gains = np.mean([log.gains[1].mean(axis=0) for log in logs], axis=0)
    taken = [np.array(each.estimated.equal_compute.counts) / sum(each.true.baseline.counts) for each in compared]
    rows: list[Row] = []
    for j, name in enumerate(names):
        row: Row = {"action": name}
        for kind, each in costs.items():
            row |= {f"ms, {kind}": 1e3 * float(each.seconds[j])}
            row |= {f"ms low, {kind}": 1e3 * float(each.low[j]), f"ms high, {kind}": 1e3 * float(each.high[j])}
        row |= {"clicks gained": float(gains[j]), "taken_pct": 100 * float(np.mean(taken, axis=0)[j])}
        rows.append(row | {"on_frontier": j in front})
    return rows


def publish(
    path: Path,
    outcome: Result,
    *,
    costs: Measured,
    compared: Sequence[Compared],
    intervals: tuple[Mapping[str, Interval], Mapping[str, Interval]],
    traffic: Runs,
) -> Path:
    """Prints the headline and writes the page. `intervals`: against the baseline, and against the lean one."""
    seeds, requests = len(compared), sum(compared[0].true.baseline.counts)
    headline: list[Row] = [
        {
            "%": text,
            "mean": found.mean,
            "low": found.low,
            "high": found.high,
            "against the lean baseline": intervals[1][name].mean if name in intervals[1] else None,
            "published": PUBLISHED.get(name),
        }
        for name, text in SAYS.items()
        if (found := intervals[0].get(name)) is not None
    ]
    numbers = outcome.figures
    findings = [
        report.Finding(
            f"The multiplier of {numbers['multiplier_requests']:,.0f} requests x 20 actions takes "
            f"{numbers['multiplier_1m_s']:.2f} s ({numbers['multiplier_1m_first_s']:.2f} s with compilation); its "
            f"allocation is at most {numbers['dual_gap_pct']:.4f} % below the exact linear relaxation."
        ),
        report.Finding(
            f"Three times the traffic and half of the capacity: {numbers['surge_failure_pct']:.3g} % of the settled "
            f"requests fail in the worst run, {numbers['surge_failure_uncontrolled_pct']:.3g} % without a controller; "
            f"on scenarios that its gains were not set on {numbers['held_out_failure_pct']:.3g} %."
        ),
        report.Finding(
            f"Settled, the cost asked for swings by {numbers['surge_swing']:.2f} of its mean at most in a surge and a "
            f"loss, and by {numbers['held_out_swing']:.2f} in the other scenarios, four servers among them. In quiet "
            f"times and without a controller a second's mean swings by {numbers['quiet_swing']:.2f}, with four servers "
            f"by {numbers['quiet_swing_four_servers']:.2f}, since requests differ."
        ),
        report.Finding(
            f"An estimate of one request's gains takes {numbers['estimator_cost_pct']:.3g} % of the baseline's time, "
            "which is not counted as compute above."
        ),
    ]
    print(table(headline))
    for finding in findings:
        print(finding.text)
    interval = f"95 %, t-interval across {seeds} seeds"
    panels = [
        report.Panel(
            "Gain against compute",
            _curves(compared),
            "Clicks that ranking adds at a budget, as a share of what the baseline's one action for all adds, over the "
            "budget as a share of its compute. Blind cuts use only actions that no mix of others beats.",
            samples=requests,
            seeds=seeds,
            interval=interval,
            notes=("Published, on the authors' log: +3.7 % at equal compute, 49 % less compute at equal gain.",),
        ),
        report.Panel(
            "Costs of actions",
            figures.lines(
                {name: (costs.counts, 1e3 * part) for name, part in _by_ranker(costs, costs.costs.seconds).items()},
                bands={
                    name: (1e3 * low, 1e3 * high)
                    for (name, low), high in zip(
                        _by_ranker(costs, costs.costs.low).items(),
                        _by_ranker(costs, costs.costs.high).values(),
                        strict=True,
                    )
                },
                title="Measured cost of each action",
                x_label="candidates scored",
                y_label="ms a request",
            ),
            "Time of the compiled model for one request on this machine; bands are the quartiles of the rounds.",
        ),
        report.Panel(
            "Failures through a surge and a loss of capacity",
            _trace("failed", traffic, "share of the requests that end, by second"),
            f"{next(iter(TUNED))}: traffic is three times as high from 10 s to 30 s, half of the capacity is gone from "
            "40 s to 60 s. Requests that are answered late or dropped, with the controller and without.",
        ),
        report.Panel(
            "What the controller does",
            _trace("asked", traffic, "mean cost asked for, 1 = the baseline"),
            "Mean cost that the limits and the multiplier let requests ask for, by second, in the same runs.",
        ),
    ]
    page = report.page(
        outcome,
        "DCAF: compute where it gains the most",
        headline=headline,
        panels=panels,
        findings=findings,
        tables={
            "Traffic": traffic.rows(),
            "Actions": _of_kind(outcome, "cost"),
            "Rankers": _of_kind(outcome, "ranker"),
            "Each seed": _of_kind(outcome, "replay"),
            "Gap to the exact solver": _of_kind(outcome, "gap"),
        },
        lead=(
            "Each request is given the ranker and the number of candidates that are worth their measured cost, at a "
            "price of compute that spends the budget. Worth is the true number of clicks that ranking adds to the page."
        ),
    )
    return report.write(path, page)


def _of_kind(outcome: Result, kind: str) -> list[Row]:
    rows = [row for row in outcome.rows if row.get("kind") == kind]
    return [{name: value for name, value in row.items() if name != "kind"} for row in rows]


def _by_ranker(costs: Measured, values: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(costs.rankers, values.reshape(len(costs.rankers), -1), strict=True))


def _curves(compared: Sequence[Compared]) -> str:
    spread = {
        name: [across_seeds(np.array([each.curves[i, b] for each in compared])) for b in range(len(BUDGETS))]
        for i, name in enumerate(CURVES)
    }
    return figures.lines(
        {name: (BUDGETS, [point.mean for point in points]) for name, points in spread.items()},
        bands={name: ([p.low for p in points], [p.high for p in points]) for name, points in spread.items()},
        title="Gain against compute",
        x_label="compute, 1 = the baseline's",
        y_label="gain, 1 = the baseline's",
        log_x=True,
    )


def _trace(what: str, traffic: Runs, label: str) -> str:
    drawn = {"controller": traffic.traces[0], "none": traffic.traces[1]}
    return figures.lines(
        {name: _seconds(trace, what) for name, trace in drawn.items()},
        title=label,
        x_label="seconds",
        y_label=label,
        markers=False,
    )


def _seconds(trace: Trace, what: str) -> tuple[np.ndarray, np.ndarray]:
    """A column by second: shares of the requests that ended, or means over those that arrived."""
    second = trace.time.astype(int)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(second, weights=values)

    ended = total(trace.failed + trace.served + trace.skipped)
    if what == "failed":
        return np.unique(second), total(trace.failed) / np.maximum(ended, 1)
    return np.unique(second), total(trace.asked * trace.arrived) / np.maximum(total(trace.arrived), 1)

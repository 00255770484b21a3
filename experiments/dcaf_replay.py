"""DCAF on a log whose gains are known: what it gains at equal compute, what it saves at equal gain, and its controller.

    python -m experiments dcaf-replay                     # ten minutes on two cores
    python -m experiments dcaf-replay --quick             # seconds: shows that everything works
    python -m experiments dcaf-replay --seeds 2 --rankers DNN SIM

Rankers are trained on the first half of a synthetic world's time, gains are replayed on the third quarter (on which the
value estimator is trained) and on the last. An action is a ranker and the number of candidates that it scores; the page
shows the ten that it puts first. Its cost q_j is the measured time of the compiled model for one request, as a server
calls it; beside it the same for requests in batches. Its gain Q_ij is the sum of the true click probabilities of the
page minus that of the page of the first stage, which costs nothing more and is what a skipped request gets. So gains in
percent are of the clicks that ranking adds; `..._of_clicks_pct` is of all clicks. Scoring as many as are shown changes
nothing and is no action.

DCAF is compared with the best that one action for all can do, among the actions that no mix of others beats (the
frontier; chosen on the earlier quarter of all worlds). The baseline is the cheapest of them that reaches 95 % of the
largest mean gain; figures `..._lean` have the frontier's first instead, which gains the most for its cost, as theirs:
where a cheap ranker is nearly as good as the best, much is saved against the one and little against the other. Blind
cuts use the frontier alone. Where choosing by estimates never reaches the baseline's gain, 0 is saved. The published
+3.7 % (equal compute), 49 % (equal gain) and 25 % (online, estimated) are of the authors' log, not a threshold.
Result: `results/dcaf.json`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import results, statistics
from experiments.progress import table
from experiments.settings import in_small
from experiments.steps import (
    dcaf_compare,
    dcaf_costs,
    dcaf_exact,
    dcaf_rankers,
    dcaf_report,
    dcaf_requests,
    dcaf_traffic,
    dcaf_value,
)
from experiments.steps.dcaf_compare import Compared
from experiments.steps.dcaf_costs import Costs
from experiments.steps.dcaf_log import Log, make_log
from rec_core.data.world import World

ONE = "one request"


@dataclass(frozen=True)
class DcafReplay:
    """Settings; the defaults take two cores ten minutes.

    Attributes:
      rankers: rows of `experiments.steps.dcaf_rankers.RANKERS`. counts: candidates that they may score.
      seeds: worlds, each with rankers and estimator of its own.
      samples: newest samples of the first half that each ranker learns from.
      requests: of the third quarter, on which the estimator is trained, and of the last.
      long_term: the world's dial for long-term interest, 0 to 1.
      batch_samples: of a training step.
      users, items, categories, mean_length, max_length: sizes of the world.
      batch: requests of a call in the second measurement of costs; 0 for none.
      rounds: of the measurement of costs.
      traffic_seeds: runs of each traffic scenario. scenarios: names of the held-out ones to run; all by default.
      multiplier_requests: of the log on which the multiplier's time is measured.
      gap_requests: of each log that the exact solver gets.
      out: folder for result.json, report.html and the worlds.
      quick: a run of seconds that only shows that everything works.
    """

    rankers: tuple[str, ...] = tuple(dcaf_rankers.RANKERS)
    counts: tuple[int, ...] = (20, 30, 50, 100, 200)
    seeds: int = 5
    samples: int = 120_000
    batch_samples: int = 512
    requests: tuple[int, int] = (10_000, 4000)
    long_term: float = 0.8
    users: int = 1500
    items: int = 1000
    categories: int = 32
    mean_length: float = 200.0
    max_length: int = 1000
    batch: int = 16
    rounds: int = 25
    traffic_seeds: int = 3
    scenarios: tuple[str, ...] = ()
    multiplier_requests: int = 1_000_000
    gap_requests: int = 4000
    out: Path = Path("runs/dcaf-replay")
    quick: bool = False

    def __post_init__(self) -> None:
        if unknown := [name for name in self.rankers if name not in dcaf_rankers.RANKERS]:
            raise ValueError(f"rankers names {unknown[0]!r}; there are {', '.join(dcaf_rankers.RANKERS)}")
        if unknown := [name for name in self.scenarios if name not in dcaf_traffic.HELD_OUT]:
            raise ValueError(f"scenarios names {unknown[0]!r}; there are {', '.join(dcaf_traffic.HELD_OUT)}")
        if not self.rankers or len(set(self.rankers)) < len(self.rankers):
            raise ValueError(f"rankers is {self.rankers}; name at least one, each once")
        if not self.counts or min(self.counts) <= dcaf_requests.SHOWN or list(self.counts) != sorted(set(self.counts)):
            raise ValueError(f"counts is {self.counts}; numbers above the {dcaf_requests.SHOWN} shown, rising")
        least = {"seeds": 2, "rounds": 3, "traffic_seeds": 1, "samples": 100, "batch": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {value}")
        if min(self.requests) < 50:
            raise ValueError(f"requests is {self.requests}, must be at least 50 of each period")


QUICK: dict[str, Any] = {
    "rankers": ("DNN",),
    "counts": (20, 40),
    "seeds": 2,
    "samples": 6000,
    "batch_samples": 64,
    "requests": (300, 300),
    "users": 120,
    "items": 100,
    "categories": 8,
    "mean_length": 40.0,
    "max_length": 200,
    "batch": 0,
    "rounds": 9,  # a busy machine may slow one action alone in some of them
    "traffic_seeds": 1,
    "scenarios": ("four servers",),
    "multiplier_requests": 20_000,
    "gap_requests": 200,
}


def run(config: DcafReplay) -> results.Result:
    """Measures everything, prints the tables, writes `out`/result.json and `out`/report.html."""
    if config.quick:
        config = in_small(config, QUICK)
    config.out.mkdir(parents=True, exist_ok=True)
    started = results.begin()
    times = dcaf_exact.times(config.multiplier_requests)
    print(f"multiplier of {config.multiplier_requests:,} requests: {times['multiplier_1m_s']:.2f} s", flush=True)
    logs = [_log(config, seed) for seed in range(config.seeds)]
    names = [f"{ranker}, {n}" for ranker in config.rankers for n in config.counts]
    costs = {ONE: _costs(config, logs[0], 1)}
    if config.batch:
        costs[f"batches of {config.batch}"] = _costs(config, logs[0], config.batch)
    estimates = [_estimates(log) for log in logs]
    gained = np.mean([log.gains[0].mean(axis=0) for log in logs], axis=0)
    fronts = {kind: dcaf_compare.frontier(gained, each.seconds) for kind, each in costs.items()}
    compared = {
        kind: _compare(logs, estimates, each.seconds, fronts[kind], dcaf_compare.baseline(gained, fronts[kind]))
        for kind, each in costs.items()
    }
    lean = _compare(logs, estimates, costs[ONE].seconds, fronts[ONE], int(fronts[ONE][0]))
    base = costs[ONE].seconds[compared[ONE][0].baseline]
    share = 100 * dcaf_value.seconds(estimates[0].estimator, logs[0].known[1], rounds=config.rounds) / base
    gaps = dcaf_exact.gaps(_gap_logs(config, logs, costs[ONE].seconds))
    traffic = dcaf_traffic.run_all(
        _traffic_logs(logs, estimates, costs, compared), config.traffic_seeds, config.scenarios
    )

    found, found_lean = _intervals(compared[ONE]), _intervals(lean)
    figures = times | {"dual_gap_pct": max(float(row["gap_pct"] or 0.0) for row in gaps)} | _figures(found)
    for kind in list(costs)[1:]:
        figures |= _figures(_intervals(compared[kind]), "_batched")
    figures |= _figures({n: found_lean[n] for n in dcaf_report.SAYS if n in found_lean}, "_lean")
    figures |= traffic.figures() | {"estimator_cost_pct": share}
    rows: list[results.Row] = [
        *({"kind": "cost", **row} for row in dcaf_report.cost_rows(names, costs, logs, compared[ONE], fronts[ONE])),
        *(row for log in logs for row in log.rows),
        *(
            {"kind": "replay", "costs": kind, **each.row(names)}
            for kind, part in [*compared.items(), (ONE, lean)]
            for each in part
        ),
        *gaps,
        *traffic.rows(),
    ]
    outcome = results.record("dcaf", started=started, seeds=range(config.seeds), rows=rows, figures=figures)
    results.write(config.out / "result.json", outcome)
    print(table([{"figure": name, "value": value} for name, value in figures.items()]))
    path = dcaf_report.publish(
        config.out / "report.html",
        outcome,
        costs=dcaf_report.Measured(tuple(config.rankers), tuple(config.counts), costs[ONE]),
        compared=compared[ONE],
        intervals=(found, found_lean),
        traffic=traffic,
    )
    print(f"report: {path}   result: {config.out / 'result.json'}   {outcome.seconds:.0f} s", flush=True)
    return outcome


def _log(config: DcafReplay, seed: int) -> Log:
    world = World(
        users=config.users,
        items=config.items,
        categories=config.categories,
        mean_length=config.mean_length,
        max_length=config.max_length,
        long_term=config.long_term,
        seed=seed,
    )
    return make_log(
        world,
        config.out / f"world-{seed}",
        rankers=config.rankers,
        counts=config.counts,
        samples=config.samples,
        batch_size=config.batch_samples,
        requests=config.requests,
        seed=seed,
    )


def _costs(config: DcafReplay, log: Log, batch: int) -> Costs:
    return dcaf_costs.measure(
        log.problem, log.trained, log.requests[1], config.counts, batch=batch, rounds=config.rounds
    )


@dataclass(frozen=True, eq=False)
class Estimates:
    """An estimator trained on the earlier period, and what it says of both."""

    estimator: dcaf_value.Estimator
    earlier: np.ndarray
    later: np.ndarray


def _estimates(log: Log) -> Estimates:
    estimator = dcaf_value.fit(
        log.known[0],
        log.gains[0],
        time=log.problem.samples.time[log.requests[0].sample],
        domains=log.problem.behaviors.sizes["domain"],
        seed=log.seed,
    )
    return Estimates(estimator, estimator(log.known[0]), estimator(log.known[1]))


def _compare(
    logs: Sequence[Log], estimates: Sequence[Estimates], costs: np.ndarray, front: np.ndarray, base: int
) -> list[Compared]:
    return [
        dcaf_compare.compare(
            log.seed, guess.earlier, (log.gains[1], guess.later), costs, log.first_stage, front=front, base=base
        )
        for log, guess in zip(logs, estimates, strict=True)
    ]


def _gap_logs(config: DcafReplay, logs: Sequence[Log], costs: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The replayed logs, and random ones of two sizes."""
    real = {f"replayed, seed {log.seed}": (log.gains[1][: config.gap_requests], costs) for log in logs}
    made = {
        f"random, {actions} actions": dcaf_exact.random_log(config.gap_requests, actions, actions)
        for actions in (6, dcaf_exact.ACTIONS)
    }
    return real | made


def _traffic_logs(
    logs: Sequence[Log],
    estimates: Sequence[Estimates],
    costs: Mapping[str, Costs],
    compared: Mapping[str, Sequence[Compared]],
) -> list[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Gains, estimates, and costs in units of the baseline's, for each log and kind of costs."""
    return [
        {
            kind: (log.gains[1], guess.later, costs[kind].seconds / costs[kind].seconds[compared[kind][i].baseline])
            for kind in costs
        }
        for i, (log, guess) in enumerate(zip(logs, estimates, strict=True))
    ]


def _intervals(compared: Sequence[Compared]) -> dict[str, statistics.Interval]:
    """Means over seeds with their intervals; what is undefined for a seed is left out."""
    each = [found.figures() for found in compared]
    found = {}
    for name in each[0]:
        values = [value for row in each if (value := row[name]) is not None]
        if len(values) == len(each):
            found[name] = statistics.across_seeds(np.array(values))
    return found


def _figures(intervals: Mapping[str, statistics.Interval], suffix: str = "") -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, interval in intervals.items():
        named = name + suffix
        figures |= {named: interval.mean, f"{named}_low": interval.low, f"{named}_high": interval.high}
    return figures

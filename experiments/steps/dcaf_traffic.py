"""DCAF's controller under traffic: the scenarios, and what is counted of them.

Costs are in units of the baseline action's, and the system is one that gives every request the baseline's action at
its target utilisation: `RATE` requests a second on `SERVERS` servers. So a request takes as long there as the measured
costs say, relative to each other.

`TUNED` are the shapes that the controller's gains were set on; `HELD_OUT` are not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sim_jax.dcaf import controller, multiplier, simulator
from sim_jax.dcaf.simulator import Event, Trace, Traffic

RATE, SERVERS, DEADLINE = 1000.0, 32, 0.2  # requests/s; servers; seconds
UTILIZATION = 0.8
LEAST_CAP = 0.02  # of the cheapest action
SETTLE = 4.0  # seconds after a jump of the load that are not counted as settled
JUMP = 1.2  # a larger change of the load from one tick to the next is a jump
_SECONDS = 60.0


def ramp(begin: float, end: float, *, traffic: float = 1.0, capacity: float = 1.0, stop: float) -> tuple[Event, ...]:
    """Events that multiply traffic and capacity up to these factors from `begin` to `end`, in half-second steps of
    equal ratio, and hold them until `stop`."""
    steps = round((end - begin) / 0.5)
    return tuple(
        Event(begin + 0.5 * i, stop, traffic=traffic ** (1 / steps), capacity=capacity ** (1 / steps))
        for i in range(steps)
    )


def scenario(*events: Event, **settings: Any) -> Traffic:
    """Traffic in units of the baseline's cost; see the module's text."""
    made = Traffic(
        seconds=_SECONDS,
        rate=RATE,
        capacity=RATE / UTILIZATION,
        servers=SERVERS,
        deadline=DEADLINE,
        window=2048,
        events=events,
    )
    return replace(made, **settings)


FOUR: dict[str, Any] = {"rate": RATE / 8, "capacity": RATE / 8 / UTILIZATION, "servers": 4}
SURGE, LOSS = Event(10, 30, traffic=3.0), Event(40, 60, capacity=0.5)
TUNED: dict[str, Traffic] = {
    "3x surge, half lost": scenario(SURGE, LOSS),
    "overlapping": scenario(Event(12, 36, traffic=3.0), Event(24, 48, capacity=0.5)),
}
HELD_OUT: dict[str, Traffic] = {
    "ramp surge": scenario(*ramp(10, 25, traffic=3.0, stop=40)),
    "spikes": scenario(*(Event(t, t + 3, traffic=3.0) for t in range(10, 60, 10))),
    "both at once": scenario(Event(15, 45, traffic=3.0, capacity=0.5)),
    "slow loss": scenario(*ramp(10, 40, capacity=0.5, stop=60)),
    "6x surge": scenario(Event(15, 45, traffic=6.0)),
    "one tick later": scenario(SURGE, LOSS, delay=1),
    "four servers": scenario(SURGE, LOSS, **FOUR),
    "price every 5 s": scenario(SURGE, LOSS, refresh=5.0),
}
# Nothing happens, and there is no controller: how much a second's mean of requests that differ swings by itself.
QUIET: dict[str, Traffic] = {"quiet": scenario(), "quiet, four servers": scenario(**FOUR)}
OTHER_COSTS = "costs of a batch"  # the tuned surge with other costs, if they were measured


@dataclass(frozen=True)
class Outcome:
    """What came of a scenario.

    Attributes:
      failure: share of the settled requests that failed. failure_all: of all requests.
      swing: the largest `simulator.swing` of the settled stretches between jumps.
      skipped: share of the settled requests that were skipped. utilization: mean of the settled time.
      gain_of_best: gain of the settled requests, as a share of what the log gains at the same compute by one multiplier
        for all of it: what the controller and the moving price lose, whatever the estimates are worth.
    """

    failure: float
    failure_all: float
    swing: float
    skipped: float
    utilization: float
    gain_of_best: float

    def row(self) -> dict[str, float]:
        return {
            "failure_pct": 100 * self.failure,
            "failure_all_pct": 100 * self.failure_all,
            "swing": self.swing,
            "skipped_pct": 100 * self.skipped,
            "utilization": self.utilization,
            "gain_of_best_pct": 100 * self.gain_of_best,
        }


def run(
    gains: Float[np.ndarray, "M J"],
    costs: Float[np.ndarray, " J"],
    traffic: Traffic,
    *,
    estimates: Float[np.ndarray, "M J"] | None = None,
    controlled: bool = True,
    seed: int = 0,
) -> Trace:
    """The scenario's trace.

    Args:
      costs: in units of the baseline's. controlled: False holds the price of quiet times, with nothing else.
    """
    if controlled:
        return simulator.simulate(gains, costs, traffic, control(costs, traffic), estimates=estimates, seed=seed)
    chosen_by = gains if estimates is None else estimates
    found = multiplier.solve(chosen_by, costs, len(gains) * UTILIZATION * traffic.capacity / traffic.rate)
    return simulator.simulate(gains, costs, traffic, None, estimates=estimates, price=found.multiplier, seed=seed)


def control(costs: Float[np.ndarray, " J"], traffic: Traffic) -> controller.Config:
    """The default gains; the cap reaches up to the dearest action that a server can do in half of the deadline.

    It reaches down to a share of the cheapest: a cap between nothing and the cheapest skips a share of the requests, so
    the controller can shed any load by itself, whatever the price. A skipped page is the first stage's.
    """
    longest = 0.5 * traffic.deadline * traffic.capacity / traffic.servers
    fitting = costs[costs <= longest]
    if len(fitting) < 2:
        raise ValueError(
            f"fewer than two of the actions' costs {costs} can be done in half of the deadline, {longest}; raise "
            "servers' speed or drop the dearest rankers"
        )
    return controller.Config(
        cap=(LEAST_CAP * float(fitting.min()), float(fitting.max())),
        utilization=UTILIZATION,
        queue=50.0,
        tick=traffic.tick,
    )


def outcome(
    trace: Trace,
    traffic: Traffic,
    gains: Float[np.ndarray, "M J"],
    costs: Float[np.ndarray, " J"],
    *,
    estimates: Float[np.ndarray, "M J"] | None = None,
) -> Outcome:
    """What is counted of a trace; see `Outcome`. `estimates`: what was chosen by, if not the gains."""
    calm = settled(trace, traffic)
    arrived = max(trace.arrived[calm].sum(), 1.0)
    ended = trace.failed + trace.served + trace.skipped
    second = round(1 / traffic.tick)
    swings = [
        simulator.swing(np.convolve(trace.asked[part], np.full(second, 1 / second), mode="valid"))
        for part in np.split(np.arange(len(calm)), np.flatnonzero(np.diff(calm.astype(int))) + 1)
        if calm[part[0]] and len(part) >= second
    ]
    budget = trace.spend[calm].sum() / arrived
    chosen_by = gains if estimates is None else estimates
    best = multiplier.solve(chosen_by, costs, budget * len(gains), outcomes=gains).gain / len(gains)
    return Outcome(
        failure=float(trace.failed[calm].sum() / max(ended[calm].sum(), 1.0)),
        failure_all=float(trace.failed.sum() / max(ended.sum(), 1.0)),
        swing=max(swings, default=0.0),
        skipped=float(trace.skipped[calm].sum() / arrived),
        utilization=float(trace.utilization[calm].mean()),
        gain_of_best=float(trace.gain[calm].sum() / arrived / best) if best > 0 else 0.0,
    )


def settled(trace: Trace, traffic: Traffic) -> Bool[np.ndarray, " ticks"]:
    """Ticks at least `SETTLE` seconds after the start and after every jump of traffic or capacity."""
    load = np.array([rate / capacity for rate, capacity in map(traffic.at, trace.time)])
    jumps = 1 + np.flatnonzero(np.abs(np.diff(np.log(load))) > np.log(JUMP))
    last = np.zeros(len(load), int)
    last[jumps] = jumps
    since = np.arange(len(load)) - np.maximum.accumulate(last)
    return since * traffic.tick >= SETTLE


def mean(outcomes: list[Outcome]) -> Mapping[str, float]:
    """Means over seeds; of failures, too, the worst."""
    rows = [o.row() for o in outcomes]
    found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return found | {"failure_worst_pct": max(row["failure_pct"] for row in rows)}


@dataclass(frozen=True)
class Runs:
    """All scenarios' outcomes by name, over seeds, and the traces of the first of `TUNED` for the report.

    `uncontrolled` are the tuned scenarios and the quiet ones with the price of quiet times and nothing else.
    """

    controlled: dict[str, list[Outcome]]
    uncontrolled: dict[str, list[Outcome]]
    traces: tuple[Trace, Trace]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"kind": "traffic", "scenario": name, "tuned_on": name in TUNED, "controller": label, **mean(found)}
            for label, each in (("PID", self.controlled), ("none", self.uncontrolled))
            for name, found in each.items()
        ]

    def figures(self) -> dict[str, float]:
        def worst(runs: Mapping[str, list[Outcome]], names: Any, what: str) -> float:
            return max(outcome.row()[what] for name in names for outcome in runs[name])

        held = [name for name in self.controlled if name not in TUNED]
        return {
            "surge_failure_pct": worst(self.controlled, TUNED, "failure_pct"),
            "surge_failure_all_pct": worst(self.controlled, TUNED, "failure_all_pct"),
            "surge_swing": worst(self.controlled, TUNED, "swing"),
            "held_out_failure_pct": worst(self.controlled, held, "failure_pct"),
            "held_out_failure_all_pct": worst(self.controlled, held, "failure_all_pct"),
            "held_out_swing": worst(self.controlled, held, "swing"),
            "quiet_swing": worst(self.uncontrolled, ["quiet"], "swing"),
            "quiet_swing_four_servers": worst(self.uncontrolled, ["quiet, four servers"], "swing"),
            "surge_failure_uncontrolled_pct": worst(self.uncontrolled, TUNED, "failure_pct"),
            "surge_gain_of_best_pct": float(
                np.mean([outcome.row()["gain_of_best_pct"] for name in TUNED for outcome in self.controlled[name]])
            ),
        }


def run_all(
    logs: list[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]], seeds: int, names: tuple[str, ...] = ()
) -> Runs:
    """The tuned scenarios and the held-out ones of these `names` (all by default), seed s on log s (in turn).

    Args:
      logs: for each seed, by the kind of costs, (gains, estimates, costs in units of the baseline's); the first kind is
        that of all scenarios, another that of `OTHER_COSTS`.
    """
    controlled: dict[str, list[Outcome]] = {}
    uncontrolled: dict[str, list[Outcome]] = {}
    traces: list[Trace] = []
    for seed in range(seeds):
        kinds = list(logs[seed % len(logs)].values())
        held = {name: traffic for name, traffic in HELD_OUT.items() if not names or name in names}
        todo = [(True, name, traffic, kinds[0]) for name, traffic in (TUNED | held).items()]
        todo += [(True, OTHER_COSTS, next(iter(TUNED.values())), kind) for kind in kinds[1:]]
        todo += [(False, name, traffic, kinds[0]) for name, traffic in (TUNED | QUIET).items()]
        for with_control, name, traffic, (gains, estimates, costs) in todo:
            trace = run(gains, costs, traffic, estimates=estimates, controlled=with_control, seed=seed)
            kept = controlled if with_control else uncontrolled
            kept.setdefault(name, []).append(outcome(trace, traffic, gains, costs, estimates=estimates))
            if seed == 0 and name == next(iter(TUNED)):
                traces.append(trace)
    return Runs(controlled, uncontrolled, (traces[0], traces[1]))

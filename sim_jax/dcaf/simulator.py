"""Traffic against a system of limited capacity, to try DCAF's controller on: surges, lost capacity, seeded.

Requests arrive as a Poisson process and are drawn from a log of gains. Each gets its action from `policy.choose` at the
limits and the multiplier of the moment and joins the queue of `pool.py`, unless it is skipped.

Every tick the controller sees what the system measured of itself; it is not told of traffic and capacity as they are
set here. Every `refresh` seconds the multiplier is solved again on the last `window` requests, for the budget that
throughput, utilisation and arrivals since the last time say there is.
"""

import functools
import itertools
from collections import deque
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sim_jax.dcaf import controller, multiplier, policy
from sim_jax.dcaf.pool import Pool

_JUMP = 0.1  # of the budget: what a multiplier may leave before the system is kept busy by the other side of the jump
_PART = 512  # requests that one call of the policy chooses for: one shape, compiled once


@dataclass(frozen=True)
class Event:
    """From `begin` to `end`, in seconds, traffic and capacity are multiplied. Events may overlap."""

    begin: float
    end: float
    traffic: float = 1.0
    capacity: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ValueError(f"dcaf.simulator.Event: from {self.begin} to {self.end}, must be 0 <= begin < end")
        if not (self.traffic >= 0 and 0 < self.capacity < float("inf") and self.traffic < float("inf")):
            raise ValueError(
                f"dcaf.simulator.Event: traffic is {self.traffic}, must be at least 0, capacity {self.capacity} above 0"
            )


@dataclass(frozen=True)
class Traffic:
    """What happens to the system.

    Attributes:
      seconds: how long. tick: seconds between two measurements.
      rate: requests a second. capacity: cost that the pool of `servers` does in a second.
      deadline: seconds after which an answer is a failure.
      events: surges and losses.
      window: requests of the log that the multiplier is solved on; refresh: seconds between two solutions.
      delay: ticks by which the controller sees what was measured later than at the end of that tick.
    """

    seconds: float = 60.0
    tick: float = 0.1
    rate: float = 2000.0
    capacity: float = 20_000.0
    servers: int = 64
    deadline: float = 0.2
    events: tuple[Event, ...] = ()
    window: int = 4096
    refresh: float = 1.0
    delay: int = 0

    def __post_init__(self) -> None:
        for name in ("seconds", "tick", "rate", "capacity", "servers", "deadline", "window", "refresh"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"dcaf.simulator.Traffic: {name} is {getattr(self, name)}, must be finite and above 0")
        if self.seconds < self.tick or self.refresh < self.tick:
            raise ValueError(
                f"dcaf.simulator.Traffic: tick is {self.tick}, must be at most seconds={self.seconds} and "
                f"refresh={self.refresh}"
            )
        if self.delay < 0:
            raise ValueError(f"dcaf.simulator.Traffic: delay is {self.delay}, must be at least 0 ticks")

    def at(self, second: float) -> tuple[float, float]:
        """Rate and capacity at a moment."""
        now = [event for event in self.events if event.begin <= second < event.end]
        traffic, capacity = (float(np.prod([getattr(e, name) for e in now])) for name in ("traffic", "capacity"))
        return self.rate * traffic, self.capacity * capacity


@dataclass(frozen=True)
class Trace:
    """One entry a tick, `[ticks]` each.

    `time` is the tick's beginning. `arrived`, `skipped`, `served` and `failed` are requests: those that arrive are
    skipped by choice at once or queued, and later served in time or failed. `spend` is the cost that was done, `gain`
    that of the requests served in time, `queue` requests waiting at the end, `latency` the 99th percentile of those
    answered, in seconds; `floor`, `cap` and `multiplier` are what the tick's requests were chosen by, `asked` the mean
    cost that was chosen for them.
    """

    time: np.ndarray
    arrived: np.ndarray
    skipped: np.ndarray
    served: np.ndarray
    failed: np.ndarray
    spend: np.ndarray
    gain: np.ndarray
    queue: np.ndarray
    latency: np.ndarray
    utilization: np.ndarray
    floor: np.ndarray
    cap: np.ndarray
    multiplier: np.ndarray
    asked: np.ndarray


@dataclass(frozen=True)
class Phase:
    """A stretch of constant traffic and capacity. Figures are of its settled part.

    `failure` is the share of the requests that failed, `skipped` the share that was skipped, `gain` and `cost` are for
    each request that arrived; `swing` is that of the mean cost asked for, averaged over a second.
    """

    begin: float
    end: float
    failure: float
    skipped: float
    gain: float
    cost: float
    utilization: float
    swing: float


def simulate(
    gains: Float[Any, "M J"],
    costs: Float[Any, " J"],
    traffic: Traffic,
    control: controller.Config | None,
    *,
    estimates: Float[Any, "M J"] | None = None,
    price: float | None = None,
    seed: int = 0,
) -> Trace:
    """Runs the traffic. The same arguments give the same trace.

    Args:
      gains, costs: a log of requests, drawn from with replacement; finite, as in `multiplier.solve`.
      control: the controller, at the tick of `traffic`; None has no limits, and needs a price.
      estimates: what the policy chooses by, if not the gains themselves.
      price: a multiplier to hold on to; None solves for it on the window and begins at 0.
      seed: of arrivals, requests and dithering.
    """
    if control is not None and control.tick != traffic.tick:
        raise ValueError(f"the controller's tick is {control.tick}, must be that of the traffic, {traffic.tick}")
    if control is None and price is None:
        raise ValueError("without a controller nothing says what load to aim at; give a price, from multiplier.solve")
    chosen_by = gains if estimates is None else estimates
    multiplier.check(gains, costs)
    multiplier.check(chosen_by, costs, "estimates")
    if np.shape(chosen_by) != np.shape(gains):
        raise ValueError(f"estimates has shape {np.shape(chosen_by)}, must be that of gains, {np.shape(gains)}")
    if price is not None and not 0 <= price < float("inf"):
        raise ValueError(f"price is {price}, must be finite and at least 0")
    device, costs = jnp.asarray(chosen_by, jnp.float32), np.asarray(costs, np.float64)
    gains = np.asarray(gains, np.float64)
    draw = np.random.default_rng(seed)
    pool = Pool(traffic.tick, traffic.deadline, traffic.capacity / traffic.servers)
    if control is not None:
        state, limits = controller.start(control)
    else:
        limits = controller.Limits(jnp.float32(0), jnp.float32(np.inf))
    value = price or 0.0
    recent = np.zeros(0, np.int64)
    measured: deque[controller.Load] = deque()  # not yet seen by the controller
    ticks = round(traffic.seconds / traffic.tick)
    every = max(1, round(traffic.refresh / traffic.tick))
    columns: dict[str, list[float]] = {name: [] for name in Trace.__dataclass_fields__}

    for number in range(ticks):
        now = number * traffic.tick
        rate, capacity = traffic.at(now)
        count = int(draw.poisson(rate * traffic.tick))
        arrival = now + traffic.tick * np.sort(draw.random(count))
        rows = draw.integers(0, len(gains), count)
        uniform = draw.random(count).astype(np.float32)
        action = _decide(device, costs.astype(np.float32), rows, uniform, np.float32(value), limits)
        skipped = action == policy.SKIP
        kept = ~skipped
        cost = np.where(skipped, 0.0, costs[action])
        pool.arrive(arrival[kept], cost[kept], gains[rows, action][kept])
        done = pool.run(now, capacity)
        load = controller.Load(
            latency=done["latency"],
            qps=count / traffic.tick,
            utilization=done["utilization"],
            queue=done["queue"],
            failures=done["failed"] / max(1, done["failed"] + done["served"]),
        )
        entry = {
            **done,
            "time": now,
            "arrived": count,
            "skipped": skipped.sum(),
            "floor": float(limits.floor),
            "cap": float(limits.cap),
            "multiplier": value,
            "asked": cost.mean() if count else 0.0,
        }
        for name, column in columns.items():
            column.append(float(entry[name]))
        measured.append(load)
        if control is not None and len(measured) > traffic.delay:
            state, limits = _step(state, measured.popleft(), control)
        recent = np.concatenate([recent, rows])[-traffic.window :]
        if control is not None and price is None and (number + 1) % every == 0 and len(recent) == traffic.window:
            spend, busy, arrived = (sum(columns[name][-every:]) for name in ("spend", "utilization", "arrived"))
            # Capacity is what was done in the time that was worked; the budget is for each request of the window.
            share = control.utilization * (spend / busy) * every / arrived if busy and arrived else np.inf
            value = _price(device[recent], costs, share, control)
    return Trace(**{name: np.array(column) for name, column in columns.items()})


def phases(trace: Trace, traffic: Traffic, *, settle: float = 10.0) -> tuple[Phase, ...]:
    """Figures of each stretch between events, without its first `settle` seconds (stretches as short are left out)."""
    cuts = {0.0, traffic.seconds} | {t for e in traffic.events for t in (e.begin, e.end) if t < traffic.seconds}
    ends = sorted(cuts)
    second = max(1, round(1 / traffic.tick))
    found = []
    for begin, end in itertools.pairwise(ends):
        inside = (trace.time >= begin + settle) & (trace.time < end)
        if inside.sum() < second:
            continue
        arrived = max(trace.arrived[inside].sum(), 1.0)
        failed, served = trace.failed[inside].sum(), trace.served[inside].sum()
        smooth = np.convolve(trace.asked[inside], np.full(second, 1 / second), mode="valid")
        found.append(
            Phase(
                begin=begin,
                end=end,
                failure=float(failed / max(failed + served + trace.skipped[inside].sum(), 1)),
                skipped=float(trace.skipped[inside].sum() / arrived),
                gain=float(trace.gain[inside].sum() / arrived),
                cost=float(trace.spend[inside].sum() / arrived),
                utilization=float(trace.utilization[inside].mean()),
                swing=swing(smooth),
            )
        )
    return tuple(found)


def swing(series: Float[Any, " n"]) -> float:
    """The largest fall that is followed by as large a rise, or the reverse, as a share of the series' mean.

    What we call oscillation is a swing of more than .25, after settling, of the cost that the limits and the multiplier
    let requests ask for. What drifts to its place, however far, has no swing; what comes back has, however slowly.
    Requests differ, so a second's mean over a few hundred of them swings without any controller: compare with that.
    """
    x = np.asarray(series, np.float64)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all() or (x < 0).any():
        raise ValueError(f"swing needs a series of finite numbers, at least 0, got shape {x.shape}")

    def valley(x: np.ndarray) -> float:
        before, after = np.maximum.accumulate(x), np.maximum.accumulate(x[::-1])[::-1]
        return float((np.minimum(before, after) - x).max())

    return max(valley(x), valley(-x)) / float(x.mean()) if x.any() else 0.0


def _decide(
    gains: Array,
    costs: np.ndarray,
    rows: np.ndarray,
    uniform: np.ndarray,
    value: np.floating,
    limits: controller.Limits,
) -> np.ndarray:
    """The policy for a tick's requests, in parts of one shape."""
    short = -len(rows) % _PART
    rows, uniform = np.pad(rows, (0, short)), np.pad(uniform, (0, short))
    parts = [
        np.asarray(_act(gains, costs, rows[i : i + _PART], uniform[i : i + _PART], value, limits))
        for i in range(0, len(rows), _PART)
    ]
    return np.concatenate([np.zeros(0, np.int32), *parts])[: len(rows) - short]


@jax.jit
def _act(gains: Array, costs: Array, rows: Array, uniform: Array, value: Array, limits: controller.Limits) -> Array:
    floor, cap = (policy.dither(limit, costs, uniform) for limit in limits)
    return policy.choose(gains[rows], costs, value, floor=floor, cap=cap)


@functools.partial(jax.jit, static_argnames="config")
def _step(
    state: controller.State, load: controller.Load, config: controller.Config
) -> tuple[controller.State, controller.Limits]:
    return controller.step(state, load, config)


def _price(window: Array, costs: np.ndarray, share: float, control: controller.Config) -> float:
    """The multiplier that spends `share` on each request of the window, or the least that the floor allows.

    Where many requests are exactly alike, as to a coarse estimator, the spend jumps over the budget: the feasible side
    would leave the system idle, so the other is taken, and the controller's dithered cap brings the mean down.
    """
    floor, cap, requests = control.floor[0], control.cap[1], len(window)
    least = multiplier.least_spend(costs, requests, floor=floor, cap=cap)
    budget = requests * min(share, float(costs.max()))
    found = multiplier.solve(window, costs, max(budget, least), floor=floor, cap=cap)
    value = np.float32(found.multiplier or 0.0)
    return float(np.nextafter(value, np.float32(0)) if found.left > _JUMP * budget else value)

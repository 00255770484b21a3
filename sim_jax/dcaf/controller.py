"""DCAF's controller (arXiv 2006.09684, section 4): the load of the system moves the limits of a request's cost.

A PID on latency, utilisation, queue and failures, with QPS fed forward. It moves the cap ("MaxPower") and the floor
together: down when the system is hot, up when traffic is low. The paper names the signals and the PID; the form below
and its gains are ours.

Load is a product, `QPS x cost of a request / capacity`, so all of it works in logarithms, where the plant's gain is
about one at any traffic:

    heat  = max over the signals of (measured / limit)            1 where the system should be
    e     = filter(clip(-log heat))                               above 0 where there is room
    u     = K_P e + I + K_D de/dt
    I    <- clip(I + K_I e dt - log(QPS / QPS before), -log(cap_max / cap_min), 0)
    cap   = cap_max exp(clip(u)),  u between the same bounds

The feed-forward term is exact for a change of QPS alone, and answers a surge before anything is late. Anti-windup: the
integral is held within the range of the output, so at either end it holds no more than the output can use.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_LEAST = 1e-6  # heat and requests a second below which there is none: a logarithm stays finite


@dataclass(frozen=True)
class Config:
    """Limits and gains.

    The default gains were set on `simulator.py` at ten ticks a second: the integral alone would close a gap in
    `1 / integral` seconds. There, with one tick of delay, three times the gains still settle and five times oscillate.

    Attributes:
      cap: least and largest cap, in the unit of the costs, above 0. A least cap that admits the cheapest action leaves
        skipping to the price; one far below it lets the controller skip a share of all, through `policy.dither`, and so
        shed any load, also at a price that is not of the moment.
      floor: least and largest floor, at 0 and at full power; (0, 0) leaves skipping free at all times.
      latency, utilization, queue, failures: what each signal should not exceed: seconds, a share of capacity below 1
        (a saturated system must look hot), requests waiting, a share of requests.
      proportional, integral, derivative: K_P, K_I (1/s), K_D (s).
      feed_forward: share of a change of log QPS that is passed on, 1 for all, 0 for none.
      filter: time constant of the filters of error and QPS, seconds.
      clip: largest error either way, in log units.
      tick: seconds between two steps.
    """

    cap: tuple[float, float]
    floor: tuple[float, float] = (0.0, 0.0)
    latency: float = 0.1
    utilization: float = 0.8
    queue: float = 100.0
    failures: float = 0.001
    proportional: float = 0.9
    integral: float = 1.8
    derivative: float = 0.06
    feed_forward: float = 1.0
    filter: float = 0.2
    clip: float = 1.0
    tick: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.cap[0] < self.cap[1] < float("inf"):
            raise ValueError(f"dcaf.controller.Config: cap is {self.cap}, must be 0 < least < largest, both finite")
        if not (0 <= self.floor[0] <= self.floor[1] and self.floor[0] <= self.cap[0] and self.floor[1] <= self.cap[1]):
            raise ValueError(
                f"dcaf.controller.Config: floor is {self.floor}, must be 0 <= least <= largest and not above the cap, "
                f"{self.cap}"
            )
        if not 0 < self.utilization < 1:
            raise ValueError(f"dcaf.controller.Config: utilization is {self.utilization}, must be between 0 and 1")
        for name in ("latency", "queue", "failures", "integral", "filter", "clip", "tick"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"dcaf.controller.Config: {name} is {getattr(self, name)}, must be finite and above 0")
        for name in ("proportional", "derivative", "feed_forward"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"dcaf.controller.Config: {name} is {getattr(self, name)}, must be finite, at least 0")


class Load(NamedTuple):
    """What was measured over the last tick. A signal that is NaN or infinite is left out of that step."""

    latency: float | Float[Array, ""]  # seconds, a high percentile
    qps: float | Float[Array, ""]  # requests that arrived, a second
    utilization: float | Float[Array, ""]  # share of the capacity
    queue: float | Float[Array, ""]  # requests waiting at the end
    failures: float | Float[Array, ""]  # share of the requests


class State(NamedTuple):
    integral: Float[Array, ""]  # I, from -log(cap_max / cap_min) to 0
    error: Float[Array, ""]  # e, filtered
    log_qps: Float[Array, ""]  # filtered; NaN before the first measurement


class Limits(NamedTuple):
    """Floor and cap of a request's cost, for `policy.choose`, through `policy.dither` where actions are few."""

    floor: Float[Array, ""]
    cap: Float[Array, ""]


def start(config: Config) -> tuple[State, Limits]:
    """At the least power, with nothing measured: it rises as fast as there is seen to be room."""
    state = State(jnp.float32(-_span(config)), jnp.float32(0), jnp.float32(jnp.nan))
    return state, Limits(jnp.float32(config.floor[0]), jnp.float32(config.cap[0]))


def step(state: State, load: Load, config: Config) -> tuple[State, Limits]:
    """One tick: pure, jittable with `config` static, and finite whatever was measured.

    Without any finite signal the error stands still, and so does its pull on the limits.
    """
    limits = jnp.asarray([config.latency, config.utilization, config.queue, config.failures], jnp.float32)
    signals = jnp.asarray([load.latency, load.utilization, load.queue, load.failures], jnp.float32)
    known = jnp.isfinite(signals)
    heat = jnp.max(jnp.where(known, signals / limits, 0))
    measured = jnp.clip(-jnp.log(jnp.maximum(heat, _LEAST)), -config.clip, config.clip)
    smooth = 1 - np.exp(-config.tick / config.filter)
    error = jnp.where(known.any(), state.error + smooth * (measured - state.error), state.error)

    qps = jnp.asarray(load.qps, jnp.float32)
    counted = jnp.isfinite(qps) & (qps > _LEAST)
    now = jnp.where(counted, jnp.log(jnp.where(counted, qps, 1)), state.log_qps)
    log_qps = jnp.where(jnp.isnan(state.log_qps), now, state.log_qps + smooth * (now - state.log_qps))
    change = jnp.where(jnp.isnan(state.log_qps), 0, log_qps - state.log_qps)

    span = _span(config)
    pull = jnp.where(known.any(), config.integral * config.tick * error, 0)
    integral = jnp.clip(state.integral + pull - config.feed_forward * change, -span, 0)
    slope = (error - state.error) / config.tick
    output = jnp.clip(config.proportional * error + integral + config.derivative * slope, -span, 0)
    power = 1 + output / span
    floor = config.floor[0] + power * (config.floor[1] - config.floor[0])
    cap = jnp.clip(config.cap[1] * jnp.exp(output), config.cap[0], config.cap[1])
    return State(integral, error, log_qps), Limits(floor, cap)


def _span(config: Config) -> float:
    return float(np.log(config.cap[1] / config.cap[0]))

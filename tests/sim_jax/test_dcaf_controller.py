import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_jax.dcaf import controller
from sim_jax.dcaf.controller import Config, Load

CONFIG = Config(cap=(1.0, 20.0), floor=(0.5, 4.0))
COLD = Load(latency=0.01, qps=1000.0, utilization=0.2, queue=0.0, failures=0.0)
EVEN = COLD._replace(utilization=CONFIG.utilization)
HOT = COLD._replace(utilization=1.0, queue=1000.0, failures=0.3, latency=0.4)
SPAN = float(np.log(20.0))
step = jax.jit(controller.step, static_argnames="config")


def run(loads, config=CONFIG, state=None):
    """The states and limits after each load."""
    state = controller.start(config)[0] if state is None else state
    out = []
    for load in loads:
        state, limits = step(state, load, config)
        out.append((state, limits))
    return out


@functools.cache
def full_power():
    return run([COLD] * 100)[-1][0]


@pytest.mark.portable
def test_two_steps_by_hand():
    config = dataclasses.replace(CONFIG, filter=0.1 / np.log(2))  # the filter goes half the way in each tick
    state, start = controller.start(config)
    assert (float(start.floor), float(start.cap)) == (0.5, 1.0)
    integral, error = -SPAN, 0.0
    log_qps = np.log(1000.0)
    for qps, utilization in ((1000.0, 0.4), (500.0, 0.5)):
        state, limits = step(state, COLD._replace(qps=qps, utilization=utilization), config)
        before = error
        error = error + 0.5 * (-np.log(utilization / 0.8) - error)
        now = log_qps + 0.5 * (np.log(qps) - log_qps)
        integral, log_qps = integral + 0.1 * 1.8 * error - (now - log_qps), now
        output = 0.9 * error + integral + 0.06 * (error - before) / 0.1
        np.testing.assert_allclose(limits.cap, 20 * np.exp(output), rtol=1e-5)
        np.testing.assert_allclose(limits.floor, 0.5 + 3.5 * (1 + output / SPAN), rtol=1e-5)
        np.testing.assert_allclose(state, (integral, error, log_qps), rtol=1e-5)


@pytest.mark.portable
def test_limits_go_down_when_hot_and_up_when_traffic_is_low():
    down = run([HOT] * 60, state=full_power())
    caps, floors = (np.array([getattr(limits, name) for _, limits in down]) for name in ("cap", "floor"))
    assert (np.diff(caps) <= 0).all() and (np.diff(floors) <= 0).all()
    np.testing.assert_allclose((caps[-1], floors[-1]), (1.0, 0.5), rtol=1e-5)
    up = run([COLD] * 60, state=down[-1][0])
    caps, floors = (np.array([getattr(limits, name) for _, limits in up]) for name in ("cap", "floor"))
    assert (np.diff(caps) >= 0).all() and (np.diff(floors) >= 0).all()
    np.testing.assert_allclose((caps[-1], floors[-1]), (20.0, 4.0), rtol=1e-5)


@pytest.mark.parametrize("signal", ["latency", "utilization", "queue", "failures"])
def test_each_signal_alone_makes_the_system_hot(signal):
    limit = getattr(CONFIG, signal)
    middle = full_power()._replace(integral=np.float32(-1.0), error=np.float32(0.0))
    hot = run([COLD._replace(**{signal: 1.2 * limit})], state=middle)[-1][0]
    even = run([COLD._replace(**{signal: limit})], state=middle)[-1][0]
    assert hot.integral < middle.integral
    np.testing.assert_allclose(even.integral, middle.integral, atol=1e-6)


@given(st.lists(st.tuples(*[st.floats(width=32) for _ in Load._fields]), min_size=1, max_size=8))
def test_limits_stay_in_range_whatever_is_measured(loads):
    """NaN, infinite and negative measurements included."""
    for state, limits in run([Load(*load) for load in loads], state=full_power()):
        assert 1 <= limits.cap <= 20 and 0.5 - 1e-6 <= limits.floor <= 4 + 1e-6
        assert limits.floor <= limits.cap
        assert np.isfinite([state.integral, state.error]).all()


def test_signals_that_fail_are_left_out():
    middle = full_power()._replace(integral=np.float32(-1.0))
    nan = float("nan")
    some = run([HOT, HOT._replace(latency=nan, failures=nan)], state=middle)[-1]
    np.testing.assert_allclose(some[1], run([HOT, HOT], state=middle)[-1][1], rtol=1e-6)
    none = run([Load(nan, nan, nan, nan, nan)] * 3, state=middle)
    jax.tree.map(np.testing.assert_array_equal, none[-1], none[0])
    np.testing.assert_array_equal(none[0][0], middle)


def test_a_change_of_traffic_is_answered_before_the_system_is_hot():
    """At the load that it should have the limits stand still, and after a surge they ask for the same load again."""
    middle = full_power()._replace(integral=np.float32(-0.5), error=np.float32(0.0))
    even = run([EVEN] * 20, state=middle)
    np.testing.assert_allclose([limits.cap for _, limits in even], 20 * np.exp(-0.5), rtol=1e-5)
    surge = run([EVEN._replace(qps=3000.0)] * 40, state=middle)
    np.testing.assert_allclose(surge[-1][1].cap, 20 * np.exp(-0.5) / 3, rtol=1e-4)
    ignored = run([EVEN._replace(qps=3000.0)] * 40, dataclasses.replace(CONFIG, feed_forward=0.0), middle)
    np.testing.assert_allclose(ignored[-1][1].cap, 20 * np.exp(-0.5), rtol=1e-5)


@pytest.mark.parametrize(("long", "after"), [(HOT, COLD), (COLD, HOT)])
def test_no_windup(long, after):
    """However long the limits were at an end, they leave it as fast."""
    short = run([long] * 60 + [after] * 15)[-15:]
    ages = run([long] * 240 + [after] * 15)[-15:]
    np.testing.assert_allclose([x.cap for _, x in ages], [x.cap for _, x in short], rtol=1e-4)
    assert abs(np.log(short[-1][1].cap / short[0][1].cap)) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cap": (2.0, 2.0)}, r"cap is \(2.0, 2.0\), must be 0 < least < largest"),
        ({"cap": (0.0, 2.0)}, "0 < least"),
        ({"cap": (1.0, float("inf"))}, "both finite"),
        ({"floor": (2.0, 4.0)}, r"floor is \(2.0, 4.0\).*not above the cap"),
        ({"floor": (0.5, 0.2)}, "least <= largest"),
        ({"utilization": 1.0}, "utilization is 1.0, must be between 0 and 1"),
        ({"latency": 0.0}, "latency is 0.0, must be finite and above 0"),
        ({"integral": float("nan")}, "integral is nan"),
        ({"proportional": -0.1}, "proportional is -0.1, must be finite, at least 0"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)

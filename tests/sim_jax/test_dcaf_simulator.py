import dataclasses
import functools

import numpy as np
import pytest

from sim_jax.dcaf import controller, multiplier, simulator
from sim_jax.dcaf.pool import Pool
from sim_jax.dcaf.simulator import Event, Traffic

COSTS = np.array([1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 20.0])
CONTROL = controller.Config(cap=(1.0, 20.0), floor=(1.0, 1.0), queue=50.0)
SURGE, LOSS = Event(12, 36, traffic=3.0), Event(24, 48, capacity=0.5)  # from 24 to 36 both: six times the load
TRAFFIC = Traffic(seconds=60, rate=1000, capacity=10_000, servers=32, window=2048, events=(SURGE, LOSS))
SETTLE = 4.0


@functools.cache
def log():
    """Gains that rise with cost, more for some requests than for others."""
    draw = np.random.default_rng(0)
    worth, rate = draw.gamma(0.7, 1.4, (5000, 1)), draw.uniform(0.04, 0.3, (5000, 1))
    return worth * (1 - np.exp(-rate * COSTS)) * draw.uniform(0.9, 1.1, (5000, 7))


@functools.cache
def price():
    """The multiplier that fits quiet times at a load of .8, solved on the log beforehand."""
    return multiplier.solve(log(), COSTS, 8.0 * len(log())).multiplier


@functools.cache
def run(control=CONTROL, held=False, traffic=TRAFFIC, seed=0):
    return simulator.simulate(log(), COSTS, traffic, control, price=price() if held else None, seed=seed)


def test_pool_by_hand():
    """One server that does 10 a second: services of .5, .5, .2, .1 s; deadline .8 s."""
    pool = Pool(tick=1.0, deadline=0.8, speed=10.0)
    pool.arrive(np.array([0.0, 0.1, 0.3, 0.9]), np.array([5.0, 5.0, 2.0, 1.0]), np.array([1.0, 2.0, 4.0, 8.0]))
    first = pool.run(0.0, 10.0)
    # Ends at .5, 1, 1.2 and 1.3: the second is answered .9 s after it came.
    assert (first["served"], first["failed"], first["queue"], first["gain"]) == (1, 1, 2, 1.0)
    np.testing.assert_allclose((first["spend"], first["utilization"]), (10, 1))
    np.testing.assert_allclose(first["latency"], np.quantile([0.5, 0.9], 0.99))
    pool.arrive(np.array([1.9]), np.array([4.0]), np.array([16.0]))
    second = pool.run(1.0, 10.0)
    # The third would be answered 0.9 s late at 1.2; the last runs from 1.9 to 2.3.
    assert (second["served"], second["failed"], second["queue"], second["gain"]) == (1, 1, 1, 8.0)
    np.testing.assert_allclose((second["spend"], second["utilization"]), (4, 0.4))
    third = pool.run(2.0, 20.0)
    assert (third["served"], third["queue"]) == (1, 0)
    np.testing.assert_allclose((third["spend"], third["utilization"]), (3, 0.15), err_msg="3 left, at 20 a second")
    idle = pool.run(3.0, 10.0)
    assert set(idle.values()) == {0}


def test_pool_drops_what_has_waited_past_the_deadline():
    pool = Pool(tick=1.0, deadline=0.5, speed=10.0)
    pool.arrive(np.array([0.0, 0.1, 0.9]), np.array([20.0, 1.0, 1.0]), np.ones(3))
    assert pool.run(0.0, 10.0)["queue"] == 3
    after = pool.run(1.0, 10.0)
    assert (after["failed"], after["served"]) == (2, 1)
    np.testing.assert_allclose(after["spend"], 1)


def test_a_request_takes_one_server_of_many():
    pool = Pool(tick=1.0, deadline=0.5, speed=2.5)
    pool.arrive(np.array([0.0, 0.0]), np.array([1.0, 2.0]), np.ones(2))
    # Begun at 0 and .1, at a quarter of the pool's speed: .4 and .1 + .8.
    done = pool.run(0.0, 10.0)
    assert (done["served"], done["failed"]) == (1, 1)
    np.testing.assert_allclose(done["latency"], np.quantile([0.4, 0.9], 0.99))


def test_a_request_that_runs_over_a_tick_began_in_the_first():
    pool = Pool(tick=1.0, deadline=4.0, speed=5.0)
    pool.arrive(np.array([0.5]), np.array([15.0]), np.ones(1))
    assert pool.run(0.0, 10.0)["queue"] == 1
    # Of its cost 10 is left to the second tick; one server takes 3 s, from .5 on.
    done = pool.run(1.0, 10.0)
    np.testing.assert_allclose((done["spend"], done["served"], done["latency"]), (10, 1, 3))


def test_every_request_is_accounted_for():
    trace = run()
    assert len(trace.time) == 600
    queue = np.concatenate([[0], trace.queue])
    np.testing.assert_array_equal(np.diff(queue), trace.arrived - trace.skipped - trace.served - trace.failed)
    capacity = np.array([TRAFFIC.at(t)[1] for t in trace.time]) * TRAFFIC.tick
    np.testing.assert_allclose(trace.spend, trace.utilization * capacity, rtol=1e-9)
    assert (trace.utilization <= 1 + 1e-9).all()
    rate = np.array([TRAFFIC.at(t)[0] for t in trace.time]) * TRAFFIC.tick
    assert abs((trace.arrived - rate).sum()) < 5 * np.sqrt(rate.sum()), "Poisson arrivals at the rate"


def test_the_same_seed_is_the_same_trace():
    short = dataclasses.replace(TRAFFIC, seconds=6, events=(Event(3, 6, traffic=3.0),))
    one, again = (
        simulator.simulate(log(), COSTS, short, CONTROL, seed=1),
        simulator.simulate(log(), COSTS, short, CONTROL, seed=1),
    )
    for name, column in dataclasses.asdict(one).items():
        np.testing.assert_array_equal(column, getattr(again, name))
    assert (run(traffic=short, seed=2).arrived != one.arrived).any()


@pytest.mark.parametrize("held", [False, True], ids=["price solved again", "price held"])
def test_the_controller_carries_the_system_through(held):
    """Three times the traffic, then half the capacity too, then that alone: all are answered, at a steady cost."""
    trace = run(held=held)
    found = simulator.phases(trace, TRAFFIC, settle=SETTLE)
    assert [(phase.begin, phase.end) for phase in found] == [(0, 12), (12, 24), (24, 36), (36, 48), (48, 60)]
    for phase in found:
        assert phase.failure < 1e-3
        assert phase.skipped == 0, "the floor has everybody served"
        assert phase.swing < 0.25
    assert all(0.7 < phase.utilization < 0.85 for phase in found), "nor is capacity left lying"
    assert trace.failed.sum() < 0.01 * trace.arrived.sum(), "before it has settled too"
    costs = [phase.cost for phase in found]
    np.testing.assert_allclose(costs, [8, 8 / 3, 8 / 6, 4, 8], rtol=0.12)


def test_few_actions_far_apart_do_not_make_it_swing():
    """The cost to keep to lies between two actions: a share of the requests gets the dearer."""
    three = [0, 3, 6]
    trace = simulator.simulate(log()[:, three], COSTS[three], TRAFFIC, CONTROL, price=price())
    for phase in simulator.phases(trace, TRAFFIC, settle=SETTLE):
        assert phase.failure < 1e-3 and phase.swing < 0.25 and phase.utilization > 0.75


def test_requests_that_are_all_alike_keep_the_system_busy():
    """A price serves all of them or none: the cap sees to the share that capacity allows."""
    alike = np.tile(np.sqrt(COSTS), (100, 1))
    short = dataclasses.replace(TRAFFIC, seconds=24, events=(SURGE,))
    control = dataclasses.replace(CONTROL, cap=(0.05, 20.0), floor=(0.0, 0.0))
    for phase in simulator.phases(simulator.simulate(alike, COSTS, short, control), short, settle=SETTLE):
        assert phase.failure < 1e-3 and phase.swing < 0.25 and 0.7 < phase.utilization < 0.85


def test_a_cap_below_the_cheapest_action_sheds_load_at_any_price():
    """At a price of 0 everybody asks for the best; 12 times the load can be carried by skipping alone."""
    few = [4, 6]
    short = dataclasses.replace(TRAFFIC, seconds=24, events=(Event(12, 24, traffic=12.0),))
    control = dataclasses.replace(CONTROL, cap=(0.05, 20.0), floor=(0.0, 0.0))
    trace = simulator.simulate(log()[:, few], COSTS[few], short, control, price=0.0)
    surge = simulator.phases(trace, short, settle=SETTLE)[1]
    assert surge.failure < 1e-3 and surge.skipped > 0.9 and surge.utilization > 0.7


@pytest.mark.parametrize("delay", [1, 2])
def test_measurements_that_come_late_are_seen_late(delay):
    late = dataclasses.replace(TRAFFIC, seconds=24, events=(SURGE,), delay=delay)
    trace, prompt = run(traffic=late), run(traffic=dataclasses.replace(late, delay=0))
    assert (trace.cap[: delay + 1] == CONTROL.cap[0]).all()
    np.testing.assert_allclose(trace.cap[1 + delay], prompt.cap[1], rtol=0.2)
    assert simulator.phases(trace, late, settle=SETTLE)[1].failure < 1e-3


def test_without_a_controller_the_surge_is_lost():
    short = dataclasses.replace(TRAFFIC, seconds=24, events=(SURGE,))
    quiet, surge = simulator.phases(run(None, held=True, traffic=short), short, settle=SETTLE)
    assert quiet.failure < 1e-3
    assert surge.failure > 0.5


def test_solving_the_price_again_gains_more_than_the_limits_alone():
    solved, held = (simulator.phases(run(held=held), TRAFFIC, settle=SETTLE) for held in (False, True))
    for phase in (1, 3):  # in surge and loss, at the same compute
        assert solved[phase].gain > 1.05 * held[phase].gain


def test_gains_that_are_too_large_oscillate():
    """What `swing` calls steady is not steady for every controller."""
    short = dataclasses.replace(TRAFFIC, seconds=24, events=(SURGE,))
    wild = dataclasses.replace(CONTROL, proportional=9.0, integral=18.0, derivative=0.6)
    assert simulator.phases(run(wild, held=True, traffic=short), short, settle=SETTLE)[1].swing > 0.3


def test_swing_by_hand():
    assert simulator.swing(np.linspace(1, 5, 9)) == 0, "a drift is no swing"
    assert simulator.swing(np.array([2.0, 1.0, 3.0])) == 0.5
    assert simulator.swing(np.array([1.0, 4.0, 2.0, 1.0])) == 1.5
    np.testing.assert_allclose(simulator.swing(2 + np.sin(np.linspace(0, 6 * np.pi, 601))), 1, rtol=1e-3)
    assert simulator.swing(np.zeros(4)) == 0
    with pytest.raises(ValueError, match="swing needs a series of finite numbers"):
        simulator.swing(np.array([1.0, np.nan]))


def test_events_multiply():
    assert TRAFFIC.at(0) == (1000, 10_000) and TRAFFIC.at(12) == (3000, 10_000)
    assert TRAFFIC.at(30) == (3000, 5000) and TRAFFIC.at(48) == (1000, 10_000)


def test_a_system_without_traffic():
    silent = dataclasses.replace(TRAFFIC, seconds=2, events=(Event(0, 2, traffic=0.0),))
    trace = run(traffic=silent)
    assert trace.arrived.sum() == 0 and np.isfinite(trace.cap).all()
    (phase,) = simulator.phases(trace, silent, settle=0.0)
    assert (phase.failure, phase.gain, phase.swing) == (0, 0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Event(3, 3), "from 3 to 3"),
        (lambda: Event(0, 1, traffic=-1.0), "traffic is -1.0"),
        (lambda: Event(0, 1, capacity=0.0), "capacity 0.0 above 0"),
        (lambda: Traffic(rate=0.0), "rate is 0.0, must be finite and above 0"),
        (lambda: Traffic(delay=-1), "delay is -1, must be at least 0 ticks"),
        (lambda: Traffic(seconds=0.05), "tick is 0.1, must be at most seconds=0.05"),
        (lambda: simulator.simulate(log(), COSTS, TRAFFIC, None), "without a controller.*give a price"),
        (lambda: simulator.simulate(log(), COSTS, TRAFFIC, CONTROL, price=-1.0), "price is -1.0"),
        (lambda: simulator.simulate(log() * np.nan, COSTS, TRAFFIC, CONTROL), "gains: nan at row 0"),
        (
            lambda: simulator.simulate(log(), COSTS, TRAFFIC, CONTROL, estimates=log() * np.inf),
            "estimates: inf at row 0",
        ),
        (lambda: simulator.simulate(log(), COSTS, TRAFFIC, CONTROL, estimates=log()[1:]), "estimates has shape"),
        (
            lambda: simulator.simulate(log(), COSTS, TRAFFIC, dataclasses.replace(CONTROL, tick=0.2)),
            "the controller's tick is 0.2, must be that of the traffic, 0.1",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

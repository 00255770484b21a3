"""DCAF's replay on a small world: what a request knows, what it is truly worth, and the whole run."""

import dataclasses

import numpy as np
import pytest

from experiments import results
from experiments.datasets import make_world
from experiments.dcaf_replay import DcafReplay, run
from experiments.steps import (
    dcaf_compare,
    dcaf_costs,
    dcaf_exact,
    dcaf_rankers,
    dcaf_requests,
    dcaf_traffic,
    dcaf_value,
)
from experiments.steps.problem import make_problem
from rec_core.data.world import World, truth_of
from sim_jax.dcaf import multiplier
from sim_jax.dcaf.simulator import Event

WORLD = World(users=40, items=90, categories=8, departments=2, domains=2, mean_length=25, max_length=80, seed=3)
SAMPLES, CANDIDATES = 60, 30


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make_problem(make_world(WORLD, tmp_path_factory.mktemp("world"), log=str), log=str)


@pytest.fixture(scope="module")
def cut(problem):
    return int(np.quantile(problem.samples.time, 0.5))


@pytest.fixture(scope="module")
def requests(problem, cut):
    sample = dcaf_requests.draw_samples(problem, SAMPLES, cut, int(problem.samples.time.max()) + 1, 0)
    return dcaf_requests.make_requests(problem, WORLD, sample, count=CANDIDATES, known_before=cut)


def test_true_probability_is_the_worlds(problem):
    """Of the item that was shown the log holds it, drawn while the world was made."""
    sample = np.random.default_rng(0).permutation(len(problem.samples))[:400]
    shown = problem.samples.item[sample]
    others = np.stack([shown, np.full_like(shown, 5), shown], axis=1)
    found = dcaf_requests.true_probability(problem, WORLD, sample, others)
    np.testing.assert_allclose(found[:, 0], problem.samples.probability[sample], rtol=1e-5)
    np.testing.assert_array_equal(found[:, 0], found[:, 2])
    alone = dcaf_requests.true_probability(problem, WORLD, sample[7:8], others[7:8])
    np.testing.assert_array_equal(found[7:8], alone)
    with pytest.raises(ValueError, match="sample holds an impression twice"):
        dcaf_requests.true_probability(problem, WORLD, sample[[1, 1]], others[[1, 1]])


def test_the_first_stage_by_hand(problem, requests, cut):
    samples, born = problem.samples, truth_of(WORLD).born
    for row in (0, 31):
        sample = requests.sample[row]
        past = slice(samples.start[sample], samples.end[sample])
        mine = np.bincount(problem.behaviors.columns["category"][past], minlength=problem.category.max() + 1)
        clicked = np.bincount(samples.item[(samples.time < cut) & (samples.label == 1)], minlength=WORLD.items + 2)
        score = (1 + mine[problem.category]) * (1 + clicked)
        exists = np.concatenate([[False, False], born <= samples.time[sample]])
        expected = [i for i in np.argsort(-score, kind="stable") if exists[i]][:CANDIDATES]
        np.testing.assert_array_equal(requests.candidates[row], expected)
        np.testing.assert_array_equal(requests.scores[row], score[expected])


def test_nothing_of_a_requests_future_reaches_it(problem, requests, cut):
    """Later clicks are taken away, and later behaviours are of other items: what is known of a request stays."""
    t = int(np.quantile(problem.samples.time[requests.sample], 0.5))
    early = problem.samples.time[requests.sample] <= t
    later = problem.behaviors.columns["time"] >= t
    columns = dict(problem.behaviors.columns)
    columns["item"] = np.where(later, 2 + (columns["item"] + 7) % 80, columns["item"]).astype(np.int32)
    columns["category"] = problem.category[columns["item"]]
    label = np.where(problem.samples.time >= t, 0, problem.samples.label).astype(np.uint8)
    other = dataclasses.replace(
        problem,
        behaviors=dataclasses.replace(problem.behaviors, columns=columns),
        samples=dataclasses.replace(problem.samples, label=label),
    )
    again = dcaf_requests.make_requests(other, WORLD, requests.sample, count=CANDIDATES, known_before=cut)
    assert 0 < early.sum() < SAMPLES
    for name in ("candidates", "scores", "probability"):
        np.testing.assert_array_equal(getattr(again, name)[early], getattr(requests, name)[early])
    assert not np.array_equal(again.probability, requests.probability)
    known = dcaf_requests.features(problem, requests, known_before=cut)
    then = dcaf_requests.features(other, again, known_before=cut)
    np.testing.assert_array_equal(known[1][early], then[1][early])
    assert np.isfinite(known[1]).all() and known[1].std(axis=0).min() > 0
    tree, changed = dcaf_rankers.make_tree(problem), dcaf_rankers.make_tree(other)
    for one, two in zip(*(_sim(p, x, requests) for p, x in ((problem, tree), (other, changed))), strict=True):
        np.testing.assert_array_equal(one[early], two[early])


def _sim(problem, tree, requests):
    ranker = dcaf_rankers.RANKERS["SIM"]
    trained = dcaf_rankers.Trained(ranker, None, None, tree)
    asked = dcaf_rankers.request(problem, trained, requests.sample, requests.candidates, keys=8)
    return asked.long["item"], asked.long_mask, asked.long_time, asked.place, asked.sequence["item"]


def test_sim_reads_the_newest_behaviours_of_each_candidates_category(problem, requests):
    item, mask, age, place, _ = _sim(problem, dcaf_rankers.make_tree(problem), requests)
    columns, samples, found = problem.behaviors.columns, problem.samples, dcaf_rankers.RANKERS["SIM"].found
    assert item.shape == (SAMPLES, 8, found)
    for row in range(0, SAMPLES, 7):
        sample = requests.sample[row]
        past = np.arange(samples.start[sample], samples.end[sample])
        for c in (0, 11, CANDIDATES - 1):
            same = past[columns["category"][past] == problem.category[requests.candidates[row, c]]][-found:]
            at = row, place[row, c]
            np.testing.assert_array_equal(item[at][mask[at]], columns["item"][same])
            np.testing.assert_array_equal(age[at][mask[at]], samples.time[sample] - columns["time"][same])
            assert not mask[at][: found - len(same)].any()
    with pytest.raises(ValueError, match="keys is 1, but request 0 has candidates of"):
        trained = dcaf_rankers.Trained(dcaf_rankers.RANKERS["SIM"], None, None, dcaf_rankers.make_tree(problem))
        dcaf_rankers.request(problem, trained, requests.sample, requests.candidates, keys=1)


def test_gains_by_hand():
    probability = np.linspace(0.1, 0.4, 12)[None]
    made = dcaf_requests.Requests(np.array([0]), np.zeros((1, 12), np.int32), np.ones((1, 12)), probability)
    best = dcaf_requests.gains(made, probability, (11, 12))
    step = 0.3 / 11
    np.testing.assert_allclose(best, [[10 * step, 20 * step]], err_msg="the lowest of 11 and the two lowest of 12 go")
    worst = dcaf_requests.gains(made, -probability, (11, 12))
    np.testing.assert_allclose(worst, 0, atol=1e-12, err_msg="the first stage's own page")
    with pytest.raises(ValueError, match="10 candidates: must be above the 10 shown and at most 12"):
        dcaf_requests.gains(made, probability, (10,))


def test_frontier_by_hand():
    costs, gain = np.array([1.0, 2.0, 3.0, 4.0, 8.0, 9.0]), np.array([1.0, 1.2, 2.4, 2.5, 3.0, 2.9])
    assert dcaf_compare.frontier(gain, costs).tolist() == [0, 2, 4]
    assert dcaf_compare.frontier(np.array([1.0, 2.0]), np.array([2.0, 1.0])).tolist() == [1]
    with pytest.raises(ValueError, match="no action gains anything"):
        dcaf_compare.frontier(np.array([-1.0, 0.0]), np.array([1.0, 2.0]))


def test_on_a_log_that_is_known_the_comparison_is_right():
    """Requests are alike but for their worth, which the estimates know or do not."""
    draw, costs = np.random.default_rng(0), np.array([1.0, 2.0, 3.0, 6.0])
    gains = draw.gamma(0.5, 2, (3000, 1)) * (1 - np.exp(-costs))
    blind = np.tile(gains.mean(axis=0), (3000, 1))
    front = dcaf_compare.frontier(gains.mean(axis=0), costs)
    base = dcaf_compare.baseline(gains.mean(axis=0), front)
    assert (front.tolist(), base) == ([0, 1, 2, 3], 2)

    def figures(estimates):
        return dcaf_compare.compare(0, estimates, (gains, estimates), costs, 2.0, front=front, base=base).figures()

    knows, guesses = figures(gains), figures(blind)
    assert knows["gain_equal_compute_estimated_pct"] == knows["gain_equal_compute_pct"] > 1
    assert knows["compute_saved_estimated_pct"] == knows["compute_saved_pct"] > 20
    np.testing.assert_allclose(knows["carried_spend_pct"], 100, atol=0.5)
    assert knows["estimate_r2"] == 1 and guesses["estimate_r2"] == 0
    assert guesses["gain_equal_compute_estimated_pct"] < 0.5
    assert knows["random_cut_pct"] < 0 and knows["uniform_cut_pct"] < 0


def test_the_exact_solver_bounds_what_dcaf_gains():
    gains, costs = dcaf_exact.random_log(150, 5, 0)
    rows = dcaf_exact.gaps({"random": (gains, costs)})
    assert len(rows) == 3
    for row in rows:
        assert 0 <= row["gap_pct"] < 1.5
        assert abs(row["bound_pct"]) < 1e-4, "the dual's value is the relaxation's"
    assert dcaf_exact.relaxation(gains, costs, 1e6) == pytest.approx(multiplier.allocate(gains, costs, 0.0).gain)


def test_the_estimator_finds_what_can_be_known():
    draw = np.random.default_rng(0)
    floats = draw.normal(size=(1200, 3)).astype(np.float32)
    fields = {name: draw.integers(1, 3, 1200).astype(np.int32) for name in ("hour", "domain")}
    expected = np.stack([floats[:, 0], 2 * floats[:, 0] - floats[:, 1]], axis=1) * 1e-3 + 0.01
    gains = expected + draw.normal(size=expected.shape) * 1e-3
    found = dcaf_value.fit((fields, floats), gains, time=np.arange(1200), domains=3, seed=0, steps=240, batch_size=64)
    assert dcaf_compare.r_squared(found((fields, floats)), expected) > 0.9


def test_traffic_scenarios():
    climb = dcaf_traffic.scenario(*dcaf_traffic.ramp(10, 12, traffic=3.0, capacity=0.5, stop=20))
    rate, capacity = climb.at(15)
    np.testing.assert_allclose((rate / climb.rate, capacity / climb.capacity), (3, 0.5))
    rates = [climb.at(t)[0] for t in (9.9, 10, 10.5, 11, 11.5, 12, 20)]
    np.testing.assert_allclose(np.divide(rates, climb.rate), 3 ** np.array([0, 0.25, 0.5, 0.75, 1, 1, 0]))
    jumpy = dcaf_traffic.scenario(Event(10, 20, traffic=3.0), seconds=30.0)
    gains, costs = np.random.default_rng(0).gamma(1, 1, (3000, 1)) * np.array([1.0, 1.5]), np.array([0.5, 1.0])
    trace = dcaf_traffic.run(gains, costs, jumpy, seed=0)
    calm = trace.time[dcaf_traffic.settled(trace, jumpy)]
    whole = np.unique(np.floor(calm)).tolist()
    assert whole == [*range(4, 10), *range(14, 20), *range(24, 30)]
    found = dcaf_traffic.outcome(trace, jumpy, gains, costs)
    assert found.failure == 0 and found.swing < 0.25 and 0.7 < found.utilization < 0.9
    assert 0.8 < found.gain_of_best < 1.02
    wide = np.array([0.1, 100.0])
    with pytest.raises(ValueError, match="fewer than two of the actions' costs"):
        dcaf_traffic.control(wide, jumpy)


def test_a_quick_run_leaves_a_result_and_a_report(tmp_path, monkeypatch):
    measure, measured = dcaf_costs.measure, []

    def steady(*args, **options):
        """The costs are measured, and others taken: those of a busy machine may be any."""
        measured.append(measure(*args, **options))
        return dcaf_costs.Costs(*np.outer([1.0, 0.9, 1.1], [1e-3, 2e-3]))

    monkeypatch.setattr(dcaf_costs, "measure", steady)
    outcome = run(DcafReplay(out=tmp_path, quick=True))
    assert all((each.seconds > 0).all() and (each.low <= each.high).all() for each in measured) and len(measured) == 1
    assert results.read(tmp_path / "result.json") == outcome
    named = ("multiplier_1m_s", "dual_gap_pct", "gain_equal_compute_pct", "compute_saved_pct", "surge_failure_pct")
    for name in (
        *named,
        "gain_equal_compute_estimated_pct",
        "gain_equal_compute_pct_low",
        "uniform_cut_pct",
        "compute_saved_pct_lean",
    ):
        assert np.isfinite(outcome.figures[name]), name
    assert outcome.figures["gain_equal_compute_pct"] > 0 and outcome.figures["compute_saved_pct"] > 0
    cost = [row for row in outcome.rows if row["kind"] == "cost"]
    assert [row["ms, one request"] for row in cost] == [1, 2]
    page = (tmp_path / "report.html").read_text()
    for heading in ("Gain against compute", "Costs of actions", "What the controller does", "49 % less compute"):
        assert heading in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rankers": ("DNN", "DIM")}, "rankers names 'DIM'; there are DNN, DIN, DIEN, SIM"),
        ({"rankers": ()}, "name at least one"),
        ({"counts": (10, 20)}, r"counts is \(10, 20\); numbers above the 10 shown, rising"),
        ({"scenarios": ("storm",)}, "scenarios names 'storm'"),
        ({"seeds": 1}, "seeds is 1, must be at least 2"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        DcafReplay(**change)


def test_costs_stand_in_the_order_of_the_gains(problem, requests, monkeypatch):
    """Rankers first, then numbers of candidates; calls are timed on requests of the size asked for."""
    seen = []
    monkeypatch.setattr(dcaf_costs, "_compile", lambda p, ranker, n, r, batch: ((ranker, n, batch), []))
    monkeypatch.setattr(
        dcaf_costs, "time_calls", lambda made, sets, calls: seen.append(made) or made[0] + made[1] / 1e3
    )
    found = dcaf_costs.measure(problem, {"a": 1.0, "b": 2.0}, requests, (20, 30), batch=4, rounds=3)
    np.testing.assert_allclose(found.seconds, np.array([1.02, 1.03, 2.02, 2.03]) / 4)
    assert (found.low <= found.seconds).all() and (found.seconds <= found.high).all()
    assert seen[:4] == [(1.0, 20, 4), (1.0, 30, 4), (2.0, 20, 4), (2.0, 30, 4)] and len(seen) == 4 * (1 + 3)

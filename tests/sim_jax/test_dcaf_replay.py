import dataclasses

import numpy as np
import pytest

from sim_jax.dcaf import multiplier, policy, replay

GAINS = np.array([[4.0, 5.0], [1.0, 4.0], [1.0, 1.5], [3.0, 4.0]])
COSTS = np.array([1.0, 2.0])


def random_log(requests=2000, seed=0):
    draw = np.random.default_rng(seed)
    costs = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    worth, rate = draw.gamma(0.7, 1.4, (requests, 1)), draw.uniform(0.05, 0.5, (requests, 1))
    return worth * (1 - np.exp(-rate * costs)) * draw.uniform(0.9, 1.1, (requests, 5)), costs


def test_by_hand():
    """All get action 0: 4 for 9. The same compute buys 11, and 9 can be had for 3."""
    got = replay.replay(GAINS, COSTS, 0)
    assert (got.baseline.spend, got.baseline.gain) == (4, 9)
    assert (got.equal_compute.spend, got.equal_compute.gain) == (4, 11)  # 4, 4, none, 3
    assert got.equal_compute.counts == (2, 1) and got.equal_compute.skipped == 1
    np.testing.assert_allclose(got.gain_equal_compute_pct, 100 * 2 / 9)
    assert got.equal_gain.gain >= 9 and got.equal_gain.spend == 4  # at 1.5 and below; above it 8 for 3
    assert got.compute_saved_pct == 0 and got.uniform_cut_pct == 0


def test_more_gain_at_the_same_compute_less_compute_at_the_same_gain():
    gains, costs = random_log()
    got = replay.replay(gains, costs, 2)
    assert got.equal_compute.spend <= got.baseline.spend and got.equal_compute.left >= 0
    assert got.equal_gain.gain >= got.baseline.gain
    assert got.gain_equal_compute_pct > 3 and got.compute_saved_pct > 20
    for cut in (got.uniform_cut, got.random_cut):
        assert 0 <= got.equal_gain.spend - cut.spend <= costs.max()
    assert got.random_cut_pct < got.uniform_cut_pct < 0


def test_nothing_within_a_budget_beats_the_multiplier():
    gains, costs = random_log(500)
    for budget in (300.0, 1500.0, 4000.0):
        best = multiplier.solve(gains, costs, budget)
        for cut in (
            replay.uniform_cut(gains, costs, budget),
            replay.random_cut(gains, costs, 4, budget),
            *(replay.constant(gains, costs, j) for j in range(5) if 500 * costs[j] <= budget),
        ):
            assert cut.spend <= budget * (1 + 1e-9)
            assert cut.gain < best.bound
            assert cut.gain < best.gain


def test_estimates_cost_some_of_it():
    gains, costs = random_log()
    estimates = gains * np.random.default_rng(1).lognormal(0, 1.0, gains.shape)
    known, guessed = replay.replay(gains, costs, 2), replay.replay(gains, costs, 2, estimates=estimates)
    assert guessed.baseline == known.baseline
    assert guessed.gain_equal_compute_pct < known.gain_equal_compute_pct
    assert guessed.compute_saved_pct < known.compute_saved_pct
    # In the unit of gains that they estimate: another scale of them is another multiplier and the same choice.
    doubled = replay.replay(gains, costs, 2, estimates=2 * estimates)
    np.testing.assert_allclose(doubled.gain_equal_compute_pct, guessed.gain_equal_compute_pct, rtol=1e-6)


def test_estimates_that_cannot_reach_the_baseline():
    got = replay.replay(GAINS, COSTS, 1, estimates=-GAINS)
    assert (got.equal_compute.skipped, got.gain_equal_compute_pct) == (4, -100)
    assert got.equal_gain is None and got.compute_saved_pct is None
    assert got.uniform_cut_pct is None and got.random_cut_pct is None


def test_uniform_cut_by_hand():
    gains, costs = np.tile([[5.0, 1.0, 2.0]], (10, 1)), np.array([3.0, 1.0, 2.0])
    for budget, counts, skipped in (
        (30.0, (10, 0, 0), 0),
        (25.0, (5, 0, 5), 0),
        (24.5, (4, 0, 6), 0),
        (20.0, (0, 0, 10), 0),
        (7.0, (0, 7, 0), 3),
        (0.0, (0, 0, 0), 10),
        (99.0, (10, 0, 0), 0),
    ):
        cut = replay.uniform_cut(gains, costs, budget)
        assert (cut.counts, cut.skipped) == (counts, skipped), budget
        assert cut.left == budget - cut.spend
    assert replay.uniform_cut(np.ones((3, 1)), np.array([0.1]), 0.3).counts == (3,), "three tenths, whatever 3 * .1 is"
    assert replay.random_cut(np.ones((3, 1)), np.array([0.1]), 0, 0.3).counts == (3,)


def test_random_cut_looks_at_no_gain():
    gains, costs = random_log(500)
    cut = replay.random_cut(gains, costs, 3, 1500.0, seed=3)
    other = replay.random_cut(np.roll(gains, 7, axis=0), costs, 3, 1500.0, seed=3)
    assert cut == replay.random_cut(gains, costs, 3, 1500.0, seed=3)
    assert dataclasses.replace(other, gain=0.0) == dataclasses.replace(cut, gain=0.0)
    assert cut.counts != replay.random_cut(gains, costs, 3, 1500.0, seed=4).counts
    assert cut.counts[4] == 0, "nobody gets more than before"
    assert 0 <= cut.left <= costs[3]


def test_random_cut_at_the_ends():
    gains, costs = np.arange(30.0).reshape(10, 3) + 1, np.array([2.0, 1.0, 2.0])
    assert replay.random_cut(gains, costs, 2, 20.0) == replay.constant(gains, costs, 2), "nothing to cut"
    assert replay.random_cut(gains, costs, 2, 0.0).skipped == 10
    assert replay.random_cut(gains, costs, 2, 10.0).counts[0] == 0, "the baseline and not an action of its cost"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: replay.replay(GAINS, COSTS, 2), "action is 2, must be in 0 to 1"),
        (lambda: replay.replay(-GAINS, COSTS, 0), r"action 0 spends 4.0 and gains -9.0"),
        (lambda: replay.replay(GAINS, COSTS * [0, 1], 0), r"action 0 spends 0.0"),
        (lambda: replay.replay(GAINS * np.nan, COSTS, 0), "gains: nan at row 0"),
        (lambda: replay.replay(GAINS, COSTS, 0, estimates=GAINS * np.nan), "estimates: nan at row 0"),
        (lambda: replay.random_cut(GAINS, COSTS, policy.SKIP, 1.0), "baseline is -1, must be one of the actions"),
        (lambda: replay.random_cut(GAINS, COSTS * [0, 1], 0, 1.0), "that cost something"),
        (lambda: replay.uniform_cut(GAINS, COSTS, -1.0), "budget is -1.0"),
        (lambda: replay.uniform_cut(GAINS, COSTS, np.nan), "budget is nan"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

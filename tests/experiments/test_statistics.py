"""Intervals: equal to plain computation, covering what they claim, and refusing what has no answer."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import statistics
from experiments.statistics import (
    Interval,
    across_seeds,
    auc_difference,
    auc_interval,
    mean_auc_difference,
    mean_difference,
    mean_interval,
)


def pair_auc(labels, scores):
    """Every positive against every negative: a tie counts half."""
    gap = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    return ((gap > 0) + 0.5 * (gap == 0)).mean()


def problem(rng, users=60, samples=900, seeds=3):
    user = rng.integers(0, users, samples)
    taste = rng.normal(size=users)[user]
    labels = (rng.random(samples) < 1 / (1 + np.exp(-taste))).astype(int)
    scores = taste + rng.normal(size=(seeds, samples))
    return labels, scores, user


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_auc_is_that_of_all_pairs_with_ties(seed, levels):
    rng = np.random.default_rng(seed)
    labels = np.array([0, 1, *rng.integers(0, 2, 30)])
    scores = rng.integers(0, levels, (2, 32)).astype(float)
    found = auc_interval(labels, scores, np.arange(32), resamples=20)
    np.testing.assert_allclose(found.per_seed, [pair_auc(labels, row) for row in scores], rtol=1e-12)
    assert found.mean == pytest.approx(np.mean(found.per_seed))


def test_auc_under_user_weights_is_auc_of_repeated_users():
    """The fast path against samples written out as often as their user was drawn."""
    rng = np.random.default_rng(0)
    labels, scores, user = problem(rng, users=20, samples=200, seeds=1)
    scores = np.round(scores[0], 1)  # ties
    weights = rng.integers(0, 4, 20).astype(np.int32)
    repeated = np.repeat(np.arange(200), weights[user])
    ranks = statistics._Ranks.of(scores, labels == 1, user)
    assert ranks.auc(weights) == pytest.approx(pair_auc(labels[repeated], scores[repeated]), rel=1e-12)


def test_mean_over_pairs_is_the_mean_of_their_differences_under_the_same_draws():
    labels, scores, user = problem(np.random.default_rng(2), seeds=1)
    other, third = (np.random.default_rng(i).normal(size=scores.shape) + scores for i in (3, 4))
    pairs = [(scores, other), (third, scores), (other, third)]
    alone = [auc_difference(labels, a, b, user, resamples=40) for a, b in pairs]
    found = mean_auc_difference(labels, pairs[:2], user, resamples=40)
    assert found.mean == pytest.approx((alone[0].mean + alone[1].mean) / 2) and found.seeds == 1
    assert found.high - found.low < (alone[0].high - alone[0].low + alone[1].high - alone[1].low) / 2
    around = mean_auc_difference(labels, pairs, user, resamples=40)  # b - a, a - c, c - b: nothing is left of it
    np.testing.assert_allclose([around.mean, around.low, around.high], 0, atol=1e-12)


def test_bootstrap_equals_a_plain_loop_over_users():
    """One seed: the percentiles of differences computed by resampling rows, with the same draws."""
    rng = np.random.default_rng(1)
    labels, scores, user = problem(rng, users=15, samples=120, seeds=1)
    other = scores + rng.normal(size=scores.shape)
    found = auc_difference(labels, scores, other, user, resamples=50, seed=7)
    draws, generator = [], np.random.default_rng(7)
    while len(draws) < 50:
        drawn = generator.integers(0, 15, 15)
        rows = np.concatenate([np.flatnonzero(user == u) for u in drawn])
        draws.append(pair_auc(labels[rows], other[0, rows]) - pair_auc(labels[rows], scores[0, rows]))
    np.testing.assert_allclose([found.low, found.high], np.quantile(draws, [0.025, 0.975]), rtol=1e-9)
    assert (found.users, found.seeds, found.samples, found.resamples) == (15, 1, 120, 50)


def test_a_system_against_itself_differs_by_nothing():
    labels, scores, user = problem(np.random.default_rng(2))
    found = auc_difference(labels, scores, scores.copy(), user, resamples=50)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0) and found.contains_zero


def test_swapping_the_systems_turns_the_sign():
    labels, scores, user = problem(np.random.default_rng(3))
    better = scores + 0.5 * labels
    forth = auc_difference(labels, scores, better, user, resamples=100)
    back = auc_difference(labels, better, scores, user, resamples=100)
    assert (back.mean, back.low, back.high) == pytest.approx((-forth.mean, -forth.high, -forth.low))
    assert forth.low > 0 and not forth.contains_zero and "contains zero" not in forth.describe()


def test_the_pair_makes_the_interval_narrow():
    """What makes a draw of users easy cancels: the difference is known far better than either system."""
    labels, scores, user = problem(np.random.default_rng(4))
    near = scores + 0.05 * np.random.default_rng(5).normal(size=scores.shape)
    alone = auc_interval(labels, scores, user, resamples=200)
    paired = auc_difference(labels, scores, near, user, resamples=200)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


def test_the_interval_covers_as_often_as_it_says():
    """200 repetitions in which seeds and users both vary, true mean 0: a 90 % interval misses about 20 times."""
    rng = np.random.default_rng(6)
    missed = 0
    for repetition in range(200):
        of_user, of_seed = rng.normal(size=40), 0.2 * rng.normal(size=(8, 1))
        values = np.repeat(of_user, 3) + of_seed
        found = mean_interval(values, np.repeat(np.arange(40), 3), resamples=200, seed=repetition, level=0.9)
        missed += not found.contains_zero
    assert 8 <= missed <= 40, missed


def test_users_are_drawn_whole():
    """A thousand copies of a user's sample are no more evidence than one."""
    values = np.random.default_rng(7).normal(size=(1, 30))
    one = mean_interval(values, np.arange(30), resamples=200)
    copies = mean_interval(np.repeat(values, 100, axis=1), np.repeat(np.arange(30), 100), resamples=200)
    assert (copies.low, copies.high) == pytest.approx((one.low, one.high))


def test_seed_spread_widens_the_interval():
    rng = np.random.default_rng(8)
    base = rng.normal(size=(1, 400))
    apart = base + np.array([[-1.0], [0.0], [1.0]])
    same = mean_interval(np.repeat(base, 3, axis=0), np.arange(400), resamples=500)
    wide = mean_interval(apart, np.arange(400), resamples=500)
    assert wide.mean == pytest.approx(same.mean)
    # one draw in 13.5 takes seed 1 (or -1) three times: +-1, and +-sqrt(3 / 2) after the correction for 3 seeds
    assert 2.3 < wide.high - wide.low < 2.9 and same.high - same.low < 0.3
    np.testing.assert_allclose(np.diff(wide.per_seed), 1.0)


def test_weights_are_repetitions_and_zero_leaves_out():
    rng = np.random.default_rng(9)
    values, user = rng.normal(size=(2, 40)), rng.integers(0, 8, 40)
    weights = rng.integers(0, 3, 40)
    times = np.repeat(np.arange(40), weights)
    weighted = mean_interval(values, user, weights=weights, resamples=100)
    repeated = mean_interval(values[:, times], user[times], resamples=100)
    assert (weighted.mean, weighted.low, weighted.high) == pytest.approx((repeated.mean, repeated.low, repeated.high))
    difference = mean_difference(values, values + 1.0, user, weights=weights, resamples=100)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((1.0, 1.0, 1.0))


def test_the_same_seed_gives_the_same_interval():
    labels, scores, user = problem(np.random.default_rng(10))
    first, again, other = (auc_interval(labels, scores, user, resamples=60, seed=s) for s in (1, 1, 2))
    assert first == again and (first.low, first.high) != (other.low, other.high)


def test_across_seeds_is_the_t_interval():
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), t(2, .975) = 4.302653."""
    found = across_seeds(np.array([1.0, 2.0, 3.0]))
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert found.contains_zero and found.per_seed == (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="2 seeds or more"):
        across_seeds(np.array([1.0]))


def test_an_interval_tells_itself():
    across = Interval(0.01, -0.002, 0.022, 0.95, "by hand", (0.0, 0.02), users=5, seeds=2)
    assert across.contains_zero and across.describe().endswith("; the interval contains zero")
    assert "+0.0100 [-0.0020, +0.0220], 95 % interval (by hand)" in across.describe()
    assert across.row()["seed_1"] == 0.02 and across.row()["contains_zero"] is True
    assert Interval(0.0, 0.0, 1.0, 0.95, "touching").contains_zero
    with pytest.raises(ValueError, match="not finite, or low above high"):
        Interval(0.5, 0.6, 0.4, 0.95, "turned")


LABELS, USERS = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
SCORES = np.zeros((2, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc_difference(LABELS, SCORES, SCORES[:1], USERS), r"scores_a is \(2, 4\) and scores_b \(1, 4\)"),
        (lambda: mean_auc_difference(LABELS, [(SCORES, SCORES[:1])], USERS), r"are \[\(1, 4\), \(2, 4\)\]; all need"),
        (lambda: mean_auc_difference(LABELS, [], USERS), r"the systems' scores are \[\]"),
        (lambda: auc_interval(np.ones(4), SCORES, USERS), "AUC needs both classes"),
        (lambda: auc_interval(LABELS * 2, SCORES, USERS), "each 0 or 1"),
        (lambda: auc_interval(LABELS, np.full((1, 4), np.nan), USERS), r"scores\[0, 0\] is nan"),
        (lambda: auc_interval(LABELS, SCORES, USERS[:3]), "one user id for each of 4 samples"),
        (lambda: auc_interval(LABELS, SCORES, np.zeros(4, int)), "1 users; a bootstrap over users needs"),
        (lambda: auc_interval(LABELS, SCORES, USERS, resamples=3), "resamples is 3"),
        (lambda: auc_interval(LABELS, SCORES, USERS, level=95), "level is 95"),
        (lambda: mean_interval(SCORES, USERS, weights=np.zeros(4)), "all weights are 0"),
        (lambda: mean_interval(SCORES, USERS, weights=np.array([1, 1, -1, 1])), "none below 0"),
        (lambda: mean_interval(np.zeros((0, 4)), USERS), r"shape \(0, 4\)"),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_draws_of_one_class_are_drawn_again():
    """Three users, one of them with every positive: many draws miss it, the interval is finite all the same."""
    labels, user = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 2])
    user[0] = 2
    found = auc_interval(labels, np.array([[0.9, 0.1, 0.2, 0.3, 0.5, 0.25]]), user, resamples=100)
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_intervals_made_in_processes_of_their_own_are_those_made_in_turn():
    rng = np.random.default_rng(5)
    labels, scores, user = problem(rng, users=10, samples=60, seeds=2)
    jobs = {i: partial(auc_interval, labels, scores + i, user, resamples=20, seed=i) for i in range(4)}
    in_turn = {i: job() for i, job in jobs.items()}
    assert statistics.together(jobs, worth=0.0) == in_turn == statistics.together(jobs)
    assert len({found.low for found in in_turn.values()}) > 1
    broken = jobs | {3: partial(auc_interval, labels, scores[:, 1:], user)}
    with pytest.raises(ValueError, match="expected one user id for each"):
        statistics.together(broken, worth=0.0)

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, sparse

from sim_jax.dcaf import multiplier, policy

J, N = 4, 6
GAINS = np.array([[4.0, 6.0], [3.0, 3.5], [1.0, 5.0]])  # slopes 4, 2 and 3, .5; the third goes straight to 2.5
COSTS = np.array([1.0, 2.0])


def random_log(requests, actions, seed=0):
    """Gains that rise with cost, at rates of the request's own, and are rough."""
    draw = np.random.default_rng(seed)
    costs = np.linspace(1, 20, actions)
    worth, rate = draw.gamma(0.7, 1.4, (requests, 1)), draw.uniform(0.05, 0.5, (requests, 1))
    return worth * (1 - np.exp(-rate * costs)) * draw.uniform(0.8, 1.2, (requests, actions)), costs


def before(value):
    return float(np.nextafter(np.float32(value), np.float32(0)))


@pytest.mark.portable
@pytest.mark.parametrize(
    ("budget", "price", "spend", "gain", "counts"),
    [
        (6.0, 0.0, 6, 14.5, (0, 3)),  # everybody's best
        (5.0, 0.5, 5, 14, (1, 2)),  # the second saves 1 for .5
        (4.5, 2.0, 4, 12, (2, 1)),  # the next to give way is the first, at 2; .5 is left
        (4.0, 2.0, 4, 12, (2, 1)),
        (3.0, 2.5, 2, 7, (2, 0)),  # the third gives back all of its 2 at 2.5, a jump over 3
        (1.0, 3.0, 1, 4, (1, 0)),
        (0.0, 4.0, 0, 0, (0, 0)),
    ],
)
def test_by_hand(budget, price, spend, gain, counts):
    found = multiplier.solve(GAINS, COSTS, budget)
    np.testing.assert_allclose(found.multiplier, price, rtol=1e-6)
    assert (found.spend, found.gain, found.counts) == (spend, gain, counts)
    assert found.skipped == 3 - sum(counts) and found.left == budget - spend
    np.testing.assert_allclose(found.bound, gain + price * (budget - spend), rtol=1e-6)


gains_of_any_shape = st.lists(st.lists(st.integers(-500, 500), min_size=J, max_size=J), min_size=N, max_size=N)
costs_of_any_order = st.lists(st.integers(0, 32), min_size=J, max_size=J)


@given(gains_of_any_shape, costs_of_any_order, st.lists(st.integers(0, 16_000), min_size=2, max_size=8))
def test_spend_and_gain_do_not_rise_with_the_multiplier(gains, costs, prices):
    """Whatever Q is: not increasing in cost, negative, of equal costs. In numbers whose arithmetic is exact."""
    path = [multiplier.allocate(np.array(gains), np.array(costs), price / 32) for price in sorted(prices)]
    for cheap, dear in itertools.pairwise(path):
        assert dear.spend <= cheap.spend
        assert dear.gain <= cheap.gain


@given(gains_of_any_shape, costs_of_any_order, st.integers(0, 6 * 32))
def test_the_smallest_multiplier_that_fits(gains, costs, budget):
    gains, costs = np.array(gains), np.array(costs)
    found = multiplier.solve(gains, costs, budget)
    assert found.spend <= budget and found.left == budget - found.spend
    assert found.multiplier == 0 or multiplier.allocate(gains, costs, before(found.multiplier)).spend > budget
    assert found.spend + found.left == budget
    assert sum(found.counts) + found.skipped == N
    assert found.gain <= found.bound


@given(gains_of_any_shape, costs_of_any_order, st.integers(0, 3000))
def test_the_least_compute_for_a_gain(gains, costs, target):
    gains, costs = np.array(gains), np.array(costs)
    found = multiplier.solve_gain(gains, costs, target)
    best = np.maximum(gains.max(axis=1), 0).sum()
    if target > best:
        assert found is None
        return
    assert found.gain >= target
    dearer = multiplier.solve(gains, costs, found.spend)
    assert dearer.gain >= target, "the same spend buys the gain"
    if found.spend:
        cheaper = multiplier.solve(gains, costs, found.spend * (1 - 1e-6))
        assert cheaper.gain < target, "a lower budget does not"


def test_no_allocation_beats_the_bound():
    """All 5^4 allocations of a small log."""
    gains, costs = random_log(4, 4)
    options = list(itertools.product(range(-1, 4), repeat=4))
    spends = np.array([sum(costs[j] for j in option if j >= 0) for option in options])
    totals = np.array([sum(gains[i, j] for i, j in enumerate(option) if j >= 0) for option in options])
    for budget in (0.0, 5.0, 13.0, 31.0, 50.0, 90.0):
        found = multiplier.solve(gains, costs, budget)
        assert found.gain <= totals[spends <= budget].max() * (1 + 1e-6) + 1e-9
        assert totals[spends <= budget].max() <= found.bound * (1 + 1e-6)


def relaxation(gains, costs, budget):
    """The optimum with requests split into fractions, by HiGHS."""
    requests, actions = gains.shape
    one_each = sparse.kron(sparse.eye(requests), np.ones(actions))
    rows = sparse.vstack([one_each, np.tile(costs, requests)[None]], format="csr")
    limits = np.append(np.ones(requests), budget)
    done = optimize.linprog(-gains.ravel(), A_ub=rows, b_ub=limits, bounds=(0, 1), method="highs")
    assert done.success
    return -done.fun


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_gap_to_an_exact_solver(share):
    gains, costs = random_log(2000, 6)
    budget = share * len(gains) * costs.mean()
    exact, found = relaxation(gains, costs, budget), multiplier.solve(gains, costs, budget)
    assert exact * (1 - 1e-3) <= found.gain <= exact * (1 + 1e-6)
    np.testing.assert_allclose(found.bound, exact, rtol=1e-5, err_msg="the dual's value is the relaxation's")


def test_a_jump_leaves_budget_and_says_so():
    gains, costs = np.tile([[1.0, 1.5]], (10, 1)), np.array([1.0, 2.0])
    found = multiplier.solve(gains, costs, 17.0)
    assert (found.spend, found.left, found.counts) == (10, 7, (10, 0))
    assert multiplier.allocate(gains, costs, before(found.multiplier)).spend == 20
    none = multiplier.solve(gains, costs, 9.0)
    assert (none.spend, none.left, none.skipped) == (0, 9, 10)


def test_a_sum_of_costs_fits_into_itself():
    assert 3 * 0.1 > 0.3
    assert multiplier.solve(np.ones((3, 1)), np.array([0.1]), 0.3).multiplier == 0


def test_costs_and_gains_of_any_unit():
    gains, costs = random_log(300, 5)
    budget = 300 * 6.0
    plain = multiplier.solve(gains, costs, budget)
    for g, c in ((1e-12, 1e9), (1e12, 1e-9)):
        scaled = multiplier.solve(gains * g, costs * c, budget * c)
        np.testing.assert_allclose(scaled.multiplier, plain.multiplier * g / c, rtol=1e-4)
        np.testing.assert_allclose(scaled.gain, plain.gain * g, rtol=1e-4)


def test_limits_hold_for_the_log():
    gains, costs = random_log(200, 5)
    found = multiplier.solve(gains, costs, 200 * 8.0, floor=2.0, cap=12.0)
    assert found.skipped == 0 and found.counts[0] == 0 and found.counts[3:] == (0, 0)
    assert found.spend <= 1600
    assert multiplier.least_spend(costs, 200, floor=2.0) == 200 * costs[1]
    assert multiplier.least_spend(costs, 200, floor=30.0, cap=12.0) == 200 * costs[2]
    assert multiplier.least_spend(costs, 200) == 0


def test_a_choice_by_estimates_is_accounted_in_outcomes():
    outcomes, costs = random_log(500, 5)
    estimates = outcomes * np.random.default_rng(1).uniform(0.5, 1.5, outcomes.shape)
    known = multiplier.solve(outcomes, costs, 3000.0)
    guessed = multiplier.solve(estimates, costs, 3000.0, outcomes=outcomes)
    blind = multiplier.solve(estimates, costs, 3000.0)
    assert (guessed.spend, guessed.counts, guessed.multiplier) == (blind.spend, blind.counts, blind.multiplier)
    assert guessed.gain < known.gain
    kept = multiplier.solve_gain(estimates, costs, guessed.gain * 0.9, outcomes=outcomes)
    assert kept.gain >= guessed.gain * 0.9 and kept.spend < guessed.spend
    assert multiplier.solve_gain(estimates, costs, outcomes.max(axis=1).sum() * 1.01, outcomes=outcomes) is None


def test_log_on_the_device_and_on_the_host_agree():
    gains, costs = random_log(100, 4)
    assert multiplier.solve(gains, costs, 500.0) == multiplier.solve(jnp.asarray(gains, jnp.float32), costs, 500.0)


def test_account_by_hand():
    found = multiplier.account(np.array([1, policy.SKIP, 0]), GAINS, COSTS, budget=4.0)
    assert found == multiplier.Allocation(3.0, 7.0, (1, 1), 1, None, 1.0)
    with pytest.raises(ValueError, match="no multiplier; take it from solve"):
        _ = found.bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gains": np.array([[1.0, 2.0], [np.nan, 1.0]])}, r"gains: nan at row 1, position 0 \(1 such of 4\)"),
        ({"gains": np.array([[1.0, np.inf]])}, "gains: inf at row 0, position 1"),
        ({"gains": np.ones((2, 3))}, r"gains has shape \(2, 3\), must be \[N, 2\]"),
        ({"gains": np.ones((0, 2))}, "N at least 1"),
        ({"costs": np.array([1.0, -2.0])}, r"costs\[1\] is -2.0, must be at least 0"),
        ({"costs": np.array([1.0, np.nan])}, "costs: nan at row 1"),
        ({"costs": np.ones((1, 2))}, r"costs has shape \(1, 2\)"),
        ({"budget": np.nan}, "budget is nan"),
        ({"budget": -1.0}, "budget is -1.0, must be finite and at least 0"),
        ({"floor": 1.0, "budget": 2.0}, r"budget is 2.0, but 3 requests under floor=1.0 spend at least 3.0; raise"),
        ({"floor": 2.0, "cap": 1.0}, "floor is 2.0 and cap is 1.0"),
        ({"cap": np.nan}, "cap is nan"),
        ({"outcomes": np.ones((2, 2))}, r"outcomes has shape \(2, 2\), must be that of gains, \(3, 2\)"),
        ({"outcomes": GAINS * np.nan}, "outcomes: nan at row 0"),
        ({"gains": GAINS * 1e37, "costs": COSTS * 1e-3, "budget": 0.0}, "no float32 multiplier.*rescale"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"gains": GAINS, "costs": COSTS, "budget": 3.0} | change
    with pytest.raises(ValueError, match=message):
        multiplier.solve(**arguments)


def test_wrong_multiplier_target_and_actions_are_named():
    with pytest.raises(ValueError, match=r"multiplier is -1.0.*take it from solve"):
        multiplier.allocate(GAINS, COSTS, -1.0)
    with pytest.raises(ValueError, match="target is nan"):
        multiplier.solve_gain(GAINS, COSTS, np.nan)
    with pytest.raises(ValueError, match="action is 2 at request 1, must be -1 to 1"):
        multiplier.account(np.array([0, 2, 0]), GAINS, COSTS)
    with pytest.raises(ValueError, match=r"must be \[N\], \[N, J\], \[J\]"):
        multiplier.account(np.array([0, 1]), GAINS, COSTS)

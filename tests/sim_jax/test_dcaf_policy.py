import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim_jax.dcaf import policy

choose = jax.jit(policy.choose)
J, N = 4, 6


def oracle(gains, costs, price, floor, cap):
    """One request in words: what may be taken, then the best value, then the cheaper, then the first."""
    floor = min(floor, max((c for c in costs if c <= cap), default=0))
    options = [(g - price * c, -c, -j, j) for j, (g, c) in enumerate(zip(gains, costs)) if floor <= c <= cap]
    if floor <= 0:
        options.append((0, 0, 1, policy.SKIP))
    return max(options)[-1]


@pytest.mark.portable
@pytest.mark.parametrize(
    ("price", "expected"),
    [
        (0.0, [2, 2, policy.SKIP]),  # everybody's best
        (0.25, [2, 1, policy.SKIP]),  # second: 2.75, 3.0, 2.75
        (0.5, [1, 0, policy.SKIP]),  # first: .5, 2, 2, second: 2.5, 2.5, 1.75, ties to the cheaper
        (1.5, [policy.SKIP, 0, policy.SKIP]),  # first: -.5, 0, -2, no action is worth more than none
        (3.0, [policy.SKIP] * 3),
    ],
)
def test_choice_by_hand(price, expected):
    gains = [[1.0, 3.0, 4.0], [3.0, 3.5, 3.75], [-1.0, -0.5, 0.0]]
    np.testing.assert_array_equal(choose(np.array(gains), np.array([1.0, 2.0, 4.0]), price), expected)


grid = st.integers(-64, 64)


@given(
    st.lists(st.lists(grid, min_size=J, max_size=J), min_size=N, max_size=N),
    st.lists(st.integers(0, 8), min_size=J, max_size=J),
    st.integers(0, 80),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=N, max_size=N),
)
def test_choice_is_that_of_each_request_alone(gains, costs, price, limits):
    """Any gains, equal costs and free actions included; numbers whose arithmetic is exact, so that ties are ties."""
    floor, cap = np.array(limits, np.float32).T
    got = choose(np.array(gains, np.float32), np.array(costs, np.float32), price / 8, floor=floor, cap=cap)
    expected = [oracle(g, costs, price / 8, *limit) for g, limit in zip(gains, limits)]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.portable
def test_limits():
    gains, costs = np.array([[-1.0, -5.0, -2.0], [1.0, 2.0, 9.0]]), np.array([1.0, 2.0, 4.0])

    def at(floor, cap):
        return choose(gains, costs, 0.0, floor=floor, cap=cap).tolist()

    assert at(0.0, np.inf) == [policy.SKIP, 2]
    assert at(0.5, np.inf) == [0, 2], "a floor forbids to skip"
    assert at(1.5, 3.0) == [1, 1]
    assert at(2.5, 3.5) == [1, 1], "no action between the limits: the dearest that the cap allows"
    assert at(2.0, 1.0) == [0, 0], "the cap wins"
    assert at(2.0, 0.5) == [policy.SKIP, policy.SKIP]
    assert choose(gains, costs, 3e38, floor=1.0, cap=np.inf).tolist() == [0, 0], "values beyond float32 still compare"


def test_a_gain_that_is_nan_is_not_chosen():
    gains = np.array([[1.0, np.nan, 2.0], [np.nan, np.nan, np.nan]])
    costs = np.array([1.0, 2.0, 4.0])
    assert choose(gains, costs, 0.0).tolist() == [2, policy.SKIP]
    assert choose(gains, costs, 0.75).tolist() == [0, policy.SKIP]
    assert choose(gains, costs, 0.0, floor=2.0).tolist() == [2, policy.SKIP]


def test_actions_leading_is_the_same_choice():
    draw = np.random.default_rng(0)
    gains, costs = draw.normal(size=(50, 3)).astype(np.float32), np.array([2.0, 1.0, 3.0])
    np.testing.assert_array_equal(policy.choose_by_action(jnp.asarray(gains.T), costs, 0.2), choose(gains, costs, 0.2))
    with pytest.raises(ValueError, match=r"gains of \(50, 3\).*costs of \(2,\)"):
        policy.choose(gains, costs[:2], 0.2)


@pytest.mark.portable
def test_taken():
    action = jnp.array([1, policy.SKIP, 0])
    np.testing.assert_array_equal(policy.taken(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), action), [2, 0, 5])
    np.testing.assert_array_equal(policy.taken(np.array([7.0, 8.0]), action), [8, 0, 7])


@pytest.mark.portable
@pytest.mark.parametrize("limit", [0.0, 0.25, 1.0, 2.5, 4.0, 6.9, 8.0])
def test_dithered_limits_are_costs_with_the_mean_asked_for(limit):
    costs, uniform = np.array([4.0, 1.0, 8.0]), (np.arange(1000, dtype=np.float32) + 0.5) / 1000
    got = np.asarray(policy.dither(limit, costs, uniform))
    assert set(got.tolist()) <= {0.0, 1.0, 4.0, 8.0}
    np.testing.assert_allclose(got.mean(), limit, atol=0.01)
    assert (np.asarray(policy.dither(limit / 2, costs, uniform)) <= got).all(), "the same draws keep the order"


def test_a_limit_above_every_cost_is_the_dearest():
    np.testing.assert_array_equal(policy.dither(np.inf, np.array([1.0, 2.0]), np.array([0.0, 0.99])), [2, 2])

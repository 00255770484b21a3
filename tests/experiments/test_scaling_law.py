"""Scaling laws: known coefficients come back, intervals are those of the textbook, too little data is refused."""

import numpy as np
import pytest
from scipy import stats

from experiments.scaling_law import fit, fit_joint, fit_power, fit_sweep

SIZES = np.array([1e5, 4e5, 2e6, 1e7])
LENGTHS = np.array([64.0, 128.0, 256.0])


def grid(noise=0.0, seed=0):
    """LUM's published slopes on a grid of 4 sizes x 3 lengths."""
    p, n = (a.ravel() for a in np.meshgrid(SIZES, LENGTHS, indexing="ij"))
    y = 0.0068 * np.log(p) + 0.0147 * np.log(n) + 0.05
    return p, n, y + noise * np.random.default_rng(seed).normal(size=y.shape)


@pytest.mark.parametrize("method", ["t", "bootstrap"])
def test_exact_points_give_the_law_back(method):
    law = fit(SIZES, 0.0068 * np.log(SIZES) + 0.1741, method=method, resamples=50)
    assert law.slope.value == pytest.approx(0.0068) and law.intercept.value == pytest.approx(0.1741)
    assert law.r_squared == pytest.approx(1.0) and law.slope.high - law.slope.low < 1e-9
    assert not law.slope.contains_zero and law.method == method and law.points == 4
    np.testing.assert_allclose(law.predict([1e9, 7e9]).mean, 0.0068 * np.log([1e9, 7e9]) + 0.1741)


def test_joint_law_separates_size_from_length():
    p, n, y = grid()
    law = fit_joint({"P": p, "L": n}, y)
    assert [s.value for s in law.slopes] == pytest.approx([0.0068, 0.0147]) and law.variables == ("P", "L")
    assert law.predict(1e9, 4096.0).mean == pytest.approx(0.0068 * np.log(1e9) + 0.0147 * np.log(4096) + 0.05)
    assert law.predict(SIZES[:, None], LENGTHS).mean.shape == (4, 3)


def test_intervals_are_those_of_ordinary_least_squares():
    p, _, y = grid(noise=0.01)
    law, line = fit(p, y), stats.linregress(np.log(p), y)
    t = stats.t.ppf(0.975, len(p) - 2)
    assert law.slope.value == pytest.approx(line.slope) and law.r_squared == pytest.approx(line.rvalue**2)
    assert law.slope.low == pytest.approx(line.slope - t * line.stderr)
    assert law.slope.high == pytest.approx(line.slope + t * line.stderr)
    assert law.intercept.high == pytest.approx(line.intercept + t * line.intercept_stderr)
    # the band at the mean of ln x is the interval of a mean: t * s / sqrt(n)
    band = law.predict(np.exp(np.log(p).mean()))
    s = np.sqrt(((y - law.predict(p).mean) ** 2).sum() / (len(p) - 2))
    assert band.high - band.mean == pytest.approx(t * s / np.sqrt(len(p)))
    assert band.mean - band.low == pytest.approx(band.high - band.mean)


def test_the_slope_is_covered_as_often_as_said():
    covered = 0
    for seed in range(300):
        p, _, y = grid(noise=0.01, seed=seed)
        y = y - 0.0147 * np.log(np.tile(LENGTHS, 4))
        slope = fit(p, y, level=0.8).slope
        covered += slope.low <= 0.0068 <= slope.high
    assert 215 <= covered <= 265, covered  # 240 expected, standard deviation 7


def test_bootstrap_is_close_to_t_with_many_points_and_repeats():
    rng = np.random.default_rng(1)
    x = np.exp(rng.uniform(0, 5, 200))
    y = 0.3 * np.log(x) + rng.normal(size=200)
    t, b, again = fit(x, y), *(fit(x, y, method="bootstrap", resamples=400) for _ in range(2))
    assert b.slope == again.slope
    assert (b.slope.low, b.slope.high) == pytest.approx((t.slope.low, t.slope.high), abs=0.04)
    grid_x = np.geomspace(1, 100, 5)
    np.testing.assert_allclose(b.predict(grid_x).high, t.predict(grid_x).high, atol=0.12)


def test_no_law_is_said_to_be_none():
    rng = np.random.default_rng(2)
    p, _, _ = grid()
    noise = fit(p, rng.normal(size=12))
    flat = fit(p, np.full(12, 0.3))
    assert noise.slope.contains_zero and "contains zero" in noise.describe()
    assert flat.slope.value == 0.0 and flat.slope.contains_zero and flat.r_squared == 0.0
    assert "contains zero" not in fit(p, np.log(p)).describe()


def test_figures_are_flat_and_finite():
    p, n, y = grid(noise=0.001)
    one, two = fit(p, y).figures("size"), fit_joint({"P": p, "L": n}, y).figures("joint")
    assert set(one) == {"size_intercept", "size_r_squared", "size_slope", "size_slope_low", "size_slope_high"}
    assert {"joint_slope_P", "joint_slope_L_high"} <= set(two)
    assert np.isfinite([*one.values(), *two.values()]).all()


def test_sweep_takes_each_law_where_the_other_is_largest():
    p, n, y = grid()
    y = np.where(n < 256, y - (256 - n) * np.log(p) * 1e-5, y)  # size matters more at greater length
    rows = [{"parameters": int(a), "length": int(b), "recall_at_10": c} for a, b, c in zip(p, n, y)]
    laws = fit_sweep(rows)
    assert laws.size.slope.value == pytest.approx(0.0068) and laws.size.points == 4
    assert laws.length.points == 3 and laws.length.ranges[0] == pytest.approx((64, 256))
    assert laws.joint.points == 12 and laws.joint.variables == ("P", "L")
    with pytest.raises(ValueError, match="row 1 of the sweep lacks length"):
        fit_sweep([rows[0], {"parameters": 1, "recall_at_10": 0.1}])
    with pytest.raises(ValueError, match="no rows"):
        fit_sweep([])


@pytest.mark.parametrize(("amplitude", "alpha", "floor"), [(40.0, 0.3, 1.7), (-3.0, 0.15, 0.4), (500.0, 0.5, 0.0)])
def test_power_law_comes_back(amplitude, alpha, floor):
    x = np.geomspace(1e5, 1e9, 9)
    y = amplitude * x**-alpha + floor
    law = fit_power(x, y)
    found = [law.amplitude.value, law.exponent.value, law.floor.value]
    assert found == pytest.approx([amplitude, alpha, floor], rel=1e-3, abs=1e-5)
    np.testing.assert_allclose(law.predict(x).mean, y, rtol=1e-5, atol=1e-6)


def test_power_law_intervals_are_those_of_nonlinear_least_squares():
    from scipy.optimize import curve_fit

    x = np.geomspace(1e5, 1e9, 9)
    y = 40 * x**-0.3 + 1.7 + 0.003 * np.random.default_rng(0).normal(size=9)
    best, covariance = curve_fit(lambda x, a, alpha, e: np.exp(a) * x**-alpha + e, x, y, p0=[3, 0.3, 1.5])
    half = stats.t.ppf(0.975, 6) * np.sqrt(np.diag(covariance))
    law = fit_power(x, y)
    assert law.exponent.value == pytest.approx(best[1], rel=1e-4)
    assert law.exponent.low == pytest.approx(best[1] - half[1], rel=1e-3)
    assert law.floor.high == pytest.approx(best[2] + half[2], rel=1e-3)
    band = law.predict(x)
    assert (band.low < band.mean).all() and (band.mean < band.high).all()
    assert "Exponent" in law.describe() and not law.exponent.contains_zero


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit([1e5, 1e6, 1e5], [1, 2, 3]), "P has 2 distinct values; a law needs at least 3"),
        (lambda: fit([1e5, 1e6, 0], [1, 2, 3]), "P holds 0; a law in ln P needs values above 0"),
        (lambda: fit(SIZES, [1, 2, np.nan, 4]), r"y\[2\] is nan"),
        (lambda: fit(SIZES, [1, 2, 3]), r"P has shape \(4,\) and y \(3,\)"),
        (lambda: fit(SIZES, SIZES, method="bayes"), "method is 'bayes'; it is one of 't', 'bootstrap'"),
        (lambda: fit(SIZES, SIZES, level=1.5), "level is 1.5"),
        (lambda: fit(SIZES, SIZES, method="bootstrap", resamples=3), "resamples is 3"),
        (lambda: fit_joint({"P": SIZES, "L": SIZES**2}, SIZES), "P and L rise together in all 4 observations"),
        (lambda: fit_joint({"P": SIZES[:3], "L": LENGTHS}, LENGTHS), "3 observations for 3 coefficients"),
        (lambda: fit(SIZES, SIZES).predict(1.0, 2.0), "predict got 2 arrays"),
        (lambda: fit_power(SIZES, SIZES), "4 distinct P in 4 observations"),
        (lambda: fit_power(np.geomspace(1, 1e4, 8), np.log(np.geomspace(1, 1e4, 8))), "no bend"),
        (lambda: fit_power(np.geomspace(1, 1e4, 8), np.ones(8)), "P"),
    ],
)
def test_too_little_or_wrong_data_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Scaling laws: how a metric R grows with parameters P and sequence length L.

`R = a ln P + b`, `R = a ln L + b` and `R = a ln P + c ln L + b` are linear in their coefficients: least squares, as in
LUM (arXiv 2502.08309), which publishes R@10 = 0.0068 ln P + 0.1741 and R@10 = 0.0147 ln L + 0.2326. Unlike there each
coefficient comes with an interval, and the curve with a confidence band: where the *mean* at x lies, not a new run.

Two ways, named in `method`. "t": the t-interval of ordinary least squares; every observation counts as one, residuals
taken as independent and of one variance. "bootstrap": percentiles over resampled observations (pairs); needs a dozen
or more. `fit_power` is for a loss with a floor, `L(P) = A P^-alpha + E`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

MIN_DISTINCT = 3
MAX_ALPHA = 4.0
MIN_ALPHA = 0.01  # below, P^-alpha is a straight line in ln P over any range that can be measured


@dataclass(frozen=True)
class Coefficient:
    """A fitted number and its interval."""

    value: float
    low: float
    high: float
    contains_zero: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "contains_zero", self.low <= 0.0 <= self.high)


@dataclass(frozen=True)
class Prediction:
    """The fitted mean at each x and its confidence band, arrays of one shape."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Law:
    """R = sum of slope ln x over `variables`, plus an intercept."""

    variables: tuple[str, ...]
    metric: str
    slopes: tuple[Coefficient, ...]
    intercept: Coefficient
    r_squared: float
    points: int
    level: float
    method: str  # "t" or "bootstrap"
    ranges: tuple[tuple[float, float], ...]  # smallest and largest x seen of each variable
    spread: np.ndarray = field(repr=False, compare=False)  # covariance [k, k] ("t") or draws [resamples, k]

    @property
    def slope(self) -> Coefficient:
        """The slope of the first variable."""
        return self.slopes[0]

    def predict(self, *x: Any) -> Prediction:
        """The law at `x`, one array for each of `variables`; outside `ranges` it is an extrapolation."""
        if len(x) != len(self.variables):
            raise ValueError(f"predict got {len(x)} arrays; the law has the variables {', '.join(self.variables)}")
        columns = [_logs(name, values) for name, values in zip(self.variables, x, strict=True)]
        columns = list(np.broadcast_arrays(*columns))
        design = np.stack([*columns, np.ones_like(columns[0])], axis=-1)
        mean = design @ np.array([*(s.value for s in self.slopes), self.intercept.value])
        if self.method == "t":
            variance = np.einsum("...i,ij,...j->...", design, self.spread, design)
            half = _t(self.points - design.shape[-1], self.level) * np.sqrt(np.maximum(variance, 0.0))
            return Prediction(mean, mean - half, mean + half)
        low, high = np.quantile(design @ self.spread.T, _tails(self.level), axis=-1)
        return Prediction(mean, low, high)

    def describe(self) -> str:
        """The law, its interval and how it was made, in a sentence or two."""
        terms = " + ".join(f"{s.value:.4g} ln {name}" for s, name in zip(self.slopes, self.variables, strict=True))
        text = f"{self.metric} = {terms} + {self.intercept.value:.4g} (R² {self.r_squared:.3f}, {self.points} points"
        text = text.replace("+ -", "- ") + f"; {self.level * 100:.4g} % intervals by {METHODS[self.method]})."
        for s, name in zip(self.slopes, self.variables, strict=True):
            text += f" Slope in ln {name}: [{s.low:.4g}, {s.high:.4g}]"
            text += "; the interval contains zero: these points do not show a law." if s.contains_zero else "."
        return text

    def figures(self, prefix: str) -> dict[str, float]:
        """Flat names and numbers, for `results.record(figures=...)`."""
        flat = {f"{prefix}_intercept": self.intercept.value, f"{prefix}_r_squared": self.r_squared}
        for s, name in zip(self.slopes, self.variables, strict=True):
            key = f"{prefix}_slope" if len(self.slopes) == 1 else f"{prefix}_slope_{name}"
            flat |= {key: s.value, f"{key}_low": s.low, f"{key}_high": s.high}
        return flat


METHODS = {"t": "the t-distribution of ordinary least squares", "bootstrap": "bootstrap over the points"}


def fit(
    x: Float[np.ndarray, "n"],
    y: Float[np.ndarray, "n"],
    *,
    variable: str = "P",
    metric: str = "R",
    level: float = 0.95,
    method: str = "t",
    resamples: int = 2000,
    seed: int = 0,
) -> Law:
    """Fits `y = a ln x + b`. An observation is a run: give each seed of a size as an entry of its own.

    Raises ValueError for fewer than 3 distinct x, x not above 0, values that are not finite, lengths that differ.
    """
    return fit_joint({variable: x}, y, metric=metric, level=level, method=method, resamples=resamples, seed=seed)


def fit_joint(
    x: Mapping[str, Float[np.ndarray, "n"]],
    y: Float[np.ndarray, "n"],
    *,
    metric: str = "R",
    level: float = 0.95,
    method: str = "t",
    resamples: int = 2000,
    seed: int = 0,
) -> Law:
    """Fits `y = sum of slope ln x + b` over the variables in `x`, such as {"P": ..., "L": ...}. Raises as `fit`."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it is one of {', '.join(map(repr, METHODS))}")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1, such as .95")
    y = _values("y", y)
    columns = [_logs(name, values) for name, values in x.items()]
    for name, column in zip(x, columns, strict=True):
        if column.shape != y.shape:
            raise ValueError(f"{name} has shape {column.shape} and y {y.shape}; give one of each for every observation")
        if (distinct := len(np.unique(column))) < MIN_DISTINCT:
            raise ValueError(f"{name} has {distinct} distinct values; a law needs at least {MIN_DISTINCT}")
    means = np.array([c.mean() for c in columns])
    design = np.stack([*(c - m for c, m in zip(columns, means, strict=True)), np.ones_like(y)], axis=1)  # centred
    n, k = design.shape
    if n <= k:
        raise ValueError(f"{n} observations for {k} coefficients; an interval needs at least {k + 1}")
    if np.linalg.matrix_rank(design) < k:
        raise ValueError(f"{' and '.join(x)} rise together in all {n} observations; vary one with the other held")
    back = np.eye(k)
    back[-1, :-1] = -means  # from the centred intercept to the one at ln x = 0
    solve = np.linalg.pinv(design)
    shift = y[0]  # a constant y then has the slope 0 exactly, not rounding noise with a tiny interval around it
    centred = solve @ (y - shift)
    residual = y - shift - design @ centred
    total = ((y - y.mean()) ** 2).sum()
    coefficients = back @ centred
    coefficients[-1] += shift
    if method == "t":
        spread = back @ (solve @ solve.T) @ back.T * (residual @ residual) / (n - k)
        half = _t(n - k, level) * np.sqrt(np.diag(spread))
        low, high = coefficients - half, coefficients + half
    else:
        spread = _bootstrap(design, y - shift, resamples, seed) @ back.T
        spread[:, -1] += shift
        low, high = np.quantile(spread, _tails(level), axis=0)
    made = [Coefficient(float(v), float(a), float(b)) for v, a, b in zip(coefficients, low, high, strict=True)]
    return Law(
        variables=tuple(x),
        metric=metric,
        slopes=tuple(made[:-1]),
        intercept=made[-1],
        r_squared=float(1.0 - residual @ residual / total) if np.ptp(y) > 0 else 0.0,
        points=n,
        level=level,
        method=method,
        ranges=tuple((float(np.exp(c.min())), float(np.exp(c.max()))) for c in columns),
        spread=spread,
    )


@dataclass(frozen=True)
class SweepLaws:
    """The laws of one sweep: over size at the longest length, over length at the largest size, and over both."""

    size: Law
    length: Law
    joint: Law


def fit_sweep(
    rows: Sequence[Mapping[str, Any]],
    *,
    size: str = "parameters",
    length: str = "length",
    metric: str = "recall_at_10",
    level: float = 0.95,
) -> SweepLaws:
    """The three laws of a sweep's rows, one row a run, columns by name; t-intervals."""
    for i, row in enumerate(rows):
        if missing := [name for name in (size, length, metric) if row.get(name) is None]:
            raise ValueError(f"row {i} of the sweep lacks {', '.join(missing)}; it has {', '.join(row)}")
    p, n, y = (np.array([float(row[name]) for row in rows]) for name in (size, length, metric))
    if not len(y):
        raise ValueError("the sweep has no rows; run it first")
    longest, largest = n == n.max(), p == p.max()
    return SweepLaws(
        size=fit(p[longest], y[longest], variable="P", metric=metric, level=level),
        length=fit(n[largest], y[largest], variable="L", metric=metric, level=level),
        joint=fit_joint({"P": p, "L": n}, y, metric=metric, level=level),
    )


@dataclass(frozen=True)
class PowerLaw:
    """y = A x^-alpha + E; intervals by the delta method and the t-distribution."""

    variable: str
    metric: str
    amplitude: Coefficient  # A
    exponent: Coefficient  # alpha
    floor: Coefficient  # E
    r_squared: float
    points: int
    level: float
    ranges: tuple[tuple[float, float], ...]
    center: float = field(repr=False)  # mean of ln x: A is fitted there, where it is well determined
    covariance: np.ndarray = field(repr=False, compare=False)  # of (A x_center^-alpha, alpha, E)

    def predict(self, x: Any) -> Prediction:
        """The law at `x` with its confidence band."""
        z = _logs(self.variable, x) - self.center
        scale = self.amplitude.value * np.exp(-self.exponent.value * self.center)
        decay = np.exp(-self.exponent.value * z)
        mean = scale * decay + self.floor.value
        slope = np.stack([decay, -scale * z * decay, np.ones_like(z)], axis=-1)
        variance = np.einsum("...i,ij,...j->...", slope, self.covariance, slope)
        half = _t(self.points - 3, self.level) * np.sqrt(np.maximum(variance, 0.0))
        return Prediction(mean, mean - half, mean + half)

    def describe(self) -> str:
        """The law and its exponent's interval, in a sentence."""
        a, alpha, e = self.amplitude, self.exponent, self.floor
        return (
            f"{self.metric} = {a.value:.4g} {self.variable}^-{alpha.value:.4g} + {e.value:.4g} "
            f"(R² {self.r_squared:.3f}, {self.points} points). Exponent: [{alpha.low:.4g}, {alpha.high:.4g}], "
            f"{self.level * 100:.4g} % interval by the delta method"
            + ("; the interval contains zero." if alpha.contains_zero else ".")
        )


def fit_power(
    x: Float[np.ndarray, "n"],
    y: Float[np.ndarray, "n"],
    *,
    variable: str = "P",
    metric: str = "loss",
    level: float = 0.95,
) -> PowerLaw:
    """Fits `y = A x^-alpha + E` by least squares; alpha in (0.01, 4), A of either sign (negative: y rises to E).

    Raises ValueError for fewer than 4 distinct x or 5 observations, and where the data have no bend (alpha at an end).
    """
    y, logs = _values("y", y), _logs(variable, x)
    if logs.shape != y.shape:
        raise ValueError(f"{variable} has shape {logs.shape} and y {y.shape}; give one of each for every observation")
    if len(np.unique(logs)) < 4 or len(y) < 5:
        raise ValueError(
            f"{len(np.unique(logs))} distinct {variable} in {len(y)} observations; a power law with a floor needs 4 in "
            "5: measure more, or use `fit`"
        )
    center = float(logs.mean())
    z = logs - center

    def at(alpha: float) -> tuple[float, np.ndarray]:  # for a given alpha the rest is linear
        design = np.stack([np.exp(-alpha * z), np.ones_like(z)], axis=1)
        solution = np.linalg.lstsq(design, y, rcond=None)[0]
        return float(((y - design @ solution) ** 2).sum()), solution

    grid = np.geomspace(MIN_ALPHA, MAX_ALPHA, 200)
    best = int(np.argmin([at(alpha)[0] for alpha in grid]))
    if best in (0, len(grid) - 1):
        end = "no bend: a straight line in ln x fits as well" if best == 0 else "one step, then nothing"
        raise ValueError(f"the points show {end} (alpha at {grid[best]:g}); use `fit`, or measure a wider range of x")
    low, high = grid[best - 1], grid[best + 1]
    for _ in range(80):  # ternary search: one minimum between the grid's neighbours
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if at(left)[0] < at(right)[0] else (left, high)
    alpha = float((low + high) / 2)
    error, (scale, floor) = at(alpha)
    decay = np.exp(-alpha * z)
    jacobian = np.stack([decay, -scale * z * decay, np.ones_like(z)], axis=1)
    if np.linalg.matrix_rank(jacobian) < 3:
        raise ValueError(f"{metric} does not change with {variable}; there is no power law to fit")
    degrees = len(y) - 3
    covariance = np.linalg.inv(jacobian.T @ jacobian) * error / degrees
    factor = float(np.exp(alpha * center))
    amplitude_slope = np.array([factor, scale * center * factor, 0.0])  # of A = scale * exp(alpha * center)
    deviations = np.sqrt([amplitude_slope @ covariance @ amplitude_slope, covariance[1, 1], covariance[2, 2]])
    half = _t(degrees, level) * deviations
    values = [float(scale * factor), alpha, float(floor)]
    amplitude, exponent, lowest = (
        Coefficient(v, v - float(h), v + float(h)) for v, h in zip(values, half, strict=True)
    )
    return PowerLaw(
        variable, metric, amplitude, exponent, lowest, float(1 - error / ((y - y.mean()) ** 2).sum()), len(y), level,
        ((float(np.exp(logs.min())), float(np.exp(logs.max()))),), center, covariance,
    )  # fmt: skip


def _bootstrap(design: np.ndarray, y: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Coefficients [resamples, k] of resampled observations; a draw that cannot determine them is drawn again."""
    if resamples < 20:
        raise ValueError(f"resamples is {resamples}; percentiles need at least 20, better 2,000")
    rng = np.random.default_rng(seed)
    n, k = design.shape
    draws: list[np.ndarray] = []
    for _ in range(100 * resamples):
        chosen = rng.integers(0, n, n)
        if np.linalg.matrix_rank(design[chosen]) == k:
            draws.append(np.linalg.lstsq(design[chosen], y[chosen], rcond=None)[0])
            if len(draws) == resamples:
                return np.stack(draws)
    raise ValueError(f"{n} observations are too few to resample; use method='t'")


def _t(degrees: int, level: float) -> float:
    return float(stdtrit(degrees, 0.5 + level / 2))


def _tails(level: float) -> list[float]:
    return [0.5 - level / 2, 0.5 + level / 2]


def _values(name: str, values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(np.atleast_1d(values)))[0]
        raise ValueError(f"{name}{where.tolist()} is {np.atleast_1d(values)[tuple(where)]}; give finite numbers")
    return values


def _logs(name: str, values: Any) -> np.ndarray:
    values = _values(name, values)
    if not (values > 0).all():
        raise ValueError(f"{name} holds {values.min():g}; a law in ln {name} needs values above 0")
    return np.log(values)

"""Figures as SVG text that takes on the colours of the page around it.

Every function returns one `<svg>` element that stands in a page without any outside request. Matplotlib draws with
fixed colours; they are replaced by CSS variables with those colours as fall-back (`--series-0` ... , `--grid`) and by
`currentColor` for text and axes, so one figure serves light and dark pages and paper. The palette is Okabe and Ito's,
which stays apart for colour-blind readers; series differ in marker as well.
"""

import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from experiments.scaling_law import Law, PowerLaw
from experiments.statistics import Interval

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito, without yellow and black
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GRID = "#010203", "#c9c9c8"  # replaced by currentColor and var(--grid)
MAX_POINTS = 300  # points drawn per curve: what a screen can show, and a page of 100 kB
STYLE: Any = {
    "svg.fonttype": "none",  # real text: it can be searched, copied and scaled
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "text.color": INK,
    "text.usetex": False,
    "text.parse_math": False,  # a "$" in a label is a "$"
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": True,
}

type Curve = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]


def lines(
    series: Mapping[str, Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    bands: Mapping[str, Curve] | None = None,
    references: Mapping[str, float] | None = None,
    log_x: bool = False,
    markers: bool = True,
) -> str:
    """Lines: `series` label -> (x, y); `bands` label -> (low, high) at the same x; `references` label -> a level of y.

    `title` is what a screen reader says (the page has its own caption); the axis titles carry units. Raises ValueError
    for an empty series, lengths that differ, values that are not finite, or x not above 0 on a logarithmic axis.
    """
    checked = _curves(series, log_x)
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(x_label, y_label)
        for i, (label, (x, y)) in enumerate(checked.items()):
            axes.plot(x, y, color=_color(i), marker=_marker(i) if markers else None, label=label)
            if bands and label in bands:
                low, high = (np.asarray(edge, np.float64) for edge in bands[label])
                _same_length(f"band of {label!r}", x, low, high)
                axes.fill_between(x, low, high, color=_color(i), alpha=0.2, linewidth=0)
        _references(axes, references)
        if log_x:
            _log_x(axes, np.concatenate([x for x, _ in checked.values()]))
        else:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        _legend(axes, len(checked) + len(references or {}))
        return _svg(figure, title)


def loss_curves(
    curves: Mapping[str, Curve],
    *,
    title: str = "Training loss",
    x_label: str = "training events",
    y_label: str = "loss (nats)",
) -> str:
    """Training curves: label -> (events or steps so far, loss); of more than 300 points the means of 300 bins."""
    reduced = {label: _binned(x, y) for label, (x, y) in _curves(curves, False).items()}
    return lines(reduced, title=title, x_label=x_label, y_label=y_label, markers=False)


def auc_bars(
    systems: Mapping[str, Interval | float],
    *,
    title: str = "AUC on the test period",
    x_label: str = "AUC (0.5 = chance)",
    oracle: float | None = None,
    oracle_label: str = "oracle: true click probability",
    references: Mapping[str, float] | None = None,
) -> str:
    """A bar a system from chance (0.5) to its AUC, with its interval, and a line for the oracle's where it is known."""
    known = dict(references or {}) | ({} if oracle is None else {oracle_label: oracle})
    return bars(systems, title=title, x_label=x_label, base=0.5, references=known)


def bars(
    values: Mapping[str, Interval | float],
    *,
    title: str,
    x_label: str,
    base: float = 0.0,
    references: Mapping[str, float] | None = None,
    digits: int = 4,
) -> str:
    """Horizontal bars from `base`, each labelled with its value; an `Interval` gets its whiskers."""
    _not_empty(values)
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(x_label, "", height=_rows_height(len(values), bool(references)))
        ends = [base, *(references or {}).values()]
        for i, value in enumerate(values.values()):
            mean, low, high = _mean_low_high(value)
            axes.barh(i, mean - base, left=base, height=0.6, color=_color(i), alpha=0.85)
            if high > low:
                axes.plot([low, high], [i, i], color=INK, linewidth=1.4, marker="|", markersize=8)
            ends += [low, high]
        for i, value in enumerate(values.values()):  # in a column of its own, clear of whiskers and lines
            text = f"{_mean_low_high(value)[0]:.{digits}f}"
            axes.text(1.01, i, text, va="center", ha="left", transform=axes.get_yaxis_transform())
        span = max(ends) - min(ends) or 1.0
        axes.set_xlim(min(ends) - (0.05 * span if min(ends) < base else 0.0), max(ends) + 0.05 * span)
        _row_labels(axes, list(values))
        _references(axes, references, vertical=True)
        _legend(axes, len(references or {}))
        return _svg(figure, title)


def differences(
    values: Mapping[str, Interval],
    *,
    title: str,
    x_label: str,
    digits: int = 4,
) -> str:
    """Differences as points with their intervals against zero; hollow where the interval contains zero."""
    _not_empty(values)
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(x_label, "", height=_rows_height(len(values), False))
        axes.axvline(0.0, color=INK, linewidth=1.0)
        for i, value in enumerate(values.values()):
            axes.plot([value.low, value.high], [i, i], color=_color(0), linewidth=2.0)
            face = "none" if value.contains_zero else _color(0)
            axes.plot([value.mean], [i], marker="o", markersize=7, color=_color(0), markerfacecolor=face)
            note = f"{value.mean:+.{digits}f}" + ("\ncontains zero" if value.contains_zero else "")
            axes.text(1.01, i, note, va="center", ha="left", transform=axes.get_yaxis_transform())
        low, high = min(0.0, *(v.low for v in values.values())), max(0.0, *(v.high for v in values.values()))
        margin = 0.08 * ((high - low) or 1.0)
        axes.set_xlim(low - margin, high + margin)
        _row_labels(axes, list(values))
        return _svg(figure, title)


def scaling_law(
    law: Law | PowerLaw,
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    *,
    title: str,
    x_label: str,
    y_label: str,
    groups: Sequence[str] | None = None,
) -> str:
    """The observations, the law of one variable and its confidence band, over a logarithmic axis.

    `groups` gives each observation a name (a length, a seed); observations of one name share a marker.
    """
    (points_x, points_y) = _curves({"observations": (x, y)}, True)["observations"]
    names = ["measured"] * len(points_x) if groups is None else [str(name) for name in groups]
    _same_length("groups", points_x, np.empty(len(names)))
    if isinstance(law, Law) and len(law.variables) != 1:
        raise ValueError(f"the law has the variables {', '.join(law.variables)}; a figure shows a law of one")
    ends = [*law.ranges[0], points_x.min(), points_x.max()]
    grid = np.geomspace(min(ends) / 1.15, max(ends) * 1.15, 80)
    band = law.predict(grid)
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(x_label, y_label)
        axes.fill_between(grid, band.low, band.high, color=_color(0), alpha=0.18, linewidth=0, label=_band_label(law))
        axes.plot(grid, band.mean, color=_color(0), label="fit")
        for i, name in enumerate(dict.fromkeys(names)):
            own = np.array([n == name for n in names])
            style = dict(color=_color(i + 1), marker=_marker(i), linestyle="none", label=name)
            axes.plot(points_x[own], points_y[own], **style)  # type: ignore[arg-type]
        reach = max(float(np.ptp(points_y)), float((band.high - band.low).min()), 1e-12)
        lowest, highest = axes.get_ylim()  # a band of few points may be far wider than the points: keep these legible
        bottom = max(lowest, min(points_y.min(), band.mean.min()) - 1.5 * reach)
        axes.set_ylim(bottom, min(highest, max(points_y.max(), band.mean.max()) + 1.5 * reach))
        _log_x(axes, points_x)
        _legend(axes, 3)
        return _svg(figure, title)


def short(value: float) -> str:
    """A number as an axis shows it: 950, 1.5k, 19M, 7B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


def _band_label(law: Law | PowerLaw) -> str:
    return f"{law.level * 100:.4g} % confidence band"


def _canvas(x_label: str, y_label: str, height: float = 3.7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _rows_height(rows: int, legend: bool) -> float:
    return 1.0 + 0.5 * rows + (0.3 if legend else 0.0)


def _row_labels(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _references(axes: Axes, references: Mapping[str, float] | None, *, vertical: bool = False) -> None:
    for i, (label, value) in enumerate((references or {}).items()):
        draw = axes.axvline if vertical else axes.axhline
        draw(value, color=INK, linewidth=1.3, linestyle=("--", ":", "-.")[i % 3], label=f"{label} ({value:.4f})")


def _legend(axes: Axes, entries: int) -> None:
    labels = axes.get_legend_handles_labels()[1]
    if entries and labels:
        fit = max(1, 90 // (max(map(len, labels)) + 6))  # columns that the figure's width holds
        axes.legend(
            loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=min(entries, 3, fit), borderaxespad=0.2, handlelength=1.8
        )


def _log_x(axes: Axes, x: np.ndarray) -> None:
    """A logarithmic axis whose ticks are the values that were measured, as long as they keep apart."""
    axes.set_xscale("log")
    values = np.unique(x)
    least = 0.09 * np.log(values[-1] / values[0])
    ticks = [values[0]]
    for value in values[1:]:
        if np.log(value / ticks[-1]) >= least:
            ticks.append(value)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _color(i: int) -> str:
    return PALETTE[i % len(PALETTE)]


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def _mean_low_high(value: Interval | float) -> tuple[float, float, float]:
    found = (value.mean, value.low, value.high) if isinstance(value, Interval) else (float(value),) * 3
    if not np.isfinite(found).all():
        raise ValueError(f"a bar has the value {value}; leave out what could not be measured")
    return found


def _curves(series: Mapping[str, Curve], log_x: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    _not_empty(series)
    checked = {}
    for label, (x, y) in series.items():
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if x.ndim != 1 or not len(x):
            raise ValueError(f"{label!r} has x of shape {x.shape}; a curve is one dimension with a point or more")
        _same_length(repr(label), x, y)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            where = int(np.argmin(np.isfinite(x) & np.isfinite(y)))
            raise ValueError(f"{label!r} has ({x[where]}, {y[where]}) at {where}; leave out what could not be measured")
        if log_x and not (x > 0).all():
            raise ValueError(f"{label!r} has x = {x.min():g}; a logarithmic axis needs values above 0")
        checked[label] = (x, y)
    return checked


def _same_length(what: str, x: np.ndarray, *others: np.ndarray) -> None:
    for other in others:
        if other.shape != x.shape:
            raise ValueError(f"{what} has {other.shape} values for {x.shape} places on the x axis")


def _not_empty(values: Mapping[str, Any]) -> None:
    if not values:
        raise ValueError("nothing to draw: give at least one named value")


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= MAX_POINTS:
        return x, y
    starts = np.linspace(0, len(x), MAX_POINTS, endpoint=False).astype(int)
    sizes = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _svg(figure: Figure, title: str) -> str:
    """The figure as one `<svg>` element: themed colours, ids of its own, a title for screen readers, no date."""
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Matplotlib's style element holds a rule for `*`, which would reach the whole page: set it on the element.
    text = re.sub(r"\s*<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    for i, color in enumerate(PALETTE):
        text = text.replace(color, f"var(--series-{i}, {color})")
    text = text.replace(INK, "currentColor").replace(GRID, f"var(--grid, {GRID})")
    # Matplotlib's ids repeat from figure to figure (axes_1, and hashes that are new in every run): number them.
    own = "f" + hashlib.sha256((title + re.sub(r'id="[^"]*"|#[a-z0-9]{11}', "", text)).encode()).hexdigest()[:8]
    names = {name: f"{own}-{i}" for i, name in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', text)))}
    text = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{names[m[1]]}"', text)
    text = re.sub(r'(url\(#|href="#)([^)"]+)', lambda m: m[1] + names.get(m[2], m[2]), text)
    label = html.escape(title, quote=True)
    style = "stroke-linejoin: round; stroke-linecap: butt"
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" style="{style}" ', 1)

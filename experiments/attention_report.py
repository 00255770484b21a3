"""What attention-bench makes of its measurements: rows, figures, the tables of a terminal and the report's page."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from experiments import figures, progress, report, results, statistics
from experiments.attention_cases import Case, Direction
from experiments.attention_rivals import Missing
from experiments.attention_timing import Ceilings

type Row = dict[str, Any]

FIGURES: dict[str, tuple[str, Direction]] = {
    "causal_fwd_d64": ("causal_a", "forward"),
    "causal_fwd_d128": ("causal_b", "forward"),
    "causal_bwd_d64": ("causal_a", "backward"),
    "causal_bwd_d128": ("causal_b", "backward"),
    "grouped_fwd_a_q128": ("grouped_a_q128", "forward"),
    "grouped_fwd_b_q128": ("grouped_b_q128", "forward"),
    "packed_fwd_a": ("packed_a", "forward"),
    "packed_fwd_b": ("packed_b", "forward"),
    "packed_bwd_a": ("packed_a", "backward"),
    "packed_bwd_b": ("packed_b", "backward"),
    "cached_a_ms": ("cached_a_q128", "forward"),
    "cached_b_ms": ("cached_b_q128", "forward"),
}
COLUMNS = {
    "case": "case",
    "direction": "pass",
    "implementation": "implementation",
    "ms": "ms",
    "ms_low": "least",
    "ms_high": "most",
    "tflops": "TFLOP/s",
    "of_product": "of product",
    "gb_per_s": "GB/s",
    "of_copy": "of copy",
    "error": "error",
}


def passes(chosen: Iterable[Case]) -> list[tuple[Case, Direction]]:
    """What is measured: each case with its directions, in order."""
    return [(case, direction) for case in chosen for direction in case.directions]


def missing_row(case: Case, direction: Direction, what: Missing, dtype: str) -> Row:
    return row(case, direction, what.name, what.side, {"reason": what.reason}, dtype, None)


def row(
    case: Case,
    direction: Direction,
    name: str,
    side: str,
    values: dict[str, Any],
    dtype: str,
    top: Ceilings | None,
    *,
    chosen: bool = False,
) -> Row:
    """One measurement; rates follow from its milliseconds."""
    found: Row = {"case": case.name, "direction": direction, "implementation": name, "side": side}
    found |= {"chosen": chosen, "shape": case.describe(), "rows": case.rows, "keys": case.keys, "dtype": dtype}
    found |= {key: value for key, value in values.items() if value is not None}
    if top is not None and values.get("ms") is not None:
        tflops = case.flops(direction) / values["ms"] / 1e9
        found |= {"tflops": tflops, "of_product": tflops / top.tflops}
        if case.cached:
            rate = case.bytes(jnp.dtype(dtype).itemsize) / values["ms"] / 1e6
            found |= {"gb_per_s": rate, "of_copy": rate / top.gb_per_s}
    return found


def summarize(rows: list[Row], *, small: bool) -> dict[str, float]:
    """`figures`: of each named case what range attention chooses by itself, and the best rival (`..._rival`).

    The row that a figure quotes gets its name (`figure`), the best rival's (`rival_name`) and how many times faster
    than that rival it is (`speedup`).
    """
    found: dict[str, float] = {}
    for name, where in FIGURES.items():
        own = [row for row in rows if (row["case"], row["direction"]) == where and row.get("ms") is not None]
        ours = next((row for row in own if row["chosen"]), None)
        rival = min((row for row in own if row["side"] == "rival"), key=lambda row: row["ms"], default=None)
        key = f"small_{name}" if small else name
        value = "ms" if name.endswith("_ms") else "tflops"
        if ours is not None:
            found[key] = ours[value]
            ours["figure"] = key
        if rival is not None:
            found[f"{key}_rival"] = rival[value]
        if ours is not None and rival is not None:
            ours |= {"rival_name": rival["implementation"], "speedup": rival["ms"] / ours["ms"]}
    return found


def show(rows: list[Row], found: dict[str, float]) -> None:
    """Prints what was measured, what was not, and the figures."""
    if timed := _timed(rows):
        print("\n" + progress.table(timed, _columns(timed)))
    if reasons := _reasons(rows):
        print("\nNot measured:\n" + progress.table(reasons))
    if quoted := _quoted(rows, found):
        print("\n" + progress.table(quoted))


def _columns(rows: list[Row]) -> dict[str, str]:
    return {name: text for name, text in COLUMNS.items() if any(row.get(name) is not None for row in rows)}


def _timed(rows: list[Row]) -> list[Row]:
    """The measured rows, what is chosen marked."""
    return [
        row | {"implementation": f"{row['implementation']}{' *' if row['chosen'] else ''}"}
        for row in rows
        if row.get("ms") is not None
    ]


def _reasons(rows: list[Row]) -> list[Row]:
    """Implementation, reason, and the cases: one row for all that share a reason."""
    where: dict[tuple[Any, Any], list[str]] = {}
    for row in rows:
        if row.get("ms") is None:
            where.setdefault((row["implementation"], row["reason"]), []).append(f"{row['case']} {row['direction']}")
    return [
        {
            "implementation": name,
            "reason": reason,
            "cases": ", ".join(found) if len(found) < 4 else f"{len(found)} passes",
        }
        for (name, reason), found in where.items()
    ]


def _quoted(rows: list[Row], found: dict[str, float]) -> list[Row]:
    return [
        {
            "figure": row["figure"],
            "range_attention": found[str(row["figure"])],
            "best rival": found.get(f"{row['figure']}_rival"),
            "times faster": row.get("speedup"),
            "rival": row.get("rival_name"),
        }
        for row in rows
        if row.get("figure")
    ]


def page(outcome: results.Result, rows: list[Row], chosen: Iterable[Case], top: Ceilings) -> str:
    """The report: the figures, a panel of bars for each case and direction, and everything that was measured."""
    timed = _timed(rows)
    panels = []
    for case, direction in passes(chosen):
        own = [row for row in timed if (row["case"], row["direction"]) == (case.name, direction)]
        if own:
            panels.append(_panel(case, direction, own))
    headings = _columns(timed)
    every = [{text: row.get(name) for name, text in headings.items()} for row in timed]
    return report.page(
        outcome,
        "Range attention on this device",
        headline=_quoted(rows, outcome.figures) or every,
        panels=panels,
        lead=f"A matrix product reaches {top.tflops:.4g} TFLOP/s and a copy {top.gb_per_s:.4g} GB/s in the same run.",
        tables={"All measurements": every, "Not measured": _reasons(rows)},
    )


def _panel(case: Case, direction: Direction, rows: list[Row]) -> report.Panel:
    bars = {row["implementation"]: _bar(row, case, direction) for row in rows}
    unit = "milliseconds a call" if case.cached else "TFLOP/s on unmasked pairs"
    digits = 1 if max(bar.mean for bar in bars.values()) >= 10 else 4
    title = f"{case.name}, {direction}"
    return report.Panel(
        title,
        figures.bars(bars, title=title, x_label=unit, digits=digits),
        f"{case.describe()}, {rows[0]['dtype']}. * is what range_attention chooses by itself.",
        interval=f"least and most of {rows[0]['repeats']} rounds; the bar is the median",
    )


def _bar(row: Row, case: Case, direction: Direction) -> statistics.Interval:
    ms, low, high = (float(row[name]) for name in ("ms", "ms_low", "ms_high"))
    if not case.cached:
        ms, low, high = (case.flops(direction) / x / 1e9 for x in (ms, high, low))
    return statistics.Interval(ms, low, high, 1.0, "least and most")

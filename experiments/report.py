"""One HTML file that a colleague can open anywhere: the headline table, the figures, and how to get them again.

Nothing is requested from outside: styles and figures stand in the file. It follows the reader's light or dark setting
and prints in black on white. Every text that is put in is escaped.

    panel = Panel("AUC", figures.auc_bars(...), "Click AUC on the last tenth of the time.", samples=9000, users=1200,
                  seeds=3, interval="95 %, bootstrap over users and seeds")
    write("report.html", page(result, "LUM quickstart", headline=rows, panels=[panel], findings=[...]))
"""

import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.progress import column_headings, duration, format_cell, is_number
from experiments.results import Cell, Result, write_atomically
from experiments.scaling_law import Law, PowerLaw
from experiments.statistics import Interval


@dataclass(frozen=True)
class Panel:
    """One figure and its caption: what is shown, how many samples, users and seeds, and what its intervals are."""

    title: str
    svg: str  # from experiments.figures
    shows: str
    samples: int | None = None
    users: int | None = None
    seeds: int | None = None
    interval: str = ""  # "" where the figure shows none
    notes: tuple["Finding | str", ...] = ()  # to read with this figure

    def __post_init__(self) -> None:
        if not self.title or not self.shows:
            raise ValueError(f"panel {self.title!r}: a figure needs a title and a text that says what it shows")
        if not re.fullmatch(r"<svg\b.*</svg>", self.svg.strip(), flags=re.DOTALL):
            raise ValueError(f"panel {self.title!r}: svg starts with {self.svg[:40]!r}; expected one <svg> element")

    def caption(self) -> str:
        """The facts after `shows`, in one sentence each."""
        named = (("samples", self.samples), ("users", self.users), ("seeds", self.seeds))
        counts = [f"{value:,} {name if value != 1 else name[:-1]}" for name, value in named if value is not None]
        interval = f"Interval: {self.interval.rstrip('.')}." if self.interval else "No interval is shown."
        return " ".join(filter(None, [f"n: {', '.join(counts)}." if counts else "", interval]))


@dataclass(frozen=True)
class Finding:
    """A sentence of the report; `shown` says whether the data show it (False: the interval contains zero)."""

    text: str
    shown: bool = True


def difference(what: str, interval: Interval, *, unit: str = "AUC") -> Finding:
    """`what` ("DIN with LUM's answers against DIN") with its difference, in plain words."""
    numbers = f"{interval.mean:+.4f} {unit}, {interval.level * 100:.4g} % interval"
    numbers += f" {interval.low:+.4f} to {interval.high:+.4f} ({interval.method})"
    if interval.contains_zero:
        return Finding(f"{what}: {numbers}. The interval contains zero: this run shows no difference.", shown=False)
    return Finding(f"{what}: {numbers}.")


def law(what: str, fitted: Law | PowerLaw) -> Finding:
    """`what` ("Recall@10 over model size") with its fitted law, in plain words."""
    slopes = fitted.slopes if isinstance(fitted, Law) else (fitted.exponent,)
    return Finding(f"{what}: {fitted.describe()}", shown=not any(slope.contains_zero for slope in slopes))


def page(
    result: Result,
    title: str,
    *,
    headline: Sequence[Mapping[str, Any]],
    panels: Sequence[Panel],
    columns: Sequence[str] | Mapping[str, str] | None = None,
    lead: str = "",
    findings: Sequence[Finding] = (),
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> str:
    """The page: `lead` a paragraph, `headline` the first table (`columns` as in `progress.table`), `findings` below it,
    a section a panel, `tables` heading -> rows of what else was measured, and how to repeat the run from `result`.
    """
    parts = [f"<header><h1>{_text(title)}</h1>"]
    if lead:
        parts.append(f"<p>{_text(lead)}</p>")
    parts += ["</header><main>", "<section><h2>Result</h2>"]
    parts += [_table(headline, columns), _findings(findings), "</section>"]
    for panel in panels:
        caption = f"{_text(panel.shows)} <span>{_text(panel.caption())}</span>"
        parts.append(f"<section><h2>{_text(panel.title)}</h2>")
        parts.append(f'<figure><div class="scroll">{panel.svg}</div><figcaption>{caption}</figcaption></figure>')
        parts += [_findings([Finding(note) if isinstance(note, str) else note for note in panel.notes]), "</section>"]
    for heading, rows in (tables or {}).items():
        parts.append(f"<section><h2>{_text(heading)}</h2>{_table(rows, None)}</section>")
    parts += [_repeat(result), "</main>"]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">\n'
        f"<style>{CSS}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def write(path: str | os.PathLike[str], text: str) -> Path:
    """Writes the page; a reader finds the old one or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


def _repeat(result: Result) -> str:
    facts = {
        "Command": f"<code>{_text(result.command)}</code>",
        "Commit": f"<code>{_text(result.commit)}</code>" + _commit_note(result.commit),
        "Device": _text(_device(result.device)),
        "Versions": _text(", ".join(f"{name} {version}" for name, version in result.versions.items())),
        "Seeds": _text(", ".join(map(str, result.seeds)) or "none"),
        "Run": _text(f"{result.started.replace('T', ' ')}, {duration(result.seconds)}"),
    }
    rows = "\n".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return f'<section class="repeat"><h2>How to repeat it</h2><dl>{rows}</dl></section>'


def _commit_note(commit: str) -> str:
    if commit.endswith("+dirty"):
        return " (the sources differed from this commit)"
    return " (not run from a git checkout)" if commit == "unknown" else ""


def _device(device: Mapping[str, Cell]) -> str:
    """The device in words; every entry that has no place in the sentence follows as name and value."""
    rest = {name: value for name, value in device.items() if value is not None}
    count, kind = rest.pop("count", None), rest.pop("kind", None)
    parts = [f"{count} × {kind}" if kind and count else str(kind or "")]
    if "processor" in rest:
        cores = f", {rest.pop('cores')} cores" if "cores" in rest else ""
        parts.append(f"{rest.pop('processor')}{cores}")
    if "memory_gib" in rest:
        parts.append(f"{rest.pop('memory_gib')} GiB of memory")
    if "device_memory_gib" in rest:
        parts.append(f"{rest.pop('device_memory_gib')} GiB of device memory")
    return "; ".join(filter(None, [*parts, *(f"{name}: {format_cell(value)}" for name, value in rest.items())]))


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str] | None) -> str:
    if not rows:
        return "<p>No rows.</p>"
    headings = column_headings(rows, columns)
    present = {name: [row[name] for row in rows if row.get(name) is not None] for name in headings}
    number = {name: bool(values) and all(map(is_number, values)) for name, values in present.items()}

    def cell(tag: str, name: str, text: str) -> str:
        style = ' class="n"' if number[name] else ""
        return f"<{tag}{style}>{_text(text)}</{tag}>"

    head = "".join(cell("th", name, heading) for name, heading in headings.items())
    lines = ["".join(cell("td", name, format_cell(row.get(name))) for name in headings) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    items = "\n".join(f"<li{'' if f.shown else ' class=unshown'}>{_text(f.text)}</li>" for f in findings)
    return f'<ul class="findings">{items}</ul>'


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)


CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c636b; --paper: #ffffff; --panel: #f6f7f8; --line: #dcdfe3;
  --grid: #dcdfe3; --mark: #b4540a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --soft: #a0a7af; --paper: #16181b; --panel: #1f2226; --line: #363b41; --grid: #363b41;
    --mark: #f0a35e; --series-0: #4ea3dc; --series-1: #f08a4b; --series-2: #2fc39a; --series-3: #e09cc5;
    --series-4: #8accf2; --series-5: #f0bb4a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 54rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
header p { color: var(--soft); margin: 0; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .4rem .75rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { min-width: 9rem; }
th { font-weight: 600; color: var(--soft); }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
figure { margin: 0; padding: 1rem; background: var(--panel); border-radius: 8px; }
figure svg { display: block; width: 100%; min-width: 30rem; height: auto; }
figcaption { margin-top: .75rem; font-size: .9rem; }
figcaption span { color: var(--soft); }
.findings { margin: 1rem 0 0; padding: 0 0 0 1.1rem; }
.findings li { margin: .35rem 0; }
.findings .unshown { color: var(--mark); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1rem; margin: 0; font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .92em ui-monospace, "DejaVu Sans Mono", monospace; }
@media print {
  :root { --ink: #000; --soft: #444; --paper: #fff; --panel: #fff; --line: #bbb; --grid: #ccc; --mark: #000;
    --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73; --series-3: #cc79a7; --series-4: #56b4e9;
    --series-5: #e69f00; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  figure { padding: 0; break-inside: avoid; }
  h2 { break-after: avoid; }
  tr, li { break-inside: avoid; }
  figure svg { max-width: 16cm; min-width: 0; }
}
"""

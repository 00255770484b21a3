"""What ADS costs: a training step, a request and its memory beside the attention alone, and what a second GPU gives.

    python -m experiments ads-cost                       # for one GPU
    python -m experiments ads-cost --devices 2           # the same, and the step on a data mesh of two
    python -m experiments ads-cost --joined A.json B.json   # what two machines measured, as one
    python -m experiments ads-cost --quick               # sizes of a test: only shows that everything works

The model: an item table of 10 M rows (32 wide; category and kind of behaviour 16 each, so a behaviour is 64 wide), 1 M
users, a dense network of 1024-512-256, E_D 32 wide, generators of 32 hidden units, computed in bfloat16 with float32
tables, parameters and Adam. A whole step looks up, computes and updates the net and the rows that the batch of 4,096
touches (no pass over a table); the dense part begins and ends at the vectors. Attentions: multi-head (4 x 16), DIN
(80-40) and CAN ((4, 2), its table of 1 M hashed rows), each alone, with ADS in chunks of 10, and unchunked, at 200 and
1,000 behaviours. The figures are of the whole step of **multi-head attention at 200 behaviours**, the attention of
equations 8-12, and, named so, of DIN and CAN; all other cases stand in the rows. Contenders are timed in turn within a
repeat; an overhead is the median over repeats of paired ratios.

Requests: 500 candidates of one user at 1,000 behaviours, from ids on the host to scores on the host. Two GPUs: tables
split by row, the batch by example, rows and their gradients exchanged in bfloat16, no general form for a batch that
does not fit; "speedup" is of examples a second, with 4,096 a GPU and with 4,096 in all.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from experiments import figures, progress, report, results
from experiments.results import Row
from experiments.settings import check_joined, in_small
from experiments.steps import ads_request, ads_scale, ads_step, timing
from experiments.steps.ads_scale import Sizes
from experiments.steps.ads_step import Variant
from experiments.steps.timing import Program
from rec_core.sharding import make_mesh

ATTENTIONS = ("MHA", "DIN", "CAN")
PARTS = ("step", "request", "devices")
CHUNK = 10  # behaviours that share a query, of the figures
COLUMNS = {
    "what": "part", "case": "case", "attention": "attention", "length": "behaviours", "model": "model", "ms": "ms",
    "overhead_pct": "% more", "memory_gib": "GiB", "speedup": "times faster", "reason": "not measured",
}  # fmt: skip
COUNTS = "as compiled: arguments, results and temporaries"


@dataclass(frozen=True)
class AdsCost:
    """Settings; the defaults are for an accelerator of 80 GB.

    Attributes:
      parts: "step", "request", "devices" (which needs `devices` of 2 or more).
      attentions: of "MHA", "DIN", "CAN"; MHA gives the figures.
      lengths: behaviours; the first gives the figures of the step, the last those of a request.
      devices: GPUs of one process, for the part "devices".
      candidates: of a request. at_a_time: candidates that are read at a time.
      steps: of a measurement. repeats: measurements. requests: whose latency is taken.
      limit: seconds after which no other measurement begins; what is left out says so.
      joined: results of other machines, each of other cases: nothing is measured, the first one gets the rows and
        figures of the others (`results.join`).
      quick: sizes of a test.
      out: folder for result.json, written after every measurement, and report.html.
    """

    parts: tuple[str, ...] = PARTS
    attentions: tuple[str, ...] = ATTENTIONS
    lengths: tuple[int, ...] = (200, 1000)
    devices: int = 1
    candidates: int = 500
    at_a_time: int = 50
    steps: int = 10
    repeats: int = 7
    requests: int = 500
    limit: float = 500.0
    joined: tuple[Path, ...] | None = None
    quick: bool = False
    out: Path = Path("runs/ads_cost")

    def __post_init__(self) -> None:
        for name, known in (("parts", PARTS), ("attentions", ATTENTIONS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown or not getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; give some of {known}")
        for name in ("devices", "candidates", "at_a_time", "steps", "repeats", "requests", "limit"):
            if not getattr(self, name) >= 1:  # nor is nan
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        check_joined(self.joined)
        if self.parts == ("devices",) and self.devices < 2 and not self.joined:
            raise ValueError(f"devices is {self.devices}, and parts asks for nothing else; give 2 or more")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths is {self.lengths}; give at least one, of 1 behaviour or more")


QUICK: dict[str, Any] = {
    "attentions": ("MHA",),
    "lengths": (20,),
    "candidates": 6,
    "at_a_time": 3,
    "steps": 2,
    "repeats": 2,
    "requests": 4,
}


@dataclass
class _Measured:
    """What is there so far; `rows` grow by measurement, `found` holds the figures."""

    config: AdsCost
    started: Any
    began: float = field(default_factory=time.perf_counter)
    rows: list[Row] = field(default_factory=list)
    found: dict[str, float] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until nothing more is begun."""
        return self.config.limit - (time.perf_counter() - self.began)

    def add(self, what: str, measure: Callable[[], tuple[list[Row], Any]], names: Sequence[Row]) -> None:
        """Takes a measurement, shows it, and writes all that there is."""
        if self.left() > 0:
            rows, _ = measure()
        else:
            rows = [row | {"reason": f"not begun: the limit of {self.config.limit:g} s was over"} for row in names]
        self.rows += rows
        print(f"{what}, after {time.perf_counter() - self.began:.0f} s\n{progress.table(rows)}\n", flush=True)
        self.write()

    def write(self) -> results.Result:
        self.found = summarize(self.rows, small=self.config.quick)
        outcome = results.record("ads_cost", started=self.started, seeds=[0], rows=self.rows, figures=self.found)
        results.write(self.config.out / "result.json", outcome)
        return outcome


def run(config: AdsCost) -> results.Result:
    """Attention by attention: compiles all of its cases, then measures them; prints the tables, writes result and
    report. What the figures are of comes first."""
    if config.quick:
        config = in_small(config, QUICK)
    results.make_folder(config.out)
    if config.joined:
        joined = results.join(config.joined, "ads_cost", apart=("what", "attention", "length", "model", "case"))
        found = summarize(joined.rows, small=results.is_quick(joined))
        return _finish(replace(joined, figures=dict(joined.figures) | found), config.out)
    more = config.devices if "devices" in config.parts else 1
    if more > jax.local_device_count():
        raise ValueError(f"devices is {more}, there are {jax.local_device_count()}; give as many as there are")
    sizes = ads_scale.TINY if config.quick else Sizes()
    measured = _Measured(config, results.begin())
    if more > 1:
        _measure_devices(config, sizes, measured)
    for attention in config.attentions if set(config.parts) & {"step", "request"} else ():
        _measure_attention(config, sizes, attention, measured)
    return _finish(measured.write(), config.out)


def _finish(outcome: results.Result, out: Path) -> results.Result:
    results.write(out / "result.json", outcome)
    report.write(out / "report.html", page(outcome))
    print(progress.table([{"figure": name, "value": value} for name, value in outcome.figures.items()]))
    print(f"report: {out / 'report.html'}   result: {out / 'result.json'}   {outcome.seconds:.0f} s")
    return outcome


def _measure_attention(config: AdsCost, sizes: Sizes, attention: str, measured: _Measured) -> None:
    lower: dict[tuple[str, Variant], Callable[[], Any]] = {}
    for length in config.lengths:
        for variant in variants(attention, length):
            if "step" in config.parts:
                lower["whole step", variant] = partial(ads_step.lower_whole, sizes, variant, make_mesh())
                lower["dense part", variant] = partial(ads_step.lower_dense, sizes, variant)
            if "request" in config.parts and length == config.lengths[-1]:
                lower["request", variant] = partial(
                    ads_request.lower_score, sizes, variant, config.candidates, config.at_a_time
                )
    programs = timing.compile_all(lower, log=_log) if measured.left() > 0 else {}
    steps: dict[str, Any] = {"steps": config.steps, "repeats": config.repeats}
    asked: dict[str, Any] = {"candidates": config.candidates, "requests": config.requests}
    measures: dict[str, Callable[..., tuple[list[Row], Any]]] = {
        "whole step": partial(ads_step.measure_whole, **steps),
        "dense part": partial(ads_step.measure_dense, **steps),
        "request": partial(ads_request.measure_requests, **asked),
    }
    for length in config.lengths:
        for what, measure in measures.items():
            those = [v for v in variants(attention, length) if (what, v) in lower]
            if those:
                own = {v: programs.get((what, v), Program()) for v in those}
                names = [v.row(what) for v in those]
                measured.add(f"{what}: {attention}, {length} behaviours", partial(measure, sizes, own), names)


def _measure_devices(config: AdsCost, sizes: Sizes, measured: _Measured) -> None:
    """With tables on one device and split by row, a batch a device and the same batch in all."""
    variant, more = Variant("MHA", config.lengths[0], CHUNK), config.devices
    cases = {
        "one device": (1, sizes.batch),
        "fixed batch a device": (more, more * sizes.batch),
        "fixed global batch": (more, sizes.batch),
    }
    lower = {
        name: partial(ads_step.lower_whole, sizes, variant, make_mesh(devices), batch)
        for name, (devices, batch) in cases.items()
    }
    programs = timing.compile_all(lower, log=_log)
    measured.add(
        f"{more} devices",
        lambda: ads_step.measure_devices(
            sizes,
            variant,
            {name: (programs[name], *case) for name, case in cases.items()},
            steps=config.steps,
            repeats=config.repeats,
        ),
        [variant.row("devices") | {"case": name} for name in cases],
    )


def _log(line: str) -> None:
    print(line, flush=True)


def variants(attention: str, length: int) -> tuple[Variant, ...]:
    """The attention alone, with ADS in chunks, and with a query for each behaviour."""
    return tuple(Variant(attention, length, items) for items in (None, CHUNK, 1))


def summarize(rows: Sequence[Row], *, small: bool) -> dict[str, float]:
    """The figures that README and CI quote; of the sizes of a test they are named small_...

    Each attention's are of the number of behaviours that its rows of a step, or of a request, name first.
    """
    found: dict[str, Any] = {}
    case = {(row["what"], row["attention"], row["length"], row["model"]): row for row in rows if "reason" not in row}

    def first(attention: str, *parts: str) -> int:
        own = (row for row in rows if row["attention"] == attention and row["what"] in parts)
        return next((int(row["length"] or 0) for row in own), 0)

    def get(what: str, variant: Variant, column: str) -> Any:
        return case.get((what, variant.attention, variant.length, variant.name), {}).get(column)

    length = {attention: first(attention, "whole step", "dense part") for attention in ATTENTIONS}
    for tag, items in (("chunk10", CHUNK), ("full", 1)):
        for attention in ATTENTIONS:
            name = f"overhead_{tag}_pct" if attention == "MHA" else f"{attention.lower()}_overhead_{tag}_pct"
            found[name] = get("whole step", Variant(attention, length[attention], items), "overhead_pct")
        alone, variant = (Variant("MHA", length["MHA"], n) for n in (None, items))
        found[f"dense_overhead_{tag}_pct"] = get("dense part", variant, "overhead_pct")
        for name, column in (("memory", "memory_gib"), ("temporaries", "temporaries_gib")):
            a, b = (get("whole step", v, column) for v in (alone, variant))
            found[f"{name}_overhead_{tag}_pct"] = 100 * (b / a - 1) if a and b else None
    found["step_ms_chunk10"] = get("whole step", Variant("MHA", length["MHA"], CHUNK), "ms")
    asked = Variant("MHA", first("MHA", "request"), CHUNK)
    for name in ("p99_ms", "p50_ms"):
        found[f"request_{name}_{get('request', asked, 'candidates')}"] = get("request", asked, name)
    ends = {"fixed batch a device": "", "fixed global batch": "_fixed_global"}
    for row in rows:
        if row.get("case") in ends and "speedup" in row:
            number = {2: "two"}.get(int(row["devices"] or 0), str(row["devices"]))
            found.setdefault(f"{number}_gpu_speedup{ends[str(row['case'])]}", row["speedup"])
    kept = {name: float(value) for name, value in found.items() if value is not None}
    return {f"small_{name}": value for name, value in kept.items()} if small else kept


def page(outcome: results.Result) -> str:
    """The report."""
    panels = []
    more = "% more time than the attention alone"
    ratios = "Medians over repeats of the ratio to the attention alone; contenders in turn within each repeat."
    compiled = "As the compiler counts them for one program; nothing is timed."
    latency = "From ids on the host to scores on the host; each request is asked of all contenders before the next."
    for what, column, title, label, shows in (
        ("whole step", "overhead_pct", "What ADS adds to a whole training step", more, ratios),
        ("dense part", "overhead_pct", "What ADS adds to the dense part", more, ratios),
        ("whole step", "temporaries_gib", "Temporaries of a whole step", "GiB", compiled),
        ("request", "p99_ms", "Latency of a request, 99th percentile", "milliseconds", latency),
    ):
        rows = [row for row in outcome.rows if row["what"] == what and row.get(column) is not None]
        values = {f"{row['attention']}, {row['length']}: {row['model']}": float(row[column] or 0) for row in rows}
        if values:
            drawn = figures.bars(values, title=title, x_label=label, digits=2)
            panels.append(report.Panel(title, drawn, shows))
    shown = [row for row in outcome.rows if row["what"] == "whole step"] or outcome.rows
    said = ("case", "devices", "batch", "ms", "speedup", "memory_gib", "reason", "measured_on")
    several = [{name: row[name] for name in said if name in row} for row in outcome.rows if row["what"] == "devices"]
    return report.page(
        outcome,
        "What ADS costs",
        lead=f"Training steps and requests on one model and one device. Memory is {COUNTS}.",
        headline=shown,
        columns={name: heading for name, heading in COLUMNS.items() if any(name in row for row in shown)},
        panels=panels,
        tables=({"On several devices": several} if several else {}) | {"Everything measured": outcome.rows},
    )

"""How many neighbouring behaviours should share a query of ADS: what smaller chunks gain, and what they cost.

    python -m experiments ads-chunks                     # for an accelerator
    python -m experiments ads-chunks --quick             # sizes of a test: only shows that everything works

Gain: AUC of multi-head attention alone and with ADS at 1, 2, 5 and 10 items a chunk, on the synthetic world whose
domains differ (`ads-multidomain`'s main setting, its features, learning rates, seeds and 50 behaviours), with paired
differences from the attention alone. Cost: parameters, time and temporary memory of a whole training step, and time
and operations of its dense part, on the sizes of `ads-cost` (a table of 10 M items, 200 behaviours, batch 4,096), in
turn on one device. All of it is compiled before anything is timed. Published (arXiv 2502.05523): AUC, parameters and
FLOPs all rise as chunks shrink; at 10 items ADS already beats its base.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, progress, report, results, statistics
from experiments.ads_multidomain_models import QUICK as WORLD_QUICK
from experiments.ads_multidomain_models import AdsMultidomain, model_config
from experiments.datasets import make_world
from experiments.results import Row
from experiments.settings import in_small
from experiments.statistics import Interval
from experiments.steps import ads_scale, ads_step, multidomain, timing
from experiments.steps.ads_scale import Sizes
from experiments.steps.ads_step import Variant
from experiments.steps.multidomain import Impressions, Tuned
from experiments.steps.problem import make_problem
from experiments.steps.runs import side_by_side
from rec_core import metrics
from rec_core.ranking import cost
from rec_core.sharding import make_mesh


@dataclass(frozen=True)
class AdsChunks:
    """Settings.

    Attributes:
      items: behaviours that share a query, one model each; the attention alone is always there.
      attention: "MHA", "DIN" or "CAN".
      train_samples, test_samples: impressions of the world learned from, and each of validation and test.
      seeds: final runs at the best learning rates and number of epochs of `ads-multidomain`'s. batch_size: of Adam.
      length: behaviours of the step that is timed. steps: of a measurement. repeats: measurements.
      quick: sizes of a test.
      out: folder for result.json, written after each part, report.html and the world.
    """

    items: tuple[int, ...] = (10, 5, 2, 1)
    attention: str = "MHA"
    train_samples: int = 800_000
    test_samples: int = 100_000
    seeds: int = 6
    batch_size: int = 512
    length: int = 200
    steps: int = 10
    repeats: int = 7
    quick: bool = False
    out: Path = Path("runs/ads_chunks")

    def __post_init__(self) -> None:
        if not self.items or min(self.items) < 1 or len(set(self.items)) < len(self.items):
            raise ValueError(f"items is {self.items}; give numbers of behaviours, 1 or more, each once")
        if self.attention not in ("MHA", "DIN", "CAN"):
            raise ValueError(f"attention is {self.attention!r}; give 'MHA', 'DIN' or 'CAN'")
        for name in ("train_samples", "test_samples", "seeds", "batch_size", "length", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")

    @property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(Variant(self.attention, self.length, items) for items in (None, *self.items))


_FIGURES = ("auc", "gain", "gain_low", "gain_high", "parameters", "gflop", "ms", "dense_ms", "temporaries_gib")
QUICK: dict[str, Any] = {
    "items": (3, 1), "train_samples": 2048, "test_samples": 400, "seeds": 2, "batch_size": 64,
    "length": 12, "steps": 2, "repeats": 2,
}  # fmt: skip


def run(config: AdsChunks) -> results.Result:
    """Compiles, times, then trains; prints the tables, writes the result and the report."""
    if config.quick:
        config = in_small(config, QUICK)
    results.make_folder(config.out)
    started = results.begin()
    rows = measure_cost(config)
    _write(config, started, rows, {})
    print(f"{progress.table(rows)}\n", flush=True)
    data, world = make_data(config)
    tuned = train_all(config, data, world)
    intervals: dict[str, Interval] = {}
    labels, users = data.label[data.test], data.user[data.test]
    alone = tuned[config.variants[0].name]
    for variant in config.variants:
        found = tuned[variant.name]
        shared = variant.row("AUC") | {"length": world.length, "items": variant.items, **found.best}
        rows += [shared | {"seed": i, "test_auc": metrics.auc(labels, x)} for i, x in enumerate(found.test)]
        if variant.items is not None:
            intervals[variant.name] = statistics.auc_difference(
                labels, alone.test, found.test, users, resamples=world.resamples
            )
    outcome = _write(config, started, rows, intervals)
    report.write(config.out / "report.html", page(config, outcome, intervals, len(labels)))
    print(progress.table(headline(config, rows, intervals)))
    print(f"report: {config.out / 'report.html'}   result: {config.out / 'result.json'}   {outcome.seconds:.0f} s")
    return outcome


def measure_cost(config: AdsChunks) -> list[Row]:
    """Two rows a variant: of the whole step at scale, and of its dense part."""
    sizes = ads_scale.TINY if config.quick else Sizes()
    lower = {("whole step", v): partial(ads_step.lower_whole, sizes, v, make_mesh()) for v in config.variants}
    lower |= {("dense part", v): partial(ads_step.lower_dense, sizes, v) for v in config.variants}
    programs = timing.compile_all(lower, log=partial(print, flush=True))
    rows: list[Row] = []
    for what, measure in (("whole step", ads_step.measure_whole), ("dense part", ads_step.measure_dense)):
        own = {variant: programs[what, variant] for variant in config.variants}
        found, _ = measure(sizes, own, steps=config.steps, repeats=config.repeats)
        for variant, row in zip(config.variants, found, strict=True):
            module, model = ads_scale.model(sizes, variant.attention, variant.length, variant.items)
            row |= {"items": variant.items}
            row |= {"parameters": cost.parameters(ads_scale.abstract_state(module, model).params)["rest"]}
        rows += found
    return rows


def make_data(config: AdsChunks) -> tuple[Impressions, AdsMultidomain]:
    """The impressions of `ads-multidomain` at its main setting, and its settings."""
    world = AdsMultidomain(**(WORLD_QUICK if config.quick else {}), quick=config.quick)
    world = replace(world, train_samples=config.train_samples, test_samples=config.test_samples)
    problem = make_problem(make_world(world.world(world.main), config.out / "prepared"))
    data = multidomain.make_impressions(
        problem,
        name=f"world, domain {world.main:g}",
        train=world.train_samples,
        test=world.test_samples,
        length=world.length,
        width=world.width,
    )
    return data, world


def train_all(config: AdsChunks, data: Impressions, world: AdsMultidomain) -> dict[str, Tuned]:
    """Every variant tuned and trained, side by side, since compiling takes longer than training."""
    size = min(config.batch_size, len(data.train))

    def one(variant: Variant) -> Tuned:
        name = config.attention if variant.items is None else f"{config.attention} + ADS"
        module, model = model_config(data, name, replace(world, items_per_chunk=variant.items or 1))
        return multidomain.tune_and_train(
            data, module, model, epochs=world.epochs, rates=world.trials, seeds=config.seeds, batch_size=size
        )

    jobs = {variant.name: partial(one, variant) for variant in config.variants}
    return side_by_side(jobs, data.name, lambda found: float(found.losses[-1].mean()))


def headline(config: AdsChunks, rows: Sequence[Row], intervals: dict[str, Interval]) -> list[Row]:
    """A line a variant: AUC and its gain beside what the step costs."""
    table: list[Row] = []
    for variant in config.variants:
        own = {str(row["what"]): row for row in rows if row["model"] == variant.name}
        found = [float(row["test_auc"] or 0) for row in rows if row["what"] == "AUC" and row["model"] == variant.name]
        line: Row = {"model": variant.name, "items": variant.items, "auc": float(np.mean(found)) if found else None}
        if variant.name in intervals:
            gain = intervals[variant.name]
            line |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
        whole, dense = own["whole step"], own["dense part"]
        for name in ("parameters", "ms", "overhead_pct", "temporaries_gib", "reason"):
            if name in whole:
                line[name] = whole[name]
        table.append(line | {"dense_ms": dense.get("ms"), "gflop": dense.get("gflop")})
    return table


def summarize(config: AdsChunks, rows: Sequence[Row], intervals: dict[str, Interval]) -> dict[str, float]:
    """The figures; of the sizes of a test they are named small_..."""
    found: dict[str, Any] = {}
    for line in headline(config, rows, intervals):
        tag = "alone" if line["items"] is None else str(line["items"])
        for name in _FIGURES:
            found[f"{name}_{tag}"] = line.get(name)
    kept = {name: float(value) for name, value in found.items() if value is not None}
    return {f"small_{name}": value for name, value in kept.items()} if config.quick else kept


def page(config: AdsChunks, outcome: results.Result, intervals: dict[str, Interval], samples: int) -> str:
    """The report."""
    table = headline(config, outcome.rows, intervals)
    panels = [
        report.Panel(
            "What chunks gain",
            figures.differences(intervals, title="Gain of AUC", x_label="AUC over the attention alone, paired"),
            "Test samples of the last tenth of the time.",
            samples=samples,
            seeds=config.seeds,
            interval="95 %, bootstrap over users and seeds",
        )
    ]
    x = np.array([line["items"] for line in table if line["items"] is not None])
    order = np.argsort(x)
    curves = {}
    for name, label in (
        ("parameters", "parameters"),
        ("gflop", "operations, dense part"),
        ("ms", "time, whole step"),
        ("temporaries_gib", "temporaries"),
    ):
        values = [line.get(name) for line in table]
        if all(values):
            base, *others = (float(value or 0) for value in values)
            curves[label] = (x[order], np.array(others)[order] / base)
    if curves:
        drawn = figures.lines(
            curves, title="Cost of chunks", x_label="behaviours that share a query", log_x=True,
            y_label="times the attention alone", references={"alone": 1.0},
        )  # fmt: skip
        panels.append(report.Panel("What chunks cost", drawn, "A whole training step, in turn on one device."))
    return report.page(
        outcome,
        "Items per chunk",
        lead="The same attention, features, trials and seeds; the step is timed at the sizes of ads-cost.",
        headline=table,
        panels=panels,
        findings=[report.difference(f"{name} over the attention alone", gain) for name, gain in intervals.items()],
        tables={"Everything measured": outcome.rows},
    )


def _write(config: AdsChunks, started: Any, rows: list[Row], intervals: dict[str, Interval]) -> results.Result:
    found = summarize(config, rows, intervals)
    outcome = results.record("ads_chunks", started=started, seeds=range(config.seeds), rows=rows, figures=found)
    results.write(config.out / "result.json", outcome)
    return outcome

"""What a training step of BAHE costs beside LLM-CTR: time, memory and multiply-adds of the four settings.

    python -m experiments bahe-cost                      # for an accelerator; 7 minutes of an H100, 4 of them compile
    python -m experiments bahe-cost --quick              # sizes of a test: only shows that everything works

The settings are the rows of the paper's ablation on one model (the shape of SmolLM2-135M, random weights, which the
time does not depend on), one batch, one attention kernel and one remat policy. LLM-CTR and + FP train all layers. + ABE
and + BA train the upper half over a table of the frozen lower half, whose building is spread over an epoch: of
`distinct_per_sample` texts a sample, as many as the paper's data have (10 M behaviours, 50 M samples). "trained
through" encodes the batch's distinct behaviours in the step, all at once, and trains the lower half too; behaviours are
drawn by Zipf's law. Memory is the peak as compiled: parameters, optimizer, batch and temporaries. How operations grow
with N, M, K and H (`steps.bahe_counts`) is counted on two layers of the same widths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bahe_jax
from bahe_jax import cost
from experiments import figures, progress, report, results
from experiments.results import Row
from experiments.settings import check_joined, in_small
from experiments.steps import bahe_counts, timing
from experiments.steps.bahe_train import (
    SMOLLM2,
    TINY,
    Measured,
    Texts,
    draw_behaviors,
    encoding_speed,
    lower_step,
    measure,
)

# Dense bfloat16 products a second, as the makers publish them; the denominator of MFU.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}
CASES = {
    "LLM-CTR": ("llm_ctr", "full"),
    "+ FP": ("fp", "full"),
    "+ ABE": ("abe", "table"),
    "+ BA": ("ba", "table"),
    "+ ABE, trained through": ("abe", "full"),
    "+ BA, trained through": ("ba", "full"),
}


@dataclass(frozen=True)
class BaheCost:
    """Settings.

    Attributes:
      lengths: tokens of a sample's text.
      batch: samples of a step.
      sequences: N. tokens: K.
      behaviors: distinct texts that behaviours are drawn from.
      distinct_per_sample: texts that the table's building encodes for each sample of an epoch.
      remat: what the backward pass computes again: "none", "dots" or "full".
      texts: that are encoded at a time, for the throughput.
      steps: of a measurement. repeats: measurements, whose median counts.
      only: cases (see `CASES`) that are measured, without counts of operations by size; none for all.
      joined: results of other runs: nothing is measured, the first one gets the rows and figures of the others
        (`results.join`).
      quick: sizes of a test.
      out: folder for result.json and report.html.
    """

    lengths: tuple[int, ...] = (1024, 2048)
    batch: int = 16
    sequences: int = 6
    tokens: int = 5
    behaviors: int = 1_000_000
    distinct_per_sample: float = 0.2
    remat: str = "none"
    texts: int = 1_000_000
    steps: int = 10
    repeats: int = 5
    only: tuple[str, ...] = ()
    joined: tuple[Path, ...] | None = None
    quick: bool = False
    out: Path = Path("runs/bahe_cost")

    def __post_init__(self) -> None:
        check_joined(self.joined)
        for name in ("batch", "sequences", "tokens", "behaviors", "texts", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if unknown := sorted(set(self.only) - set(CASES)):
            raise ValueError(f"only has {unknown}; give some of {list(CASES)}")
        if not self.lengths or min(self.lengths) < self.sequences * self.tokens:
            raise ValueError(f"lengths is {self.lengths}; give at least {self.sequences * self.tokens} tokens each")
        if not 0 <= self.distinct_per_sample < float("inf"):
            raise ValueError(f"distinct_per_sample is {self.distinct_per_sample}; give 0 or more")


QUICK = {"lengths": (32, 64), "batch": 2, "sequences": 2, "behaviors": 50, "texts": 64, "steps": 1, "repeats": 1}


def run(config: BaheCost) -> results.Result:
    """Measures, prints the table, writes the result and the report."""
    if config.quick:
        config = in_small(config, QUICK)
    if config.joined:
        return _finish(config, results.join(config.joined, "bahe_cost"))
    results.make_folder(config.out)
    started = results.begin()
    model = bahe_jax.Config((TINY if config.quick else SMOLLM2).running(remat=config.remat), config.sequences)
    distinct = {length: _distinct(config, length) for length in config.lengths}
    cases = {
        (length, name): replace(model, setting=setting, lower=lower, chunk=-(-distinct[length] // 256) * 256)
        for length in config.lengths
        for name, (setting, lower) in CASES.items()
        if not config.only or name in config.only
    }
    counted = [] if config.only else _growth_rows(config, model)
    programs = timing.compile_all({key: partial(lower_step, _texts(config, key[0]), own) for key, own in cases.items()})
    rows = [_encoding(config, model), *counted]
    speed = float(rows[0]["tokens_per_s"] or 0)
    for (length, name), own in cases.items():
        rows.append(_case(config, own, name, length, distinct[length], speed, programs[length, name]))
        print(progress.table(rows[-1:]), flush=True)
        # After each: a run that is cut short keeps what it has measured.
        found = summarize(rows, small=config.quick)
        outcome = results.record("bahe_cost", started=started, seeds=[0], rows=rows, figures=found)
        results.write(config.out / "result.json", outcome)
    return _finish(config, outcome)


def _finish(config: BaheCost, outcome: results.Result) -> results.Result:
    results.write(config.out / "result.json", outcome)
    report.write(config.out / "report.html", page(config, outcome))
    print(progress.table([row for row in outcome.rows if row["what"] != "complexity"]))
    print(f"report: {config.out / 'report.html'}   result: {config.out / 'result.json'}   {outcome.seconds:.0f} s")
    return outcome


def _encoding(config: BaheCost, model: bahe_jax.Config) -> Row:
    shape = (4, 32) if config.quick else (64, 512)
    speed = encoding_speed(
        model, config.tokens, config.texts, rows=shape[0], row_length=shape[1], repeats=config.repeats
    )
    one = cost.count(
        replace(model, lower="frozen"), behaviors=0, tokens=config.tokens, distinct=config.texts, samples=0
    )
    flops = 2 * one.total / (config.texts * config.tokens) * speed
    peak = PEAK_FLOPS.get(jax.local_devices()[0].device_kind)
    row: Row = {"what": "encoding", "tokens_per_s": speed, "tflops": flops / 1e12}
    return row | {"mfu": flops / peak if peak else None, "texts": config.texts}


def _growth_rows(config: BaheCost, model: bahe_jax.Config) -> list[Row]:
    two = model.language_model.running(attention="reference")  # plain operations, which every compiler counts
    two = replace(two, transformer=replace(two.transformer, layers=2))
    settings = {setting: name for name, (setting, _) in CASES.items() if "through" not in name}
    varied = bahe_counts.VARIED if not config.quick else {"M": (17, 34), "H": (0.2, 0.8)}
    return bahe_counts.rows(replace(model, language_model=two), settings, varied)


def _texts(config: BaheCost, length: int) -> Texts:
    return Texts(config.batch, length, config.sequences, config.tokens, config.behaviors)


def _distinct(config: BaheCost, length: int) -> int:
    """Distinct behaviours of the batch."""
    sequences, item = draw_behaviors(_texts(config, length))
    return len(np.unique(np.append(sequences, item)))


def _case(
    config: BaheCost,
    model: bahe_jax.Config,
    name: str,
    length: int,
    distinct: int,
    speed: float,
    program: timing.Program,
) -> Row:
    """A row; where the step could not run on the device, one that says why."""
    texts = _texts(config, length)
    row: Row = {"what": name, "length": length, "batch": config.batch, "behaviors": texts.most}
    if program.call is None:
        return row | {"reason": program.reason}
    try:
        found: Measured = measure(texts, model, program, steps=config.steps, repeats=config.repeats)
    except jax.errors.JaxRuntimeError as error:
        return row | {"reason": timing.why(error)}
    built = config.batch * config.distinct_per_sample * config.tokens / speed * 1000
    in_table = model.lower == "table"
    counted = cost.count(
        model,
        behaviors=texts.most,
        tokens=config.tokens,
        distinct=0 if in_table else distinct,
        samples=config.batch,
    )
    row |= {"ms": found.ms, "ms_low": found.ms_low, "ms_high": found.ms_high, "peak_gib": found.gib}
    row |= {"table_ms": built if in_table else 0.0, "total_ms": found.ms + (built if in_table else 0.0)}
    share = distinct / (config.batch * (config.sequences * texts.most + 1))
    row |= {"distinct_share": None if in_table or not model.by_behavior else share}
    return row | {"forward_gflop": 2 * counted.total / 1e9, "papers_pairs": counted.paper}


def summarize(rows: list[Row], *, small: bool) -> dict[str, float]:
    """The figures that README and CI quote; of smaller sizes they are named small_..."""
    found = {"encode_tokens_per_s": rows[0]["tokens_per_s"], "encode_mfu": rows[0]["mfu"]}
    by_case = {(row["what"], row["length"]): row for row in rows[1:] if "ms" in row}
    for (name, length), row in by_case.items():
        base = by_case.get(("LLM-CTR", length))
        if base is None or name == "LLM-CTR":
            continue
        tag = {"+ FP": "_fp", "+ ABE": "_abe", "+ BA": ""}.get(str(name))
        through = {"+ ABE, trained through": "_abe_through", "+ BA, trained through": "_through"}.get(str(name))
        after = tag if tag is not None else through
        found[f"speedup_{length}{after}"] = float(base["total_ms"] or 0) / float(row["total_ms"] or 1)
        found[f"memory_ratio_{length}{after}"] = float(base["peak_gib"] or 0) / float(row["peak_gib"] or 1)
    kept = {name: float(value) for name, value in found.items() if value is not None}
    return {f"small_{name}": value for name, value in kept.items()} if small else kept


def name_of(row: Mapping[str, Any]) -> str:
    """The case, and whether another run measured it (`results.join`)."""
    return row["what"] + ", another run" * ("measured_on" in row)


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    origin = ("measured_on", "commit", "command")
    return {"what": name_of(row)} | {name: x for name, x in row.items() if name not in ("what", *origin)}


def page(config: BaheCost, outcome: results.Result) -> str:
    """The report."""
    steps = [row for row in outcome.rows if "ms" in row]
    panels = []
    for column, title, label in (
        ("total_ms", "Time of a training step", "milliseconds, the table's share included"),
        ("peak_gib", "Peak memory of a training step", "GiB"),
        ("forward_gflop", "Operations of a forward pass, counted", "GFLOP a batch"),
    ):
        values = {f"{name_of(row)}, {row['length']} tokens": float(row[column] or 0) for row in steps}
        shows = f"{config.batch} samples of {config.sequences} sequences, behaviours of {config.tokens} tokens."
        panels.append(report.Panel(title, figures.bars(values, title=title, x_label=label, digits=2), shows))
    panels += [_growth(outcome.rows, name) for name in dict.fromkeys(row.get("varied") for row in outcome.rows) if name]
    panels.append(_complexity(config))
    return report.page(
        outcome,
        "What BAHE costs",
        lead="The four settings of the paper's ablation on one model, one batch and one device.",
        headline=[_short(row) for row in steps] or outcome.rows,
        panels=panels,
        tables={"Encoding behaviours": [row for row in outcome.rows if row["what"] == "encoding"]},
    )


def _growth(rows: Sequence[Mapping[str, Any]], varied: Any) -> report.Panel:
    """How LLM-CTR and + BA grow with one size: as the compiler counts, exactly, and by the paper's formula."""
    what = {
        "N": "kinds of behaviour",
        "M": "behaviours of a kind",
        "K": "tokens of a behaviour",
        "H": "distinct texts a sample",
    }
    kinds = {"compiler_gflop": "compiler", "exact_gflop": "exact", "papers_pairs": "the paper's formula"}
    curves = {}
    for name in ("LLM-CTR", "+ BA"):
        own = [row for row in rows if row.get("varied") == varied and row["setting"] == name]
        usual = next(row for row in own if row[varied] == bahe_counts.USUAL[varied])
        for column, label in kinds.items():
            at = np.array([row[varied] for row in own])
            curves[f"{name}, {label}"] = at, np.array([row[column] / usual[column] for row in own])
    sizes = ", ".join(f"{name} = {value:g}" for name, value in bahe_counts.USUAL.items())
    title = f"Operations by {varied}, {what[varied]}"
    drawn = figures.lines(curves, title=title, x_label=what[varied], y_label="times the usual", log_x=True)
    shows = (
        "A forward pass. The compiler counts all pairs of a row in attention, the exact count those of causal texts, "
    )
    return report.Panel(title, drawn, shows + f"the paper's formula nothing but pairs. Usual: {sizes}.")


def _complexity(config: BaheCost) -> report.Panel:
    """How the exact counts and the paper's attention-only formulas fall from LLM-CTR, over the text's length."""
    lengths = np.array([256, 512, 1024, 2048, 4096, 8192])
    curves = {}
    for setting, name in (("abe", "+ ABE"), ("ba", "+ BA")):
        for kind in ("exact", "paper"):
            falls = []
            for length in lengths:
                most = bahe_jax.behaviors_that_fit(int(length), config.sequences, config.tokens)
                sizes = {"behaviors": most, "tokens": config.tokens, "samples": 1000}
                base = bahe_jax.Config(SMOLLM2, config.sequences, setting="llm_ctr", lower="full")
                low = cost.count(base, **sizes)
                one = cost.count(
                    replace(base, setting=setting), distinct=round(1000 * config.distinct_per_sample), **sizes
                )
                falls.append(low.total / one.total if kind == "exact" else low.paper / one.paper)
            label = "with the linear layers" if kind == "exact" else "the paper's formula"
            curves[f"{name}, {label}"] = (lengths, np.log10(np.array(falls)))
    title = "Multiply-adds of LLM-CTR over those of + ABE and + BA"
    drawn = figures.lines(
        curves, title=title, x_label="tokens of a sample's text", y_label="ratio (power of ten)", log_x=True
    )
    shows = "A thousand samples, the table's texts encoded once; forward passes."
    return report.Panel(title, drawn, shows)

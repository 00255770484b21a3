"""BAHE's ablation on real texts: what FP, ABE and BA cost in AUC, and what a ranker gains from the answers.

Shows, on MovieLens-1M (titles and genres; liked, disliked and most recent films) and an Amazon domain (negatives
sampled by popularity within the month among items that the user has at no time; the AUC of popularity alone beside it):
AUC over seeds of a DNN without text, LLM-CTR, + FP, + ABE and + BA by the length of a sample's text; mean against last
pooling; splits at 1/4, 1/2, 3/4; random weights in place of pre-trained; and AUC_d, of a DNN that learns from later
samples than the language model, without and with the answers Q_u and Q_i.

    python -m experiments bahe-text --model SmolLM2-135M.gguf --amazon PATH/amazon2014-beauty   # for an accelerator
    python -m experiments bahe-text --model SmolLM2-135M.gguf --only dnn bahe_1024 --seeds 1    # two points of it
    python -m experiments bahe-text --quick                                                     # a toy model, two cores

The four settings train the same part of one model: upper layers, final norm, F_d and head. Token table and lower layers
are frozen (a table where the lower layers see one behaviour alone), random ones too. Every seed of every point is kept
when it is done and result.json is written after every point, so that a stopped run goes on.

All points with 3 seeds of 9,600 samples took about 15 minutes of two H200, several processes to a device and one
compilation cache (`JAX_COMPILATION_CACHE_DIR`): a process for each point (`--only`) keeps devices busy while others
compile. `bahe_text_models.estimate` counts the multiply-adds of a point.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import bahe_jax
from bahe_jax import language_model
from experiments import figures, progress, report, results, statistics
from experiments.bahe_text_models import (
    ASSUMED_FLOPS,
    QUICK,
    QUICK_ONLY,
    BaheText,
    Outcome,
    Point,
    check_only,
    train_all,
)
from experiments.datasets import Data, load, make_world
from experiments.results import Row
from experiments.settings import in_small
from experiments.statistics import Interval
from experiments.steps.bahe_text import Language, Words, random_weights
from experiments.steps.bahe_text_data import TextProblem, item_texts, make_texts
from experiments.steps.problem import make_problem
from rec_core import metrics
from rec_core.data.records import Dataset
from rec_core.data.schema import DataError
from rec_core.data.world import World
from rec_core.transformer import TransformerConfig

TINY = language_model.Config(
    "llama", vocabulary=256, transformer=TransformerConfig(16, 4, 2, 1, 8, 16), tied=True, eos=(0,)
)
QUICK_WORLD = World(
    users=60, items=120, categories=8, departments=2, mean_length=30.0, max_length=80, min_impressions=20, days=300.0
)
WITHOUT = {"rank": "DNN", "both": "DNN, the language model's samples too"}
VARIED = {"pooling": "Pooling", "split": "Where the layers are split", "weights": "Pre-trained and random weights"}


def run(config: BaheText) -> results.Result:
    """Trains what is not done yet, prints the table, writes `out`/result.json and `out`/report.html."""
    if config.quick:
        config = in_small(config, QUICK, together=("lengths", "base"))
        config = in_small(config, {"only": tuple(name.format(config.base) for name in QUICK_ONLY)})
    check_only(config)
    started = results.begin()
    config.out.mkdir(parents=True, exist_ok=True)
    language = read_language(config)
    outcomes: dict[str, Outcome] = {}

    def record(rows: list[Row] | None = None) -> results.Result:
        every = [row for data in outcomes for row in point_rows(outcomes[data], data)] + (rows or [])
        found = summarize(outcomes)
        if config.quick:
            found = {f"small_{name}": value for name, value in found.items()}
        outcome = results.record("bahe_text", started=started, seeds=range(config.seeds), rows=every, figures=found)
        results.write(config.out / "result.json", outcome)
        return outcome

    for data, dataset in datasets(config).items():
        texts = read_texts(dataset, language, config)

        def done(outcome: Outcome, data: str = data) -> None:
            outcomes[data] = outcome
            record()

        train_all(texts, language, data, config, done=done)
    if not any(outcome.runs for outcome in outcomes.values()):
        raise ValueError(f"only={config.only}: nothing of {config.out} is done, and nothing was to be trained")
    compared = {data: differences(outcome, config.resamples) for data, outcome in outcomes.items()}
    rows: list[Row] = [
        {"data": data, "difference": what, "mean": gain.mean, "low": gain.low, "high": gain.high, "seeds": gain.seeds}
        for data, gains in compared.items()
        for what, gain in gains.items()
    ]
    made = record(rows)
    print(progress.table([row for row in made.rows if "point" in row]))
    path = report.write(config.out / "report.html", page(config, made, outcomes, compared))
    print(f"report: {path}   result: {config.out / 'result.json'}   {made.seconds:.0f} s", flush=True)
    return made


def read_language(config: BaheText) -> Language:
    """The language model, float32; it computes in bfloat16 on an accelerator. A toy for a quick run.

    Raises:
      ValueError: no model is named.
    """
    if config.quick:
        toy = TINY.running(remat=config.remat)
        return Language(random_weights(toy, 0), toy, Words(toy.vocabulary))
    if config.model is None:
        raise ValueError("model is not given: name the folder or .gguf file of SmolLM2-135M, or take --quick")
    params, model = bahe_jax.read(config.model)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = model.running(dtype=dtype, remat=config.remat)
    return Language(params, model, bahe_jax.read_tokenizer(config.model, model))


def datasets(config: BaheText) -> dict[str, Dataset]:
    """The data sets by their name in `plan`; a quick run has a synthetic world in the place of MovieLens-1M."""
    kept = config.out / "prepared"
    if config.quick:
        return {"ml1m": make_world(QUICK_WORLD, kept)}
    found = {"ml1m": load(Data(data="ml-1m", data_dir=config.ml_1m, prepared=kept))}
    if config.amazon is not None:
        found["amazon"] = load(Data(data="amazon", data_dir=config.amazon, prepared=kept))
    return found


def read_texts(dataset: Dataset, language: Language, config: BaheText) -> TextProblem:
    """Texts and samples of a data set, and a line that says what they are."""
    texts = make_texts(
        make_problem(dataset),
        item_texts(dataset),
        language.tokenizer,
        limit=config.limit,
        train=config.train_samples,
        rank=config.rank_samples,
        test=config.test_samples,
        rank_share=config.rank_share,
    )
    if len(np.unique(texts.problem.samples.label[texts.test])) < 2:
        raise DataError(f"{texts.problem.name}: all test samples have one label; give more events")
    print(
        f"{texts.problem.name}: {len(texts.train):,} samples for the language model, {len(texts.rank):,} for the "
        f"ranker, {len(texts.test):,} for the test; {texts.tokens} tokens a behaviour, {texts.cut:.1%} cut",
        flush=True,
    )
    return texts


def point_rows(outcome: Outcome, data: str) -> list[Row]:
    """A row for each seed of each point that is done."""
    test, name = outcome.test, outcome.texts.problem.name
    known, rows = test["known"], []
    for point in outcome.points:
        for seed, run in sorted(outcome.runs.get(point.name, {}).items()):
            row: Row = {"data": name, "point": point.name, "model": point.label, "seed": seed}
            row |= {"test_auc": metrics.auc(test["label"], run.logits)}
            for what, part in (("known_users_auc", known), ("new_users_auc", ~known)):
                both = len(np.unique(test["label"][part])) == 2
                row[what] = metrics.auc(test["label"][part], run.logits[part]) if both else None
            downstream = next((run.params[what] for what in ("answers", "rank") if what in run.params), None)
            row["auc_d"] = None if downstream is None else metrics.auc(test["label"], downstream)
            row |= {"last_loss": float(run.losses[-20:].mean()), "seconds": float(run.params["seconds"])}
            rows.append(row | {"estimated_s": outcome.flops[point.name] / ASSUMED_FLOPS, "device": run.device})
    rows.append({"data": name, "model": "popularity alone", "test_auc": metrics.auc(test["label"], test["popularity"])})
    return rows


def summarize(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """The figures that README and CI quote: means over the seeds that are done."""
    found: dict[str, float] = {}
    for data, outcome in outcomes.items():
        test, own = outcome.test, "amazon_" if data == "amazon" else ""
        found[f"{own}train_samples"] = len(outcome.texts.train)
        found[f"{own}popularity_auc"] = metrics.auc(test["label"], test["popularity"])
        for point in outcome.points:
            key = point.figure.split("_auc")[0]
            names = {
                "own": point.figure,
                "answers": f"{key}_auc_d",
                "rank": f"{key}_auc_d",
                "both": f"{key}_both_auc_d",
            }
            for what, name in names.items():
                if logits := outcome.logits(point.name, what):
                    found[name] = float(np.mean([metrics.auc(test["label"], x) for x in logits.values()]))
    return found


def differences(outcome: Outcome, resamples: int) -> dict[str, Interval]:
    """Paired differences of AUC, of seeds that both have: the settings against LLM-CTR and the DNN, the variations
    against their base, and rankers with answers against those without."""
    dnn = next(point for point in outcome.points if point.setting == "dnn")
    wanted: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {}
    for point in outcome.points:
        if point is dnn:
            continue
        name, rival = point.name, point.like(point.setting if point.variation else "llm_ctr")
        if rival != name:
            wanted[f"{name} - {rival}"] = (rival, "own"), (name, "own")
        if not point.variation:
            wanted[f"{name} - {dnn.name}"] = (dnn.name, "own"), (name, "own")
        for what, label in WITHOUT.items() if point.downstream else ():
            wanted[f"AUC_d: DNN with answers of {name} - {label}"] = (dnn.name, what), (name, "answers")
    found = {}
    for text, (a, b) in wanted.items():
        first, second = outcome.logits(*a), outcome.logits(*b)
        if seeds := sorted(first.keys() & second.keys()):
            one, other = (np.stack([logits[seed] for seed in seeds]) for logits in (first, second))
            found[text] = statistics.auc_difference(
                outcome.test["label"], one, other, outcome.test["user"], resamples=resamples
            )
    return found


def intervals(outcome: Outcome, resamples: int) -> dict[tuple[str, str], Interval]:
    """AUC of each point and kind of logits (`Outcome.logits`) that is there."""
    found = {}
    for point in outcome.points:
        for what in ("own", "answers", *WITHOUT):
            if logits := outcome.logits(point.name, what):
                scores = np.stack([logits[seed] for seed in sorted(logits)])
                found[point.name, what] = statistics.auc_interval(
                    outcome.test["label"], scores, outcome.test["user"], resamples=resamples
                )
    return found


def page(
    config: BaheText,
    made: results.Result,
    outcomes: Mapping[str, Outcome],
    compared: Mapping[str, Mapping[str, Interval]],
) -> str:
    """The report."""
    panels: list[report.Panel] = []
    headline: list[dict[str, Any]] = []
    findings: list[report.Finding] = []
    for data, outcome in outcomes.items():
        name, found = outcome.texts.problem.name, intervals(outcome, config.resamples)
        for point in outcome.points:
            if (point.name, "own") in found:
                own = found[point.name, "own"]
                line: dict[str, Any] = {"data": name, "model": point.label}
                line |= {"tokens": point.length or None, "AUC": own.mean, "low": own.low, "high": own.high}
                later = found.get((point.name, "answers")) or found.get((point.name, "rank"))
                headline.append(line | {"AUC_d": None if later is None else later.mean, "seeds": own.seeds})
        ours = re.compile(rf"bahe_{config.amazon_length if data == 'amazon' else config.base}(_[a-z_]+)? - ")
        findings += [report.difference(f"{name}: {x}", gain) for x, gain in compared[data].items() if ours.search(x)]
        panels += _panels(outcome, found)
    return report.page(
        made,
        "BAHE on real texts",
        headline=headline,
        panels=panels,
        findings=findings,
        tables={
            "Differences of AUC": [row for row in made.rows if "difference" in row],
            "Everything measured": [row for row in made.rows if "model" in row],
        },
        lead=(
            "One language model in four settings, the same part trained in each. Published on other data, at 1,024 and "
            "2,048 tokens: LLM-CTR .7161 and .7276, + FP .7143 and .7326, + ABE .7150 and .7332, + BA .7132 and .7309; "
            "AUC_d .7219 without answers, and .7323, .7369, .7372 and .7352 with them."
        ),
    )


def _panels(outcome: Outcome, found: Mapping[tuple[str, str], Interval]) -> list[report.Panel]:
    name, test = outcome.texts.problem.name, outcome.test
    counts = {"samples": len(test["label"]), "users": len(np.unique(test["user"]))}
    shared: dict[str, Any] = {"interval": "95 %, bootstrap over users and seeds", **counts}
    levels = {"popularity alone": metrics.auc(test["label"], test["popularity"])}
    done = [point for point in outcome.points if (point.name, "own") in found]
    levels |= {point.label: found[point.name, "own"].mean for point in done if point.setting == "dnn"}
    panels = []

    def bars(title: str, chosen: Mapping[str, Interval], shows: str) -> None:
        drawn = figures.auc_bars(chosen, title=f"{title}, {name}", references=levels)
        panels.append(report.Panel(f"{title}, {name}", drawn, shows, **shared))

    plain = [point for point in done if point.length and not point.variation]
    if len({point.length for point in plain}) > 1:
        panels.append(_by_length(plain, found, name, levels, shared))
    elif plain:
        chosen = {f"{point.label}, {point.length} tokens": found[point.name, "own"] for point in plain}
        bars("AUC by setting", chosen, "Test samples, the last tenth of the time.")
    for variation, title in VARIED.items():
        varied = [point for point in done if point.variation == variation]
        bases = {point.like(point.setting) for point in varied}
        chosen = {point.label: found[point.name, "own"] for point in done if point in varied or point.name in bases}
        if varied:
            bars(title, chosen, "At the base length, one thing changed at a time; mean pooling, split at 1/2.")
    later = {WITHOUT[what]: x for (_, what), x in found.items() if what in WITHOUT}
    later |= {f"answers of {point.label}": found[key] for point in done if (key := (point.name, "answers")) in found}
    if later:
        bars("AUC of a downstream ranker", later, "It learns from later samples than the language model.")
    curves: dict[str, Any] = {}
    for point in done:
        losses = np.stack(list(run.losses for run in outcome.runs[point.name].values())).mean(axis=0)
        curves |= {point.name: (np.arange(len(losses)), losses)} if point.length else {}
    if curves:
        drawn = figures.loss_curves(curves, title=f"Training losses, {name}", x_label="step")
        panels.append(report.Panel(f"Training losses, {name}", drawn, "On training batches, mean over seeds."))
    return panels


def _by_length(
    points: list[Point],
    found: Mapping[tuple[str, str], Interval],
    name: str,
    levels: Mapping[str, float],
    shared: Mapping[str, Any],
) -> report.Panel:
    series, bands = {}, {}
    for label in dict.fromkeys(point.label for point in points):
        own = sorted((point.length, found[point.name, "own"]) for point in points if point.label == label)
        at = np.array([length for length, _ in own])
        series[label] = (at, np.array([x.mean for _, x in own]))
        bands[label] = (np.array([x.low for _, x in own]), np.array([x.high for _, x in own]))
    title = f"AUC by setting and length, {name}"
    drawn = figures.lines(
        series, title=title, x_label="tokens of a sample's text", y_label="AUC", bands=bands, references=levels,
        log_x=True,
    )  # fmt: skip
    return report.Panel(title, drawn, "Test samples, the last tenth of the time.", **shared)

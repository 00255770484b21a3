"""LUM's three steps end to end: does a large user model make a ranking model better, and does it scale?

Shows: DIN's AUC on the last tenth of the time without and with LUM's answers (paired over seeds and users, beside the
oracle's where the data know it), and Recall@10 of the next item over at least 4 sizes x 3 lengths on the same targets,
with both scaling laws fitted.

    make quickstart                                                              # synthetic world, under 5 minutes
    python -m experiments quickstart --data ml-1m --data-dir PATH/ml-1m          # MovieLens-1M
    python -m experiments quickstart --data table --data-dir FILE.csv --columns user=uid item=sku time=ts

LUM is pre-trained on what is older than DIN's training samples; DIN learns from the same samples in both arms, and no
vector that it reads rests on an event at or after its sample. Pre-training resumes in `out`.
Results: `results/quickstart_world.json`, `results/quickstart_ml1m.json`.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, report, results, scaling_law, statistics
from experiments.datasets import Data, load
from experiments.progress import table
from experiments.settings import in_small
from experiments.steps import rank
from experiments.steps.ask import Knowledge, ask
from experiments.steps.pretrain import lum_config, pretrain
from experiments.steps.problem import Problem, make_problem
from experiments.steps.sweep import sweep
from lum_jax import utilization
from rec_core.data.world import World


@dataclass(frozen=True)
class Quickstart:
    """Settings; the defaults fit two cores in under 5 minutes on the synthetic world.

    Attributes:
      data: which data.
      out: folder for report.html, result.json, checkpoints and the knowledge store; runs/quickstart-<data> by default.
      quick: a run of seconds that only shows that everything works.
      seeds: how often each ranking model is trained.
      size: of LUM, as in `lum_jax.SIZES`.
      lum_events: behaviours that LUM's pre-training sees (with repetitions).
      lum_share: LUM sees the first share of the training samples' time (1: all of it). None: what is older than the
        samples that DIN learns from, so that its answers come from a model that has not seen their labels, as at test
        time (all of it where DIN takes every sample).
      lum_length: behaviours of a prefix.
      every: behaviours from one stored answer of a user to the next.
      history: behaviours that DIN reads.
      max_samples: the newest training samples that DIN learns from.
      epochs: of DIN.
      ablate: also DIN with the direct features alone and with interest matching alone.
      batch_rows: packed rows of one pre-training step.
      sweep_sizes, sweep_lengths, sweep_events, sweep_targets: the scaling sweep.
    """

    data: Data = field(default_factory=Data)
    out: Path | None = None
    quick: bool = False
    seeds: int = 3
    size: str = "100k"
    lum_events: int = 300_000
    lum_share: float | None = None
    lum_length: int = 128
    every: int = 8
    history: int = 32
    max_samples: int = 150_000
    epochs: float = 1.0
    ablate: bool = False
    batch_rows: int = 4
    sweep_sizes: tuple[str, ...] = ("6k", "25k", "100k", "400k")
    sweep_lengths: tuple[int, ...] = (8, 32, 128)
    sweep_events: int = 60_000
    sweep_targets: int = 800

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} must be at least 1")
        if self.lum_share is not None and not 0 < self.lum_share <= 1:
            raise ValueError(f"lum_share={self.lum_share} must be above 0 and at most 1")
        if len(self.sweep_sizes) < 3 or len(self.sweep_lengths) < 3:
            raise ValueError(
                "sweep_sizes and sweep_lengths need at least 3 values each: a law cannot be fitted to fewer"
            )


QUICK = {
    "lum_events": 8_000,
    "lum_length": 32,
    "max_samples": 8_000,
    "sweep_sizes": ("6k", "25k", "100k"),
    "sweep_lengths": (4, 8, 16),
    "sweep_events": 2_000,
    "sweep_targets": 100,
    "seeds": 2,
}
QUICK_WORLD = World(users=300, items=400, categories=16, mean_length=40, max_length=200)


def run(config: Quickstart) -> results.Result:
    """Runs everything, prints the table, writes `out`/result.json and `out`/report.html."""
    if config.quick:
        config = in_small(config, QUICK)
    out = config.out or Path("runs") / f"quickstart-{config.data.data}"
    out.mkdir(parents=True, exist_ok=True)
    started = results.begin()
    problem = make_problem(load(config.data, world=QUICK_WORLD if config.quick else None))
    sizes = {name: len(index) for name, index in problem.splits.items()}
    print(f"samples: {sizes['train']:,} train, {sizes['valid']:,} validation, {sizes['test']:,} test", flush=True)

    lum = lum_config(problem, config.size)
    pretrained = pretrain(
        problem,
        lum,
        until=lum_until(problem, config),
        events=config.lum_events,
        max_length=config.lum_length,
        row_length=config.lum_length,
        batch_rows=config.batch_rows,
        directory=out / f"lum-{config.size}",
    )
    store = out / "knowledge"
    shutil.rmtree(store, ignore_errors=True)  # answers of an earlier model do not mix with this one's
    knowledge = ask(problem, pretrained.params, lum, store=str(store), max_length=config.lum_length, every=config.every)
    print(f"knowledge: {len(knowledge.answers):,} answers of version {knowledge.answers.version}", flush=True)
    ranking = compare(problem, knowledge, config)
    points = sweep(
        problem,
        sizes=config.sweep_sizes,
        lengths=config.sweep_lengths,
        events=config.sweep_events,
        target_count=config.sweep_targets,
        batch_rows=config.batch_rows,
    )
    laws = scaling_law.fit_sweep(points)
    return _publish(config, out, problem, pretrained.history, ranking, points, laws, started)


def newest_training_samples(problem: Problem, count: int) -> np.ndarray:
    """Indices of the `count` newest samples of the training period, in the samples' order."""
    train = problem.splits["train"]
    return np.sort(train[np.argsort(problem.samples.time[train], kind="stable")[-count:]])


def lum_until(problem: Problem, config: Quickstart) -> int:
    """The time before which LUM's pre-training ends; see `Quickstart.lum_share`."""
    time = np.sort(problem.samples.time[problem.splits["train"]])
    if config.lum_share is None:
        first = max(0, len(time) - config.max_samples)
    else:
        first = int(config.lum_share * len(time)) % len(time)
    return int(time[first]) if first else problem.train_end


@dataclass(frozen=True)
class Ranking:
    """Step 3's outcome on the test period; `apart` are AUCs of users with and without training samples."""

    systems: dict[str, statistics.Interval]
    gain: statistics.Interval
    apart: dict[str, dict[str, float]]
    popularity: float
    oracle: float | None
    rows: list[results.Row]
    samples: int
    users: int
    curves: dict[str, Any]


def compare(problem: Problem, knowledge: Knowledge, config: Quickstart) -> Ranking:
    """DIN without and with the answers: same samples, same order, same seeds."""
    arms: dict[str, np.ndarray | None] = {"DIN": None, "DIN + LUM": rank.answer_features(problem, knowledge)}
    if config.ablate:
        arms |= {
            f"DIN + LUM, {use} only": rank.answer_features(problem, knowledge, use=(use,)) for use in utilization.USES
        }
    train, test = newest_training_samples(problem, config.max_samples), problem.splits["test"]
    logits: dict[str, list[np.ndarray]] = {}
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    rows: list[results.Row] = []
    for name, dense in arms.items():
        model = rank.rank_config(problem, dense=0 if dense is None else dense.shape[1])
        for seed in range(config.seeds):
            trained = rank.train_ranker(
                problem,
                model,
                train,
                dense=dense,
                length=config.history,
                epochs=config.epochs,
                seed=seed,
                label=f"{name}, seed {seed}",
            )
            found = rank.scores(problem, trained.params, model, test, dense=dense, length=config.history)
            logits.setdefault(name, []).append(found)
            rows.append(
                {"system": name, "seed": seed, "test_auc": rank.auc(problem, test, found), "steps": trained.steps}
            )
            curves.setdefault(name, []).append([(r["step"], r["loss"]) for r in trained.history if "loss" in r])
    labels, users = problem.samples.label[test], problem.samples.user[test]
    without, informed = np.stack(logits["DIN"]), np.stack(logits["DIN + LUM"])
    past = problem.splits["train"]
    known = np.isin(users, problem.samples.user[past])
    groups = {"known_users": known, "new_users": ~known}
    apart = {
        name: {
            group: float(np.mean([rank.auc(problem, test[mask], scores[mask]) for scores in found]))
            for group, mask in groups.items()
            if 0 < labels[mask].sum() < mask.sum()
        }
        for name, found in logits.items()
    }
    counts = np.bincount(problem.samples.item[past], problem.samples.label[past], minlength=len(problem.category))
    return Ranking(
        systems={n: statistics.auc_interval(labels, np.stack(s), users, resamples=1000) for n, s in logits.items()},
        gain=statistics.auc_difference(labels, without, informed, users, resamples=1000),
        apart=apart,
        popularity=rank.auc(problem, test, counts[problem.samples.item[test]]),
        oracle=rank.oracle(problem, test),
        rows=rows,
        samples=len(test),
        users=len(np.unique(users)),
        curves={name: np.mean(np.array(c), axis=0).T for name, c in curves.items()},
    )


def _publish(
    config: Quickstart,
    out: Path,
    problem: Problem,
    history: list[dict[str, Any]],
    ranking: Ranking,
    points: list[results.Row],
    laws: scaling_law.SweepLaws,
    started: Any,
) -> results.Result:
    numbers = {
        "din_auc": ranking.systems["DIN"].mean,
        "din_lum_auc": ranking.systems["DIN + LUM"].mean,
        "gain_auc": ranking.gain.mean,
        "gain_auc_low": ranking.gain.low,
        "gain_auc_high": ranking.gain.high,
        **laws.size.figures("size_law"),
        **laws.length.figures("length_law"),
    }
    numbers["popularity_auc"] = ranking.popularity
    for name, key in (("DIN", "din"), ("DIN + LUM", "din_lum")):
        numbers |= {f"{key}_auc_{group}": value for group, value in ranking.apart[name].items()}
    if ranking.oracle is not None:
        numbers["oracle_auc"] = ranking.oracle
    if problem.reachable and ranking.oracle is not None:
        numbers["reachable_auc"] = ranking.oracle  # the true probability is a function of the observed history
    rows = [{"kind": "ranking", **row} for row in ranking.rows] + [{"kind": "sweep", **row} for row in points]
    outcome = results.record(
        f"quickstart_{problem.name.replace('-', '')}",
        started=started,
        seeds=range(config.seeds),
        rows=rows,
        figures=numbers,
    )
    results.write(out / "result.json", outcome)

    headline = [
        {
            "system": name,
            "AUC": value.mean,
            "low": value.low,
            "high": value.high,
            "seeds": value.seeds,
            **{group.replace("_", " "): auc for group, auc in ranking.apart[name].items()},
        }
        for name, value in ranking.systems.items()
    ]
    headline.append({"system": "popularity alone", "AUC": ranking.popularity})
    if ranking.oracle is not None:
        reach = ", reachable" if problem.reachable else ""
        headline.append({"system": f"oracle (true probability{reach})", "AUC": ranking.oracle})
    gain = report.difference("DIN with LUM's answers against DIN", ranking.gain)
    by_size = report.law("Recall@10 over model size", laws.size)
    by_length = report.law("Recall@10 over length", laws.length)
    print(table(headline))
    print(table(points, ("size", "parameters", "length", "recall_at_10", "recall_at_50", "loss")))
    for finding in (gain, by_size, by_length):
        print(finding.text)

    losses = [record for record in history if "loss" in record]
    common = {"samples": ranking.samples, "users": ranking.users, "seeds": config.seeds}
    negatives = " Negatives were sampled in proportion to popularity." if problem.sampled_negatives else ""
    panels = [
        report.Panel(
            "Ranking",
            figures.auc_bars(ranking.systems, oracle=ranking.oracle),
            f"AUC of DIN on the last tenth of the time, without and with LUM's answers.{negatives}",
            interval="95 %, bootstrap over users and seeds",
            notes=(gain.text,),
            **common,
        ),
        _law_panel("Recall over model size", laws.size, points, "parameters", "length", "transformer parameters"),
        _law_panel("Recall over length", laws.length, points, "length", "size", "history length (events)"),
        report.Panel(
            "Pre-training",
            figures.loss_curves({"LUM": ([r["step"] for r in losses], [r["loss"] for r in losses])}, x_label="step"),
            "InfoNCE of the next item at condition positions, on training batches.",
        ),
        report.Panel(
            "Ranking losses",
            figures.loss_curves({name: (step, loss) for name, (step, loss) in ranking.curves.items()}, x_label="step"),
            "Binary cross-entropy on training batches, mean over seeds.",
            seeds=config.seeds,
        ),
    ]
    text = report.page(
        outcome,
        f"LUM's three steps on {problem.name}",
        headline=headline,
        panels=panels,
        findings=[gain, by_size, by_length],
        tables={"The sweep": points, "Each ranking run": ranking.rows},
        lead=(
            "A large user model is pre-trained on condition-item sequences, asked grouped questions about every user, "
            "and its stored answers are given to DIN as fixed features."
        ),
    )
    path = report.write(out / "report.html", text)
    print(f"report: {path}   result: {out / 'result.json'}   {outcome.seconds:.0f} s", flush=True)
    return outcome


def _law_panel(
    title: str, law: Any, points: Sequence[Mapping[str, Any]], x: str, group: str, x_label: str
) -> report.Panel:
    """The law over all points of the sweep; it is fitted where the other variable is largest."""
    return report.Panel(
        title,
        figures.scaling_law(
            law,
            [float(p[x]) for p in points],
            [float(p["recall_at_10"]) for p in points],
            title=title,
            x_label=x_label,
            y_label="Recall@10",
            groups=[f"{group} {p[group]}" for p in points],
        ),
        "Recall@10 of the next item over the full catalogue, the same targets at every point; the law is fitted at "
        f"the largest {group}.",
        seeds=1,
        interval="95 % band, t-distribution of least squares",
        notes=(law.describe(),),
    )

"""The points of `bahe_text.py`: settings, the plan, what each trains, and what it would cost."""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float

import bahe_jax
from bahe_jax import cost
from experiments.progress import Progress
from experiments.steps import bahe_text as steps
from experiments.steps import rank
from experiments.steps.bahe_text import Language
from experiments.steps.bahe_text_data import TextProblem
from experiments.steps.runs import Run, run_file, saved_run, settings_for
from rec_core.training import TrainConfig

ASSUMED_FLOPS = 250e12  # a second, on an H100: for `estimate`


@dataclass(frozen=True)
class BaheText:
    """Settings; the defaults are for one accelerator.

    Attributes:
      model: folder or .gguf file of the language model, with its tokenizer (SmolLM2-135M); not read when `quick`.
      ml_1m: where MovieLens-1M lies; by default $USERSCALE_DATA/ml-1m, else it is downloaded.
      amazon: where an Amazon domain lies, in Parquet form or as ratings_*.csv whose items have texts; without it
        MovieLens-1M alone.
      only: names of points (see `plan`) that may be trained; none for all. Points that are done are always reported.
      seeds: how often each point is trained.
      lengths: tokens of a sample's text. base: the one for AUC_d and the variations. amazon_length: the one on Amazon.
      train_samples: that the language model learns from. rank_samples: that the downstream ranker learns from.
      test_samples: that both are tested on.
      rank_share: of the training period's samples, the newest, that `rank_samples` are taken from.
      epochs: over the training samples. rank_epochs: of the click models without text.
      batch_size, learning_rate: of the language model's training, Adam with linear decay; of 1e-4, 3e-4 and 1e-3 the
        rate with the lowest last losses, of samples not seen before, for LLM-CTR and + BA at 256 tokens.
      rank_batch, rank_learning_rate: of the click models without text; chosen, with `rank_epochs`, for the DNN's AUC on
        the ranker's period of MovieLens-1M, later than what it learned from and before the test.
      remat: what the backward pass computes again: "none", "dots" or "full".
      dtype: of the language model's computation; "auto" is float32 on a CPU and bfloat16 elsewhere. Runs are kept by
        it: to report on a CPU what an accelerator trained, say "bfloat16".
      limit: most tokens of a behaviour's or item's text.
      history: behaviours that the click models without text read.
      interest: of these: "average" (the DNN) or "din".
      encode_rows: packed rows of 512 tokens that the lower layers encode at a time.
      resamples: of the bootstrap.
      quick: a run of seconds on a synthetic world with a random model, which only shows that everything works.
      out: folder for report.html, result.json, the prepared data, and what is done already.
    """

    model: Path | None = None
    ml_1m: Path | None = None
    amazon: Path | None = None
    only: tuple[str, ...] = ()
    seeds: int = 3
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    base: int = 1024
    amazon_length: int = 256
    train_samples: int = 20_000
    rank_samples: int = 30_000
    test_samples: int = 10_000
    rank_share: float = 0.25
    epochs: float = 1.0
    rank_epochs: float = 2.0
    batch_size: int = 32
    learning_rate: float = 3e-4
    rank_batch: int = 128
    rank_learning_rate: float = 5e-3
    remat: Literal["none", "dots", "full"] = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    limit: int = 32
    history: int = 100
    interest: Literal["average", "din"] = "average"
    encode_rows: int = 64
    resamples: int = 300
    quick: bool = False
    out: Path = Path("runs/bahe_text")

    def __post_init__(self) -> None:
        least = ("seeds", "train_samples", "rank_samples", "test_samples", "batch_size", "rank_batch", "limit")
        for name in (*least, "history", "encode_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not 0 < self.rank_share < 1:
            raise ValueError(f"rank_share is {self.rank_share}; give a share above 0 and below 1")
        if self.base not in self.lengths:
            raise ValueError(f"base is {self.base}; give one of lengths={self.lengths}")


QUICK: dict[str, Any] = {
    "seeds": 2, "lengths": (48,), "base": 48, "train_samples": 128, "rank_samples": 128,
    "test_samples": 64, "batch_size": 16, "learning_rate": 3e-3, "rank_batch": 32, "limit": 8, "history": 8,
    "encode_rows": 2, "resamples": 40,
}  # fmt: skip
QUICK_ONLY = ("dnn", "bahe_{}", "bahe_{}_random", "llm_ctr_{}")  # of the base length


@dataclass(frozen=True)
class Point:
    """One thing to train.

    Attributes:
      name: for `only`. figure: of its AUC, without a prefix. label: in the report.
      data: "ml1m" or "amazon".
      setting: of `bahe_jax.Config`, or "dnn" for click models without text.
      variation: "" for none, else what differs from the base: "pooling", "split" or "weights".
      downstream: whether a ranker reads its answers (AUC_d).
    """

    name: str
    figure: str
    label: str
    data: str
    setting: str
    length: int = 0
    pooling: str = "mean"
    split: float = 0.5
    pretrained: bool = True
    variation: str = ""
    downstream: bool = False

    def like(self, setting: str) -> str:
        """The name of the point of a setting on the same data at the same length, without a variation."""
        return f"{'amazon_' * (self.data == 'amazon')}{FAMILY[setting][0]}_{self.length}"


FAMILY = {
    "llm_ctr": ("llm_ctr", "LLM-CTR"), "fp": ("fp", "+ FP"), "abe": ("abe", "+ ABE"), "ba": ("bahe", "+ BA"),
}  # fmt: skip
VARIATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "last": ("pooling", "last state", {"pooling": "last"}),
    "split_quarter": ("split", "split at 1/4", {"split": 0.25}),
    "split_three_quarters": ("split", "split at 3/4", {"split": 0.75}),
    "random": ("weights", "random weights", {"pretrained": False}),
}
VARIED = {"ba": tuple(VARIATIONS), "llm_ctr": ("last", "random")}


def plan(config: BaheText) -> tuple[Point, ...]:
    """All points, the cheap ones of each data set first.

    On MovieLens-1M every setting at every length, and at the base length the variations, one at a time, of + BA
    (pooling, split, weights) and of LLM-CTR (pooling, weights); on Amazon every setting at one length.
    """
    points = []
    for data, lengths in (("ml1m", config.lengths), ("amazon", (config.amazon_length,))):
        if data == "amazon" and config.amazon is None:
            continue
        own = "amazon_" if data == "amazon" else ""
        base = config.base if data == "ml1m" else config.amazon_length
        points.append(Point(f"{own}dnn", f"{own}dnn_auc", "DNN", data, "dnn"))
        for setting in reversed(FAMILY):
            key, label = FAMILY[setting]
            for length in lengths:
                shared: dict[str, Any] = {"data": data, "setting": setting, "length": length}
                figure = f"{own}{key}_auc_{length}"
                points.append(Point(f"{own}{key}_{length}", figure, label, **shared, downstream=length == base))
                for name in VARIED.get(setting, ()) if (data, length) == ("ml1m", base) else ():
                    variation, said, changes = VARIATIONS[name]
                    points.append(
                        Point(
                            f"{key}_{length}_{name}", f"{figure}_{name}", f"{label}, {said}", **shared, **changes,
                            variation=variation,
                        )
                    )  # fmt: skip
    return tuple(points)


def check_only(config: BaheText) -> None:
    """ValueError for a name in `only` that is not in the plan."""
    known = [point.name for point in plan(config)]
    unknown = [name for name in config.only if name not in known]
    if unknown:
        raise ValueError(f"only={unknown}: there is no such point; there are {', '.join(known)}")


def model_config(texts: TextProblem, language: Language, point: Point) -> bahe_jax.Config:
    """Settings of a point. What is trained is the same in all four: the upper layers, the final norm, F_d and the head;
    token table and lower layers are frozen, in a table where the setting can have one."""
    table = point.setting in ("abe", "ba")
    return bahe_jax.Config(
        language.config,
        len(texts.kinds),
        split=round(point.split * language.config.transformer.layers),
        setting=point.setting,
        lower="table" if table else "frozen",
        pooling=point.pooling,
        slots=0 if point.setting == "ba" else point.length,
    )


def train_settings(texts: TextProblem, config: BaheText) -> tuple[TrainConfig, int]:
    """Settings of a language model's training, and the batch."""
    size = min(config.batch_size, len(texts.train))
    settings = settings_for(len(texts.train), size, config.epochs, steps.CALL, learning_rate=config.learning_rate)
    return settings, size


def estimate(texts: TextProblem, language: Language, point: Point, config: BaheText) -> float:
    """Floating point operations of one seed, counted (`bahe_jax.cost`): training, test, and answers for the ranker.

    The lower layers cost one forward pass where they are not in a table, the rest three in training.
    """
    if point.setting == "dnn":
        return 0.0
    model = model_config(texts, language, point)
    most = bahe_jax.behaviors_that_fit(point.length, len(texts.kinds), texts.tokens)
    one = cost.count(model, behaviors=most, tokens=texts.tokens)
    lower = one.lower_linear + one.lower_attention
    settings, size = train_settings(texts, config)
    forwards = len(texts.test)
    if point.downstream:
        asked = np.concatenate([texts.rank, texts.test])
        forwards += len(np.unique(texts.moment[asked])) + len(np.unique(texts.problem.samples.item[asked]))
    return 2.0 * (settings.steps * size * (3 * one.total - 2 * lower) + forwards * one.total)


@dataclass
class Outcome:
    """What a data set gave: the runs that are done, by point and seed, and what a seed was estimated to cost."""

    texts: TextProblem
    points: tuple[Point, ...]
    flops: dict[str, float]
    runs: dict[str, dict[int, Run]] = field(default_factory=dict)

    @property
    def test(self) -> dict[str, np.ndarray]:
        """Label, user, whether the user is known from training, and popularity of the item, of the test samples."""
        samples, index = self.texts.problem.samples, self.texts.test
        columns = {"label": samples.label, "user": samples.user, "known": self.texts.known_user}
        return {name: x[index] for name, x in (columns | {"popularity": self.texts.popularity}).items()}

    def logits(self, name: str, what: str = "own") -> dict[int, Float[np.ndarray, " n"]]:
        """Test logits by seed: the model's "own", of the ranker that has its "answers", or (of the click models without
        text) of those that learned from the ranker's samples, "rank", or from the language model's too, "both"."""
        runs = self.runs.get(name, {})
        if what == "own":
            return {seed: run.logits for seed, run in runs.items()}
        return {seed: run.params[what] for seed, run in runs.items() if what in run.params}


def train_all(
    texts: TextProblem, language: Language, data: str, config: BaheText, *, done: Callable[[Outcome], None]
) -> Outcome:
    """Every point of a data set, each seed kept under `out`/points as soon as it is done: a stopped run goes on there.

    Args:
      done: is called with all that is there, at the start and after each point.
    """
    points = tuple(point for point in plan(config) if point.data == data)
    flops = {point.name: estimate(texts, language, point, config) for point in points}
    outcome, tables = Outcome(texts, points, flops), dict[Any, jax.Array]()
    file = {(point, seed): _file(texts, language, point, seed, config) for point in points for seed in _seeds(config)}

    def keep(point: Point, seed: int) -> None:
        run = partial(_train, texts, language, point, seed, config, tables)
        outcome.runs.setdefault(point.name, {})[seed] = saved_run(file[point, seed], run)

    for point, seed in file:
        if file[point, seed].exists():
            keep(point, seed)
    done(outcome)
    for point in points:
        if not config.only or point.name in config.only:
            missing = [seed for seed in _seeds(config) if not file[point, seed].exists()]
            for seed in missing:
                keep(point, seed)
            if missing:
                done(outcome)
    return outcome


def _seeds(config: BaheText) -> range:
    return range(config.seeds)


def _file(texts: TextProblem, language: Language, point: Point, seed: int, config: BaheText) -> Path:
    """Where a run is kept: its name says point, seed and a checksum of all that the numbers depend on."""
    samples, params = texts.problem.samples, language.params
    arrays = [samples.user, samples.item, samples.time, samples.label, texts.catalogue.tokens, texts.train, texts.rank]
    arrays += [params["tables"]["token"][:64], params["decoder"]["final_norm"]["scale"]]
    identity = [zlib.crc32(np.ascontiguousarray(x).tobytes()) for x in arrays]
    ranker = (config.rank_batch, config.rank_learning_rate, config.rank_epochs)
    shared = (config.history, *ranker, config.interest, point.downstream)
    own = None
    if point.setting != "dnn":
        model = model_config(texts, language, point)
        same = model.language_model.running(remat="none")  # it changes time and memory alone
        own = (replace(model, language_model=same), point.pretrained)
    said = (identity, shared, own, point.length, train_settings(texts, config))
    return run_file(config.out / "points", f"{point.name}-{seed}", said)


def _train(
    texts: TextProblem, language: Language, point: Point, seed: int, config: BaheText, tables: dict[Any, jax.Array]
) -> Run:
    """One seed of a point. `tables` holds what frozen lower layers made of all texts, and gets what is not there."""
    began = time.perf_counter()
    if point.setting == "dnn":
        run = _clicks(texts, seed, config)
    else:
        run = _language(texts, language, point, seed, config, tables)
    return replace(run, params=run.params | {"seconds": np.float64(time.perf_counter() - began)})


def _clicks(texts: TextProblem, seed: int, config: BaheText) -> Run:
    """Click models without text: on the language model's samples, on the ranker's, and on both."""
    own = _ranker(texts, texts.train, seed, config)
    parts = {"rank": texts.rank, "both": np.concatenate([texts.train, texts.rank])}
    other = {name: _ranker(texts, index, seed, config).logits for name, index in parts.items()}
    return Run(other, own.losses, own.logits)


def _language(
    texts: TextProblem, language: Language, point: Point, seed: int, config: BaheText, tables: dict[Any, jax.Array]
) -> Run:
    model = model_config(texts, language, point)
    weights = language.weights(point.pretrained, seed)
    states = None
    if model.lower == "table":
        key = (model.setting, model.split, model.pooling, None if point.pretrained else seed)
        if key not in tables:
            tables[key] = steps.table(texts, language, weights, model, rows=config.encode_rows, limit=config.limit)
        states = tables[key]
    device = steps.put(texts, point.length, states)
    settings, size = train_settings(texts, config)
    with Progress(settings.steps, f"{point.name}, seed {seed}", unit="samples") as progress:

        def shown(step: int, made: int, loss: float) -> None:
            progress.update(step, loss=loss, count=made * size)

        params, losses = steps.train(
            device, texts.train, weights, model, settings, batch_size=size, seed=seed, on_call=shown
        )
    logits = steps.scores(device, params, texts.test, model, batch_size=size)
    if not point.downstream:
        return Run({}, losses, logits)
    asked = np.concatenate([texts.rank, texts.test])
    dense = steps.answers(device, params, texts, asked, model, batch_size=size)
    return Run({"answers": _ranker(texts, texts.rank, seed, config, dense).logits}, losses, logits)


def _ranker(texts: TextProblem, index: np.ndarray, seed: int, config: BaheText, dense: np.ndarray | None = None) -> Run:
    """A click model on ids and side information, and on answers where they are given."""
    changes: dict[str, Any] = {"dense": 0 if dense is None else dense.shape[1], "interest": config.interest}
    if config.interest == "average":
        changes["interest_options"] = ()
    model = rank.rank_config(texts.problem, **changes)
    read: dict[str, Any] = {"dense": dense, "length": config.history}
    label = "DNN" if config.interest == "average" else "DIN"
    found = rank.train_ranker(
        texts.problem, model, index, batch_size=config.rank_batch, epochs=config.rank_epochs,
        learning_rate=config.rank_learning_rate, seed=seed, label=label, **read,
    )  # fmt: skip
    losses = np.array([record["loss"] for record in found.history if "loss" in record])
    return Run({}, losses, rank.scores(texts.problem, found.params, model, texts.test, **read))

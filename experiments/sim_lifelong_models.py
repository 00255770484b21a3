"""The models of `sim_lifelong.py`: settings, what each reads, their training, and what their searches find."""

import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import sim_jax
import sim_jax.search
from experiments.progress import Progress
from experiments.steps import lifelong
from experiments.steps.lifelong import Feed, Lifelong
from experiments.steps.runs import Run, run_file, saved_run, settings_for
from rec_core import embedding
from rec_core.data.world import World
from rec_core.embedding import Categorical
from rec_core.interest import ETA, SDIM


@dataclass(frozen=True)
class SimLifelong:
    """Settings; the defaults are for one accelerator.

    Attributes:
      out: folder for report.html, result.json and the generated world.
      quick: a run of seconds that only shows that everything works.
      ml_1m: where MovieLens-1M lies; without it the world alone.
      only: names of models (`MODELS`); none for all. train: False reports what is kept under `out` and trains nothing.
      seeds: how often each model is trained.
      users, items, mean_length, longest, long_term, time: of the world (`rec_core.data.world`).
      train_samples, test_samples: impressions learned from and tested on.
      epochs: over the training samples.
      recent: behaviours that every model reads. top: that a search keeps. memory: that MIMN reads.
      whole: behaviours that models without a search read; the newest of a longer history.
      batch_size, learning_rate: of Adam, with linear decay.
      clicks: test clicks that are ranked among 99 other items, as many of each age of the category as there are.
      recall_samples: test samples for what the searches find.
      workers: models under way at once: one computes while others are compiled.
    """

    out: Path = Path("runs/sim-lifelong")
    quick: bool = False
    ml_1m: Path | None = None
    only: tuple[str, ...] = ()
    train: bool = True
    seeds: int = 5
    users: int = 1500
    items: int = 4000
    mean_length: float = 6000.0
    longest: int = 50_000
    long_term: float = 0.8
    time: float = 0.3
    train_samples: int = 200_000
    test_samples: int = 40_000
    epochs: float = 1.0
    recent: int = 50
    top: int = 200
    memory: int = 256
    whole: int = 8192
    batch_size: int = 256
    learning_rate: float = 3e-3
    clicks: int = 2000
    recall_samples: int = 1024
    workers: int = 4

    def __post_init__(self) -> None:
        unknown = [name for name in self.only if name not in MODELS]
        if unknown:
            raise ValueError(f"only={unknown}: there is no such model; there are {', '.join(map(repr, MODELS))}")
        for name in ("seeds", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def world(self) -> World:
        quick = {"categories": 16, "departments": 4} if self.quick else {"categories": 64, "departments": 16}
        rate = 0.4
        least = 2000 if not self.quick else 20
        return World(
            users=self.users,
            items=self.items,
            mean_length=self.mean_length,
            max_length=self.longest,
            min_impressions=round(least / rate),
            click_rate=rate,
            days=400.0,
            long_term=self.long_term,
            time=self.time,
            **quick,
        )


QUICK: dict[str, Any] = {
    "users": 40, "items": 300, "mean_length": 60.0, "longest": 200, "train_samples": 600, "test_samples": 300,
    "seeds": 2, "recent": 10, "top": 10, "memory": 20, "whole": 64, "batch_size": 64, "epochs": 1.0, "clicks": 20,
    "recall_samples": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model: what differs from the common configuration, and what it reads of the long sequence.

    `length` names the setting that holds the number of behaviours. `together`: see `steps.lifelong.train`.
    """

    changes: Mapping[str, Any]
    kind: Literal["tree", "newest", "none"] = "none"
    length: str = ""
    together: bool = True


_HARD: dict[str, Any] = {"kind": "tree", "length": "top"}
_WHOLE: dict[str, Any] = {"kind": "newest", "length": "whole", "together": False}
_DIN = {"exact": "din", "exact_options": (("hidden", (32,)),)}
MODELS: dict[str, Model] = {
    "DIN": Model({}),
    "DIN + mean of the long": Model({"exact": "average"}, **_WHOLE),
    "DIEN": Model({"short": "dien", "short_options": ()}),
    "MIMN": Model({"exact": "mimn"}, "newest", "memory"),
    "GSU hard": Model({"exact": "average"}, **_HARD),
    "GSU soft": Model({"search": "soft", "exact": "search"}, **_WHOLE),
    "SIM hard": Model({"exact": "multi_head"}, **_HARD),
    "SIM soft": Model({"search": "soft", "exact": "multi_head"}, **_WHOLE),
    "SIM hard, time": Model({"exact": "multi_head", "age_width": 8}, **_HARD),
    "SIM soft, time": Model({"search": "soft", "exact": "multi_head", "age_width": 8}, **_WHOLE),
    "SIM hard, time, DIN as exact unit": Model({**_DIN, "age_width": 8}, **_HARD),
    "SIM soft, time, DIEN beside": Model(
        {"search": "soft", "exact": "multi_head", "age_width": 8, "short": "dien", "short_options": ()}, **_WHOLE
    ),
    "TWIN": Model({"exact": "twin", "age_width": 8}, **_WHOLE),
    "ETA": Model({"exact": "eta"}, **_WHOLE),
    "SDIM": Model({"exact": "sdim"}, **_WHOLE),
    "DIN over the whole": Model(_DIN, **_WHOLE),
    "DIN over the whole, time": Model({**_DIN, "age_width": 8}, **_WHOLE),
}


@dataclass
class Trained:
    """What one data set gave: test logits `[seeds, n]`, parameters and losses by model."""

    problem: Lifelong
    device: lifelong.OnDevice
    logits: dict[str, np.ndarray] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, np.ndarray] = field(default_factory=dict)
    trained_on: dict[str, str] = field(default_factory=dict)


def model_config(problem: Lifelong, name: str, settings: SimLifelong) -> tuple[sim_jax.Config, Feed]:
    """The configuration of a model and what it reads of the long sequence."""
    model = MODELS[name]
    widths = {"item": 16, "category": 8, "domain": 4, "feedback": 4}
    common: dict[str, Any] = {
        "item_features": tuple(Categorical(field, size, widths[field]) for field, size in problem.sizes.items()),
        "search": "none",
        "top": settings.top,
        "exact": "",
        "age_width": 0,
        "short": "din",
        "short_options": (("hidden", (32,)),),
        "hidden": (64, 32),
    }
    if model.changes.get("exact") in ("twin", "eta"):  # they search themselves: for as many as the others
        common["exact_options"] = (("top", settings.top),)
    feed = Feed()
    if model.length:
        feed = Feed(model.kind, min(getattr(settings, model.length), int(problem.history_lengths().max())))
    return sim_jax.Config(**(common | dict(model.changes))), feed


def train_all(problem: Lifelong, config: SimLifelong) -> Trained:
    """Every model on one data set. What is done is kept under `out`/models: a stopped run goes on from there."""
    lengths = problem.history_lengths()
    print(
        f"{problem.name}: {len(problem.time):,} behaviours of {len(lengths):,} users, {int(lengths.min()):,} to "
        f"{int(lengths.max()):,} each, median {int(np.median(lengths)):,}; {len(problem.train):,} training and "
        f"{len(problem.test):,} test samples",
        flush=True,
    )
    done = Trained(problem, lifelong.put(problem))
    size = min(config.batch_size, len(problem.train))
    settings = settings_for(len(problem.train), size, config.epochs, lifelong.CALL, learning_rate=config.learning_rate)
    steps = settings.steps
    data = zlib.crc32(b"".join(x.tobytes() for x in (problem.time, problem.user, problem.moment, problem.label)))
    lock, made = threading.Lock(), [0]

    def kept(name: str) -> Path:
        model, feed = model_config(problem, name, config)
        identity = (data, model, feed, settings, config.seeds, config.recent, size, problem.train[[0, -1]])
        return run_file(config.out / "models", problem.name, identity)

    def one(name: str) -> Run:
        model, feed = model_config(problem, name, config)

        def shown(step: int, steps: int, loss: float) -> None:
            with lock:
                made[0] += steps
                progress.update(made[0], loss=loss, count=steps * size * config.seeds)

        def run() -> Run:
            shared: dict[str, Any] = {"recent": config.recent, "batch_size": size}
            params, losses = lifelong.train(
                done.device, problem.train, model, feed, settings, seeds=config.seeds,
                together=MODELS[name].together, on_call=shown, **shared,
            )  # fmt: skip
            logits = lifelong.scores(done.device, params, problem.test, model, feed, **shared)
            return Run(params, losses, logits)

        before = kept(name).exists()
        found = saved_run(kept(name), run)
        if before:
            shown(steps, steps, float(found.losses[-1].mean()))
        return found

    names = [name for name in config.only or MODELS if config.train or kept(name).exists()]
    if not names:
        raise ValueError(f"{config.out}/models holds nothing of these settings and this commit: train it first")
    with (
        Progress(steps * len(names), problem.name, unit="samples") as progress,
        ThreadPoolExecutor(config.workers) as pool,
    ):
        for name, run in zip(names, pool.map(one, names), strict=True):
            done.params[name], done.losses[name], done.logits[name] = run.params, run.losses, run.logits
            done.trained_on[name] = run.device
    return done


def recall(done: Trained, config: SimLifelong) -> dict[str, float]:
    """What one search finds of what another finds, means over test samples and seeds, as shares.

    - `hard_of_soft`: behaviours of the soft search's top K (of "SIM soft, time") that hard search finds too;
      `same_category`: those in the target's category, which hard search would find with a K without end;
    - `eta_of_exact`, `sdim_of_exact`: behaviours of the exact top K by cosine, in the embeddings that ETA and SDIM were
      trained with, that are among ETA's K by Hamming distance, and among the K that share the most of SDIM's buckets.
    """
    problem, device = done.problem, done.device
    index = jnp.asarray(problem.test[: config.recall_samples], jnp.int32)
    found: dict[str, list[float]] = {}

    def batch_of(name: str) -> tuple[sim_jax.Config, sim_jax.Batch]:
        model, feed = model_config(problem, name, config)
        return model, lifelong.make_batch(device, index, model, feed, config.recent)

    chunks = range(0, len(index), 64)
    for name in ("SIM soft, time", "ETA", "SDIM"):
        if name not in done.params:
            continue
        model, batch = batch_of(name)
        for seed in range(config.seeds):
            params = jax.tree.map(lambda x, seed=seed: x[seed], done.params[name])
            for first in chunks:
                part = jax.tree.map(lambda x, first=first: x[first : first + 64], batch)
                for key, value in _recall_of(params, part, name=name, model=model, k=config.top).items():
                    found.setdefault(key, []).append(float(value))
    return {key: float(np.mean(values)) for key, values in found.items()}


@partial(jax.jit, static_argnames=("name", "model", "k"))
def _recall_of(params: Any, batch: sim_jax.Batch, *, name: str, model: sim_jax.Config, k: int) -> dict[str, Array]:
    def share(position: Array, present: Array, among: Array, known: Array) -> Array:
        """Of the behaviours at `position` the share that is `among` others."""
        hit = ((position[:, :, None] == among[:, None, :]) & known[:, None, :]).any(-1) & present
        return hit.sum() / jnp.maximum(present.sum(), 1)

    mask = jnp.asarray(batch.long_mask)
    if name.startswith("SIM"):
        position, present = sim_jax.find(params, batch, model)
        category = jnp.take_along_axis(batch.long["category"], position, axis=1)
        same = present & (category == batch.target["category"][:, None])
        hard = sim_jax.search.hard(batch.target["category"], batch.long["category"], mask, k)
        return {
            "hard_of_soft": share(position, present, *hard),
            "same_category": same.sum() / jnp.maximum(present.sum(), 1),
        }
    target = embedding.embed(params["tables"], model.item_features, batch.target)
    sequence = embedding.embed(params["tables"], model.item_features, batch.long)
    cosine = jnp.einsum("bd,btd->bt", target, sequence) / jnp.maximum(jnp.linalg.norm(sequence, axis=-1), 1e-9)
    exact = sim_jax.search.soft(cosine, mask, k)
    unit = {"params": params["net"]["exact"]["unit"]}
    if name == "ETA":
        eta = ETA(top=k)
        found = eta.apply(unit, eta.apply(unit, sequence, mask, method="encode"), target, method="search")
        return {"eta_of_exact": share(*exact, *found)}
    sdim = SDIM()
    hits: Any = sdim.apply(unit, sdim.apply(unit, sequence, mask, method="encode"), target, method="collisions")
    found = sim_jax.search.soft(jnp.sum(hits, axis=-1, dtype=jnp.float32), mask, k)
    return {"sdim_of_exact": share(*exact, *found)}


@dataclass(frozen=True)
class LongTerm:
    """Clicks found in the top 10 of 100 candidates, by days since the user's last behaviour in the category."""

    days: np.ndarray  # [n], infinite where there was none
    user: np.ndarray  # [n]
    hits: dict[str, np.ndarray]  # model -> [seeds, n]


def long_term(done: Trained, config: SimLifelong, models: tuple[str, ...], days: tuple[float, ...]) -> LongTerm:
    """Ranks test clicks among 99 other items, drawn by popularity in the training samples, the same for all models.

    Args:
      days: bounds from which on bins begin; as many clicks of each bin, as far as there are so many.
    """
    problem, rng = done.problem, np.random.default_rng(0)
    clicks = rng.permutation(problem.test[problem.label[problem.test] == 1])
    place = np.searchsorted(days, lifelong.days_since_category(done.device, clicks), side="right")
    each = -(-config.clicks // len(days))
    clicks = np.sort(np.concatenate([clicks[place == bin_][:each] for bin_ in np.unique(place)]))
    popular = problem.target["item"][problem.train]
    others = popular[rng.integers(0, len(popular), (len(clicks), 99))]
    item = np.concatenate([problem.target["item"][clicks, None], others], axis=1)
    target = {name: np.repeat(x[clicks, None], 100, axis=1) for name, x in problem.target.items()}
    target |= {"item": item, "category": problem.category[item]}
    hits = {}
    for name in models:
        model, feed = model_config(problem, name, config)
        flat = {key: x.reshape(-1) for key, x in target.items()}
        found = lifelong.scores(
            done.device, done.params[name], np.repeat(clicks, 100), model, feed,
            recent=config.recent, batch_size=config.batch_size, target=flat,
        )  # fmt: skip
        found = found.reshape(config.seeds, len(clicks), 100)
        better = (found > found[:, :, :1]).sum(-1) + ((found == found[:, :, :1]).sum(-1) - 1) / 2
        hits[name] = (better < 10).astype(np.float64)
    return LongTerm(lifelong.days_since_category(done.device, clicks), problem.user[clicks], hits)

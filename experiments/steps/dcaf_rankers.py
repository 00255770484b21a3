"""The rankers that DCAF chooses among: DNN, DIN, DIEN and SIM on one feature set, trained on one period.

Each reads the user's newest behaviours; SIM also what the behaviour tree finds in all of them for each candidate's
category. `RANKERS` is the table; another row is another ranker.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

import sim_jax
from experiments.progress import Progress
from experiments.steps.pretrain import report_to
from experiments.steps.problem import Problem
from experiments.steps.rank import rank_batch, rank_config
from rec_core import training
from rec_core.data import pipeline
from rec_core.data.schema import FIRST_ITEM, EventLog
from rec_core.ranking import ctr
from sim_jax.tree_table import TreeTable

_UNIT: dict[str, Any] = {"interest_options": (), "hidden": (64, 32)}


@dataclass(frozen=True)
class Ranker:
    """A ranker of `RANKERS`: its model under the contract, config from the problem, and the behaviours it reads.

    Attributes:
      model: the module; `sim_jax` takes `sim_jax.Batch`, `rec_core.ranking.ctr` its own.
      config: makes the model's config.
      recent: newest behaviours that it reads. found: behaviours that the tree gives for a category; 0 without a tree.
    """

    model: ModuleType
    config: Callable[[Problem], Any]
    recent: int = 20
    found: int = 0


def _ctr(interest: str, **options: Any) -> Ranker:
    return Ranker(ctr, lambda problem: rank_config(problem, interest=interest, **(_UNIT | options)))


def _sim(problem: Problem) -> sim_jax.Config:
    same = rank_config(problem)
    return sim_jax.Config(
        item_features=same.item_features,
        user_features=same.user_features,
        context_features=same.context_features,
        search="none",  # hard search by the tree: what it found is read as it is
        exact_options=(("heads", 2),),
        hidden=_UNIT["hidden"],
    )


RANKERS: dict[str, Ranker] = {
    "DNN": _ctr("average"),
    "DIN": _ctr("din", interest_options=(("hidden", (32,)),)),
    "DIEN": _ctr("dien"),
    "SIM": Ranker(sim_jax, _sim, found=30),
}


@dataclass(frozen=True, eq=False)
class Trained:
    """A ranker with its parameters, and the tree that it reads, if any."""

    ranker: Ranker
    config: Any
    params: Any
    tree: TreeTable | None


def make_tree(problem: Problem) -> TreeTable:
    """The behaviour tree of all behaviours, by category; asked before a time, it knows nothing later."""
    sequences = problem.behaviors
    user = np.repeat(np.arange(sequences.users, dtype=np.int64), np.diff(sequences.offsets))
    return TreeTable.build(
        EventLog(user, sequences.columns["item"].astype(np.int64), sequences.columns["time"].astype(np.int64)),
        problem.category[sequences.columns["item"]].astype(np.int64),
    )


def train(
    problem: Problem,
    name: str,
    index: Int[np.ndarray, " n"],
    tree: TreeTable,
    *,
    seed: int,
    batch_size: int = 512,
    learning_rate: float = 4e-3,
) -> Trained:
    """Trains `RANKERS[name]` for one pass over the samples at `index`; Adam, linear decay."""
    ranker = RANKERS[name]
    config = ranker.config(problem)
    batch_size = min(batch_size, len(index))
    steps = max(2, len(index) // batch_size)
    ones = np.ones(batch_size, np.float32)
    source = pipeline.Samples(len(index), lambda i: _batch(problem, ranker, tree, index[i], ones[: len(i)]))
    settings = training.TrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        decay="linear",
        warmup=max(1, steps // 20),
        log_every=max(1, steps // 20),
        seed=seed,
    )
    with Progress(steps, f"{name}, seed {seed}", unit="samples") as progress:
        data = pipeline.iterator(source, batch_size=batch_size, seed=seed)
        done = training.fit(ranker.model, config, settings, data, on_log=report_to(progress, batch_size))
    return Trained(ranker, config, done.params, tree if ranker.found else None)


def score(
    problem: Problem,
    trained: Trained,
    sample: Int[np.ndarray, " N"],
    candidates: Int[np.ndarray, "N C"],
    *,
    rows: int = 16,
) -> Float[np.ndarray, "N C"]:
    """Logits of all candidates, `rows` requests a call."""
    keys, parts = distinct_keys(problem, candidates), []
    for place, weight in pipeline.evaluation_batches(len(sample), min(rows, len(sample))):
        asked = request(problem, trained, sample[place], candidates[place], keys=keys)
        logits = np.asarray(jitted_score(trained.ranker.model)(trained.params, asked, trained.config))
        parts.append(logits[weight > 0])
    return np.concatenate(parts)


def distinct_keys(problem: Problem, candidates: Int[np.ndarray, "N C"]) -> int:
    """Categories that the tree is asked for: the most of any request, as a multiple of 4, so that shapes are few."""
    category = np.sort(problem.category[candidates], axis=1)
    return 4 * -(-int((np.diff(category, axis=1) > 0).sum(axis=1).max() + 1) // 4)


def jitted_score(model: ModuleType) -> Any:
    """The model's `score`, compiled once a shape and config."""
    return _SCORE[model]


_SCORE = {model: jax.jit(model.score, static_argnums=2) for model in (ctr, sim_jax)}


def request(
    problem: Problem,
    trained: Trained,
    sample: Int[np.ndarray, " B"],
    candidates: Int[np.ndarray, "B C"],
    *,
    keys: int,
) -> Any:
    """What the model's `score` takes: the candidates in the places of the impressions `sample`.

    Args:
      keys: categories that a request's candidates have at most; the tree is asked for so many.
    """
    read = rank_batch(problem, sample, np.ones(len(sample), np.float32), None, trained.ranker.recent)
    category = problem.category[candidates].astype(np.int32)
    target = {"item": candidates, "category": category}
    if trained.tree is None:
        return replace(read, target=target)
    asked = np.zeros((len(sample), keys), np.int64)
    place = np.empty(candidates.shape, np.int32)
    for row, found in enumerate(category):
        distinct, place[row] = np.unique(found, return_inverse=True)
        if len(distinct) > keys:
            raise ValueError(f"keys is {keys}, but request {row} has candidates of {len(distinct)} categories")
        asked[row, : len(distinct)] = distinct
    long, mask, age = _found(problem, trained.tree, sample, asked, trained.ranker.found)
    return sim_jax.Request(
        target=target,
        sequence=read.sequence,
        mask=read.mask,
        long=long,
        long_mask=mask,
        place=place,
        long_time=age,
        user=read.user,
        context=read.context,
    )


def _batch(problem: Problem, ranker: Ranker, tree: TreeTable, index: np.ndarray, weight: np.ndarray) -> Any:
    read = rank_batch(problem, index, weight, None, ranker.recent)
    if not ranker.found:
        return read
    long, mask, age = _found(problem, tree, index, problem.samples.category[index, None].astype(np.int64), ranker.found)
    # DIEN's own loss compares each behaviour with an item that was not chosen there: one at random.
    items = FIRST_ITEM + np.random.default_rng(index[:1]).integers(
        0, len(problem.category) - FIRST_ITEM, read.mask.shape
    )
    return sim_jax.Batch(
        target=read.target,
        sequence=read.sequence,
        mask=read.mask,
        long={name: column[:, 0] for name, column in long.items()},
        long_mask=mask[:, 0],
        label=read.label,
        weight=weight,
        long_time=age[:, 0],
        negatives={"item": items.astype(np.int32), "category": problem.category[items].astype(np.int32)},
        user=read.user,
        context=read.context,
    )


def _found(
    problem: Problem, tree: TreeTable, sample: np.ndarray, keys: Int[np.ndarray, "B n"], k: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Fields, mask and age in seconds, `[B, n, k]` each, of the k newest behaviours of each key, oldest first."""
    time = problem.samples.time[sample].astype(np.int64)
    found = tree.lookup(problem.samples.user[sample], keys, k, time)
    mask = (np.arange(k) < found.count[..., None])[..., ::-1]
    item = np.where(mask, found.item[..., ::-1], 0).astype(np.int32)
    age = np.where(mask, time[:, None, None] - found.time[..., ::-1].astype(np.int64), 0).astype(np.float32)
    return {"item": item, "category": problem.category[item].astype(np.int32)}, np.ascontiguousarray(mask), age

"""Next-item recall over the full catalogue: one set of targets for all sizes and lengths of a scaling sweep."""

from typing import Any

import jax
import numpy as np

import lum_jax
from experiments.steps.ask import item_embeddings
from experiments.steps.pretrain import columns, lum_batch
from experiments.steps.problem import ANY, Problem
from rec_core import losses, metrics
from rec_core.data import pipeline
from rec_core.data.samples import LIKED
from rec_core.data.schema import FIRST_ITEM


def targets(problem: Problem, count: int, *, seed: int = 0) -> np.ndarray:
    """`count` behaviours at or after the end of training that have history (and were liked), as sorted indices."""
    sequences = problem.behaviors
    later = sequences.columns["time"] >= problem.train_end
    if "feedback" in sequences.columns:
        later &= sequences.columns["feedback"] == LIKED
    candidates = np.flatnonzero(later)
    owner = np.searchsorted(sequences.offsets, candidates, side="right") - 1
    end = sequences.before(owner, sequences.columns["time"][candidates])
    candidates = candidates[end > sequences.offsets[owner]]
    if not len(candidates):
        raise ValueError(f"{problem.name}: no behaviour after the end of training has a history; nothing to score")
    chosen = np.random.default_rng(seed).choice(len(candidates), min(count, len(candidates)), replace=False)
    return np.sort(candidates[chosen])


def target_ranks(
    problem: Problem,
    params: Any,
    config: lum_jax.Config,
    index: np.ndarray,
    *,
    length: int,
    batch_size: int = 128,
) -> np.ndarray:
    """Rank, from 1, of each target behaviour's item among all items, from the newest `length` behaviours before it.

    The question holds only what is known before the choice: time gap, domain, and "liked"; never the item's category.
    """
    sequences = problem.behaviors
    owner = np.searchsorted(sequences.offsets, index, side="right") - 1
    start, end = sequences.offsets[owner], sequences.before(owner, sequences.columns["time"][index])
    given = columns(problem)
    items = item_embeddings(problem, params, config)
    valid: Any = np.arange(len(items)) >= FIRST_ITEM

    @jax.jit
    def find(params, batch, queries, items, target):
        answers = lum_jax.query(params, batch, queries, config)[:, 0]
        if config.similarity == "cosine":
            items = losses.normalize(items)  # the answer's own length changes no rank
        return metrics.ranks(answers, items, target, valid=valid)

    parts = []
    for place, weight in pipeline.evaluation_batches(len(index), min(batch_size, len(index))):
        slots, mask = sequences.history(start[place], end[place], length)
        rows = {name: column[slots] * mask for name, column in given.items()}
        rows["segment_ids"] = mask.astype(np.int32)
        rows["positions"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
        asked = index[place]
        conditions = {name: np.full((len(place), 1), ANY, np.int32) for name in problem.conditions}
        for name in ("gap", "domain", "feedback"):
            if name in conditions:
                conditions[name] = sequences.columns[name][asked][:, None]
        queries = lum_jax.Queries(conditions, np.ones((len(place), 1), np.int32))
        found = find(params, lum_batch(rows), queries, items, sequences.columns["item"][asked])
        parts.append(np.asarray(found)[weight > 0])
    return np.concatenate(parts)

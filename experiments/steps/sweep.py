"""A scaling sweep: LUM of several sizes and lengths on the same data, scored on the same targets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.results import Row
from experiments.steps.pretrain import lum_config, pretrain
from experiments.steps.problem import Problem
from experiments.steps.recall import target_ranks, targets
from rec_core import metrics


def sweep(
    problem: Problem,
    *,
    sizes: Sequence[str],
    lengths: Sequence[int],
    events: int,
    target_count: int,
    row_length: int | None = None,
    batch_rows: int = 16,
    seed: int = 0,
    directory: Path | None = None,
) -> list[Row]:
    """One row a point: `parameters` (transformer without tables), `all_parameters`, `length` in events (tokens are
    twice that), `recall_at_10`, `recall_at_50`, `loss`.

    Every point trains on about `events` events before the end of training, cut in windows of its own length, and is
    scored on the same `target_count` later behaviours with its own length of history.
    """

    index = targets(problem, target_count, seed=seed)
    row_length = row_length or max(lengths)
    rows: list[Row] = []
    for size in sizes:
        config = lum_config(problem, size)
        for length in lengths:
            result = pretrain(
                problem,
                config,
                until=problem.train_end,
                events=events,
                max_length=length,
                row_length=row_length,
                batch_rows=batch_rows,
                seed=seed,
                directory=directory and directory / f"{size}-{length}",
                label=f"sweep: {size} parameters, length {length}",
            )
            ranks: Any = target_ranks(problem, result.params, config, index, length=length)
            losses = [record["loss"] for record in result.history if "loss" in record]
            rows.append(
                {
                    "size": size,
                    "parameters": config.transformer.parameters,
                    "all_parameters": sum(x.size for x in jax.tree.leaves(result.params)),
                    "length": length,
                    "recall_at_10": float(metrics.hit_rate(ranks, 10)[0] / len(ranks)),
                    "recall_at_50": float(metrics.hit_rate(ranks, 50)[0] / len(ranks)),
                    "loss": losses[-1],
                    "steps": result.steps,
                    "seed": seed,
                }
            )
    return rows

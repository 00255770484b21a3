"""Step 1: LUM's pre-training on the behaviours before a time."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

import lum_jax
from experiments.progress import Progress
from experiments.steps.problem import ANY, CONDITIONS, Problem
from rec_core import training
from rec_core.data import packing, pipeline
from rec_core.embedding import Categorical


def lum_config(problem: Problem, size: str, **changes: Any) -> lum_jax.Config:
    """LUM over item and category, with the conditions that the dataset has; `size` as in `lum_jax.SIZES`."""
    sizes = problem.behaviors.sizes
    encoder = lum_jax.encoder(size)
    settings: dict[str, Any] = {
        "item": (Categorical("item", sizes["item"], encoder.width), Categorical("category", sizes["category"], 16)),
        "condition": tuple(Categorical(name, sizes[name], 16) for name in problem.conditions),
        "transformer": encoder,
        "negative_count": 512,
        # Negatives drawn from the batch come by popularity; without the correction the model would learn how much more
        # likely an item is than usual, and rank a catalogue by that.
        "popularity_correction": True,
        "chunk": 2048,
    }
    return lum_jax.Config(**(settings | changes))


def columns(problem: Problem, *, hide: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    """One value a behaviour: item, category and, as `condition_*`, the conditions.

    Conditions other than feedback are hidden (set to ANY) independently with probability `hide`; which ones of an event
    is fixed by `seed`. A model trained so can be asked with any of them given or not.
    """
    sequences = problem.behaviors
    made = {name: sequences.columns[name] for name in ("item", "category")}
    place = np.arange(len(sequences), dtype=np.uint64)
    for number, name in enumerate(problem.conditions):
        values = sequences.columns[name]
        if hide and name != "feedback":
            draw = packing.mix(place, seed * len(CONDITIONS) + number) / 2.0**64
            values = np.where(draw < hide, np.int32(ANY), values)
        made[f"condition_{name}"] = values
    return made


def lum_rows(problem: Problem, *, until: int, max_length: int, row_length: int, seed: int = 0) -> pipeline.PackedRows:
    """Packed rows of the behaviours before `until`, in windows of at most `max_length` events."""
    sequences = problem.behaviors
    users = np.arange(sequences.users)
    end = sequences.before(users, np.full(sequences.users, until))
    windows = packing.plan_windows(sequences.offsets, max_length, end=end, min_length=2)
    if not len(windows):
        raise ValueError(f"{problem.name}: no user has two behaviours before {until}; there is nothing to learn from")
    item = sequences.columns["item"]
    seen = sequences.columns["time"] < until
    counts = np.bincount(item[seen], minlength=sequences.sizes["item"]) + 1.0
    made = columns(problem, hide=0.5, seed=seed)
    made["log_q"] = np.log(counts / counts.sum()).astype(np.float32)[item]
    return pipeline.PackedRows(packing.pack(windows.length, row_length, order_seed=seed), windows, made)


def lum_batch(rows: dict[str, np.ndarray]) -> lum_jax.Batch:
    """What `PackedRows` gives, as LUM reads it."""
    conditions = {name.removeprefix("condition_"): v for name, v in rows.items() if name.startswith("condition_")}
    return lum_jax.Batch(
        item={"item": rows["item"], "category": rows["category"]},
        condition=conditions,
        segment_ids=rows["segment_ids"],
        positions=rows["positions"],
        log_q=rows.get("log_q"),
    )


def pretrain(
    problem: Problem,
    config: lum_jax.Config,
    *,
    until: int,
    events: int,
    max_length: int,
    row_length: int,
    batch_rows: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
    directory: Path | None = None,
    label: str = "LUM pre-training",
    mesh: Any = None,
) -> training.Result:
    """Trains on about `events` events (with repetitions), in batches of `batch_rows` packed rows of `row_length`.

    Resumes in `directory`.
    """
    rows = lum_rows(problem, until=until, max_length=max_length, row_length=row_length, seed=seed)
    batch_rows = min(batch_rows, len(rows))
    # By slots, not by events: runs that differ in their windows alone then have the same steps, compiled once.
    steps = max(2, round(events / (batch_rows * row_length)))
    per_step = batch_rows * row_length * (1 - rows.plan.waste)
    train = training.TrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        warmup=max(1, steps // 20),
        weight_decay=0.01,
        b2=0.98,
        log_every=max(1, steps // 50),
        checkpoint_every=max(1, steps // 4),
        seed=seed,
    )
    data = pipeline.iterator(
        rows,
        batch_size=batch_rows,
        seed=seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        transform=lum_batch,
    )
    with Progress(steps, label) as progress:
        on_log = report_to(progress, per_step)
        return training.fit(lum_jax, config, train, data, mesh=mesh, directory=directory, on_log=on_log)


def report_to(progress: Progress, per_step: float) -> Any:
    """An `on_log` for `training.fit` that moves a progress line; `per_step` is what one step processes."""
    done = 0

    def on_log(record: dict[str, Any]) -> None:
        nonlocal done
        if "loss" in record:
            progress.update(record["step"], loss=record["loss"], count=per_step * (record["step"] - done))
            done = record["step"]

    return on_log

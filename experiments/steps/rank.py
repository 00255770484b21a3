"""Step 3: a ranking model (DIN) without and with LUM's answers."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.progress import Progress
from experiments.steps.ask import Knowledge
from experiments.steps.pretrain import report_to
from experiments.steps.problem import ANY, Problem
from lum_jax import utilization
from rec_core import metrics, training
from rec_core.data import pipeline
from rec_core.embedding import Categorical
from rec_core.ranking import ctr


def rank_config(problem: Problem, *, dense: int = 0, width: int = 16, **changes: Any) -> ctr.Config:
    """DIN on item and category (and a behaviour's feedback), user side information and the domain."""
    sizes = problem.behaviors.sizes
    item = [Categorical("item", sizes["item"], width), Categorical("category", sizes["category"], width // 2)]
    if "feedback" in sizes:
        item.append(Categorical("feedback", sizes["feedback"], 4))
    settings: dict[str, Any] = {
        "item_features": tuple(item),
        "user_features": tuple(Categorical(n, size, 4) for n, size in sorted(problem.user_feature_sizes.items())),
        "context_features": (Categorical("domain", sizes["domain"], 4),) if sizes.get("domain", 0) > 1 else (),
        "interest": "din",
        "interest_options": (("hidden", (32,)),),
        "hidden": (64, 32),
        "dense": dense,
    }
    return ctr.Config(**(settings | changes))


def answer_features(
    problem: Problem, knowledge: Knowledge, *, use: tuple[str, ...] = utilization.USES, chunk: int = 65536
) -> np.ndarray:
    """Dense features of every sample from the newest answers before it, float16 `[samples, F]`.

    The conditions are the candidate's own category, whose answer is the direct
    feature, and ANY. The last feature tells whether there was an answer.
    """
    samples = problem.samples
    conditions = np.stack([samples.category, np.full(len(samples), ANY, samples.category.dtype)], axis=1)
    make = jax.jit(utilization.features, static_argnames="use")
    own = np.zeros(min(chunk, len(samples)), np.int32)  # the first of the two conditions
    parts = []
    for first in range(0, len(samples), chunk):
        # The last chunk is filled up, so that nothing is compiled twice.
        index = np.minimum(np.arange(first, first + min(chunk, len(samples))), len(samples) - 1)
        answers, found, _ = knowledge.answers.read(samples.user[index], conditions[index], samples.time[index])
        made = np.asarray(make(answers, knowledge.items[samples.item[index]], own, use=use))
        made = np.concatenate([made * found.any(1, keepdims=True), found.any(1, keepdims=True)], axis=1)
        parts.append(made[: len(samples) - first].astype(np.float16))
    return np.concatenate(parts)


def rank_batch(
    problem: Problem, index: np.ndarray, weight: np.ndarray, dense: np.ndarray | None, length: int
) -> ctr.Batch:
    """The samples at `index` with their newest `length` behaviours."""
    samples, sequences = problem.samples, problem.behaviors
    place, mask = sequences.history(samples.start[index], samples.end[index], length)
    target = {"item": samples.item[index], "category": samples.category[index]}
    sequence = {name: sequences.columns[name][place] * mask for name in target}
    if "feedback" in sequences.columns:
        target["feedback"] = np.zeros(len(index), np.int32)  # the target's is what is to be found
        sequence["feedback"] = sequences.columns["feedback"][place] * mask
    return ctr.Batch(
        user={name: column[samples.user[index]] for name, column in problem.user_features.items()},
        target=target,
        sequence=sequence,
        mask=mask,
        context={"domain": samples.domain[index]} if "domain" in sequences.sizes else {},
        dense=None if dense is None else dense[index].astype(np.float32),
        label=samples.label[index].astype(np.float32),
        weight=weight,
    )


def train_ranker(
    problem: Problem,
    config: ctr.Config,
    train_index: np.ndarray,
    *,
    dense: np.ndarray | None = None,
    length: int = 32,
    batch_size: int = 1024,
    epochs: float = 1.0,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    directory: Path | None = None,
    label: str = "DIN",
) -> training.Result:
    """Trains for `epochs` over the samples at `train_index`; Adam, linear decay."""
    batch_size = min(batch_size, len(train_index))
    steps = max(2, round(epochs * len(train_index) / batch_size))
    ones = np.ones(batch_size, np.float32)
    data = pipeline.iterator(
        pipeline.Samples(
            len(train_index),
            lambda index: rank_batch(problem, train_index[index], ones[: len(index)], dense, length),
        ),
        batch_size=batch_size,
        seed=seed,
    )
    train = training.TrainConfig(
        steps=steps,
        learning_rate=learning_rate,
        decay="linear",
        warmup=max(1, steps // 20),
        weight_decay=weight_decay,
        log_every=max(1, steps // 20),
        seed=seed,
    )
    with Progress(steps, label, unit="samples") as progress:
        on_log = report_to(progress, batch_size)
        return training.fit(ctr, config, train, data, directory=directory, on_log=on_log)


_apply = jax.jit(ctr.apply, static_argnums=2)


def scores(
    problem: Problem,
    params: Any,
    config: ctr.Config,
    index: np.ndarray,
    *,
    dense: np.ndarray | None = None,
    length: int = 32,
    batch_size: int = 4096,
) -> np.ndarray:
    """Logits of the samples at `index`, float32."""
    parts = []
    for place, weight in pipeline.evaluation_batches(len(index), min(batch_size, len(index))):
        logits = np.asarray(_apply(params, rank_batch(problem, index[place], weight, dense, length), config))
        parts.append(logits[weight > 0])
    return np.concatenate(parts)


def auc(problem: Problem, index: np.ndarray, logits: np.ndarray) -> float:
    """Exact AUC of the samples at `index`."""
    return metrics.auc(problem.samples.label[index], logits)


def oracle(problem: Problem, index: np.ndarray) -> float | None:
    """AUC of the true click probability, where the data know it."""
    if problem.samples.probability is None:
        return None
    return metrics.auc(problem.samples.label[index], problem.samples.probability[index])

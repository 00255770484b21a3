"""DCAF's value estimator on a log of an earlier period: gains of all actions from what is known before any ranking."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from experiments.steps.dcaf_costs import time_calls
from rec_core import training
from rec_core.data import pipeline
from rec_core.embedding import Categorical
from sim_jax.dcaf import value

HOURS = 24
_EVERY = 20  # steps between two looks at the held-out requests


def fit(
    known: tuple[dict[str, np.ndarray], Float[np.ndarray, "N F"]],
    gains: Float[np.ndarray, "N J"],
    *,
    time: Int[np.ndarray, " N"],
    domains: int,
    seed: int,
    steps: int = 800,
    batch_size: int = 256,
) -> "Estimator":
    """Trains on the log of `known` (from `dcaf_requests.features`) and the gains replayed on it.

    The last fifth by `time` is held out, and the parameters are those of the least error there. Requests held out at
    random would not do: a user's requests of one period are alike, and the net would learn the users by heart.
    """
    fields, floats = known
    held_out = time >= np.quantile(time, 0.8)
    center, scale = floats.mean(axis=0), floats.std(axis=0) + 1e-6
    config = value.Config(
        features=(Categorical("hour", HOURS, 4), Categorical("domain", domains, 4)),
        actions=gains.shape[1],
        dense=floats.shape[1],
        hidden=(32,),
        monotone=False,  # actions of several rankers: a dearer one may gain less
        scale=float(gains.std(axis=0).mean()) + 1e-9,
        start=tuple(gains[~held_out].mean(axis=0).tolist()),
    )

    def batch(index: np.ndarray) -> value.Batch:
        return value.Batch(
            features={name: column[index] for name, column in fields.items()},
            gain=gains[index].astype(np.float32),
            observed=np.ones((len(index), gains.shape[1]), bool),
            weight=np.ones(len(index), np.float32),
            dense=((floats[index] - center) / scale).astype(np.float32),
        )

    learned, asked = np.flatnonzero(~held_out), batch(np.flatnonzero(held_out))

    def evaluate(params: Any) -> dict[str, float]:
        return {"error": float(_loss(params, asked, config))}

    batch_size = min(batch_size, len(learned))
    settings = training.TrainConfig(
        steps=steps,
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup=min(20, steps - 1),
        log_every=max(1, steps // 20),
        evaluate_every=_EVERY,
        early_stopping=training.EarlyStopping("error", patience=8, mode="min"),
        seed=seed,
    )
    data = pipeline.iterator(
        pipeline.Samples(len(learned), lambda i: batch(learned[i])), batch_size=batch_size, seed=seed
    )
    done = training.fit(value, config, settings, data, evaluate=evaluate)
    return Estimator(config, done.params, center, scale)


class Estimator:
    """A trained estimator: `estimator(known)` gives the gains of all actions, `[M, J]` float32."""

    def __init__(self, config: value.Config, params: Any, center: np.ndarray, scale: np.ndarray) -> None:
        self.config, self.params, self.center, self.scale = config, params, center, scale

    def __call__(self, known: tuple[dict[str, np.ndarray], Float[np.ndarray, "M F"]]) -> Float[np.ndarray, "M J"]:
        return np.asarray(_apply(self.params, self.batch(known), self.config))

    def batch(self, known: tuple[dict[str, np.ndarray], Float[np.ndarray, "M F"]]) -> value.Batch:
        """What the model reads."""
        fields, floats = known
        rows, actions = len(floats), self.config.actions
        return value.Batch(
            features=fields,
            gain=np.zeros((rows, actions), np.float32),
            observed=np.zeros((rows, actions), bool),
            weight=np.ones(rows, np.float32),
            dense=((floats - self.center) / self.scale).astype(np.float32),
        )


_apply = jax.jit(value.apply, static_argnums=2)
_loss = jax.jit(lambda params, batch, config: value.loss(params, batch, config)[0], static_argnums=2)


def seconds(estimator: Estimator, known: tuple[dict[str, np.ndarray], Float[np.ndarray, "N F"]], rounds: int) -> float:
    """What the estimate of one request takes, as a ranker's cost is measured: the compiled model, the median."""
    fields, floats = known
    asked = [estimator.batch(({n: c[i : i + 1] for n, c in fields.items()}, floats[i : i + 1])) for i in range(8)]
    run = _apply.lower(estimator.params, asked[0], estimator.config).compile()
    return float(np.median([time_calls(run, [(estimator.params, each) for each in asked], 64) for _ in range(rounds)]))

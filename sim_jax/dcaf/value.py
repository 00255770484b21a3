"""DCAF's request value estimation (arXiv 2006.09684, section 4): `Q_ij` from what is known before compute is spent.

A light model, since its own cost counts: embeddings, one float vector and a small MLP give the gains of all J actions
of a request at once. It is trained on the replayed gains of an earlier period. The loss is squared error and not a
robust one: the multiplier's optimum is in expected gains, so the estimate must be a mean, and gains have long tails.

The paper's form is not public beyond "a light model"; sizes and the monotone output are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rec_core import embedding, losses
from rec_core.embedding import Categorical, Continuous, Feature, Hashed
from rec_core.features import check_features, check_not_nan, check_shape
from rec_core.sharding import constrain

_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Config:
    """Settings of the value estimator.

    Attributes:
      features: of the request: user, hour, page, length of the history; at least one.
      actions: J. With `monotone` they stand in the order of rising cost.
      dense: number of float features, such as scores of an earlier stage.
      hidden: widths of the hidden layers.
      monotone: gains are at least 0 and never fall from one action to the next, `Q_ij = sum_(k <= j) softplus(o_ik)`:
        the paper's assumption. False leaves each action free.
      scale: a typical spread of gains between requests, in the log's unit; the net works in units of it.
      start: mean gain of each action, at which the training starts: without it the net has to learn first what all
        requests have in common, which takes long where that is large beside their spread. () for none.
      dtype: compute dtype; parameters and estimates are float32.
    """

    features: tuple[Feature, ...]
    actions: int
    dense: int = 0
    hidden: tuple[int, ...] = (64, 32)
    monotone: bool = True
    scale: float = 1.0
    start: tuple[float, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError("dcaf.value.Config: features is empty; the estimate needs at least one of the request")
        if self.actions < 1 or self.dense < 0:
            raise ValueError(
                f"dcaf.value.Config: actions is {self.actions}, must be at least 1; dense is {self.dense}, at least 0"
            )
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"dcaf.value.Config: hidden is {self.hidden}, must be widths of at least one layer")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"dcaf.value.Config: scale is {self.scale}, must be a finite gain above 0")
        if self.start and (len(self.start) != self.actions or not np.isfinite(self.start).all()):
            raise ValueError(
                f"dcaf.value.Config: start is {self.start}, must be () or {self.actions} finite mean gains"
            )
        if self.dtype not in _DTYPES:
            raise ValueError(f"dcaf.value.Config: dtype is {self.dtype!r}, must be one of {_DTYPES}")
        embedding.tables(self.features)


@struct.dataclass
class Batch:
    """B requests of a log, NumPy on the host or JAX on a device.

    Attributes:
      features: raw features by field, `[B]` each.
      gain: replayed gains Q_ij; anything where `observed` is false.
      observed: which actions were replayed for the request.
      weight: of the request in the loss, 0 for padding.
      dense: float features, or None.
    """

    features: Mapping[str, Any]
    gain: Float[Any, "B J"]
    observed: Bool[Any, "B J"]
    weight: Float[Any, " B"]
    dense: Float[Any, "B F"] | None = None


class Net(nn.Module):
    """From vectors to the gains of all actions, in units of `scale`; the tables are outside."""

    config: Config

    @nn.compact
    def __call__(self, x: Float[Array, "B d"], dense: Float[Array, "B F"] | None) -> Float[Array, "B J"]:
        c = self.config
        if dense is not None:
            # Tames large counts and keeps small values, as in rec_core.ranking.ctr.
            dense = jnp.sign(dense) * jnp.log1p(jnp.abs(dense))
            x = jnp.concatenate([x, dense], axis=-1)
        x = x.astype(c.dtype)
        for i, units in enumerate(c.hidden):
            x = nn.relu(nn.Dense(units, dtype=c.dtype, name=f"mlp_{i}")(x))
        first = nn.initializers.constant(_bias(c)) if c.start else nn.initializers.zeros
        out = nn.Dense(c.actions, dtype=jnp.float32, bias_init=first, name="gain")(x.astype(jnp.float32))
        return jnp.cumsum(nn.softplus(out), axis=-1) if c.monotone else out


def _bias(config: Config) -> np.ndarray:
    """The output's bias at which the estimates are `start`."""
    start = np.asarray(config.start) / config.scale
    if not config.monotone:
        return start
    steps = np.maximum(np.diff(start, prepend=0.0), 1e-3)  # a mean that falls cannot be met; by less than this it rises
    return steps + np.log(-np.expm1(-steps))  # the inverse of softplus


def init(key: Array, config: Config) -> dict[str, Any]:
    """Parameters: `{"tables": {name: [rows, width]}, "net": ...}`, float32. Pure and jittable."""
    table_key, net_key = jax.random.split(key)
    dense = jnp.zeros((1, config.dense)) if config.dense else None
    net = Net(config).init(net_key, jnp.zeros((1, embedding.width(config.features))), dense)["params"]
    return {"tables": embedding.init_tables(table_key, config.features), "net": net}


def apply(
    params: Any, batch: Batch, config: Config, *, key: Array | None = None, train: bool = False
) -> Float[Array, "B J"]:
    """Estimated gains in the log's unit. Gains, `observed` and `weight` are not read, nor are `key` and `train`."""
    del key, train
    vectors = constrain(embedding.embed(params["tables"], config.features, batch.features))
    dense = batch.dense if config.dense else None
    estimates: Any = Net(config).apply({"params": params["net"]}, vectors, dense)
    return config.scale * estimates


def objective(
    params: Any,
    output: Float[Array, "B J"],
    batch: Batch,
    config: Config,
    *,
    key: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], dict[str, losses.Sum]]:
    """Mean over the observed (request, action) of `((estimate - gain) / scale)^2`.

    The aux sums `estimated` and `gained`, in units of scale, show the bias; all are of the whole batch, over all
    devices.
    """
    del params, key
    weight = jnp.where(batch.observed, jnp.asarray(batch.weight, jnp.float32)[:, None], 0)
    # What has no weight may hold anything: replaced first, since 0 * NaN would reach the sums and the gradients.
    output = jnp.where(weight > 0, output, 0) / config.scale
    gain = jnp.where(weight > 0, jnp.asarray(batch.gain, jnp.float32), 0) / config.scale
    sums = {
        "loss": jnp.sum(weight * jnp.square(output - gain)),
        "estimated": jnp.sum(weight * output),
        "gained": jnp.sum(weight * gain),
    }
    sums, count = losses.sum_over(axis_name, (sums, jnp.sum(weight)))
    aux = {name: (total, count) for name, total in sums.items()}
    return losses.mean(*aux["loss"]), jax.lax.stop_gradient(aux)


def loss(
    params: Any,
    batch: Batch,
    config: Config,
    *,
    key: Array | None = None,
    train: bool = True,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], dict[str, losses.Sum]]:
    """`objective(apply(...))`; see both."""
    output = apply(params, batch, config, key=key, train=train)
    return objective(params, output, batch, config, key=key, axis_name=axis_name)


def touched(batch: Batch, config: Config) -> dict[str, Int[Array, " n"]]:
    """Rows of each table that the batch reads, with repetitions."""
    return embedding.touched((config.features, batch.features))


def check(batch: Batch, config: Config) -> None:
    """ValueError naming field, row and value for what would pass unseen on a device."""
    rows = len(batch.weight)
    check_features("dcaf.value.Batch.features", config.features, batch.features, (rows,))
    for name in ("gain", "observed"):
        check_shape(f"dcaf.value.Batch.{name}", getattr(batch, name), (rows, config.actions))
    observed, weight = np.asarray(batch.observed), np.asarray(batch.weight)
    if observed.dtype != bool:
        raise ValueError(f"dcaf.value.Batch.observed: must be bool, got {observed.dtype}")
    check_shape("dcaf.value.Batch.weight", weight, (rows,))
    check_not_nan("dcaf.value.Batch.weight", weight, finite=True)
    if (weight < 0).any():
        row = int(np.flatnonzero(weight < 0)[0])
        raise ValueError(f"dcaf.value.Batch.weight: {weight[row]} at row {row} must be at least 0")
    check_not_nan("dcaf.value.Batch.gain", np.where(observed, np.asarray(batch.gain), 0), finite=True)
    if config.dense:
        if batch.dense is None:
            raise ValueError(f"dcaf.value.Batch.dense: missing, config.dense asks for {config.dense} float features")
        check_shape("dcaf.value.Batch.dense", batch.dense, (rows, config.dense))
        check_not_nan("dcaf.value.Batch.dense", batch.dense, finite=True)


def example(batch_size: int = 8, seed: int = 0) -> tuple[Config, Batch]:
    """A small configuration and a valid random batch: for tests, warm-up and lowering."""
    draw, actions = np.random.default_rng(seed), 5
    config = Config(
        features=(Categorical("user", 24, 4), Hashed("page", 16, 4), Continuous("history", (10.0, 100.0), 4)),
        actions=actions,
        dense=2,
        hidden=(16,),
        scale=2.0,
    )
    batch = Batch(
        features={
            "user": draw.integers(2, 24, batch_size).astype(np.int32),
            "page": draw.integers(0, 1000, batch_size).astype(np.int32),
            "history": draw.exponential(50, batch_size).astype(np.float32),
        },
        gain=np.cumsum(draw.exponential(1, (batch_size, actions)), axis=1).astype(np.float32),
        observed=draw.random((batch_size, actions)) < 0.8,
        weight=np.ones(batch_size, np.float32),
        dense=draw.normal(size=(batch_size, 2)).astype(np.float32),
    )
    return config, batch

"""A model small enough to compile in a moment, with all that training must get right: two tables (one read twice by a
batch), dropout, in-batch negatives, weights, and the parameter names that the sharding rules know."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rec_core.embedding import lookup
from rec_core.losses import gather_over, sum_over
from rec_core.sharding import constrain


@dataclass(frozen=True)
class Config:
    users: int = 40
    items: int = 64
    width: int = 8
    hidden: int = 16
    dropout: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width is {self.width}: at least 1")


@struct.dataclass
class Batch:
    user: Any  # int32 [B]
    item: Any  # int32 [B]
    history: Any  # int32 [B, T]
    price: Any  # float32 [B]
    weight: Any  # float32 [B]


class Net(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, price, deterministic):
        hidden = nn.Dense(self.config.hidden, name="gate", dtype=self.config.dtype)(x)
        hidden = nn.Dropout(self.config.dropout, deterministic=deterministic)(jax.nn.silu(hidden))
        out = nn.Dense(self.config.width, name="down", dtype=self.config.dtype)(constrain(hidden))
        return nn.LayerNorm(name="norm")(x + out + price[:, None])


def init(key, config):
    keys = jax.random.split(key, 3)
    x, price = jnp.zeros((1, config.width)), jnp.zeros(1)
    return {
        "tables": {
            "user": jax.random.normal(keys[0], (config.users, config.width)),
            "item": jax.random.normal(keys[1], (config.items, config.width)),
        },
        "net": Net(config).init(keys[2], x, price, True),
    }


def apply(params, batch, config, *, key=None, train=False):
    item, user = params["tables"]["item"], params["tables"]["user"]
    x = lookup(user, batch.user) + lookup(item, batch.history).mean(1)
    deterministic = key is None or not train
    rngs = {} if deterministic else {"dropout": key}
    query = Net(config).apply(params["net"], x, batch.price, deterministic, rngs=rngs)
    return {"query": query.astype(jnp.float32), "item": lookup(item, batch.item)}


def objective(params, output, batch, config, *, key=None, axis_name=None):
    """Softmax over the whole batch's items: needs every device's rows."""
    items, ids, weights = gather_over(axis_name, (output["item"], batch.item, batch.weight))
    scores = output["query"] @ items.T
    same = batch.item[:, None] == ids[None, :]
    scores = jnp.where(same | (weights[None, :] == 0), -1e9, scores)
    positive = (output["query"] * output["item"]).sum(-1)
    loss = jax.nn.logsumexp(jnp.concatenate([positive[:, None], scores], 1), axis=1) - positive
    sums = sum_over(axis_name, ((loss * batch.weight).sum(), batch.weight.sum()))
    hits = sum_over(axis_name, ((positive > scores.max(1)) * batch.weight).sum())
    return sums[0] / sums[1], {"hit": (hits, sums[1])}


def loss(params, batch, config, *, key=None, train=True, axis_name=None):
    output = apply(params, batch, config, key=key, train=train)
    return objective(params, output, batch, config, key=key, axis_name=axis_name)


def touched(batch, config):
    return {"user": batch.user, "item": jnp.concatenate([batch.item, batch.history.reshape(-1)])}


def check(batch, config):
    for name, size in (("user", config.users), ("item", config.items), ("history", config.items)):
        ids = np.asarray(getattr(batch, name))
        wrong = np.argwhere((ids < 0) | (ids >= size))
        if wrong.size:
            at = tuple(wrong[0])
            raise ValueError(f"{name}[{at}] is {ids[at]}: must be in [0, {size})")
    for name in ("price", "weight"):
        wrong = np.argwhere(~np.isfinite(np.asarray(getattr(batch, name))))
        if wrong.size:
            raise ValueError(f"{name}[{wrong[0][0]}] is not a finite number")


def make_batch(rng, batch_size, config):
    def ids(size, *shape):
        return rng.integers(0, size, shape).astype(np.int32)

    return Batch(
        user=ids(config.users, batch_size),
        item=ids(config.items, batch_size),
        history=ids(config.items, batch_size, 3),
        price=rng.normal(size=batch_size).astype(np.float32),
        weight=rng.integers(1, 3, batch_size).astype(np.float32),
    )


def example(batch_size=8, seed=0):
    config = Config()
    return config, make_batch(np.random.default_rng(seed), batch_size, config)

"""LUM step 3, knowledge utilization in retrieval: two towers (arXiv 2502.08309, section 4.3).

`e_us = UEnc(us, {o_q})`, `e_i' = IEnc(i, e_i)`: the user tower reads the user's features, sequence and LUM's answers,
the item tower the item's features and LUM's item embedding; InfoNCE over the global batch. Without answers and item
embeddings it is the plain two-tower model (EDB), its baseline.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rec_core import embedding, losses
from rec_core.embedding import Categorical, Feature
from rec_core.features import check_features, check_not_nan, check_shape
from rec_core.interest.average import Average


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the two towers.

    Attributes:
      user: features of the user.
      item: features of an item; the behaviours of the sequence share them.
      target: the item feature that holds the item id.
      conditions: N, how many of LUM's answers the user tower reads, 0 for none.
      knowledge_width: width of LUM's answers and item embeddings.
      hidden: widths of each tower's hidden layers.
      width: of the towers' outputs.
      temperature: of the loss; outputs are L2-normalised.
      popularity_correction: subtract `Batch.log_q` from the similarities.
      chunk: queries whose similarities are held at a time.
      dtype: compute dtype.
    """

    user: tuple[Feature, ...]
    item: tuple[Feature, ...]
    target: str = "item"
    conditions: int = 0
    knowledge_width: int = 0
    hidden: tuple[int, ...] = (128,)
    width: int = 64
    temperature: float = 0.05
    popularity_correction: bool = False
    chunk: int = 1024
    dtype: str = "float32"

    def __post_init__(self):
        if self.target not in (f.name for f in self.item):
            raise ValueError(f"two_tower.Config: target={self.target!r} must name one of the item features")
        if (self.conditions > 0) != (self.knowledge_width > 0) or self.conditions < 0:
            raise ValueError(
                f"two_tower.Config: conditions={self.conditions} and knowledge_width={self.knowledge_width} must both "
                "be 0 or both above"
            )
        if not self.temperature > 0 or self.width < 1 or self.chunk < 1:
            raise ValueError(
                f"two_tower.Config: temperature={self.temperature} must be above 0, width={self.width} and "
                f"chunk={self.chunk} at least 1"
            )


@struct.dataclass
class Batch:
    """B (user, chosen item) pairs, NumPy on the host or JAX on a device.

    Attributes:
      user: raw user features, `[B]` each.
      sequence: raw item features of the user's behaviours, `[B, T]` each.
      mask: which of them are real.
      item: raw features of the chosen item, `[B]` each.
      answers: LUM's answers o_q, `[B, N, d]`, or None.
      knowledge: LUM's embedding e_i of the chosen item, `[B, d]`, or None.
      weight: of the pair in the loss.
      log_q: log of the item's sampling probability, or None.
    """

    user: dict[str, Any]
    sequence: dict[str, Any]
    mask: Bool[Any, "B T"]
    item: dict[str, Any]
    answers: Float[Any, "B N d"] | None
    knowledge: Float[Any, "B d"] | None
    weight: Float[Any, " B"]
    log_q: Float[Any, " B"] | None = None


@struct.dataclass
class Output:
    """L2-normalised outputs of both towers, `[B, width]`."""

    user: Float[Array, "B d"]
    item: Float[Array, "B d"]


class Tower(nn.Module):
    """An MLP with layer-normalised input and L2-normalised output."""

    hidden: tuple[int, ...]
    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*n f"]) -> Float[Array, "*n d"]:
        dtype = jnp.dtype(self.dtype)
        x = nn.LayerNorm(dtype=dtype, name="norm")(x)
        for number, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, dtype=dtype, name=f"hidden_{number}")(x))
        return losses.normalize(nn.Dense(self.width, dtype=dtype, name="output")(x))


def init(key: PRNGKeyArray, config: Config) -> dict:
    """Parameters: `{"tables": ..., "net": {"user": ..., "item": ...}}`. Pure and jittable."""
    table_key, user_key, item_key = jax.random.split(key, 3)
    item = embedding.width(config.item)
    user = embedding.width(config.user) + item + config.conditions * config.knowledge_width
    tower = _tower(config)
    return {
        "tables": embedding.init_tables(table_key, config.user + config.item),
        "net": {
            "user": tower.init(user_key, jnp.zeros((1, user)))["params"],
            "item": tower.init(item_key, jnp.zeros((1, item + config.knowledge_width)))["params"],
        },
    }


def _tower(config: Config) -> Tower:
    return Tower(config.hidden, config.width, config.dtype)


def user_tower(params: dict, batch: Batch, config: Config) -> Float[Array, "B width"]:
    """`e_us = UEnc(us, {o_q})`; reads `user`, `sequence`, `mask` and `answers` of the batch."""
    tables = params["tables"]
    sequence = embedding.embed(tables, config.item, batch.sequence, where=jnp.asarray(batch.mask).astype(bool))
    parts = [Average()(jnp.zeros_like(sequence[:, 0]), sequence, batch.mask)]
    if config.user:
        parts.append(embedding.embed(tables, config.user, batch.user))
    if config.conditions:
        assert batch.answers is not None, "config.conditions asks for Batch.answers"
        answers = jax.lax.stop_gradient(batch.answers.astype(jnp.float32))
        parts.append(answers.reshape(answers.shape[0], -1))
    vectors: Any = _tower(config).apply({"params": params["net"]["user"]}, jnp.concatenate(parts, axis=-1))
    return vectors


def item_tower(
    params: dict, item: dict[str, Any], config: Config, knowledge: Float[Any, "*n d"] | None = None
) -> Float[Array, "*n width"]:
    """`e_i' = IEnc(i, e_i)` for raw item features of any common shape; the whole catalogue at once for an index."""
    vectors = embedding.embed(params["tables"], config.item, item)
    if config.knowledge_width:
        assert knowledge is not None, "config.knowledge_width asks for LUM's item embeddings"
        vectors = jnp.concatenate([vectors, jax.lax.stop_gradient(knowledge.astype(jnp.float32))], axis=-1)
    outputs: Any = _tower(config).apply({"params": params["net"]["item"]}, vectors)
    return outputs


def apply(
    params: dict, batch: Batch, config: Config, *, key: PRNGKeyArray | None = None, train: bool = False
) -> Output:
    """Both towers over a batch of pairs. `key` and `train` are unused: there is no randomness."""
    del key, train
    return Output(user_tower(params, batch, config), item_tower(params, batch.item, config, batch.knowledge))


def objective(
    params: dict,
    output: Output,
    batch: Batch,
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    axis_name: str | None = None,
) -> tuple[Array, dict]:
    """InfoNCE of each user against all items of the global batch; aux is `{"loss": (sum, weight)}`."""
    del params, key
    ids = batch.item[config.target]
    pool: dict[str, Any] = {"embedding": output.item, "id": ids, "valid": batch.weight > 0}
    if config.popularity_correction:
        pool["log_q"] = batch.log_q
    pool = losses.gather_over(axis_name, pool)
    total, count = losses.info_nce(
        output.user,
        output.item,
        pool["embedding"],
        positive_ids=ids,
        negative_ids=pool["id"],
        negative_mask=pool["valid"],
        weights=batch.weight,
        log_q=pool.get("log_q"),
        positive_log_q=batch.log_q if config.popularity_correction else None,
        temperature=config.temperature,
        similarity="dot",
        chunk=config.chunk,
    )
    total, count = losses.sum_over(axis_name, (total, count))
    return losses.mean(total, count), {"loss": (total, count)}


def loss(
    params: dict,
    batch: Batch,
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = True,
    axis_name: str | None = None,
) -> tuple[Array, dict]:
    """`objective(apply(...))`; see both."""
    return objective(params, apply(params, batch, config, train=train), batch, config, key=key, axis_name=axis_name)


def touched(batch: Batch, config: Config) -> dict[str, Int[Array, " n"]]:
    """The table rows that the batch reads, with repetitions."""
    return embedding.touched((config.user, batch.user), (config.item, batch.item), (config.item, batch.sequence))


def check(batch: Batch, config: Config) -> None:
    """Raises ValueError naming field, row and value for ids out of range, NaN features and missing knowledge."""
    rows = len(batch.weight)
    check_features("two_tower.Batch.user", config.user, batch.user, (rows,))
    check_features("two_tower.Batch.item", config.item, batch.item, (rows,))
    check_features("two_tower.Batch.sequence", config.item, batch.sequence, np.shape(batch.mask))
    floats = {
        "weight": (True, (rows,)),
        "answers": (config.conditions > 0, (rows, config.conditions, config.knowledge_width)),
        "knowledge": (config.knowledge_width > 0, (rows, config.knowledge_width)),
        "log_q": (config.popularity_correction, (rows,)),
    }
    for name, (needed, shape) in floats.items():
        value = getattr(batch, name)
        if value is None and needed:
            raise ValueError(f"two_tower.Batch: {name} is missing; the config asks for it")
        if value is not None:
            check_shape(f"two_tower.Batch.{name}", value, shape)
            check_not_nan(f"two_tower.Batch.{name}", value, finite=True)


def example(batch_size: int = 8, seed: int = 0) -> tuple[Config, Batch]:
    """A small configuration and a valid random batch: for tests, warm-up and lowering."""
    rng = np.random.default_rng(seed)
    length, conditions, width = 6, 3, 8
    config = Config(
        user=(Categorical("gender", 3, 4),),
        item=(Categorical("item", 40, 8),),
        conditions=conditions,
        knowledge_width=width,
        hidden=(16,),
        width=8,
        chunk=8,
    )
    mask = np.arange(length) < rng.integers(1, length + 1, batch_size)[:, None]
    batch = Batch(
        user={"gender": rng.integers(1, 3, batch_size, dtype=np.int32)},
        sequence={"item": rng.integers(2, 40, (batch_size, length), dtype=np.int32) * mask},
        mask=mask,
        item={"item": rng.integers(2, 40, batch_size, dtype=np.int32)},
        answers=rng.standard_normal((batch_size, conditions, width)).astype(np.float32),
        knowledge=rng.standard_normal((batch_size, width)).astype(np.float32),
        weight=np.ones(batch_size, np.float32),
    )
    return config, batch

"""The click model `y = sigmoid(MLP(s + E_U + E_I + E_O + dense))`, `+` being concatenation, with any interest module.

`s` is what `config.interest` makes of the behaviours for the target: "din" gives DIN (arXiv 1706.06978), "average" a
plain DNN with pooled behaviours. Behaviours are described by the target's features and share its tables. The loss is
the clicks' alone: the modules' own (DIEN's, MIMN's) are not added.

Float features (`dense`, such as LUM's answers) pass `sign(x) log(1 + |x|)`, which tames large counts and keeps small
values as they are, and a linear layer of their own. A layer norm would not do: it erases the size of a single feature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rec_core import embedding, losses
from rec_core.embedding import Categorical, Continuous, Cross, Feature, Hashed
from rec_core.features import check_features, check_labels, check_mask, check_not_nan, check_shape
from rec_core.interest import INTEREST, Dice
from rec_core.sharding import constrain

_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Config:
    """`context_features` may cross fields of user and target: they see the fields of all three groups."""

    item_features: tuple[Feature, ...]
    user_features: tuple[Feature, ...] = ()
    context_features: tuple[Feature, ...] = ()
    interest: str = "din"  # a name in rec_core.interest.INTEREST
    interest_options: tuple[tuple[str, Any], ...] = ()  # its fields, such as (("softmax", True),)
    hidden: tuple[int, ...] = (200, 80)
    dense: int = 0  # number of float features
    dense_width: int = 32  # width of their linear layer
    tasks: int = 1
    dropout: float = 0.0
    embedding_scale: float = 0.05  # standard deviation of new tables
    dtype: str = "float32"  # of the computation; parameters and logits are float32

    def __post_init__(self) -> None:
        if not self.item_features:
            raise ValueError("item_features is empty; the target needs at least one feature")
        if self.interest not in INTEREST:
            raise ValueError(f"interest is {self.interest!r}, must be one of {sorted(INTEREST)}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, must be one of {_DTYPES}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, must be in [0, 1)")
        for name, least in (("dense", 0), ("dense_width", 1), ("tasks", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden is {self.hidden}, must be widths of at least one layer")
        embedding.tables(self.features)
        both = set(embedding.fields(self.user_features)) & set(embedding.fields(self.item_features))
        if both:
            raise ValueError(f"fields {sorted(both)} are in user_features and item_features; rename one of each")

    @property
    def features(self) -> tuple[Feature, ...]:
        return self.user_features + self.item_features + self.context_features

    @property
    def context_fields(self) -> tuple[str, ...]:
        """Fields that the batch's `context` holds: what context features read and user and target do not give."""
        given = {*embedding.fields(self.user_features), *embedding.fields(self.item_features)}
        return tuple(name for name in embedding.fields(self.context_features) if name not in given)


@struct.dataclass
class Batch:
    """B impressions, NumPy on the host or JAX on a device. Fields are named by the features' specs; see `Config`."""

    target: Mapping[str, Any]  # each [B]; [B, C] for `score`
    sequence: Mapping[str, Any]  # each [B, T], of the same fields as target
    mask: Bool[Any, "B T"]  # true where there is a behaviour
    label: Float[Any, "B"]  # clicked or not; [B, tasks] for several tasks
    weight: Float[Any, "B"]  # 0 for padding
    user: Mapping[str, Any] = struct.field(default_factory=dict)  # each [B]
    context: Mapping[str, Any] = struct.field(default_factory=dict)  # each [B]; [B] or [B, C] for `score`
    dense: Float[Any, "B F"] | None = None  # [B, C, F] or [B, F] for `score`
    time: Float[Any, "B T"] | None = None  # age of the behaviours at the impression, seconds


class Net(nn.Module):
    """From vectors to logits; the tables are outside."""

    config: Config

    @nn.compact
    def __call__(
        self,
        user: Float[Array, "B d_U"] | None,
        target: Float[Array, "B d_I"],
        sequence: Float[Array, "B T d_I"],
        mask: Bool[Array, "B T"],
        context: Float[Array, "B d_O"] | None,
        dense: Float[Array, "B F"] | None,
        time: Float[Array, "B T"] | None,
        deterministic: bool = True,
        encoded: Any = None,
    ) -> Float[Array, "B tasks"]:
        """``encoded``: what the interest module made of the sequence before, in place of making it."""
        c = self.config
        interest = _interest(c, name="interest")
        if encoded is None:
            read = interest(target, sequence, mask, time=time)
        else:
            read = interest.read(encoded, target)
        return Head(c.hidden, c.dropout, c.tasks, c.dense_width, c.dtype, name="head")(
            [read, user, target, context], dense, deterministic
        )


class Head(nn.Module):
    """The MLP over what is known of an impression: parts side by side, float features through a layer of their own."""

    hidden: tuple[int, ...]
    dropout: float = 0.0
    tasks: int = 1
    dense_width: int = 32
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        parts: Sequence[Float[Array, "B _"] | None],
        dense: Float[Array, "B F"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B tasks"]:
        """Logits, float32. Parts that are None are left out."""
        given = [part for part in parts if part is not None]
        if dense is not None:
            dense = jnp.sign(dense) * jnp.log1p(jnp.abs(dense))
            given.append(nn.Dense(self.dense_width, dtype=self.dtype, name="dense")(dense))
        x = jnp.concatenate([part.astype(self.dtype) for part in given], axis=-1)
        for i, units in enumerate(self.hidden):
            x = Dice(self.dtype, name=f"dice_{i}")(nn.Dense(units, dtype=self.dtype, name=f"mlp_{i}")(x))
            x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        return nn.Dense(self.tasks, dtype=jnp.float32, name="logit")(x.astype(jnp.float32))


def init(key: Array, config: Config) -> dict[str, Any]:
    """Parameters: `{"tables": {name: [rows, width]}, "net": ...}`, float32."""
    table_key, net_key = jax.random.split(key)
    item = embedding.width(config.item_features)

    def vectors(specs: tuple[Feature, ...]) -> Array | None:
        return jnp.zeros((1, embedding.width(specs))) if specs else None

    net = Net(config).init(
        net_key,
        vectors(config.user_features),
        jnp.zeros((1, item)),
        jnp.zeros((1, 1, item)),
        jnp.ones((1, 1), bool),
        vectors(config.context_features),
        jnp.zeros((1, config.dense)) if config.dense else None,
        jnp.zeros((1, 1)),
    )["params"]
    return {"tables": embedding.init_tables(table_key, config.features, scale=config.embedding_scale), "net": net}


def apply(
    params: Any, batch: Batch, config: Config, *, key: Array | None = None, train: bool = False
) -> Float[Array, "B"] | Float[Array, "B tasks"]:
    """Logits, `[B]` for one task. `key` is for dropout, in training only."""
    deterministic = not train or config.dropout == 0
    if not deterministic and key is None:
        raise ValueError(f"apply in training with dropout {config.dropout} needs a key")
    # Laid out over the mesh's data axis, where there is one: left to itself the compiler may choose to replicate.
    vectors = jax.tree.map(constrain, _embed(params["tables"], batch, config))
    logits: Any = Net(config).apply(
        {"params": params["net"]},
        **vectors,
        dense=batch.dense if config.dense else None,
        deterministic=deterministic,
        rngs=None if deterministic or key is None else {"dropout": key},
    )
    return logits[:, 0] if config.tasks == 1 else logits


def click_sums(
    logits: Float[Array, "B"] | Float[Array, "B tasks"], label: Any, weight: Float[Any, "B"]
) -> dict[str, losses.Sum]:
    """`loss`, the binary cross-entropy, `predicted` and `clicked`, over impressions (and tasks), as mergeable sums."""
    weight = jnp.asarray(weight, jnp.float32).reshape(-1, *[1] * (logits.ndim - 1))
    loss, count = losses.bce_with_logits(logits, label, weight)
    weight = jnp.broadcast_to(weight, logits.shape)
    predicted = jnp.sum(jax.nn.sigmoid(jnp.where(weight > 0, logits, 0)) * weight)
    clicked = jnp.sum(jnp.where(weight > 0, jnp.asarray(label, jnp.float32), 0) * weight)
    return {"loss": (loss, count), "predicted": (predicted, count), "clicked": (clicked, count)}


def objective(
    params: Any,
    output: Float[Array, "B"] | Float[Array, "B tasks"],
    batch: Batch,
    config: Config,
    *,
    key: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], dict[str, losses.Sum]]:
    """Mean binary cross-entropy over impressions (and tasks). The aux sums are of the whole batch, over all devices."""
    aux = losses.sum_over(axis_name, click_sums(output, batch.label, batch.weight))
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
    output = apply(params, batch, config, key=key, train=train)
    return objective(params, output, batch, config, key=key, axis_name=axis_name)


def score(params: Any, batch: Batch, config: Config, *, chunk: int = 32) -> Float[Array, "B C"]:
    """Logits of C candidates for each request: `[B, C]`, or `[B, C, tasks]` for several tasks.

    User and behaviours are embedded, and the behaviours encoded, once a request and never repeated; `chunk` candidates
    are read by the interest module and go through the MLP at a time. Label and weight are not read.
    """
    shape = next(iter(batch.target.values())).shape
    if len(shape) != 2:
        raise ValueError(f"score takes targets [B, C], got {shape}; for one target an example use apply")

    def per_candidate(x: Array) -> Array:  # [B] or [B, C] to [C, B]
        return jnp.broadcast_to(x if x.ndim == 2 else x[:, None], shape).T

    dense = None
    if config.dense:
        given = jnp.asarray(batch.dense)
        dense = jnp.broadcast_to(given if given.ndim == 3 else given[:, None], (*shape, config.dense)).swapaxes(0, 1)
    tables = params["tables"]
    shared = _embed(tables, batch, config, target=False)
    encoded = _interest(config).apply(
        {"params": params["net"].get("interest", {})},
        shared["sequence"],
        shared["mask"],
        time=shared["time"],
        method="encode",
    )

    def one(candidate: dict[str, Any]) -> Array:
        part = replace(batch, target=candidate["target"], context=candidate["context"])
        vectors: dict[str, Any] = shared | {
            "target": embedding.embed(tables, config.item_features, part.target),
            "context": _context(tables, part, config),
        }
        logits: Any = Net(config).apply({"params": params["net"]}, **vectors, dense=candidate["dense"], encoded=encoded)
        return logits

    candidates = {
        "target": {name: per_candidate(jnp.asarray(x)) for name, x in batch.target.items()},
        "context": {name: per_candidate(jnp.asarray(x)) for name, x in batch.context.items()},
        "dense": dense,
    }
    logits = jax.lax.map(one, candidates, batch_size=min(chunk, shape[1])).swapaxes(0, 1)
    return logits[..., 0] if config.tasks == 1 else logits


def touched(batch: Batch, config: Config) -> dict[str, Int[Array, " n"]]:
    """Rows of each table that the batch reads."""
    groups: list[tuple[tuple[Feature, ...], Mapping[str, Any]]] = [
        (config.user_features, batch.user),
        (config.item_features, batch.target),
        (config.item_features, batch.sequence),
        (config.context_features, {**batch.user, **batch.target, **batch.context}),
    ]
    return embedding.touched(*groups)


def check(batch: Batch, config: Config) -> None:
    """ValueError naming field, row and value for what would pass unseen on a device. For batches of `apply`.

    A row without any behaviour is legal: a new user.
    """
    size, length = check_mask("mask", batch.mask)
    check_features("user", config.user_features, batch.user, (size,))
    check_features("target", config.item_features, batch.target, (size,))
    check_features("sequence", config.item_features, batch.sequence, (size, length))
    missing = [name for name in config.context_fields if name not in batch.context]
    if missing:
        raise ValueError(f"context: field {missing[0]!r} is missing; present: {sorted(batch.context)}")
    together = {**batch.user, **batch.target, **batch.context}
    check_features("context", config.context_features, together, (size,))
    check_labels(batch.label, batch.weight, size, config.tasks)
    if config.dense and batch.dense is None:
        raise ValueError(f"dense: missing, config.dense asks for {config.dense} float features")
    if batch.dense is not None:
        check_shape("dense", batch.dense, (size, config.dense))
        check_not_nan("dense", batch.dense, finite=True)
    if batch.time is not None:
        check_shape("time", batch.time, (size, length))
        check_not_nan("time", batch.time, finite=True)


def example(batch_size: int = 8, seed: int = 0) -> tuple[Config, Batch]:
    """A small config with every kind of feature, and a valid random batch."""
    config = Config(
        user_features=(Categorical("user", 20, 4), Continuous("activity", (0.0, 1.0, 2.0), 4)),
        item_features=(Categorical("item", 30, 4), Hashed("brand", 16, 4)),
        context_features=(Categorical("hour", 24, 4), Cross("user_x_brand", ("user", "brand"), 16, 4)),
        interest_options=(("hidden", (8, 4)),),
        hidden=(16, 8),
        dense=3,
        dense_width=4,
    )
    draw, length = np.random.default_rng(seed), 6
    lengths = draw.integers(1, length + 1, batch_size)

    def ids(high: int, *shape: int) -> np.ndarray:
        return draw.integers(2, high, (batch_size, *shape)).astype(np.int32)

    mask = np.arange(length) < lengths[:, None]
    sequence = {"item": ids(30, length), "brand": ids(1000, length)}
    return config, Batch(
        user={"user": ids(20), "activity": draw.normal(1, 1, batch_size).astype(np.float32)},
        target={"item": ids(30), "brand": ids(1000)},
        sequence={name: np.where(mask, x, embedding.PAD) for name, x in sequence.items()},
        mask=mask,
        context={"hour": ids(24)},
        dense=draw.normal(size=(batch_size, 3)).astype(np.float32),
        label=draw.integers(0, 2, batch_size).astype(np.float32),
        weight=np.ones(batch_size, np.float32),
        time=np.sort(draw.exponential(1e5, (batch_size, length)).astype(np.float32))[:, ::-1].copy(),
    )


def _interest(config: Config, **options: Any) -> Any:
    return INTEREST[config.interest](**dict(config.interest_options), dtype=config.dtype, **options)


def _context(tables: Mapping[str, Any], batch: Batch, config: Config) -> Array | None:
    if not config.context_features:
        return None
    fields = {**batch.user, **batch.target, **batch.context}
    return embedding.embed(tables, config.context_features, fields)


def _embed(tables: Mapping[str, Any], batch: Batch, config: Config, *, target: bool = True) -> dict[str, Any]:
    vectors: dict[str, Any] = {
        "user": embedding.embed(tables, config.user_features, batch.user) if config.user_features else None,
        "sequence": embedding.embed(tables, config.item_features, batch.sequence),
        "mask": batch.mask,
        "time": batch.time,
    }
    if target:
        vectors |= {
            "target": embedding.embed(tables, config.item_features, batch.target),
            "context": _context(tables, batch, config),
        }
    return vectors

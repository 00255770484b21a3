"""What the click model reads, its checks on the host, and a small example."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Bool, Float

from rec_core import embedding
from rec_core.embedding import Categorical, Continuous, Cross, Hashed
from rec_core.features import check_features, check_ids, check_labels, check_mask, check_not_nan, check_shape
from rec_core.ranking.ctr_config import Config


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

    @property
    def fields(self) -> dict[str, Any]:
        """All fields of user, target and context: what context and domain features read."""
        return {**self.user, **self.target, **self.context}


def check(batch: Batch, config: Config) -> None:
    """ValueError naming field, row and value for what would pass unseen on a device. For batches of `apply`.

    A row without any behaviour is legal: a new user. Numbers that domain features read must be finite, those of other
    features may be infinite (the end buckets).
    """
    size, length = check_mask("mask", batch.mask)
    check_features("user", config.user_features, batch.user, (size,))
    check_features("target", config.item_features + config.query_features, batch.target, (size,))
    check_features("sequence", config.item_features, batch.sequence, (size, length))
    missing = [name for name in config.context_fields if name not in batch.fields]
    if missing:
        raise ValueError(f"context: field {missing[0]!r} is missing; present: {sorted(batch.context)}")
    check_features("context", config.context_features, batch.fields, (size,))
    check_features("domain", config.domain_features, batch.fields, (size,))
    for name in embedding.fields(config.domain_features):
        check_not_nan(f"domain[{name!r}]", batch.fields[name], finite=True)
    if config.domain_field:
        where = f"domain[{config.domain_field!r}]"
        check_shape(where, batch.fields[config.domain_field], (size,))
        check_ids(where, batch.fields[config.domain_field], config.domains)
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

"""What the click model reads, its checks on the host, and a small example."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Bool, Float

from rec_core import embedding
from rec_core.embedding import Categorical, Continuous, Cross, Feature, Hashed
from rec_core.features import (
    check_features,
    check_fields,
    check_ids,
    check_labels,
    check_mask,
    check_not_nan,
    check_shape,
    mask_shape,
)
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


def check(batch: Batch, config: Config, *, candidates: bool = False) -> None:
    """ValueError naming field, row and value for what would pass unseen on a device.

    A row without any behaviour is legal: a new user. Numbers that domain features read must be finite, those of other
    features may be infinite (the end buckets).

    Args:
      candidates: the batch is of `score`: targets are [B, C], and context and dense may be; label and weight are not
        read. Otherwise it is of `apply`.
    """
    size, length = check_mask("mask", batch.mask)
    asked = check_shapes(batch, config, candidates=candidates)
    check_features("user", config.user_features, batch.user, (size,))
    check_features("target", config.item_features + config.query_features, batch.target, asked)
    check_features("sequence", config.item_features, batch.sequence, (size, length))
    _check_fields("context", config.context_features, batch)
    _check_fields("domain", config.domain_features, batch)
    for name in embedding.fields(config.domain_features):
        check_not_nan(f"domain[{name!r}]", batch.fields[name], finite=True)
    if config.domain_field:
        check_ids(f"domain[{config.domain_field!r}]", batch.fields[config.domain_field], config.domains)
    if not candidates:
        check_labels(batch.label, batch.weight, size, config.tasks)
    for name, values in (("dense", batch.dense), ("time", batch.time)):
        if values is not None:
            check_not_nan(name, values, finite=True)


def check_shapes(batch: Batch, config: Config, *, candidates: bool = False) -> tuple[int, ...]:
    """The part of `check` that reads no value and so serves under jit: what is missing, and what does not go together.

    Returns:
      The shape of what is asked about: `[B]`, and `[B, C]` of `candidates`.
    """
    size, length = mask_shape("mask", batch.mask)
    asked = _asked(batch, size) if candidates else (size,)
    check_fields("user", config.user_features, batch.user, (size,))
    check_fields("target", config.item_features + config.query_features, batch.target, asked)
    check_fields("sequence", config.item_features, batch.sequence, (size, length))
    missing = [name for name in config.context_fields if name not in batch.fields]
    if missing:
        raise ValueError(f"context: field {missing[0]!r} is missing; present: {sorted(batch.context)}")
    domain = (*embedding.fields(config.domain_features), *([config.domain_field] if config.domain_field else []))
    for where, names in (("context", embedding.fields(config.context_features)), ("domain", domain)):
        for name in names:
            field = batch.fields[name]  # [B]; of candidates [B, C] in the target, and either in the context
            each = name in batch.target or (name in batch.context and np.ndim(field) == len(asked))
            check_shape(f"{where}[{name!r}]", field, asked if each else asked[:1])
    if config.dense and batch.dense is None:
        raise ValueError(f"dense: missing, config.dense asks for {config.dense} float features")
    if batch.dense is not None:
        of_candidate = candidates and np.ndim(batch.dense) == 3
        check_shape("dense", batch.dense, (*(asked if of_candidate else (size,)), config.dense))
    if batch.time is not None:
        check_shape("time", batch.time, (size, length))
    elif config.reads_time:
        raise ValueError(f"time: missing; interest {config.interest!r} reads ages of behaviours, zeros if not known")
    return asked


def _asked(batch: Batch, size: int) -> tuple[int, int]:
    # The shape of a request's targets.
    if not batch.target:
        raise ValueError("target: no field is there; a request needs those of its candidates")
    name, ids = next(iter(batch.target.items()))
    shape = np.shape(ids)
    if len(shape) != 2 or shape[0] != size or not shape[1]:
        raise ValueError(f"target[{name!r}]: shape {shape}, must be ({size}, C) with at least one candidate")
    return size, shape[1]


def _check_fields(where: str, specs: tuple[Feature, ...], batch: Batch) -> None:
    # The values, of user, target and context. Where a feature crosses fields of request and candidate, each has all
    # candidates.
    for spec in specs:
        raw = {name: np.asarray(batch.fields[name]) for name in embedding.fields((spec,))}
        shape = max((x.shape for x in raw.values()), key=len)
        raw = {name: x if x.shape == shape else np.broadcast_to(x[:, None], shape) for name, x in raw.items()}
        check_features(where, (spec,), raw, shape)


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

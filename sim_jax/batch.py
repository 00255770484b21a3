"""What the SIM model reads: impressions to learn from, and requests with many candidates."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from rec_core import embedding
from rec_core.embedding import Categorical, Hashed
from rec_core.features import check_features, check_labels, check_mask, check_not_nan, check_shape
from sim_jax.config import Config


@struct.dataclass
class Batch:
    """B impressions, NumPy on the host or JAX on a device; behaviours oldest first, strictly before the impression."""

    target: Mapping[str, Any]  # item fields, each [B]
    sequence: Mapping[str, Any]  # the S recent behaviours, item fields, each [B, S]
    mask: Bool[Any, "B S"]
    long: Mapping[str, Any]  # the lifelong sequence, or what a tree found in it, item fields, each [B, T]
    long_mask: Bool[Any, "B T"]
    label: Float[Any, "B"]  # clicked or not; [B, tasks] for several tasks
    weight: Float[Any, "B"]  # 0 for padding
    long_time: Float[Any, "B T"] | None = None  # age of the behaviours at the impression, seconds
    negatives: Mapping[str, Any] | None = None  # an item not chosen at each recent behaviour, each [B, S]; for DIEN
    user: Mapping[str, Any] = struct.field(default_factory=dict)  # each [B]
    context: Mapping[str, Any] = struct.field(default_factory=dict)  # each [B]
    dense: Float[Any, "B F"] | None = None


@struct.dataclass
class Request:
    """B requests of C candidates. The behaviours are those of `Batch`, with n long sequences a request: for search
    "none" what the tree found for each of its n keys, `place` telling each candidate's; else the user's one sequence.
    """

    target: Mapping[str, Any]  # each [B, C]
    sequence: Mapping[str, Any]  # each [B, S]
    mask: Bool[Any, "B S"]
    long: Mapping[str, Any]  # each [B, n, T]
    long_mask: Bool[Any, "B n T"]
    place: Int[Any, "B C"]  # in [0, n)
    long_time: Float[Any, "B n T"] | None = None
    user: Mapping[str, Any] = struct.field(default_factory=dict)  # each [B]
    context: Mapping[str, Any] = struct.field(default_factory=dict)  # each [B] or [B, C]
    dense: Float[Any, "B C F"] | None = None


def check(batch: Batch, config: Config) -> None:
    """ValueError naming field, row and value for what would pass unseen on a device.

    Rows without any behaviour, recent or long, are legal: a new user, or a category that the user never met.
    """
    size, short = check_mask("mask", batch.mask)
    long_size, length = check_mask("long_mask", batch.long_mask)
    if long_size != size:
        raise ValueError(f"long_mask: {long_size} rows, must be {size} as mask has")
    check_features("user", config.user_features, batch.user, (size,))
    check_features("target", config.item_features, batch.target, (size,))
    check_features("sequence", config.item_features, batch.sequence, (size, short))
    check_features("long", config.item_features, batch.long, (size, length))
    together = {**batch.user, **batch.target, **batch.context}
    check_features("context", config.context_features, together, (size,))
    check_labels(batch.label, batch.weight, size, config.tasks)
    if config.uses_negatives:
        if batch.negatives is None:
            raise ValueError("negatives: missing; DIEN's auxiliary loss needs an item that was not chosen at each slot")
        check_features("negatives", config.item_features, batch.negatives, (size, short))
    needed = {"dense": (config.dense, (size, config.dense)), "long_time": (config.exact and config.age_width, None)}
    for name, (asked, shape) in needed.items():
        values = getattr(batch, name)
        if values is None and asked:
            raise ValueError(f"{name}: missing, the configuration reads it")
        if values is not None:
            check_shape(name, values, shape or (size, length))
            check_not_nan(name, values, finite=True)


def example(batch_size: int = 8, seed: int = 0) -> tuple[Config, Batch]:
    """A small config of soft search with time beside DIEN, and a valid random batch."""
    config = Config(
        user_features=(Categorical("user", 24, 4),),
        item_features=(Categorical("item", 32, 4), Categorical("category", 8, 4)),
        context_features=(Hashed("hour", 16, 4),),
        top=3,
        search_width=4,
        search_hidden=(8,),
        sample=0,
        exact_options=(("heads", 2), ("width", 4)),
        ages=(60.0, 3600.0),
        age_width=2,
        hidden=(16, 8),
    )
    draw, short, length = np.random.default_rng(seed), 4, 9

    def items(*shape: int) -> dict[str, np.ndarray]:
        item = draw.integers(2, 32, (batch_size, *shape)).astype(np.int32)
        return {"item": item, "category": 2 + item % 5}

    def behaviors(size: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        mask = np.arange(size) >= size - draw.integers(1, size + 1, batch_size)[:, None]
        return {name: np.where(mask, x, embedding.PAD) for name, x in items(size).items()}, mask

    sequence, mask = behaviors(short)
    long, long_mask = behaviors(length)
    return config, Batch(
        target=items(),
        sequence=sequence,
        mask=mask,
        long=long,
        long_mask=long_mask,
        label=draw.integers(0, 2, batch_size).astype(np.float32),
        weight=np.ones(batch_size, np.float32),
        long_time=np.sort(draw.exponential(5000, (batch_size, length)).astype(np.float32))[:, ::-1].copy(),
        negatives=items(short),
        user={"user": draw.integers(2, 24, batch_size).astype(np.int32)},
        context={"hour": draw.integers(0, 24, batch_size).astype(np.int32)},
    )

"""Queries against a cached prefix, and the cache's extension by new behaviours; both equal recomputation.

One user a row. The keys and values of a user's events are kept; new events are appended as they arrive, questions read
and write nothing.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from lum_jax import model
from lum_jax.batch import Batch
from lum_jax.config import Config
from lum_jax.query import require_conditions
from rec_core.attention import ranges_from_lengths
from rec_core.transformer import KVCache, check_append, empty_cache


@struct.dataclass
class Cache:
    """Keys and values of B users' prefixes.

    Attributes:
      kv: `[layers, B, S, kv_heads, head_width]` each, S the capacity in tokens (2 an event).
      length: events held, `[B]`.
    """

    kv: KVCache
    length: Int[Array, " B"]


def empty(batch_size: int, capacity: int, config: Config) -> Cache:
    """A cache with room for `capacity` events of each of `batch_size` users."""
    kv = empty_cache(config.transformer, batch_size, config.stride * capacity)
    return Cache(kv, jnp.zeros(batch_size, jnp.int32))


def prefill(params: dict, batch: Batch, config: Config, *, capacity: int | None = None) -> Cache:
    """Runs each row's user once and keeps keys and values.

    Args:
      params: from `init` or training.
      batch: one user a row: `segment_ids` is 1 on its events, which come first, and 0 behind.
      config: settings.
      capacity: events that the cache can hold, at least L; None is L.
    """
    rows, length = batch.segment_ids.shape
    capacity = length if capacity is None else capacity
    if capacity < length:
        raise ValueError(f"lum_jax.prefill: capacity={capacity} must be at least the batch's length {length}")
    return extend(params, empty(rows, capacity, config), batch, config)


def extend(params: dict, cache: Cache, batch: Batch, config: Config) -> Cache:
    """Appends each row's new events (as in `prefill`, none is legal); equals a prefill of everything.

    The caller keeps within the capacity: `check_room` raises on the host.
    """
    count = (batch.segment_ids > 0).sum(axis=1).astype(jnp.int32)
    # The new events continue behind those that the cache holds, whatever positions the batch says.
    positions = cache.length[:, None] + jnp.arange(batch.segment_ids.shape[1], dtype=jnp.int32)
    tokens, _, positions, _ = model.prefix_tokens(params, replace(batch, positions=positions), config)
    held = config.stride * cache.length
    k_start, k_end = ranges_from_lengths(held, tokens.shape[1], append=True)
    _, kv = model.encode(
        params, config, tokens, positions, k_start, k_end, cache=cache.kv, cache_lengths=held, return_kv=True
    )
    # What padding wrote lies past the new length: no range reaches it, and the next events overwrite it.
    return Cache(kv, cache.length + count)


def ask(params: dict, cache: Cache, condition: dict[str, Any], config: Config) -> Float[Array, "B Q width"]:
    """Answers to Q questions a user, `condition` holding raw features `[B, Q]`; the cache stays as it is."""
    require_conditions(config)
    questions = model.condition_embeddings(params, condition, config)
    k_start, k_end = ranges_from_lengths(config.stride * cache.length, questions.shape[1])
    return model.encode(params, config, questions, k_end, k_start, k_end, cache=cache.kv)


def check_room(cache: Cache, events: Int[np.ndarray, " B"], config: Config) -> None:
    """Raises ValueError naming the first row whose new `events` do not fit."""
    check_append(cache.kv, config.stride * np.asarray(cache.length), config.stride * np.asarray(events))

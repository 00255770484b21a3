"""Which key blocks a tile of rows must visit, from the ranges of its rows: once per batch, for all heads and layers.

A kernel cuts T rows in tiles of ``block_q`` and S keys in blocks of ``block_k``. Rows past T in the last tile are
empty rows. Everything is plain jnp; nothing larger than tiles x key blocks is formed, and that only as the operand of
a reduction.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Schedule(NamedTuple):
    """Per example and tile, in key blocks, ``first <= full_first <= full_last <= last``.

    Only blocks in ``[first, last)`` hold a key that some row of the tile sees. Every row of the tile sees every key of
    the blocks in ``[full_first, full_last)``, so they need no mask. Both are empty for a tile of empty rows.
    """

    first: Int[Array, "B tiles"]
    full_first: Int[Array, "B tiles"]
    full_last: Int[Array, "B tiles"]
    last: Int[Array, "B tiles"]


def schedule(k_start: Int[Array, "B T"], k_end: Int[Array, "B T"], block_q: int, block_k: int) -> Schedule:
    """The key blocks of each tile of ``block_q`` rows, int32 [B, ceil(T / block_q)].

    Args:
      k_start, k_end: row i sees the keys [k_start_i, k_end_i); both within [0, S], which is the caller's to see to
        (``jnp.clip``). start >= end is an empty row; one such row keeps its tile from having full blocks.
    """
    batch, rows = k_start.shape
    tiles = -(-rows // block_q)
    edges = [(0, 0), (0, tiles * block_q - rows)]
    start, end = (jnp.pad(x.astype(jnp.int32), edges).reshape(batch, tiles, block_q) for x in (k_start, k_end))
    some = start < end
    far = jnp.iinfo(jnp.int32).max
    last = -(-jnp.max(jnp.where(some, end, 0), axis=-1) // block_k)
    # min with last: a tile of empty rows gets [0, 0).
    first = jnp.minimum(jnp.min(jnp.where(some, start, far), axis=-1) // block_k, last)
    full_first = -(-jnp.max(start, axis=-1) // block_k)
    full_last = jnp.min(end, axis=-1) // block_k
    full = full_first < full_last  # never beside an empty row: its start is not before its end
    return Schedule(first, jnp.where(full, full_first, first), jnp.where(full, full_last, first), last)


def key_schedule(
    k_start: Int[Array, "B T"], k_end: Int[Array, "B T"], block_q: int, block_k: int, keys: int
) -> tuple[Int[Array, "B blocks"], Int[Array, "B blocks"]]:
    """The tiles that may see each key block: the inverse of ``schedule``, for kernels that loop over tiles of rows.

    Returns:
      ``(first, last)`` int32 [B, ceil(keys / block_k)]: only tiles in [first, last) visit the block. It is the hull of
      the visiting tiles; one inside it visits block j exactly if ``schedule.first <= j < schedule.last``. (0, 0) for
      a block that no row sees.
    """
    visited = schedule(k_start, k_end, block_q, block_k)
    tiles = visited.first.shape[1]
    block = jnp.arange(-(-keys // block_k), dtype=jnp.int32)
    tile = jnp.arange(tiles, dtype=jnp.int32)
    sees = (visited.first[:, None] <= block[:, None]) & (block[:, None] < visited.last[:, None])  # [B, blocks, tiles]
    last = jnp.max(jnp.where(sees, tile + 1, 0), axis=-1, initial=0)
    return jnp.minimum(jnp.min(jnp.where(sees, tile, tiles), axis=-1, initial=tiles), last), last

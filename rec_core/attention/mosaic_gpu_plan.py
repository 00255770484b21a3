"""The plans of the kernels: the key blocks a tile of rows visits, and the rows a tile of keys meets; which need a mask.

Made once per batch, in plain XLA, for all heads and layers; it starts from the bounds of ``schedule``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rec_core.attention.blocks import BLOCK_Q, ENTRIES, KEYS, Forward
from rec_core.attention.schedule import schedule

HEAD, PER_GROUP = 8, 8  # int32 of a tile in the table: of all, then of each warpgroup


class Plan(NamedTuple):
    """The work of a batch, the same for all heads and layers. ``P`` is examples times parts of the keys.

    Attributes:
      start, end: ranges of the rows, cut to a part, padded to whole tiles.
      order: tiles by falling number of steps.
      table: per tile the steps of its walk over key blocks, how steps become blocks, its place, and per warpgroup the
        steps ``[first, last)`` that concern it and ``[plain_first, plain_last)`` that need no mask.
    """

    start: Int[Array, "P padded"]
    end: Int[Array, "P padded"]
    order: Int[Array, " tiles"]
    table: Int[Array, "tiles 32"]


def plan(
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    keys: int,
    blocks: Forward,
    own: str,
    *,
    splits: int = 1,
    ordered: bool = True,
) -> Plan:
    """The work that the ranges ask for.

    Args:
      k_start, k_end: row i sees keys [k_start_i, k_end_i), cut to [0, keys).
      own: "same" if the rows' own keys are those at their place in k, "separate" if they are arrays of their own,
        "none" for no self term.
      splits: parts in which the key blocks of each tile are cut, each an item of its own; separate own keys go with the
        first. "same" cannot be split.
      ordered: False leaves tiles in their order, for a grid that has a program for each item.
    """
    batch, rows = k_start.shape
    tile = BLOCK_Q * blocks.groups
    edges = [(0, 0), (0, -rows % tile)]
    start, end = (jnp.pad(jnp.clip(x, 0, keys).astype(jnp.int32), edges, mode="edge") for x in (k_start, k_end))
    if splits > 1:
        visits = schedule(start, end, tile, blocks.block_k)
        part = -(-(visits.last - visits.first) // splits) * blocks.block_k
        low = visits.first[:, None] * blocks.block_k + jnp.arange(splits, dtype=jnp.int32)[:, None] * part[:, None]
        low, part = (jnp.repeat(x, tile, axis=-1) for x in (low, part[:, None]))  # [B, splits or 1, padded]
        start = jnp.maximum(start[:, None], low).reshape(batch * splits, -1)
        end = jnp.minimum(end[:, None], low + part).reshape(batch * splits, -1)
    table = _table(start, end, rows, blocks, own, splits)
    number = jnp.arange(table.shape[0], dtype=jnp.int32)
    order = jnp.argsort(-table[:, 0], stable=True).astype(jnp.int32) if ordered else number
    return Plan(start, end, order, table)


def _table(start: Array, end: Array, rows: int, blocks: Forward, own: str, splits: int) -> Array:
    """``Plan.table``, int32 [P * tiles, ENTRIES]. Inside [P, tiles, 1], or [P, tiles, groups] of warpgroups."""
    parts, padded = start.shape
    groups, block_k, far = blocks.groups, blocks.block_k, jnp.iinfo(jnp.int32).max
    tile = BLOCK_Q * groups
    tiles = padded // tile
    mine = jax.tree.map(lambda x: x.reshape(parts, tiles, groups), schedule(start, end, BLOCK_Q, block_k))
    last = jnp.max(mine.last, axis=-1, keepdims=True)
    first = jnp.minimum(
        jnp.min(jnp.where(mine.first < mine.last, mine.first, far), axis=-1, keepdims=True),
        last,
    )
    number = jnp.broadcast_to(jnp.arange(tiles, dtype=jnp.int32)[:, None], (parts, tiles, 1))
    low_row = number * tile + jnp.arange(groups, dtype=jnp.int32) * BLOCK_Q
    part = jnp.broadcast_to(jnp.arange(parts, dtype=jnp.int32)[:, None, None], number.shape)
    has_own = (part % splits == 0) & (own != "none")
    last = jnp.where(has_own, last, jnp.maximum(last, first + 1))  # so that no tile is without a step
    diag_first, diag_last = number * tile // block_k, -(-jnp.minimum((number + 1) * tile, rows) // block_k)
    diag_first, diag_last = (jnp.where(has_own, edge, 0) for edge in (diag_first, diag_last))
    diag = diag_last - diag_first

    # Steps: the diagonal blocks from the last to the first, then those of the ranges. Where the rows' own keys are
    # among the keys, the diagonal blocks are left out of the latter.
    if own == "same":
        overlap = jnp.maximum(0, jnp.minimum(last, diag_last) - jnp.maximum(first, diag_first))
        steps = diag + last - first - overlap
        base = jnp.where(last > diag_last, last - 1 + diag, jnp.minimum(last, diag_first) - 1 + 2 * diag)
    else:
        steps, base = diag + last - first, last - 1 + diag

    def diagonal(block: Array) -> Array:
        return diag_last - 1 - block

    def ranged(block: Array) -> Array:
        return base - block - jnp.where(block < diag_first, diag, 0) if own == "same" else base - block

    def step(block: Array) -> Array:
        on = (block >= diag_first) & (block < diag_last)
        return jnp.where(on, diagonal(block), ranged(block)) if own == "same" else ranged(block)

    spans: list[tuple[Array, Array, Callable[[Array], Array]]]
    if own == "same":
        spans = [
            (jnp.maximum(mine.first, diag_last), mine.last, ranged),
            (jnp.maximum(mine.first, diag_first), jnp.minimum(mine.last, diag_last), diagonal),
            (mine.first, jnp.minimum(mine.last, diag_first), ranged),
        ]
    else:
        spans = [(mine.first, mine.last, ranged)]
    if own != "none":
        own_first = jnp.minimum(low_row, rows - 1) // block_k
        own_last = jnp.maximum(-(-jnp.minimum(low_row + BLOCK_Q, rows) // block_k), own_first + 1)
        spans.append((own_first, jnp.where(has_own, own_last, 0), diagonal))
    step_first = functools.reduce(jnp.minimum, [jnp.where(a < b, at(b - 1), far) for a, b, at in spans])
    step_last = functools.reduce(jnp.maximum, [jnp.where(a < b, at(a) + 1, 0) for a, b, at in spans])
    step_first = jnp.minimum(step_first, steps - 1)
    step_last = jnp.maximum(step_last, step_first + 1)

    # Blocks that need no mask are one run of blocks, but one run of steps only on one side of the diagonal blocks, or
    # where the tile has none after them.
    bottom = mine.full_first
    if own == "same":
        cut = jnp.where(mine.full_last > diag_last, diag_last, jnp.where(mine.full_last > diag_first, diag_first, 0))
        bottom = jnp.where(last > diag_last, jnp.maximum(bottom, cut), bottom)
    plain = mine.full_first < mine.full_last
    plain_first = jnp.where(plain, jnp.clip(step(mine.full_last - 1), step_first, step_last), step_last)
    plain_last = jnp.where(plain, jnp.clip(step(bottom) + 1, plain_first, step_last), step_last)

    head = jnp.concatenate([steps, diag, diag_last, base, part // splits, number, part, jnp.zeros_like(part)], axis=-1)
    walks = jnp.stack([step_first, step_last, plain_first, plain_last], axis=-1)
    table = jnp.concatenate([head, _padded(walks, PER_GROUP).reshape(parts, tiles, -1)], axis=-1).astype(jnp.int32)
    return _padded(table, ENTRIES).reshape(-1, ENTRIES)


def key_block(own: str, step: Any, diag: Any, diag_last: Any, base: Any) -> Any:
    """The key block of a step, from the tile's entries in the table: the diagonal blocks first, then the others."""
    block = base - step
    if own == "none":
        return block
    if own == "same":
        block = block - jnp.where(block < diag_last, diag, 0)
    return jnp.where(step < diag, diag_last - 1 - step, block)


class KeyPlan(NamedTuple):
    """The work of the kernel that walks by keys.

    Attributes:
      order: tiles of keys by falling number of blocks of rows.
      table: per tile its first block of 64 rows, how many it meets, example, number; and per warpgroup, counted from
        the tile's first, the blocks ``[first, last)`` that concern it and ``[plain_first, plain_last)`` that need no
        mask.
    """

    order: Int[Array, " tiles"]
    table: Int[Array, "tiles 32"]


def plan_keys(start: Int[Array, "B T"], end: Int[Array, "B T"], keys: int, groups: int, own: str) -> KeyPlan:
    """Which blocks of rows a tile of ``groups`` times 64 keys meets: the hull of those whose ranges, or own places if
    ``own`` is "same", touch it."""
    visits = schedule(start, end, BLOCK_Q, KEYS)
    tiles = -(-keys // (KEYS * groups))
    piece = jnp.arange(tiles * groups, dtype=jnp.int32)[None, :, None]
    block = jnp.arange(visits.first.shape[1], dtype=jnp.int32)
    sees = (visits.first[:, None] <= piece) & (piece < visits.last[:, None])  # [B, pieces of keys, blocks of rows]
    whole = (visits.full_first[:, None] <= piece) & (piece < visits.full_last[:, None])
    if own == "same":
        sees, whole = sees | (block == piece), whole & (block != piece)
    count = block.shape[0]
    last = jnp.max(jnp.where(sees, block + 1, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(sees, block, count), axis=-1), last)
    plain_first = jnp.min(jnp.where(whole, block, count), axis=-1)
    plain_last = jnp.min(jnp.where(~whole & (block >= plain_first[..., None]), block, count), axis=-1)
    plain_first = jnp.minimum(plain_first, last)
    plain_last = jnp.clip(plain_last, plain_first, last)
    walks = jnp.stack([first, last, plain_first, plain_last], axis=-1)
    walks = walks.reshape(start.shape[0], tiles, groups, -1)
    some = walks[..., 0] < walks[..., 1]
    low = jnp.min(jnp.where(some, walks[..., 0], count), axis=-1)
    high = jnp.max(jnp.where(some, walks[..., 1], 0), axis=-1)
    low = jnp.minimum(low, high)
    walks = jnp.clip(walks - low[..., None, None], 0)
    example, number = (
        jnp.broadcast_to(x, low.shape)
        for x in (jnp.arange(start.shape[0], dtype=jnp.int32)[:, None], jnp.arange(tiles, dtype=jnp.int32))
    )
    head = jnp.stack([low, high - low, example, number], axis=-1)
    table = jnp.concatenate([_padded(head, HEAD), _padded(walks, PER_GROUP).reshape(*low.shape, -1)], axis=-1)
    table = _padded(table.astype(jnp.int32), ENTRIES).reshape(-1, ENTRIES)
    return KeyPlan(jnp.argsort(-table[:, 1], stable=True).astype(jnp.int32), table)


def _padded(x: Array, length: int) -> Array:
    """``x`` with zeros behind its last axis."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])

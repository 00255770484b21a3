"""Range attention in plain XLA: key blocks, online softmax, memory linear in length.

Queries are cut in tiles and keys in blocks; a tile visits only the blocks that some row of the batch can see
(dynamic loop bounds), and keeps a running maximum, sum and output (Milakov & Gimelshein, arXiv:1805.02867; Dao et
al., arXiv:2205.14135). The online softmax of a row starts from its own key: ``m = q . k_self, l = 1, acc = v_self``.
The backward pass recomputes probabilities from the saved log-sum-exp with ``delta = rowsum(dO * O)``, so that
neither pass ever holds a T x S array or repeats keys per query head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int


class _Static(NamedTuple):
    scale: float
    block_q: int
    block_k: int


class _Tile(NamedTuple):
    """What one query tile reads; arrays stacked on a leading axis of tiles are scanned. ``g`` heads share a key."""

    q: Array  # [B, K, g, block_q, D]
    k_self: Array | None  # [B, K, block_q, D]
    v_self: Array | None  # [B, K, block_q, D]
    start: Array  # [B, block_q]
    end: Array  # [B, block_q]
    first: Array  # [] first key block that a row of the tile can see
    last: Array  # [] one past the last such block


def block_sizes(platform: str, batch_heads: int, rows: int, keys: int) -> tuple[int, int]:
    """(block_q, block_k) for a device.

    On a CPU 64 x 64: a block of logits and its operands stay in cache, and short ranges skip most blocks. Of sizes 32
    to 1024 it was fastest or near it at batch 8-64, length 128-1024, 2-8 heads of width 16-64 (two shared cores; at
    length 4096 128 x 128 was some 17 % faster, forward and backward). Elsewhere 512 x 512,
    halved until a block's float32 logits of all examples and heads take at most 256 MiB, but not below 64.
    """
    block = 64 if platform == "cpu" else 512
    while block > 64 and 4 * batch_heads * min(block, rows) * min(block, keys) > 2**28:
        block //= 2
    return block, block


def range_attention_xla(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    k_self: Float[Array, "B T K D"] | None,
    v_self: Float[Array, "B T K D"] | None,
    *,
    scale: float,
    block_q: int | None = None,
    block_k: int | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """The same function as ``range_attention_reference``, differentiable once in q, k, v, k_self and v_self.

    Softmax statistics and accumulators are float32 (float64 for float64 inputs); matrix products take their operands
    in the dtype of the inputs, at JAX's default matrix precision. Any T and S, zero included: tails are padded inside.

    Args:
      block_q, block_k: rows and keys of a block; chosen by ``block_sizes`` when None.
    """
    batch, rows, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    chosen = block_sizes(jax.default_backend(), batch * heads, rows, keys)
    static = _Static(scale, _fit(block_q or chosen[0], rows), _fit(block_k or chosen[1], keys))
    q, k, v, k_self, v_self, k_start, k_end = same_varying((q, k, v, k_self, v_self, k_start, k_end))

    blocked = functools.partial(_to_blocks, block=static.block_q)
    start = jnp.clip(k_start, 0, keys).astype(jnp.int32)
    end = jnp.clip(k_end, 0, keys).astype(jnp.int32)
    out, lse = _attend(
        static,
        blocked(q.reshape(batch, rows, kv_heads, heads // kv_heads, width)),
        _to_blocks(k, static.block_k),
        _to_blocks(v, static.block_k),
        None if k_self is None else blocked(k_self),
        None if v_self is None else blocked(v_self),
        blocked(start),
        blocked(end),
    )
    # [tiles, B, K, g, block_q, ...] back to [B, T, H, D] and [B, H, T]
    padded = out.shape[0] * static.block_q
    out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(batch, padded, heads, width)[:, :rows]
    lse = jnp.moveaxis(lse, 0, 3).reshape(batch, heads, padded)[:, :, :rows]
    return out, lse


def _fit(block: int, length: int) -> int:
    """The smallest multiple of 8 that covers ``length`` with no more blocks than ``block`` would."""
    count = max(1, -(-length // block))
    return max(8, -(-length // (8 * count)) * 8)


def _to_blocks(x: Array, block: int) -> Array:
    """[B, length, *heads, D] -> [blocks, B, *heads, block, D]; [B, length] -> [blocks, B, block]; zeros behind."""
    count = max(1, -(-x.shape[1] // block))
    x = jnp.pad(x, [(0, 0), (0, count * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    x = jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)
    return jnp.moveaxis(x, 2, -2) if x.ndim > 3 else x


def same_varying(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inside shard_map, lets all arrays vary over the union of their mesh axes, as the carries of loops must agree.

    Adding a zero that varies does it by JAX's own promotion, whose transpose sums the gradient of a shared array.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return args
    zero: Any = sum(jnp.full_like(x, 0, dtype=jnp.int32, shape=()) for x in args if x is not None)
    return tuple(None if x is None else x + zero.astype(x.dtype) for x in args)


def _visible_blocks(start: Array, end: Array, block_k: int) -> tuple[Array, Array]:
    """Per tile of ranges [tiles, B, block_q]: the key blocks [first, last) that any non-empty range touches."""
    some = start < end
    low = jnp.min(jnp.where(some, start, jnp.iinfo(jnp.int32).max), axis=(1, 2), initial=jnp.iinfo(jnp.int32).max)
    high = jnp.max(jnp.where(some, end, 0), axis=(1, 2), initial=0)
    last = -(-high // block_k)
    return jnp.minimum(low // block_k, last), last


def _over_blocks(step: Any, carry: Any, tile: _Tile, blocks: int) -> Any:
    """``step(j, carry)`` for the key blocks that the tile can see; one block needs no loop."""
    return step(0, carry) if blocks == 1 else lax.fori_loop(tile.first, tile.last, step, carry)


def _over_tiles(step: Any, carry: Any, tiles: Any) -> tuple[Any, Any]:
    """``lax.scan`` that is no loop for a single tile."""
    if tiles[0].q.shape[0] > 1:
        return lax.scan(step, carry, tiles)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], tiles))
    return carry, jax.tree.map(lambda x: x[None], out)


def _logits(tile: _Tile, key: Array, j: Any, static: _Static, acc: Any) -> Array:
    """[B, K, g, block_q, block_k] scaled logits of one block, -inf where the row may not look."""
    logits = jnp.einsum("bkgqd,bksd->bkgqs", tile.q, key, preferred_element_type=acc) * static.scale
    slot = j * static.block_k + jnp.arange(static.block_k, dtype=jnp.int32)
    visible = (slot >= tile.start[..., None]) & (slot < tile.end[..., None])
    return jnp.where(visible[:, None, None], logits, -jnp.inf)


def _forward(static: _Static, q: Array, k: Array, v: Array, k_self: Any, v_self: Any, start: Array, end: Array) -> Any:
    acc = jnp.promote_types(jnp.float32, q.dtype)

    def tile_step(_: tuple[()], tiles: tuple[_Tile]) -> Any:
        (tile,) = tiles
        if tile.k_self is None or tile.v_self is None:
            carry = (
                jnp.full_like(tile.q, -jnp.inf, dtype=acc, shape=tile.q.shape[:-1]),
                jnp.zeros_like(tile.q, acc, shape=tile.q.shape[:-1]),
                jnp.zeros_like(tile.q, acc),
            )
        else:
            own = jnp.einsum("bkgqd,bkqd->bkgq", tile.q.astype(acc), tile.k_self.astype(acc)) * static.scale
            value = jnp.broadcast_to(tile.v_self[:, :, None], tile.q.shape).astype(acc)
            carry = (own, jnp.ones_like(own), value)

        def block_step(j: Any, carry: Any) -> Any:
            top, total, out = carry
            logits = _logits(tile, k[j], j, static, acc)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            # Only a row that has seen nothing yet still has -inf here, and it has no own key.
            shift = new_top if k_self is not None else jnp.where(new_top == -jnp.inf, 0.0, new_top)
            weight = jnp.exp(logits - shift[..., None])
            decay = jnp.exp(top - shift)
            seen = jnp.einsum("bkgqs,bksd->bkgqd", weight.astype(v.dtype), v[j], preferred_element_type=acc)
            return new_top, total * decay + jnp.sum(weight, axis=-1), out * decay[..., None] + seen

        top, total, out = _over_blocks(block_step, carry, tile, k.shape[0])
        some = total > 0
        out = out / jnp.where(some, total, 1.0)[..., None]
        return (), (out.astype(q.dtype), jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf))

    tile = _Tile(q, k_self, v_self, start, end, *_visible_blocks(start, end, static.block_k))
    return _over_tiles(tile_step, (), (tile,))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q: Array, k: Array, v: Array, k_self: Any, v_self: Any, start: Array, end: Array) -> Any:
    return _forward(static, q, k, v, k_self, v_self, start, end)


def _attend_forward(static: _Static, *args: Any) -> Any:
    # A remat policy may save these two by name, and so never run the forward pass twice.
    out, lse = (checkpoint_name(x, "range_attention") for x in _forward(static, *args))
    return (out, lse), (*args, out, lse)


def _attend_backward(static: _Static, residuals: Any, cotangents: Any) -> Any:
    q, k, v, k_self, v_self, start, end, out, lse = residuals
    acc = lse.dtype
    d_out, d_lse = cotangents
    some = lse > -jnp.inf
    # d logit = p * (dO . v - delta + d lse). A row that saw nothing has p = 0; its lse and d lse may not be finite.
    delta = jnp.sum(d_out.astype(acc) * out.astype(acc), axis=-1) - jnp.where(some, d_lse, 0.0)
    lse = jnp.where(some, lse, 0.0)

    def tile_step(carry: Any, tiles: Any) -> Any:
        tile, d_out, lse, delta = tiles
        q = tile.q

        def block_step(j: Any, carry: Any) -> Any:
            d_q, d_k, d_v = carry
            weight = jnp.exp(_logits(tile, k[j], j, static, acc) - lse[..., None])
            d_v_j = jnp.einsum("bkgqs,bkgqd->bksd", weight.astype(v.dtype), d_out, preferred_element_type=acc)
            d_weight = jnp.einsum("bkgqd,bksd->bkgqs", d_out, v[j], preferred_element_type=acc)
            d_logits = (weight * (d_weight - delta[..., None]) * static.scale).astype(q.dtype)
            d_q_j = jnp.einsum("bkgqs,bksd->bkgqd", d_logits, k[j], preferred_element_type=acc)
            d_k_j = jnp.einsum("bkgqs,bkgqd->bksd", d_logits, q, preferred_element_type=acc)
            return d_q + d_q_j, d_k.at[j].add(d_k_j), d_v.at[j].add(d_v_j)

        own: tuple[Array | None, Array | None]
        if tile.k_self is None or tile.v_self is None:
            d_q, own = jnp.zeros_like(q, acc), (None, None)
        else:
            key, value, q_acc, g = (x.astype(acc) for x in (tile.k_self, tile.v_self, q, d_out))
            weight = jnp.exp(jnp.einsum("bkgqd,bkqd->bkgq", q_acc, key) * static.scale - lse)
            d_own = weight * (jnp.einsum("bkgqd,bkqd->bkgq", g, value) - delta) * static.scale
            d_q = d_own[..., None] * key[:, :, None]
            own = (
                jnp.einsum("bkgq,bkgqd->bkqd", d_own, q_acc).astype(k.dtype),
                jnp.einsum("bkgq,bkgqd->bkqd", weight, g).astype(v.dtype),
            )
        d_q, d_k, d_v = _over_blocks(block_step, (d_q, *carry), tile, k.shape[0])
        return (d_k, d_v), (d_q.astype(q.dtype), *own)

    tile = _Tile(q, k_self, v_self, start, end, *_visible_blocks(start, end, static.block_k))
    carry = (jnp.zeros_like(k, acc), jnp.zeros_like(v, acc))
    (d_k, d_v), (d_q, d_k_self, d_v_self) = _over_tiles(tile_step, carry, (tile, d_out, lse, delta))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), d_k_self, d_v_self, None, None


_attend.defvjp(_attend_forward, _attend_backward)

"""The backward pass of the GPU kernels: what they need made ready, which of them run, and the rows' own keys.

Two kernels: dq by rows and dk, dv by keys, seven matrix products a block, every output with one writer, so that equal
inputs give equal bits. Both recompute the weights from the log-sum-exp, with ``delta = rowsum(dO * O) - d lse``
(FlashAttention-2, Dao, arXiv:2307.08691, which sums dq on the way of dk and dv in no fixed order: five products, and
measured to be no faster here, see NOTES.md).
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rec_core.attention.blocks import Backward, Forward
from rec_core.attention.mosaic_gpu_backward_keys import backward_keys
from rec_core.attention.mosaic_gpu_backward_rows import backward_rows
from rec_core.attention.mosaic_gpu_common import BLOCK_Q, LOG2_E
from rec_core.attention.mosaic_gpu_plan import plan, plan_keys

FAR = 1e30  # log-sum-exp of a row that sees nothing, here: its weights are 2 ** -FAR = 0


def backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    k_self: Float[Array, "B T K D"] | None,
    v_self: Float[Array, "B T K D"] | None,
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    out: Float[Array, "B T H D"],
    lse: Float[Array, "B H T"],
    d_out: Float[Array, "B T H D"],
    d_lse: Float[Array, "B H T"],
    *,
    scale: float,
    blocks: Backward,
    own: str,
    programs: int,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Gradients of q, k, v, k_self and v_self.

    Args:
      k_self, v_self: the rows' own keys and values where ``own`` is "separate". Where it is "same" they are k and v,
        whose gradients hold both parts, and None; so they are for "none".
      out, lse: what the forward pass gave out. d_out, d_lse: their gradients.
      scale: factor on the logits, above 0.
      programs: size of the grid, the multiprocessors of the device.
      interpret: the kernels are run by the interpreter.
    """
    rows, width, keys = q.shape[1], q.shape[3], k.shape[1]
    seen = lse > -jnp.inf
    delta = jnp.einsum("bthd,bthd->bht", out, d_out, preferred_element_type=jnp.float32)
    # Apart from what is made of it: fused with the copies below, the reduction takes five times as long.
    delta = lax.optimization_barrier(delta - jnp.where(seen, d_lse, 0.0))
    log2_norm = jnp.where(seen, lse * LOG2_E, FAR)
    start, end = (jnp.clip(x, 0, keys).astype(jnp.int32) for x in (k_start, k_end))
    among = "same" if own == "same" else "none"
    common: dict[str, Any] = {
        "scale": scale,
        "blocks": blocks,
        "own": among,
        "programs": programs,
        "interpret": interpret,
    }

    def in_blocks(x: Array, fill: float) -> Array:
        """[..., T] -> [..., blocks of rows, BLOCK_Q]"""
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -rows % BLOCK_Q)], constant_values=fill)
        return padded.reshape(*x.shape[:-1], -1, BLOCK_Q)

    statistics = jnp.stack([in_blocks(log2_norm, FAR), in_blocks(delta, 0.0)], axis=-2)
    ranges = jnp.stack([in_blocks(start, 0), in_blocks(jnp.maximum(end - start, 0), 0)], axis=-2)
    planned = plan_keys(start, end, keys, blocks.keys_groups, among)
    by_keys: Any = (q, k, v, d_out, statistics, ranges, planned)
    tile = Forward(block_k=blocks.rows_block_k, groups=blocks.rows_groups)
    by_rows = plan(start, end, keys, tile, among)
    edge = [(0, 0), (0, 0), (0, by_rows.start.shape[1] - rows)]
    padded = jnp.pad(log2_norm, edge, constant_values=FAR), jnp.pad(delta, edge)
    d_q = backward_rows(q, k, v, d_out, *padded, by_rows, **common)
    if width <= 128:
        d_k, d_v = backward_keys(*by_keys, gradients=("dk", "dv"), **common)
    else:  # both accumulators of a wider head do not fit in registers
        (d_k,) = backward_keys(*by_keys, gradients=("dk",), **common)
        (d_v,) = backward_keys(*by_keys, gradients=("dv",), **common)
    if own != "separate" or k_self is None or v_self is None:
        return d_q, d_k, d_v, None, None
    d_q_own, d_k_self, d_v_self = _own(q, k_self, v_self, lse, delta, d_out, scale)
    return (d_q + d_q_own).astype(q.dtype), d_k, d_v, d_k_self, d_v_self


def _own(
    q: Array, k_self: Array, v_self: Array, lse: Array, delta: Array, d_out: Array, scale: float
) -> tuple[Array, Array, Array]:
    """What a row's own key adds to dq, and the gradients of the own keys and values; float32 inside."""
    batch, rows, heads, _ = q.shape
    kv_heads = k_self.shape[2]

    def grouped(x: Array) -> Array:
        return x.astype(jnp.float32).reshape(batch, rows, kv_heads, heads // kv_heads, -1)

    query, gradient = grouped(q), grouped(d_out)
    norm, shift = (grouped(jnp.swapaxes(x, 1, 2))[..., 0] for x in (lse, delta))
    key, value = (x.astype(jnp.float32)[:, :, :, None] for x in (k_self, v_self))
    weight = jnp.exp(jnp.sum(query * key, axis=-1) * scale - norm)
    d_logit = weight * (jnp.sum(gradient * value, axis=-1) - shift) * scale
    d_q = (d_logit[..., None] * key).reshape(q.shape)
    d_k_self = jnp.sum(d_logit[..., None] * query, axis=3).astype(k_self.dtype)
    d_v_self = jnp.sum(weight[..., None] * gradient, axis=3).astype(v_self.dtype)
    return d_q, d_k_self, d_v_self

"""The three kernels of ``mosaic_tpu``: what happens in one step of their grids.

The grid is (examples, key heads, tiles of rows or key blocks, steps); the scalars come first among the references,
then inputs, outputs and scratch. Scratch lives through the steps of a tile: step 0 fills it, the last step writes out.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

LANES = 128
LOG2_E = float(np.log2(np.e))
NN, NT = ((1,), (0,)), ((1,), (1,))  # contracted axes of a @ b and a @ b.T


class Plan(NamedTuple):
    """What is static in a call."""

    scale: float
    block_q: int
    block_k: int
    heads: int
    kv_heads: int
    width: int
    interpret: Any

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def stack(self) -> int:
        """N, the rows of a tile."""
        return self.group * self.block_q


def count(length: int, block: int) -> int:
    """How many blocks cover ``length``, at least one."""
    return max(1, -(-length // block))


def _read(ref: Any, width: int) -> Array:
    """The heads of a block of a packed array, stacked to [heads * block, D]."""
    if len(ref.shape) == 3:
        return ref[...].reshape(-1, width)
    return jnp.concatenate([ref[:, at : at + width] for at in range(0, ref.shape[1], width)], axis=0)


def _write(ref: Any, x: Array, width: int) -> None:
    """Undoes ``_read``, in the dtype of the block."""
    x = x.astype(ref.dtype)
    if len(ref.shape) == 3:
        ref[...] = x.reshape(ref.shape)
        return
    for head in range(ref.shape[1] // width):
        ref[:, head * width : (head + 1) * width] = x[head * ref.shape[0] : (head + 1) * ref.shape[0]]


def _dot(a: Array, b: Array, contracted: Any) -> Array:
    # bfloat16 operands are exact in the one pass of DEFAULT, and the compiler refuses them any other precision.
    precision = lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    return lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _column(row: Array, repeats: int = 1) -> Array:
    """[1, n] -> [repeats * n, 128], lanes equal."""
    return jnp.tile(jnp.broadcast_to(row, (LANES, row.shape[1])).T, (repeats, 1))


def _across(column: Array, size: int) -> Array:
    """[n, 128] of equal lanes -> [n, size]."""
    return jnp.tile(column, (1, count(size, LANES)))[:, :size]


def _own(plan: Plan, ref: Any) -> Array:
    """The rows' own keys or values in float32, once for each head of the group: [N, D]."""
    return jnp.tile(_read(ref, plan.width).astype(jnp.float32), (plan.group, 1))


def _own_logits(plan: Plan, q_ref: Any, k_self_ref: Any) -> Array:
    """[N, 1], in base 2."""
    product = _read(q_ref, plan.width).astype(jnp.float32) * _own(plan, k_self_ref)
    return jnp.sum(product, axis=-1, keepdims=True) * (plan.scale * LOG2_E)


def _over_group(plan: Plan, x: Array) -> Array:
    """[N, D] -> [block_q, D]: the sum over the heads that share a key."""
    parts = [x[at : at + plan.block_q] for at in range(0, plan.stack, plan.block_q)]
    return sum(parts[1:], parts[0])


def _logits(plan: Plan, rows: Array, columns: Array, visible: Any, keys_axis: int, block: Any) -> Array:
    """rows @ columns.T in base 2; -inf where ``visible`` of the keys' places along ``keys_axis`` says so."""
    logits = _dot(rows, columns, NT) * (plan.scale * LOG2_E)
    if visible is None:
        return logits
    place = block * plan.block_k + lax.broadcasted_iota(jnp.int32, logits.shape, keys_axis)
    return jnp.where(visible(place), logits, -jnp.inf)


def _visit(plan: Plan, visit: Any, block: Any, at: Any, visits: Any, ranges_ref: Any) -> None:
    """``visit(visible)`` of a key block if tile ``at`` sees it; ``visible`` is None where no mask is needed."""
    _, full_first, full_last, last = visits
    full = (full_first[at] <= block) & (block < full_last[at])
    pl.when(full)(lambda: visit(None))

    @pl.when((block < last[at]) & ~full)
    def masked() -> None:
        columns = (_column(ranges_ref[row : row + 1, :], plan.group) for row in (0, 1))
        start, end = (_across(x, plan.block_k) for x in columns)
        visit(lambda place: (place >= start) & (place < end))


def forward_kernel(plan: Plan, *refs: Any) -> None:
    visits, (ranges_ref, q_ref, k_ref, v_ref) = refs[:4], refs[4:8]
    *own_refs, out_ref, lse_ref, top_ref, total_ref, sum_ref = refs[8:]
    at = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    step, steps = pl.program_id(3), pl.num_programs(3)
    block = visits[0][at] + step

    @pl.when(step == 0)
    def begin() -> None:
        if own_refs:
            top_ref[...] = jnp.broadcast_to(_own_logits(plan, q_ref, own_refs[0]), top_ref.shape)
            total_ref[...] = jnp.ones_like(total_ref)
            sum_ref[...] = _own(plan, own_refs[1])
        else:
            # Finite, so that a row that has seen nothing takes it from -inf, and never -inf from -inf.
            top_ref[...] = jnp.full_like(top_ref, jnp.finfo(jnp.float32).min)
            total_ref[...] = jnp.zeros_like(total_ref)
            sum_ref[...] = jnp.zeros_like(sum_ref)

    def visit(visible: Any) -> None:
        logits = _logits(plan, _read(q_ref, plan.width), _read(k_ref, plan.width), visible, 1, block)
        old = top_ref[...]
        top = jnp.maximum(old, jnp.max(logits, axis=-1, keepdims=True))
        weight = jnp.exp2(logits - _across(top, plan.block_k))
        decay = jnp.exp2(old - top)
        top_ref[...] = top
        total_ref[...] = total_ref[...] * decay + jnp.sum(weight, axis=-1, keepdims=True)
        value = _read(v_ref, plan.width)
        sum_ref[...] = sum_ref[...] * _across(decay, plan.width) + _dot(weight.astype(value.dtype), value, NN)

    _visit(plan, visit, block, at, visits, ranges_ref)

    @pl.when(step == steps - 1)
    def finish() -> None:
        some = total_ref[...] > 0
        total = jnp.where(some, total_ref[...], 1.0)
        _write(out_ref, sum_ref[...] * _across(1 / total, plan.width), plan.width)
        lse_ref[...] = jnp.where(some, top_ref[...] / LOG2_E + jnp.log(total), -jnp.inf).T[0:1, :]


def query_kernel(plan: Plan, *refs: Any) -> None:
    visits, (ranges_ref, stats_ref, q_ref, d_out_ref, k_ref, v_ref) = refs[:4], refs[4:10]
    own_refs = refs[10:12] if len(refs) > 14 else ()
    d_q_ref, *d_own_refs, lse_ref, delta_ref, sum_ref = refs[10 + len(own_refs) :]
    at = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
    step, steps = pl.program_id(3), pl.num_programs(3)
    block = visits[0][at] + step

    @pl.when(step == 0)
    def begin() -> None:
        lse_ref[...] = _column(stats_ref[0:1, :])
        delta_ref[...] = _column(stats_ref[1:2, :])
        if not own_refs:
            sum_ref[...] = jnp.zeros_like(sum_ref)
            return
        weight = jnp.exp2(_own_logits(plan, q_ref, own_refs[0]) - lse_ref[...])
        d_out = _read(d_out_ref, plan.width).astype(jnp.float32)
        d_weight = jnp.sum(d_out * _own(plan, own_refs[1]), axis=-1, keepdims=True)
        d_logits = _across(weight * (d_weight - delta_ref[...]), plan.width)
        sum_ref[...] = d_logits * _own(plan, own_refs[0])
        d_key = _over_group(plan, d_logits * _read(q_ref, plan.width).astype(jnp.float32))
        _write(d_own_refs[0], d_key * plan.scale, plan.width)
        _write(d_own_refs[1], _over_group(plan, _across(weight, plan.width) * d_out), plan.width)

    def visit(visible: Any) -> None:
        key = _read(k_ref, plan.width)
        logits = _logits(plan, _read(q_ref, plan.width), key, visible, 1, block)
        weight = jnp.exp2(logits - _across(lse_ref[...], plan.block_k))
        d_weight = _dot(_read(d_out_ref, plan.width), _read(v_ref, plan.width), NT)
        d_logits = weight * (d_weight - _across(delta_ref[...], plan.block_k))
        sum_ref[...] += _dot(d_logits.astype(key.dtype), key, NN)

    _visit(plan, visit, block, at, visits, ranges_ref)

    @pl.when(step == steps - 1)
    def finish() -> None:
        _write(d_q_ref, sum_ref[...] * plan.scale, plan.width)


def key_kernel(plan: Plan, tiles: int, *refs: Any) -> None:
    first, full_first, full_last, last, first_tile, last_tile = refs[:6]
    ranges_ref, stats_ref, q_ref, d_out_ref, k_ref, v_ref, d_k_ref, d_v_ref, sum_k_ref, sum_v_ref = refs[6:]
    block, step, steps = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
    hull = pl.program_id(0) * pl.num_programs(2) + block
    tile = first_tile[hull] + step
    # A step past the hull reads the schedule of some tile, and does not use it.
    at = pl.program_id(0) * tiles + jnp.minimum(tile, tiles - 1)

    @pl.when(step == 0)
    def begin() -> None:
        sum_k_ref[...] = jnp.zeros_like(sum_k_ref)
        sum_v_ref[...] = jnp.zeros_like(sum_v_ref)

    def visit(visible: Any) -> None:
        query, d_out = _read(q_ref, plan.width), _read(d_out_ref, plan.width)
        logits = _logits(plan, _read(k_ref, plan.width), query, visible, 0, block)
        weight = jnp.exp2(logits - stats_ref[0:1, :])
        sum_v_ref[...] += _dot(weight.astype(d_out.dtype), d_out, NN)
        d_weight = _dot(_read(v_ref, plan.width), d_out, NT)
        d_logits = weight * (d_weight - stats_ref[1:2, :])
        sum_k_ref[...] += _dot(d_logits.astype(query.dtype), query, NN)

    inside = (tile < last_tile[hull]) & (first[at] <= block) & (block < last[at])
    full = inside & (full_first[at] <= block) & (block < full_last[at])
    pl.when(full)(lambda: visit(None))

    @pl.when(inside & ~full)
    def masked() -> None:
        start, end = (jnp.tile(ranges_ref[row : row + 1, :], (1, plan.group)) for row in (0, 1))
        visit(lambda place: (place >= start) & (place < end))

    @pl.when(step == steps - 1)
    def finish() -> None:
        _write(d_k_ref, sum_k_ref[...] * plan.scale, plan.width)
        _write(d_v_ref, sum_v_ref[...], plan.width)

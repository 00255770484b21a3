"""`MultiHead.attend` on a GPU in one pass over the behaviours forward and one backward (Pallas, lowered by Triton).

A program reads one example. Its behaviours come in blocks of `block` rows: whole groups where they fit, else parts of
one. A block's queries are rows q = (slot of the group in the block, head), at least 16 of them, and a query counts only
at the behaviours of its own group. Each row has an online softmax of its own over the blocks (Milakov and Gimelshein,
arXiv 1805.02867), and at the end rows of the same head are merged. Kept for the backward pass are the heads' weighted
sums of behaviours and the logarithm of the softmax's denominator; weights are made again (FlashAttention-2, arXiv
2307.08691, section 3.1.2). With E the behaviours, W and b the linear map, Q a query, all of one head:

    s_t = E_t . W Q + b . Q,   a = softmax(s),   r = sum_t a_t E_t,   u = W^T r + b sum_t a_t
    dr = W du,   ds_t = a_t (E_t . dr - r . dr),   dE_t = a_t dr + ds_t W Q,   d(WQ) = sum_t ds_t E_t
    dQ = W^T d(WQ) + b sum_t ds_t,   dW = d(WQ) Q^T + r du^T,   db = Q sum_t ds_t + du sum_t a_t

The reference is what `MultiHead.attend` does elsewhere; tests/rec_core/test_interest_multi_head_gpu.py compares the
two. On an H100 a forward and a backward pass take .35 to .45 of its time: NOTES.md has times and tuning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from rec_core.interest.triton_gpu import (
    Blocks,
    Shape,
    Tuning,
    call,
    cut,
    dot,
    load_rows,
    loop,
    on_each_device,
    power_of_2,
    rows_of,
    serves,
    triton,
)  # fmt: skip

QUERIES = 64  # rows of queries in a block at most, as registers are limited
LOW = float(jnp.finfo(jnp.float32).min)
Linear = tuple[Float[Array, "B d d"], Float[Array, "B d"]]


DEFAULT = Tuning(Shape(32, 1, 1), Shape(32, 1, 1))
MAPPED = Tuning(Shape(32, 1, 2), Shape(32, 2, 1))  # with a linear map


@dataclass(frozen=True)
class Queried(Blocks):
    """Blocks, and the heads of their queries."""

    heads: int

    @property
    def queries(self) -> int:
        return max(16, pl.next_power_of_2(self.groups * self.heads))


def runs(dtype: str, shape: tuple[int, ...], heads: int) -> bool:
    """Whether this process's device, and JAX, run these kernels, for a computation's dtype and a sequence's shape."""
    return serves(dtype, shape) and power_of_2(heads) and 1 <= heads <= 16


def attend(
    sequence: Float[Array, "B T d"],
    mask: Bool[Array, "B T"],
    linear: Linear | None,
    queries: Float[Array, "B G heads d"],
    value: Float[Array, "d heads width"],
    tuning: Tuning | None = None,
) -> Float[Array, "B heads*width"]:
    """The interest; the computation has the dtype of `value`. What stands in the sequence at padding does not matter.

    Args:
      sequence, mask: behaviours in any floating dtype, and which are no padding.
      linear: a map of the behaviours, `E_t weight + bias`, in the dtype of `value`.
      queries: of the width of the behaviours, each of T / G neighbouring ones; G divides T.
      value: the matrix of the values. tuning: default `DEFAULT`, with a linear map `MAPPED`.
    """
    read = partial(_read, tuning or (MAPPED if linear else DEFAULT))
    heads = on_each_device(read, sequence, mask, linear, queries.astype(value.dtype))
    return jnp.einsum("bhd,dhw->bhw", heads, value).reshape(len(heads), -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(tuning: Tuning, sequence: Array, mask: Array, linear: Linear | None, queries: Array) -> Array:
    return _forward(tuning, sequence, mask, linear, queries)[0]


def _forward(tuning: Tuning, sequence: Array, mask: Array, linear: Linear | None, queries: Array) -> tuple[Array, Any]:
    blocks, rows = _blocks(tuning.forward, sequence, queries), queries.reshape(len(queries), -1, queries.shape[-1])
    size, (heads, d) = len(queries), queries.shape[2:]
    summed = [((size, heads, d), queries.dtype), ((size, heads, d), jnp.float32), ((size, heads), jnp.float32)]
    given = (sequence, mask, rows, *(linear or ()))
    made = call(partial(_forward_kernel, blocks), given, summed, tuning.forward, tuning.interpret)
    return made[0], (sequence, mask, linear, queries, *made[1:])


def _backward(tuning: Tuning, saved: Any, gradient: Array) -> tuple[Array, None, Linear | None, Array]:
    sequence, mask, linear, queries, read, lse = saved
    blocks, rows = _blocks(tuning.backward, sequence, queries), queries.reshape(len(queries), -1, queries.shape[-1])
    given = (sequence, mask, rows, gradient.astype(queries.dtype), read, lse, *(linear or ()))
    made = [(x.shape, x.dtype) for x in (sequence, rows, *(linear or ()))]
    found = call(partial(_backward_kernel, blocks), given, made, tuning.backward, tuning.interpret)
    of_sequence, of_rows, *of_linear = found
    return of_sequence, None, (of_linear[0], of_linear[1]) if linear else None, of_rows.reshape(queries.shape)


_read.defvjp(_forward, _backward)


def _blocks(shape: Shape, sequence: Array, queries: Array) -> Queried:
    groups, heads = queries.shape[1:3]
    return Queried(*cut(shape.block, sequence.shape[1], groups, QUERIES // heads), heads)


def _forward_kernel(blocks: Queried, sequence: Any, mask: Any, queries: Any, *refs: Any) -> None:
    (read, kept, lse), (weight, bias) = refs[-3:], _load_linear(refs[:-3])
    d, dtype = sequence.shape[-1], queries.dtype

    def step(i: Array, state: Any) -> Any:
        query = _load_queries(blocks, queries, i)
        asked, shift = _map(query, weight, bias)

        def part(j: Any, state: Any) -> Any:
            high, total, summed = state
            _, rows, own = _load_rows(blocks, sequence, mask, i, j, dtype)
            score = jnp.where(own, dot(rows, asked, 1, 1) + shift, LOW)
            top = jnp.maximum(high, score.max(0))
            weights = jnp.where(own, jnp.exp(score - top[None]), 0)
            less = jnp.exp(high - top)
            summed = less[:, None] * summed + dot(weights.astype(dtype), rows, 0, 0)
            return top, less * total + weights.sum(0), summed

        return loop(blocks.parts, part, state)

    size = blocks.queries
    state = jnp.full(size, LOW, jnp.float32), jnp.zeros(size, jnp.float32), jnp.zeros((size, d), jnp.float32)
    high, total, summed = loop(blocks.steps, step, state)
    top = _over_slots(blocks, high, jnp.max)
    less = jnp.exp(high - top)
    total = _over_slots(blocks, less * total, jnp.sum)
    summed = _over_slots(blocks, less[:, None] * summed, jnp.sum) / jnp.where(total > 0, total, 1)[:, None]
    row = jnp.arange(size)
    first = row < blocks.heads
    triton.store(rows_of(kept, row), summed, mask=first[:, None])
    # Without any behaviour infinite, so that weights made from it are 0, and by that it is known.
    triton.store(lse.at[row], jnp.where(total > 0, top + jnp.log(total), jnp.inf), mask=first)
    if weight is not None:
        summed = dot(summed.astype(dtype), weight, 1, 0) + jnp.where(total > 0, 1.0, 0.0)[:, None] * bias[None]
    triton.store(rows_of(read, row), summed.astype(dtype), mask=first[:, None])


def _backward_kernel(
    blocks: Queried, sequence: Any, mask: Any, queries: Any, gradient: Any, kept: Any, lse: Any, *refs: Any
) -> None:
    weight, bias = _load_linear(refs[: (len(refs) - 2) // 2])
    of_sequence, of_queries, *of_linear = refs[(len(refs) - 2) // 2 :]
    d, dtype, size = sequence.shape[-1], queries.dtype, blocks.queries
    row = jnp.arange(size)
    head = jax.lax.rem(row, blocks.heads)  # each slot reads those of its head
    of_read, kept, lse = gradient[head], kept[head], lse[head]
    of_kept = of_read if weight is None else dot(of_read, weight, 1, 1).astype(dtype)
    level = (of_kept * kept).sum(1)

    def step(i: Array, of_linear: Any) -> Any:
        query = _load_queries(blocks, queries, i)
        asked, shift = _map(query, weight, bias)

        def part(j: Any, state: Any) -> Any:
            of_asked, of_shift = state
            (place, inside), rows, own = _load_rows(blocks, sequence, mask, i, j, dtype)
            weights = jnp.where(own, jnp.exp(dot(rows, asked, 1, 1) + shift - lse[None]), 0)
            of_score = weights * (dot(rows, of_kept, 1, 1) - level[None])
            of_rows = dot(weights.astype(dtype), of_kept, 1, 0) + dot(of_score.astype(dtype), asked, 1, 0)
            triton.store(rows_of(of_sequence, place), of_rows.astype(of_sequence.dtype), mask=inside)
            return of_asked + dot(of_score.astype(dtype), rows, 0, 0), of_shift + of_score.sum(0)

        state = jnp.zeros((size, d), jnp.float32), jnp.zeros(size, jnp.float32)
        of_asked, of_shift = loop(blocks.parts, part, state)
        of_query = of_asked
        if weight is not None:
            of_asked, of_shift = of_asked.astype(dtype), of_shift[:, None]
            of_query = dot(of_asked, weight, 1, 0) + of_shift * bias[None]
            of_linear = of_linear[0] + dot(of_asked, query, 0, 0), of_linear[1] + (of_shift * query).sum(0)
        at, there = _queries_at(blocks, queries, i)
        triton.store(rows_of(of_queries, at), of_query.astype(dtype), mask=there)
        return of_linear

    if weight is None:
        loop(blocks.steps, step, ())
        return
    first = (row < blocks.heads) & (lse < jnp.inf)
    of_weight = dot(jnp.where(first[:, None], kept, 0).astype(dtype), of_read, 0, 0)
    of_bias = jnp.where(first[:, None], of_read.astype(jnp.float32), 0).sum(0)
    for ref, x in zip(of_linear, loop(blocks.steps, step, (of_weight, of_bias)), strict=True):
        ref[...] = x.astype(ref.dtype)


def _load_linear(refs: Any) -> tuple[Any, Any]:
    return (refs[0][...], refs[1][...].astype(jnp.float32)) if refs else (None, None)


def _queries_at(blocks: Queried, queries: Any, i: Any) -> tuple[Any, Any]:
    row = jnp.arange(blocks.queries)
    at = i * (blocks.groups * blocks.heads) + row
    return at, ((row < blocks.groups * blocks.heads) & (at < queries.shape[0]))[:, None]


def _load_queries(blocks: Queried, queries: Any, i: Any) -> Any:
    at, there = _queries_at(blocks, queries, i)
    return triton.load(rows_of(queries, at), mask=there, other=0)


def _map(query: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """Queries in the space of the behaviours, and what they add to the score at all of their behaviours."""
    if weight is None:
        return query, jnp.zeros((1, query.shape[0]), jnp.float32)
    return dot(query, weight, 1, 1).astype(query.dtype), (query * bias[None]).sum(1)[None]


def _load_rows(blocks: Queried, sequence: Any, mask: Any, i: Any, j: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """Where behaviours are, themselves, zeros at padding, and which queries ask each: [rows, queries]."""
    where, there, rows, group = load_rows(blocks, sequence, mask, i, j)
    slot = jax.lax.div(jnp.arange(blocks.queries), blocks.heads)
    own = there[:, None] & (group[:, None] == slot[None])
    return where, jnp.where(there[:, None], rows, 0).astype(dtype), own


def _over_slots(blocks: Queried, x: Any, reduce: Callable[..., Any]) -> Any:
    split = x.reshape(-1, blocks.heads, *x.shape[1:])
    return jnp.broadcast_to(reduce(split, axis=0, keepdims=True), split.shape).reshape(x.shape)

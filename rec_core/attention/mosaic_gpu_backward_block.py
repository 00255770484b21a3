"""A block of 64 rows under a tile of keys: what the kernel that walks by keys does with it, and what it works on.

All is transposed, so that what is computed is at hand as the left operand of the next product: ``S^T = K Q^T``,
``dP^T = V dO^T``, ``dV += P^T dO``, ``dK += dS^T Q``.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from rec_core.attention.blocks import KEYS, Backward
from rec_core.attention.mosaic_gpu_common import (
    BLOCK_Q,
    COLUMN,
    LOG2_E,
    WGMMA,
    accumulate,
    hold,
    named_barrier,
    over_rows,
    there_and_back,
    wgmma_accumulator_store,
)


class Call(NamedTuple):
    """What is known of a call when it is compiled."""

    blocks: Backward
    gradients: tuple[str, ...]
    width: int
    kv_heads: int
    group: int  # query heads of a key head
    items: int  # tiles times key heads
    programs: int
    scale: float
    own: str
    dtype: Any
    interpret: bool


class Refs(NamedTuple):
    """Arrays in global memory, buffers in shared memory, barriers. ``*_free`` are for the interpreter."""

    q: Any
    d_out: Any
    k: Any
    v: Any
    statistics: Any
    ranges: Any
    order: Any
    table: Any
    made: dict[str, Any]  # the gradients
    k_tile: Any
    v_tile: Any
    q_block: Any
    do_block: Any
    made_tile: Any
    statistics_block: Any
    ranges_block: Any
    entry: Any
    kv_full: Any
    q_full: Any
    do_full: Any
    kv_free: Any = None
    q_free: Any = None
    do_free: Any = None


class Tile(NamedTuple):
    """A tile and key head, as one warpgroup sees it. ``before`` counts the blocks of the program's earlier items."""

    before: Array
    stage: Array
    first: Array
    total: Array
    example: Array
    number: Array
    kv_head: Array
    walk_first: Array
    walk_last: Array
    plain_first: Array
    plain_last: Array


class Step(NamedTuple):
    """A block of rows: where it lies in shared memory, and its number."""

    slot: Array
    block: Array


@dataclass(frozen=True)
class Program:
    """One program of the grid: what its warpgroups share."""

    call: Call
    refs: Refs
    warpgroup: Any
    number: Any

    def arrive(self, kind: str, index: Any = 0) -> None:
        """Says that a buffer ("kv", "q", "do") is free."""
        if self.call.interpret:
            plgpu.barrier_arrive(self._barrier(kind).at[index])
        else:
            named_barrier("arrive", *self._named(kind, index))

    def wait(self, kind: str, index: Any = 0) -> None:
        """Waits for ``arrive``."""
        if self.call.interpret:
            plgpu.barrier_wait(self._barrier(kind).at[index])
        else:
            named_barrier("sync", *self._named(kind, index))

    def _barrier(self, kind: str) -> Any:
        refs = self.refs
        return {"kv": refs.kv_free, "q": refs.q_free, "do": refs.do_free}[kind]

    def _named(self, kind: str, index: Any) -> tuple[Any, int]:
        blocks = self.call.blocks
        first = {"kv": blocks.keys_groups + 2}  # 0 is the program's, 1 .. groups + 1 are the warpgroups' own
        first["q"] = first["kv"] + blocks.keys_tiles
        first["do"] = first["q"] + blocks.keys_stages
        return jnp.int32(first[kind]) + index, 128 * (blocks.keys_groups + 1)

    def walk(self) -> tuple[Any, Any]:
        """The program's items by place, and how many they are. Made anew where it is used, to take no register."""
        return there_and_back(self.number, self.call.programs, self.call.items)

    def slot(self, count: Any) -> Any:
        return lax.rem(count, jnp.int32(self.call.blocks.keys_stages))

    def stage(self, place: Any) -> Any:
        return lax.rem(place, jnp.int32(self.call.blocks.keys_tiles))


def add_block(p: Program, x: Tile, s: Step, mask: bool, sums: dict[str, Array]) -> dict[str, Array]:
    """``sums`` with what a block of rows adds to them."""
    call, refs = p.call, p.refs
    plgpu.barrier_wait(refs.q_full.at[s.slot])
    weight, ds = _weights(p, x, s, mask)
    if len(sums) == 2 and not call.interpret:
        return _products(p, s, weight, ds, sums)
    sums = dict(sums)
    if "dv" in sums:
        sums["dv"] = accumulate(sums["dv"], weight, refs.do_block.at[s.slot], call.interpret)
    p.arrive("do", s.slot)
    if "dk" in sums:
        sums["dk"] = accumulate(sums["dk"], ds, refs.q_block.at[s.slot], call.interpret)
    p.arrive("q", s.slot)
    return sums


def _weights(p: Program, x: Tile, s: Step, mask: bool) -> tuple[Array, Any]:
    """P^T of a block of rows, and dS^T where dk is wanted; both in the operands' dtype."""
    call, refs = p.call, p.refs
    logits = plgpu.ACC((KEYS, BLOCK_Q), jnp.float32)

    def softened(s_ref: Any, wait: int) -> Array:
        norm = _vector(refs.statistics_block.at[s.slot, 0])
        logit = plgpu.wgmma_accumulator_load(s_ref, wait_n=wait)
        weight = jnp.exp2(logit * (call.scale * LOG2_E) - over_rows(norm, logit))
        return _masked(p, x, s, weight) if mask else weight

    def with_logits(s_ref: Any) -> Any:
        plgpu.wgmma(s_ref, refs.k_tile.at[x.stage, p.warpgroup], refs.q_block.at[s.slot].transpose((1, 0)))
        plgpu.barrier_wait(refs.do_full.at[s.slot])
        if "dk" not in call.gradients:
            return softened(s_ref, 0).astype(call.dtype), None
        return pl.run_scoped(functools.partial(with_both, s_ref), logits)

    def with_both(s_ref: Any, dp_ref: Any) -> Any:
        plgpu.wgmma(dp_ref, refs.v_tile.at[x.stage, p.warpgroup], refs.do_block.at[s.slot].transpose((1, 0)))
        weight = hold(softened(s_ref, 1), x.total < 0, refs.q_full.at[s.slot])
        narrow = weight.astype(call.dtype)
        shift = _vector(refs.statistics_block.at[s.slot, 1])
        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
        return narrow, (weight * (dp - over_rows(shift, dp))).astype(call.dtype)

    return pl.run_scoped(with_logits, logits)


def _vector(ref: Any) -> Array:
    return plgpu.load(ref, layout=COLUMN, optimized=False)


def _masked(p: Program, x: Tile, s: Step, weight: Array) -> Array:
    """Weights of a block, 0 where a row may not look."""
    low = (x.number * p.call.blocks.keys_groups + p.warpgroup) * KEYS
    key = plgpu.broadcasted_iota(jnp.int32, weight.shape, 0, layout=WGMMA) + low
    start, length = (_vector(p.refs.ranges_block.at[s.slot, i]) for i in range(2))
    # One comparison for two: a key before the start is a very large number.
    behind = (key - over_rows(start, weight)).astype(jnp.uint32)
    kept = jnp.where(behind < over_rows(length, weight).astype(jnp.uint32), weight, 0.0)
    if p.call.own == "none":
        return kept
    row = plgpu.broadcasted_iota(jnp.int32, weight.shape, 1, layout=WGMMA) + s.block * BLOCK_Q
    return jnp.where(key == row, weight, kept)


def _products(p: Program, s: Step, weight: Array, ds: Array, sums: dict[str, Array]) -> dict[str, Array]:
    """``sums`` with a block of rows added to both, the products side by side."""
    refs, wide = p.refs, plgpu.ACC((KEYS, p.call.width), jnp.float32)

    def into_dv(dv_ref: Any) -> Any:
        wgmma_accumulator_store(dv_ref, sums["dv"])
        plgpu.wgmma(dv_ref, weight, refs.do_block.at[s.slot])
        return pl.run_scoped(functools.partial(into_dk, dv_ref), wide)

    def into_dk(dv_ref: Any, dk_ref: Any) -> Any:
        wgmma_accumulator_store(dk_ref, sums["dk"])
        plgpu.wgmma(dk_ref, ds, refs.q_block.at[s.slot])
        dv = plgpu.wgmma_accumulator_load(dv_ref, wait_n=1)
        p.arrive("do", s.slot)
        return {"dk": plgpu.wgmma_accumulator_load(dk_ref, wait_n=0), "dv": dv}

    made = pl.run_scoped(into_dv, wide)
    p.arrive("q", s.slot)
    return made

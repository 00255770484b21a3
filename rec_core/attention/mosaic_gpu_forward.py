"""The forward kernel for Hopper (sm90): a persistent grid, warp-specialised.

A tile is ``groups`` warpgroups of 64 rows, which share the keys and values that one more warpgroup brings by TMA. The
programs walk over the items (tile, head), longest tiles first, there and back so that no program gets all the long
ones. Of a tile's key blocks come first the diagonal ones, for the self term (a block of the rows' own keys in which
row i sees key i), then those of its ranges from the last to the first; the online softmax (Milakov & Gimelshein,
arXiv:1805.02867) needs no other start for a row's own key. The softmax of a block runs while the tensor cores multiply
the block before with its values, and warpgroups take turns at issuing products, both as in FlashAttention-3 (Shah et
al., arXiv:2407.08608). Blocks that a warpgroup sees whole run without the mask, those it does not see are passed by.

Much here stands where it stands for the machine code that comes of it; such places say so.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm
from jaxtyping import Array, Float

from rec_core.attention.blocks import BLOCK_Q, CHUNK, ENTRIES, Forward, barrier_ids
from rec_core.attention.mosaic_gpu_common import (
    LOG2_E,
    REGISTERS,
    ROW,
    WGMMA,
    accumulate,
    named_barrier,
    operand,
    over_columns,
    there_and_back,
    wgmma_accumulator_store,
)
from rec_core.attention.mosaic_gpu_mask import keep_columns
from rec_core.attention.mosaic_gpu_plan import HEAD, PER_GROUP, Plan, key_block

BEYOND = 1 << 28  # columns further than any block is wide
RISE = 8.0  # how far, in base 2, logits rise above the maximum in use before it is replaced (FlashAttention-4's)
LOWEST = -1e30  # the maximum of a row that has seen nothing yet; finite, so that differences with it are


class _Call(NamedTuple):
    """What is known of a call when it is compiled."""

    blocks: Forward
    width: int
    heads: int
    group: int  # query heads of a key head
    items: int  # tiles times heads
    programs: int
    scale: float  # of logits in base 2
    own: str
    maybe_empty: bool  # whether a row of an item may see nothing
    dtype: Any
    interpret: bool


class _Refs(NamedTuple):
    """Arrays in global memory, buffers in shared memory, barriers. ``*_free`` and ``turn`` are for the interpreter."""

    q: Any
    k: Any
    v: Any
    k_self: Any
    v_self: Any
    start: Any
    end: Any
    order: Any
    table: Any
    out: Any
    lse: Any
    q_tile: Any
    out_tile: Any
    k_block: Any
    v_block: Any
    lse_tile: Any
    entry: Any
    start_tile: Any
    end_tile: Any
    q_full: Any
    k_full: Any
    v_full: Any
    q_free: Any = None
    k_free: Any = None
    v_free: Any = None
    turn: Any = None


class _Item(NamedTuple):
    """A tile and head, as one warpgroup sees it. ``before`` counts the blocks of the program's earlier items."""

    before: Array
    q_stage: Array
    steps: Array
    diag: Array
    diag_last: Array
    base: Array
    part: Array
    tile: Array
    head: Array
    first: Array
    last: Array
    plain_first: Array
    plain_last: Array


@dataclass(frozen=True)
class _Program:
    """One program of the grid: what its warpgroups share."""

    call: _Call
    refs: _Refs
    warpgroup: Any
    number: Any

    @property
    def takes_turns(self) -> bool:
        return self.call.blocks.turns and self.call.blocks.groups > 1

    def arrive(self, kind: str, index: Any = 0) -> None:
        """Says that a buffer ("q", "k", "v") is free, or that it is the turn of warpgroup ``index``.

        Named barriers are cheaper than barriers in memory, which the interpreter has instead.
        """
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
        return {"q": refs.q_free, "k": refs.k_free, "v": refs.v_free, "turn": refs.turn}[kind]

    def _named(self, kind: str, index: Any) -> tuple[Any, int]:
        threads = 256 if kind == "turn" else 128 * (self.call.blocks.groups + 1)
        return jnp.int32(barrier_ids(self.call.blocks)[kind]) + index, threads

    def walk(self) -> tuple[Callable[[Any], Any], Any]:
        """The program's items by place, and how many they are. Made anew where it is used, to take no register."""
        return there_and_back(self.number, self.call.programs, self.call.items)

    def block(self, step: Any, diag: Any, diag_last: Any, base: Any) -> Any:
        return key_block(self.call.own, step, diag, diag_last, base)

    def slot(self, count: Any) -> Any:
        return lax.rem(count, jnp.int32(self.call.blocks.stages))

    def q_stage(self, place: Any) -> Any:
        return lax.rem(place, jnp.int32(self.call.blocks.q_stages))


def _kernel(call: _Call, *refs: Any) -> None:
    warpgroup, number = lax.axis_index("warpgroup"), lax.axis_index("program")
    program = _Program(call, _Refs(*refs), warpgroup, number)
    pl.when(program.warpgroup < call.blocks.groups)(lambda: _compute(program))
    pl.when(program.warpgroup == call.blocks.groups)(lambda: _move(program))


def _move(p: _Program) -> None:
    """The warpgroup that fills shared memory."""
    call, refs, blocks = p.call, p.refs, p.call.blocks
    plgpu.set_max_registers(REGISTERS[blocks.groups][1], action="decrease")
    rows = BLOCK_Q * blocks.groups
    item_at, items = p.walk()

    def keys_of(step: Any, diag: Any, array: Any, own: Any, at: Any, buffer: Any, barrier: Any) -> None:
        if call.own != "separate":
            plgpu.copy_gmem_to_smem(array.at[at], buffer, barrier)
            return
        pl.when(step < diag)(lambda: plgpu.copy_gmem_to_smem(own.at[at], buffer, barrier))
        pl.when(step >= diag)(lambda: plgpu.copy_gmem_to_smem(array.at[at], buffer, barrier))

    def one(place: Any, before: Any) -> Any:
        stage = p.q_stage(place)
        full = refs.q_full.at[stage]
        item = item_at(place)
        head = lax.rem(item, jnp.int32(call.heads))
        at = refs.order[lax.div(item, jnp.int32(call.heads))]
        steps, diag, diag_last, base, example, tile, part = (refs.table[at, i] for i in range(7))
        kv_head = lax.div(head, jnp.int32(call.group))
        pl.when(place >= blocks.q_stages)(lambda: p.wait("q", stage))
        plgpu.copy_gmem_to_smem(refs.table.at[at], refs.entry.at[stage], full)
        plgpu.copy_gmem_to_smem(refs.start.at[part, pl.ds(tile * rows, rows)], refs.start_tile.at[stage], full)
        plgpu.copy_gmem_to_smem(refs.end.at[part, pl.ds(tile * rows, rows)], refs.end_tile.at[stage], full)
        for g in range(blocks.groups):
            own_rows = pl.ds(tile * rows + g * BLOCK_Q, BLOCK_Q)
            plgpu.copy_gmem_to_smem(refs.q.at[example, own_rows, head], refs.q_tile.at[stage, g], full)

        @pl.loop(0, steps)
        def _(step: Any) -> None:
            slot = p.slot(before + step)
            used = before + step >= blocks.stages
            at = (example, pl.ds(p.block(step, diag, diag_last, base) * blocks.block_k, blocks.block_k), kv_head)
            pl.when(used)(lambda: p.wait("k", slot))
            keys_of(step, diag, refs.k, refs.k_self, at, refs.k_block.at[slot], refs.k_full.at[slot])
            pl.when(used)(lambda: p.wait("v", slot))
            keys_of(step, diag, refs.v, refs.v_self, at, refs.v_block.at[slot], refs.v_full.at[slot])

        return before + steps

    count = lax.fori_loop(0, items, one, jnp.int32(0))

    # No barrier may be left in the middle of a phase.
    @pl.loop(lax.max(jnp.int32(0), items - blocks.q_stages), items)
    def _(place: Any) -> None:
        p.wait("q", p.q_stage(place))

    @pl.loop(lax.max(jnp.int32(0), count - blocks.stages), count)
    def _(count: Any) -> None:
        p.wait("k", p.slot(count))
        p.wait("v", p.slot(count))


def _compute(p: _Program) -> None:
    """A warpgroup that computes 64 rows of each tile."""
    call, refs, blocks = p.call, p.refs, p.call.blocks
    plgpu.set_max_registers(REGISTERS[blocks.groups][0], action="increase")
    s_acc, o_acc = plgpu.ACC((BLOCK_Q, blocks.block_k), jnp.float32), plgpu.ACC((BLOCK_Q, call.width), jnp.float32)

    def my_turn() -> None:
        if p.takes_turns:
            p.wait("turn", p.warpgroup)

    def next_turn() -> None:
        if p.takes_turns:
            p.arrive("turn", lax.rem(p.warpgroup + 1, jnp.int32(blocks.groups)))

    def pass_by(x: _Item, first: Any, last: Any) -> None:
        """Lets blocks pass that no row of this warpgroup sees."""

        @pl.loop(first, last)
        def _(step: Any) -> None:
            slot = p.slot(x.before + step)
            my_turn()
            next_turn()
            plgpu.barrier_wait(refs.k_full.at[slot])
            p.arrive("k", slot)
            plgpu.barrier_wait(refs.v_full.at[slot])
            p.arrive("v", slot)

    def issue_logits(s_ref: Any, x: _Item, slot: Any) -> None:
        plgpu.wgmma(s_ref, refs.q_tile.at[x.q_stage, p.warpgroup], refs.k_block.at[slot].transpose((1, 0)))

    def await_next_keys(x: _Item, step: Any) -> None:
        pl.when(step + 1 < x.last)(lambda: plgpu.barrier_wait(refs.k_full.at[p.slot(x.before + step + 1)]))

    def first_block(x: _Item) -> Array:
        slot = p.slot(x.before + x.first)
        plgpu.barrier_wait(refs.k_full.at[slot])
        my_turn()

        def logits(s_ref: Any) -> Array:
            issue_logits(s_ref, x, slot)
            next_turn()
            return plgpu.wgmma_accumulator_load(s_ref, wait_n=0)

        s = pl.run_scoped(logits, s_acc)
        p.arrive("k", slot)
        return s

    def both(x: _Item, step: Any, out: Array, weight: Array, soften: Callable[[Array], Any]) -> Any:
        """Logits of a block, beside the values of the block before; their softmax runs during the second product.

        The order is that of the machine code. The logits' product is issued before the output is moved to its
        accumulator, or the compiler clears that one first, 64 moves a block. The wait for the next keys stands before
        the wait for the second product, or the compiler puts the latter before the exponentials.
        """
        slot, before = p.slot(x.before + step), p.slot(x.before + step - 1)

        def rest(s_ref: Any, o_ref: Any = None) -> Any:
            if o_ref is not None:
                wgmma_accumulator_store(o_ref, out)
                plgpu.wgmma(o_ref, weight, refs.v_block.at[before])
            next_turn()
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=0 if o_ref is None else 1)
            p.arrive("k", slot)
            softened = soften(s)
            if o_ref is None:
                total = accumulate(out, weight, refs.v_block.at[before], True)
                await_next_keys(x, step)
            else:
                softened = lax.optimization_barrier(softened)
                await_next_keys(x, step)
                total = plgpu.wgmma_accumulator_load(o_ref, wait_n=0)
            p.arrive("v", before)
            # The cast comes last, or the wide weights stay in registers beside the narrow ones.
            new, top, norm, decay = softened
            return _rescaled(total, decay, call), top, norm, new.astype(call.dtype)

        def product(s_ref: Any) -> Any:
            issue_logits(s_ref, x, slot)
            plgpu.barrier_wait(refs.v_full.at[before])
            return rest(s_ref) if call.interpret else pl.run_scoped(functools.partial(rest, s_ref), o_acc)

        my_turn()
        return pl.run_scoped(product, s_acc)

    def last_values(x: _Item, out: Array, weight: Array) -> Array:
        slot = p.slot(x.before + x.last - 1)
        plgpu.barrier_wait(refs.v_full.at[slot])
        out = accumulate(out, weight, refs.v_block.at[slot], call.interpret)
        p.arrive("v", slot)
        return out

    def one(place: Any, before: Any) -> Any:
        x = _open(p, place, before)
        rows = pl.ds(p.warpgroup * BLOCK_Q, BLOCK_Q)
        start, end = (
            plgpu.load(ref.at[x.q_stage, rows], layout=ROW, optimized=False) for ref in (refs.start_tile, refs.end_tile)
        )
        mask = functools.partial(_mask, p, x, start, end)
        pass_by(x, jnp.int32(0), x.first)
        s = first_block(x)
        top = plgpu.layout_cast(jnp.full((BLOCK_Q,), LOWEST, jnp.float32), ROW)
        norm = plgpu.layout_cast(jnp.zeros((BLOCK_Q,), jnp.float32), ROW)
        weight, top, norm, _ = _softmax(mask(s, x.first), top, norm, call.scale, blocks.lazy)
        await_next_keys(x, x.first)
        out = plgpu.layout_cast(jnp.zeros((BLOCK_Q, call.width), jnp.float32), WGMMA)

        def step(masked: bool | None, number: Any, carry: Any) -> Any:
            out, top, norm, weight = carry

            def soften(s: Array) -> Any:
                if masked is None:
                    plain = (number >= x.plain_first) & (number < x.plain_last)
                    s = lax.cond(plain, lambda s: s, lambda s: mask(s, number), s)
                elif masked:
                    s = mask(s, number)
                return _softmax(s, top, norm, call.scale, blocks.lazy)

            return both(x, number, out, weight, soften)

        carry = out, top, norm, weight.astype(call.dtype)
        if blocks.split_loop:
            carry = lax.fori_loop(x.first + 1, x.plain_first, functools.partial(step, True), carry)
            plain_first = lax.max(x.plain_first, x.first + 1)
            carry = lax.fori_loop(plain_first, x.plain_last, functools.partial(step, False), carry)
            plain_last = lax.max(x.plain_last, x.first + 1)
            carry = lax.fori_loop(plain_last, x.last, functools.partial(step, True), carry)
        else:
            carry = lax.fori_loop(x.first + 1, x.last, functools.partial(step, None), carry)
        out, top, norm, weight = carry

        plgpu.commit_smem()
        p.arrive("q", x.q_stage)
        out = last_values(x, out, weight)
        pass_by(x, x.last, x.steps)
        _store(p, x, out, top, norm)
        return before + x.steps

    if p.takes_turns:
        pl.when(p.warpgroup == blocks.groups - 1)(lambda: p.arrive("turn"))
    lax.fori_loop(0, p.walk()[1], one, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
    if p.takes_turns:
        pl.when(p.warpgroup == 0)(lambda: p.wait("turn"))


def _open(p: _Program, place: Any, before: Any) -> _Item:
    stage = p.q_stage(place)
    plgpu.barrier_wait(p.refs.q_full.at[stage])
    steps, diag, diag_last, base, _, tile, part = (p.refs.entry[stage, i] for i in range(7))
    walk = (p.refs.entry[stage, HEAD + p.warpgroup * PER_GROUP + i] for i in range(4))
    head = lax.rem(p.walk()[0](place), jnp.int32(p.call.heads))
    return _Item(before, stage, steps, diag, diag_last, base, part, tile, head, *walk)


def _mask(p: _Program, x: _Item, start: Array, end: Array, s: Array, step: Any) -> Array:
    """Logits of a step's block, -inf where a row may not look."""
    offset = p.block(step, x.diag, x.diag_last, x.base) * p.call.blocks.block_k
    first, last = start - offset, end - offset
    if p.call.own == "none":
        return keep_columns(s, first, last, None, -jnp.inf, interpret=p.call.interpret)
    low = x.tile * (BLOCK_Q * p.call.blocks.groups) + p.warpgroup * BLOCK_Q
    own = plgpu.broadcasted_iota(jnp.int32, start.shape, 0, layout=ROW) + (low - offset)
    if p.call.own == "separate":  # a block of own keys has no others, one of others none of them
        away = jnp.where(step < x.diag, BEYOND, 0)
        first, last, own = first + away, last + away, own + (BEYOND - away)
    return keep_columns(s, first, last, own, -jnp.inf, interpret=p.call.interpret)


def _softmax(s: Array, top: Array, norm: Array, scale: float, lazy: bool) -> tuple[Array, Array, Array, Array]:
    """Weights of a block, the new maximum and sum, and the factor on what came before; logits in base 2."""
    high = s.max(axis=1) * scale
    new = jnp.where(high > top + RISE, high, top) if lazy else jnp.maximum(top, high)
    decay = jnp.exp2(top - new)
    weight = jnp.exp2(s * scale - over_columns(new, s))
    return weight, new, norm * decay + weight.sum(axis=1), decay


def _rescaled(out: Array, decay: Array, call: Any) -> Array:
    """``out`` times ``decay``; lazily, where a row of the warp has one that is not 1."""
    if call.interpret or not call.blocks.lazy:
        return out * over_columns(decay, out)

    @plgpu.inline_mgpu(
        arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct((), jnp.bool_, layout=plgpu.Layout.WG_SPLAT)
    )
    def some(_: Any, decay: Any) -> Any:
        found: list[Any] = []
        less = arith.CmpFPredicate.OLT
        decay.foreach(lambda value, _: found.append(arith.cmpf(less, value, mgpu.c(1.0, value.type))))
        any_row = functools.reduce(arith.ori, found)
        everyone = mgpu.c(-1, ir.IntegerType.get_signless(32))
        return mgpu.FragmentedArray.splat(nvvm.vote_sync(everyone, any_row, "any"), (), is_signed=False)

    return lax.cond(some(decay), lambda x: x * over_columns(decay, x), lambda x: x, out)


def _store(p: _Program, x: _Item, out: Array, top: Array, norm: Array) -> None:
    refs, width = p.refs, p.call.width
    some = jnp.where(norm > 0, norm, 1.0) if p.call.maybe_empty else norm
    out = (out * over_columns(1.0 / some, out)).astype(p.call.dtype)
    rows = pl.ds(x.tile * (BLOCK_Q * p.call.blocks.groups) + p.warpgroup * BLOCK_Q, BLOCK_Q)
    for at in range(0, width, CHUNK):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.out_tile[p.warpgroup] = out if width == CHUNK else out[:, at : at + CHUNK]
        if at == 0:
            refs.lse_tile[p.warpgroup] = (top + jnp.log2(norm)) * (1 / LOG2_E)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(refs.out_tile.at[p.warpgroup], refs.out.at[x.part, rows, x.head, pl.ds(at, CHUNK)])
        if at == 0:
            plgpu.copy_smem_to_gmem(refs.lse_tile.at[p.warpgroup], refs.lse.at[x.part, x.head, rows])


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    k_self: Float[Array, "B T K D"] | None,
    v_self: Float[Array, "B T K D"] | None,
    planned: Plan,
    *,
    scale: float,
    blocks: Forward,
    own: str,
    programs: int,
    interpret: bool = False,
) -> tuple[Float[Array, "P T H D"], Float[Array, "P H T"]]:
    """Output and log-sum-exp (float32, natural logarithm) of each example, or of each of its parts.

    Args:
      k_self, v_self: the rows' own keys and values if ``own`` is "separate", else None.
      planned: what ``plan`` made with the same ``blocks`` and ``own``. blocks: as ``check_forward`` lets pass.
      scale: factor on the logits, above 0.
      programs: size of the grid, the multiprocessors of the device.
      interpret: the kernel is run by the interpreter, which has neither named barriers nor accumulators to write to.
    """
    rows, heads, width = q.shape[1:]
    parts, padded = planned.start.shape
    groups, q_stages, stages = blocks.groups, blocks.q_stages, blocks.stages
    items = planned.table.shape[0] * heads
    empty = own == "none" or parts > q.shape[0]
    group, logit_scale = heads // k.shape[2], scale * LOG2_E
    call = _Call(blocks, width, heads, group, items, programs, logit_scale, own, empty, q.dtype, interpret)

    def barrier(arrivals: int, number: int) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

    scratch = [
        operand(q.dtype, q_stages, groups, BLOCK_Q, width),
        operand(q.dtype, groups, BLOCK_Q, CHUNK),
        operand(q.dtype, stages, blocks.block_k, width),
        operand(q.dtype, stages, blocks.block_k, width),
        plgpu.SMEM((groups, BLOCK_Q), jnp.float32),
        plgpu.SMEM((q_stages, ENTRIES), jnp.int32),
        plgpu.SMEM((q_stages, groups * BLOCK_Q), jnp.int32),
        plgpu.SMEM((q_stages, groups * BLOCK_Q), jnp.int32),
        barrier(groups + 3, q_stages),
        barrier(1, stages),
        barrier(1, stages),
    ]
    if interpret:
        scratch += [barrier(groups, q_stages), barrier(groups, stages), barrier(groups, stages)]
        scratch += [barrier(1, groups)] if groups > 1 and blocks.turns else []
    out, lse = plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=[
            jax.ShapeDtypeStruct((parts, *q.shape[1:]), q.dtype),
            jax.ShapeDtypeStruct((parts, heads, padded), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=groups + 1,
        thread_name="warpgroup",
        kernel_name="range_attention_forward",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
    )(q, k, v, k if k_self is None else k_self, v if v_self is None else v_self, *planned)
    return out, lse[..., :rows]

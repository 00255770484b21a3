"""dk and dv of range attention on Hopper: tiles of keys against the rows that see them.

A tile is ``keys_groups`` warpgroups of 64 keys; rows come in blocks of 64, of which ``mosaic_gpu_backward_block`` says
what is done with each. The grid is that of the forward kernel.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from rec_core.attention.blocks import ENTRIES, KEYS, Backward
from rec_core.attention.mosaic_gpu_backward_block import Call, Program, Refs, Step, Tile, add_block
from rec_core.attention.mosaic_gpu_common import (
    BLOCK_Q,
    CHUNK,
    REGISTERS,
    WGMMA,
    like,
    operand,
)
from rec_core.attention.mosaic_gpu_plan import HEAD, PER_GROUP, KeyPlan


def _move(p: Program) -> None:
    """The warpgroup that fills shared memory."""
    call, refs, blocks = p.call, p.refs, p.call.blocks
    groups, stages = blocks.keys_groups, blocks.keys_stages
    plgpu.set_max_registers(REGISTERS[groups][1], action="decrease")
    item_at, items = p.walk()

    def one(place: Any, before: Any) -> Any:
        stage = p.stage(place)
        full = refs.kv_full.at[stage]
        kv_head = lax.rem(item_at(place), jnp.int32(call.kv_heads))
        at = refs.order[lax.div(item_at(place), jnp.int32(call.kv_heads))]
        first, count, example, tile = (refs.table[at, i] for i in range(4))
        pl.when(place >= blocks.keys_tiles)(lambda: p.wait("kv", stage))
        plgpu.copy_gmem_to_smem(refs.table.at[at], refs.entry.at[stage], full)
        for g in range(groups):
            own_keys = pl.ds((tile * groups + g) * KEYS, KEYS)
            plgpu.copy_gmem_to_smem(refs.k.at[example, own_keys, kv_head], refs.k_tile.at[stage, g], full)
            plgpu.copy_gmem_to_smem(refs.v.at[example, own_keys, kv_head], refs.v_tile.at[stage, g], full)

        @pl.loop(0, count * call.group)
        def _(number: Any) -> None:
            slot = p.slot(before + number)
            head, block = kv_head * call.group + lax.div(number, count), first + lax.rem(number, count)
            own_rows = pl.ds(block * BLOCK_Q, BLOCK_Q)
            used, full = before + number >= stages, refs.q_full.at[slot]
            pl.when(used)(lambda: p.wait("q", slot))
            plgpu.copy_gmem_to_smem(refs.ranges.at[example, block], refs.ranges_block.at[slot], full)
            plgpu.copy_gmem_to_smem(refs.statistics.at[example, head, block], refs.statistics_block.at[slot], full)
            plgpu.copy_gmem_to_smem(refs.q.at[example, own_rows, head], refs.q_block.at[slot], full)
            pl.when(used)(lambda: p.wait("do", slot))
            plgpu.copy_gmem_to_smem(
                refs.d_out.at[example, own_rows, head], refs.do_block.at[slot], refs.do_full.at[slot]
            )

        return before + count * call.group

    count = lax.fori_loop(0, items, one, jnp.int32(0))

    # No barrier may be left in the middle of a phase.
    @pl.loop(lax.max(jnp.int32(0), items - blocks.keys_tiles), items)
    def _(place: Any) -> None:
        p.wait("kv", p.stage(place))

    @pl.loop(lax.max(jnp.int32(0), count - stages), count)
    def _(count: Any) -> None:
        p.wait("q", p.slot(count))
        p.wait("do", p.slot(count))


def _compute(p: Program) -> None:
    """A warpgroup that computes 64 keys of each tile."""
    call, refs = p.call, p.refs
    plgpu.set_max_registers(REGISTERS[call.blocks.keys_groups][0], action="increase")

    def one(place: Any, before: Any) -> Any:
        x = _open(p, place, before)

        def pass_by(head: Any, first: Any, last: Any) -> None:
            """Lets blocks pass of which no row sees a key of this warpgroup."""

            @pl.loop(first, last)
            def _(number: Any) -> None:
                slot = p.slot(x.before + head * x.total + number)
                plgpu.barrier_wait(refs.q_full.at[slot])
                p.arrive("q", slot)
                plgpu.barrier_wait(refs.do_full.at[slot])
                p.arrive("do", slot)

        def step(mask: bool, head: Any, number: Any, sums: dict[str, Array]) -> dict[str, Array]:
            at = x.before + head * x.total + number
            return add_block(p, x, Step(p.slot(at), x.first + number), mask, sums)

        def one_head(head: Any, sums: dict[str, Array]) -> dict[str, Array]:
            pass_by(head, jnp.int32(0), x.walk_first)
            sums = lax.fori_loop(x.walk_first, x.plain_first, functools.partial(step, True, head), sums)
            sums = lax.fori_loop(x.plain_first, x.plain_last, functools.partial(step, False, head), sums)
            sums = lax.fori_loop(x.plain_last, x.walk_last, functools.partial(step, True, head), sums)
            pass_by(head, x.walk_last, x.total)
            return sums

        zero = plgpu.layout_cast(jnp.zeros((KEYS, call.width), jnp.float32), WGMMA)
        sums: dict[str, Array] = {name: zero for name in ("dk", "dv") if name in call.gradients}
        sums = lax.fori_loop(0, call.group, one_head, sums) if call.group > 1 else one_head(jnp.int32(0), sums)
        plgpu.commit_smem()
        p.arrive("kv", x.stage)
        _store(p, x, sums)
        return before + x.total * call.group

    lax.fori_loop(0, p.walk()[1], one, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _open(p: Program, place: Any, before: Any) -> Tile:
    stage = p.stage(place)
    plgpu.barrier_wait(p.refs.kv_full.at[stage])
    first, count, example, number = (p.refs.entry[stage, i] for i in range(4))
    walk = (p.refs.entry[stage, HEAD + p.warpgroup * PER_GROUP + i] for i in range(4))
    kv_head = lax.rem(p.walk()[0](place), jnp.int32(p.call.kv_heads))
    return Tile(before, stage, first, count, example, number, kv_head, *walk)


def _store(p: Program, x: Tile, sums: dict[str, Array]) -> None:
    call, refs = p.call, p.refs
    for name, total in sums.items():
        narrow = (total * call.scale if name == "dk" else total).astype(call.dtype)
        for at in range(0, call.width, CHUNK):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            refs.made_tile[p.warpgroup] = narrow if call.width == CHUNK else narrow[:, at : at + CHUNK]
            plgpu.commit_smem()
            own_keys = pl.ds((x.number * call.blocks.keys_groups + p.warpgroup) * KEYS, KEYS)
            to = refs.made[name].at[x.example, own_keys, x.kv_head, pl.ds(at, CHUNK)]
            plgpu.copy_smem_to_gmem(refs.made_tile.at[p.warpgroup], to)


def _kernel(call: Call, *refs: Any, **scratch: Any) -> None:
    warpgroup, number = lax.axis_index("warpgroup"), lax.axis_index("program")
    program = Program(call, Refs(*refs, **scratch), warpgroup, number)
    pl.when(warpgroup < call.blocks.keys_groups)(lambda: _compute(program))
    pl.when(warpgroup == call.blocks.keys_groups)(lambda: _move(program))


def backward_keys(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    d_out: Float[Array, "B T H D"],
    statistics: Float[Array, "B H blocks 2 64"],
    ranges: Int[Array, "B blocks 2 64"],
    planned: KeyPlan,
    *,
    gradients: tuple[str, ...],
    scale: float,
    blocks: Backward,
    own: str,
    programs: int,
    interpret: bool,
) -> tuple[Array, ...]:
    """The ``gradients`` asked for, of "dk" and "dv" in this order.

    Args:
      statistics: of each row the log-sum-exp in base 2 and ``delta``. ranges: of each row its start and number of keys.
      planned: what ``plan_keys`` made with the same groups and ``own``.
      own: "same" or "none".
    """
    width, kv_heads = q.shape[3], k.shape[2]
    items = planned.table.shape[0] * kv_heads
    call = Call(
        blocks, gradients, width, kv_heads, q.shape[2] // kv_heads, items, programs, scale, own, q.dtype, interpret
    )
    inputs = (q, d_out, k, v, statistics, ranges, *planned)

    def body(*refs: Any) -> None:
        operands, places = refs[: len(inputs)], dict(zip(gradients, refs[len(inputs) :]))
        run = functools.partial(_kernel, call, *operands, places)
        pl.run_scoped(run, collective_axes="warpgroup", **_scratch(call))

    made: tuple[Array, ...] = pl.kernel(
        body,
        out_type=[like(k, k.shape, q.dtype) for _ in gradients],
        mesh=plgpu.Mesh(
            grid=(programs,),
            grid_names=("program",),
            num_threads=blocks.keys_groups + 1,
            thread_name="warpgroup",
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        name="range_attention_" + "_".join(gradients),
    )(*inputs)
    return tuple(made)


def _scratch(call: Call) -> dict[str, Any]:
    """Buffers and barriers by the names of ``Refs``."""
    groups, stages, tiles = call.blocks.keys_groups, call.blocks.keys_stages, call.blocks.keys_tiles
    tile, block = (operand(call.dtype, *sizes, 64, call.width) for sizes in ((tiles, groups), (stages,)))
    scratch: dict[str, Any] = {
        "k_tile": tile,
        "v_tile": tile,
        "q_block": block,
        "do_block": block,
        "made_tile": operand(call.dtype, groups, KEYS, CHUNK),
        "statistics_block": plgpu.SMEM((stages, 2, BLOCK_Q), jnp.float32),
        "ranges_block": plgpu.SMEM((stages, 2, BLOCK_Q), jnp.int32),
        "entry": plgpu.SMEM((tiles, ENTRIES), jnp.int32),
        "kv_full": plgpu.Barrier(num_arrivals=1 + 2 * groups, num_barriers=tiles),
        "q_full": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "do_full": plgpu.Barrier(num_barriers=stages),
    }
    if call.interpret:
        free = {"kv_free": tiles, "q_free": stages, "do_free": stages}
        scratch |= {name: plgpu.Barrier(num_arrivals=groups, num_barriers=number) for name, number in free.items()}
    return scratch

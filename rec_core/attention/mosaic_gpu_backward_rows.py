"""dq of range attention on Hopper: tiles of rows against the key blocks of their ranges.

The grid, the tiles and their walk over key blocks are those of the forward kernel, and so is the plan. A block takes
three matrix products: ``S = Q K^T`` and ``dP = dO V^T`` side by side, then ``dQ += dS K`` with ``dS = P (dP - delta)``,
the weights ``P = 2^(S - lse)`` being made while the second product runs.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from rec_core.attention.blocks import ENTRIES, Backward
from rec_core.attention.mosaic_gpu_common import (
    BLOCK_Q,
    CHUNK,
    LOG2_E,
    REGISTERS,
    ROW,
    WGMMA,
    accumulate,
    hold,
    like,
    named_barrier,
    operand,
    over_columns,
    there_and_back,
)
from rec_core.attention.mosaic_gpu_mask import keep_columns
from rec_core.attention.mosaic_gpu_plan import HEAD, PER_GROUP, Plan, key_block


def backward_rows(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    d_out: Float[Array, "B T H D"],
    log2_norm: Float[Array, "B H padded"],
    delta: Float[Array, "B H padded"],
    planned: Plan,
    *,
    scale: float,
    blocks: Backward,
    own: str,
    programs: int,
    interpret: bool,
) -> Float[Array, "B T H D"]:
    """dq. ``log2_norm`` is the log-sum-exp in base 2; ``planned`` is the forward kernel's for ``rows_block_k`` and
    ``rows_groups``; ``own`` is "same" or "none"."""
    heads, width = q.shape[2:]
    group = heads // k.shape[2]
    block_k, groups, stages, tiles = blocks.rows_block_k, blocks.rows_groups, blocks.rows_stages, blocks.rows_tiles
    tile_rows = BLOCK_Q * groups
    items = planned.table.shape[0] * heads
    threads = 128 * (groups + 1)

    def kernel(
        q_g: Any, do_g: Any, k_g: Any, v_g: Any, norm_g: Any, delta_g: Any, start_g: Any, end_g: Any, order_g: Any,
        table_g: Any, dq_g: Any, q_s: Any, do_s: Any, k_s: Any, v_s: Any, out_s: Any, norm_s: Any, delta_s: Any,
        start_s: Any, end_s: Any, entry: Any, q_full: Any, kv_full: Any, q_free: Any = None, kv_free: Any = None,
    ) -> None:  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        item, mine = there_and_back(lax.axis_index("program"), programs, items)

        def signal(operation: str, kind: str, index: Any) -> None:
            """Says ("arrive"), or waits for its being said ("sync"), that a tile or a key block is free."""
            if interpret:
                barrier = {"q": q_free, "kv": kv_free}[kind].at[index]
                (plgpu.barrier_arrive if operation == "arrive" else plgpu.barrier_wait)(barrier)
            else:
                first = {"q": groups + 2, "kv": groups + 2 + tiles}[kind]
                named_barrier(operation, jnp.int32(first) + index, threads)

        def slot_of(count: Any) -> Any:
            return lax.rem(count, jnp.int32(stages))

        def stage_of(place: Any) -> Any:
            return lax.rem(place, jnp.int32(tiles))

        def compute() -> None:
            plgpu.set_max_registers(REGISTERS[groups][0], action="increase")
            logits = plgpu.ACC((BLOCK_Q, block_k), jnp.float32)

            def one(place: Any, before: Any) -> Any:
                stage = stage_of(place)
                plgpu.barrier_wait(q_full.at[stage])
                steps, diag, diag_last, base, example, tile = (entry[stage, i] for i in range(6))
                walk = (entry[stage, HEAD + warpgroup * PER_GROUP + i] for i in range(4))
                first, last, plain_first, plain_last = walk
                low = tile * tile_rows + warpgroup * BLOCK_Q
                start, end, norm, shift = (
                    plgpu.load(ref.at[stage, pl.ds(warpgroup * BLOCK_Q, BLOCK_Q)], layout=ROW, optimized=False)
                    for ref in (start_s, end_s, norm_s, delta_s)
                )

                def pass_by(first: Any, last: Any) -> None:
                    @pl.loop(first, last)
                    def _(step: Any) -> None:
                        slot = slot_of(before + step)
                        plgpu.barrier_wait(kv_full.at[slot])
                        signal("arrive", "kv", slot)

                def masked(weight: Array, step: Any) -> Array:
                    offset = key_block(own, step, diag, diag_last, base) * block_k
                    own_key = None
                    if own == "same":
                        own_key = plgpu.broadcasted_iota(jnp.int32, start.shape, 0, layout=ROW) + (low - offset)
                    return keep_columns(weight, start - offset, end - offset, own_key, 0.0, interpret=interpret)

                def step(mask: bool, number: Any, dq: Array) -> Array:
                    slot = slot_of(before + number)
                    plgpu.barrier_wait(kv_full.at[slot])

                    def with_logits(s_ref: Any) -> Array:
                        plgpu.wgmma(s_ref, q_s.at[stage, warpgroup], k_s.at[slot].transpose((1, 0)))
                        return pl.run_scoped(functools.partial(with_both, s_ref), logits)

                    def with_both(s_ref: Any, dp_ref: Any) -> Array:
                        plgpu.wgmma(dp_ref, do_s.at[stage, warpgroup], v_s.at[slot].transpose((1, 0)))
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                        weight = jnp.exp2(s * (scale * LOG2_E) - over_columns(norm, s))
                        if mask:
                            weight = masked(weight, number)
                        weight = hold(weight, steps < 0, kv_full.at[slot])
                        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
                        return weight * (dp - over_columns(shift, dp))

                    ds = pl.run_scoped(with_logits, logits).astype(q.dtype)
                    dq = accumulate(dq, ds, k_s.at[slot], interpret)
                    signal("arrive", "kv", slot)
                    return dq

                pass_by(jnp.int32(0), first)
                dq = plgpu.layout_cast(jnp.zeros((BLOCK_Q, width), jnp.float32), WGMMA)
                dq = lax.fori_loop(first, plain_first, functools.partial(step, True), dq)
                dq = lax.fori_loop(plain_first, plain_last, functools.partial(step, False), dq)
                dq = lax.fori_loop(plain_last, last, functools.partial(step, True), dq)
                plgpu.commit_smem()
                signal("arrive", "q", stage)
                pass_by(last, steps)
                dq = (dq * scale).astype(q.dtype)
                head = lax.rem(item(place), jnp.int32(heads))
                for at in range(0, width, CHUNK):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_s[warpgroup] = dq if width == CHUNK else dq[:, at : at + CHUNK]
                    plgpu.commit_smem()
                    low = tile * tile_rows + warpgroup * BLOCK_Q
                    to = dq_g.at[example, pl.ds(low, BLOCK_Q), head, pl.ds(at, CHUNK)]
                    plgpu.copy_smem_to_gmem(out_s.at[warpgroup], to)
                return before + steps

            lax.fori_loop(0, mine, one, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        def move() -> None:
            plgpu.set_max_registers(REGISTERS[groups][1], action="decrease")

            def one(place: Any, before: Any) -> Any:
                head = lax.rem(item(place), jnp.int32(heads))
                at = order_g[lax.div(item(place), jnp.int32(heads))]
                steps, diag, diag_last, base, example, tile = (table_g[at, i] for i in range(6))
                kv_head = lax.div(head, jnp.int32(group))
                stage = stage_of(place)
                full = q_full.at[stage]
                pl.when(place >= tiles)(lambda: signal("sync", "q", stage))
                plgpu.copy_gmem_to_smem(table_g.at[at], entry.at[stage], full)
                tile_at = pl.ds(tile * tile_rows, tile_rows)
                for array, buffer in ((start_g, start_s), (end_g, end_s)):
                    plgpu.copy_gmem_to_smem(array.at[example, tile_at], buffer.at[stage], full)
                for array, buffer in ((norm_g, norm_s), (delta_g, delta_s)):
                    plgpu.copy_gmem_to_smem(array.at[example, head, tile_at], buffer.at[stage], full)
                for g in range(groups):
                    own_rows = pl.ds(tile * tile_rows + g * BLOCK_Q, BLOCK_Q)
                    plgpu.copy_gmem_to_smem(q_g.at[example, own_rows, head], q_s.at[stage, g], full)
                    plgpu.copy_gmem_to_smem(do_g.at[example, own_rows, head], do_s.at[stage, g], full)

                @pl.loop(0, steps)
                def _(step: Any) -> None:
                    slot = slot_of(before + step)
                    keys = pl.ds(key_block(own, step, diag, diag_last, base) * block_k, block_k)
                    pl.when(before + step >= stages)(lambda: signal("sync", "kv", slot))
                    plgpu.copy_gmem_to_smem(k_g.at[example, keys, kv_head], k_s.at[slot], kv_full.at[slot])
                    plgpu.copy_gmem_to_smem(v_g.at[example, keys, kv_head], v_s.at[slot], kv_full.at[slot])

                return before + steps

            count = lax.fori_loop(0, mine, one, jnp.int32(0))
            # No barrier may be left in the middle of a phase.
            pl.loop(lax.max(jnp.int32(0), mine - tiles), mine)(lambda place: signal("sync", "q", stage_of(place)))
            pl.loop(lax.max(jnp.int32(0), count - stages), count)(lambda count: signal("sync", "kv", slot_of(count)))

        pl.when(warpgroup < groups)(compute)
        pl.when(warpgroup == groups)(move)

    tile_of = operand(q.dtype, tiles, groups, BLOCK_Q, width)
    block_of = operand(q.dtype, stages, block_k, width)
    vectors = [plgpu.SMEM((tiles, tile_rows), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32, jnp.int32)]
    scratch = [tile_of, tile_of, block_of, block_of, operand(q.dtype, groups, BLOCK_Q, CHUNK), *vectors]
    scratch += [plgpu.SMEM((tiles, ENTRIES), jnp.int32), plgpu.Barrier(num_arrivals=5 + 2 * groups, num_barriers=tiles)]
    scratch += [plgpu.Barrier(num_arrivals=2, num_barriers=stages)]
    if interpret:
        scratch += [plgpu.Barrier(num_arrivals=groups, num_barriers=number) for number in (tiles, stages)]
    return plgpu.kernel(
        kernel,
        out_type=like(q, q.shape, q.dtype),
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=groups + 1,
        thread_name="warpgroup",
        kernel_name="range_attention_dq",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(q, d_out, k, v, log2_norm, delta, *planned)

"""dk and dv of range attention on Hopper, and on the way dq: tiles of keys against the rows that see them.

A tile is ``keys_groups`` warpgroups of 64 keys; rows come in blocks of 64. All is transposed, so that what is computed
is at hand as the left operand of the next product: ``S^T = K Q^T``, ``dP^T = V dO^T``, ``dV += P^T dO``,
``dK += dS^T Q``. Where dq is wanted too, dS goes through shared memory, one warpgroup (or each, for its columns)
multiplies it with the tile's keys, and the copy engine adds the product to dq in global memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from rec_core.attention.blocks import ENTRIES, Backward
from rec_core.attention.mosaic_gpu_common import (
    BLOCK_Q,
    CHUNK,
    COLUMN,
    LOG2_E,
    REGISTERS,
    WGMMA,
    accumulate,
    like,
    named_barrier,
    operand,
    over_rows,
    there_and_back,
    wgmma_accumulator_store,
)
from rec_core.attention.schedule import schedule

KEYS = 64  # of a warpgroup


class KeyPlan(NamedTuple):
    """Tiles of keys: by falling number of rows, and of each its first block of rows, how many, which of them
    ``[plain_first, plain_last)`` from there on need no mask, example, number."""

    order: Int[Array, " tiles"]
    table: Int[Array, "tiles 32"]


def plan_keys(
    start: Int[Array, "B T"], end: Int[Array, "B T"], rows: int, keys: int, blocks: Backward, own: str
) -> KeyPlan:
    """Which rows a tile of keys meets: the hull of those whose ranges, or own places if ``own`` is "same", touch it."""
    tile_keys = KEYS * blocks.keys_groups
    visits = schedule(start, end, BLOCK_Q, tile_keys)
    tile = jnp.arange(-(-keys // tile_keys), dtype=jnp.int32)[None, :, None]
    block = jnp.arange(visits.first.shape[1], dtype=jnp.int32)
    sees = (visits.first[:, None] <= tile) & (tile < visits.last[:, None])
    whole = (visits.full_first[:, None] <= tile) & (tile < visits.full_last[:, None])
    if own == "same":
        near = (block * BLOCK_Q < (tile + 1) * tile_keys) & ((block + 1) * BLOCK_Q > tile * tile_keys)
        sees, whole = sees | near, whole & ~near
    count = block.shape[0]
    last = jnp.max(jnp.where(sees, block + 1, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(sees, block, count), axis=-1), last)
    plain_first = jnp.min(jnp.where(whole, block, count), axis=-1)
    plain_last = jnp.min(jnp.where(~whole & (block >= plain_first[..., None]), block, count), axis=-1)
    plain_first = jnp.minimum(plain_first, last)
    plain_last = jnp.clip(plain_last, plain_first, last)
    example = jnp.broadcast_to(jnp.arange(start.shape[0], dtype=jnp.int32)[:, None], first.shape)
    number = jnp.broadcast_to(tile[..., 0], first.shape)
    entry = [first, last - first, plain_first - first, plain_last - first, example, number]
    table = jnp.stack(entry, axis=-1).reshape(-1, len(entry)).astype(jnp.int32)
    order = jnp.argsort(-table[:, 1], stable=True).astype(jnp.int32)
    return KeyPlan(order, jnp.pad(table, [(0, 0), (0, ENTRIES - len(entry))]))


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
    """The ``gradients`` asked for, of "dq", "dk", "dv" in this order; "dq" comes with both others.

    Args:
      statistics: of each row the log-sum-exp in base 2 and ``delta``. ranges: start and end of each row.
      own: "same" or "none".
    """
    heads, width = q.shape[2:]
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    dtype, groups, stages = q.dtype, blocks.keys_groups, blocks.keys_stages
    tile_keys = KEYS * groups
    items = planned.table.shape[0] * kv_heads
    with_q, with_k, with_v = ("dq" in gradients), ("dk" in gradients), ("dv" in gradients)
    by_columns = width >= CHUNK * groups  # else the warpgroups make blocks of dq in turn
    part = width // groups if by_columns else width
    wide = plgpu.ACC((KEYS, width), jnp.float32)
    logits = plgpu.ACC((KEYS, BLOCK_Q), jnp.float32)

    def kernel(
        q_g: Any, do_g: Any, k_g: Any, v_g: Any, statistics_g: Any, ranges_g: Any, order_g: Any, table_g: Any,
        out_g: dict[str, Any], k_s: Any, v_s: Any, q_s: Any, do_s: Any, out_s: Any, statistics_s: Any, ranges_s: Any,
        entry: Any, kv_full: Any, q_full: Any, do_full: Any, ds_s: Any = None, dq_s: Any = None, kv_free: Any = None,
        q_free: Any = None, do_free: Any = None, ds_full: Any = None,
    ) -> None:  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        item, mine = there_and_back(lax.axis_index("program"), programs, items)

        def signal(operation: str, kind: str, slot: Any = 0) -> None:
            """Says ("arrive"), or waits for its being said ("sync"), that a buffer is free."""
            if interpret:
                barrier = {"kv": kv_free, "q": q_free, "do": do_free}[kind].at[slot]
                (plgpu.barrier_arrive if operation == "arrive" else plgpu.barrier_wait)(barrier)
            else:
                first = {"kv": groups + 2, "q": groups + 3, "do": groups + 3 + stages}[kind]
                named_barrier(operation, jnp.int32(first) + slot, 128 * (groups + 1))

        def meet() -> None:
            """The computing warpgroups wait for each other."""
            if interpret:
                plgpu.barrier_arrive(ds_full)
                plgpu.barrier_wait(ds_full)
            else:
                named_barrier("sync", jnp.int32(groups + 3 + 2 * stages), 128 * groups)

        def slot_of(count: Any) -> Any:
            return lax.rem(count, jnp.int32(stages))

        def compute() -> None:
            plgpu.set_max_registers(REGISTERS[groups][0], action="increase")

            def one(place: Any, before: Any) -> Any:
                plgpu.barrier_wait(kv_full)
                first, count, plain_first, plain_last, example, tile = (entry[i] for i in range(6))
                low = tile * tile_keys + warpgroup * KEYS
                kv_head = lax.rem(item(place), jnp.int32(kv_heads))

                def vector(ref: Any) -> Array:
                    return plgpu.load(ref, layout=COLUMN, optimized=False)

                def masked(weight: Array, slot: Any, block: Any) -> Array:
                    key = plgpu.broadcasted_iota(jnp.int32, weight.shape, 0, layout=WGMMA) + low
                    start, end = vector(ranges_s.at[slot, 0]), vector(ranges_s.at[slot, 1])
                    see = (key >= over_rows(start, weight)) & (key < over_rows(end, weight))
                    if own == "same":
                        row = plgpu.broadcasted_iota(jnp.int32, weight.shape, 1, layout=WGMMA) + block * BLOCK_Q
                        see |= key == row
                    return jnp.where(see, weight, 0.0)

                def weights(mask: bool, slot: Any, block: Any) -> tuple[Array, Array | None]:
                    """P^T of a block of rows, and dS^T where dk is wanted; both in the operands' dtype."""

                    def softened(s_ref: Any, wait: int) -> Array:
                        norm = vector(statistics_s.at[slot, 0])
                        s = plgpu.wgmma_accumulator_load(s_ref, wait_n=wait)
                        weight = jnp.exp2(s * (scale * LOG2_E) - over_rows(norm, s))
                        return masked(weight, slot, block) if mask else weight

                    def with_logits(s_ref: Any) -> Any:
                        plgpu.wgmma(s_ref, k_s.at[warpgroup], q_s.at[slot].transpose((1, 0)))
                        plgpu.barrier_wait(do_full.at[slot])
                        if not with_k:
                            return softened(s_ref, 0).astype(dtype), None
                        return pl.run_scoped(functools.partial(with_both, s_ref), logits)

                    def with_both(s_ref: Any, dp_ref: Any) -> Any:
                        plgpu.wgmma(dp_ref, v_s.at[warpgroup], do_s.at[slot].transpose((1, 0)))
                        weight = softened(s_ref, 1)
                        narrow = weight.astype(dtype)
                        shift = vector(statistics_s.at[slot, 1])
                        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=0)
                        return narrow, (weight * (dp - over_rows(shift, dp))).astype(dtype)

                    return pl.run_scoped(with_logits, logits)

                def both_products(dk: Array, dv: Array, weight: Array, ds: Array, slot: Any) -> tuple[Array, Array]:
                    def into_dv(dv_ref: Any) -> Any:
                        wgmma_accumulator_store(dv_ref, dv)
                        plgpu.wgmma(dv_ref, weight, do_s.at[slot])
                        return pl.run_scoped(functools.partial(into_dk, dv_ref), wide)

                    def into_dk(dv_ref: Any, dk_ref: Any) -> Any:
                        wgmma_accumulator_store(dk_ref, dk)
                        plgpu.wgmma(dk_ref, ds, q_s.at[slot])
                        new_dv = plgpu.wgmma_accumulator_load(dv_ref, wait_n=1)
                        signal("arrive", "do", slot)
                        return plgpu.wgmma_accumulator_load(dk_ref, wait_n=0), new_dv

                    dk, dv = pl.run_scoped(into_dv, wide)
                    signal("arrive", "q", slot)
                    return dk, dv

                def add_to_dq(parity: Any, block: Any, head: Any) -> None:
                    def product(ref: Any) -> Array:
                        for g in range(groups):
                            own_keys = k_s.at[g, :, pl.ds(warpgroup * part, part)] if by_columns else k_s.at[g]
                            plgpu.wgmma(ref, ds_s.at[parity, g].transpose((1, 0)), own_keys)
                        return plgpu.wgmma_accumulator_load(ref, wait_n=0)

                    dq = pl.run_scoped(product, plgpu.ACC((BLOCK_Q, part), jnp.float32)) * scale
                    for at in range(0, part, CHUNK):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        dq_s[warpgroup] = dq if part == CHUNK else dq[:, at : at + CHUNK]
                        plgpu.commit_smem()
                        columns = pl.ds(warpgroup * part + at, CHUNK) if by_columns else pl.ds(at, CHUNK)
                        place = (example, pl.ds(block * BLOCK_Q, BLOCK_Q), head, columns)
                        if interpret:  # which cannot add: a place for each tile, summed outside
                            plgpu.copy_smem_to_gmem(dq_s.at[warpgroup], out_g["dq"].at[tile, *place])
                        else:
                            plgpu.copy_smem_to_gmem(dq_s.at[warpgroup], out_g["dq"].at[place], reduction_op="add")

                def step(mask: bool, head: Any, number: Any, sums: dict[str, Array]) -> dict[str, Array]:
                    at = before + head * count + number
                    slot, parity, block = slot_of(at), lax.rem(at, jnp.int32(2)), first + number
                    plgpu.barrier_wait(q_full.at[slot])
                    weight, ds = weights(mask, slot, block)
                    if with_q:
                        # Two of them in turn: a block's dS is written while that of the block before may be read.
                        ds_s[parity, warpgroup] = ds
                        plgpu.commit_smem()
                    if with_k and with_v and not interpret and ds is not None:
                        dk, dv = both_products(sums["dk"], sums["dv"], weight, ds, slot)
                        sums = {"dk": dk, "dv": dv}
                    else:
                        sums = dict(sums)
                        if with_v:
                            sums["dv"] = accumulate(sums["dv"], weight, do_s.at[slot], interpret)
                        signal("arrive", "do", slot)
                        if ds is not None:
                            sums["dk"] = accumulate(sums["dk"], ds, q_s.at[slot], interpret)
                        signal("arrive", "q", slot)
                    if with_q:
                        meet()
                        add = functools.partial(add_to_dq, parity, block, kv_head * group + head)
                        if by_columns:
                            add()
                        else:
                            pl.when(lax.rem(at, jnp.int32(groups)) == warpgroup)(add)
                    return sums

                def one_head(head: Any, sums: dict[str, Array]) -> dict[str, Array]:
                    sums = lax.fori_loop(jnp.int32(0), plain_first, functools.partial(step, True, head), sums)
                    sums = lax.fori_loop(plain_first, plain_last, functools.partial(step, False, head), sums)
                    return lax.fori_loop(plain_last, count, functools.partial(step, True, head), sums)

                zero = plgpu.layout_cast(jnp.zeros((KEYS, width), jnp.float32), WGMMA)
                sums: dict[str, Array] = {name: zero for name in ("dk", "dv") if name in gradients}
                sums = lax.fori_loop(0, group, one_head, sums) if group > 1 else one_head(jnp.int32(0), sums)
                plgpu.commit_smem()
                signal("arrive", "kv")
                for name, total in sums.items():
                    narrow = (total * scale if name == "dk" else total).astype(dtype)
                    for at in range(0, width, CHUNK):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out_s[warpgroup] = narrow if width == CHUNK else narrow[:, at : at + CHUNK]
                        plgpu.commit_smem()
                        own_keys = pl.ds(tile * tile_keys + warpgroup * KEYS, KEYS)
                        to = out_g[name].at[example, own_keys, kv_head, pl.ds(at, CHUNK)]
                        plgpu.copy_smem_to_gmem(out_s.at[warpgroup], to)
                return before + count * group

            lax.fori_loop(0, mine, one, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        def move() -> None:
            plgpu.set_max_registers(REGISTERS[groups][1], action="decrease")

            def one(place: Any, before: Any) -> Any:
                kv_head = lax.rem(item(place), jnp.int32(kv_heads))
                at = order_g[lax.div(item(place), jnp.int32(kv_heads))]
                first, count, example, tile = (table_g[at, i] for i in (0, 1, 4, 5))
                pl.when(place > 0)(lambda: signal("sync", "kv"))
                plgpu.copy_gmem_to_smem(table_g.at[at], entry, kv_full)
                for g in range(groups):
                    own_keys = pl.ds(tile * tile_keys + g * KEYS, KEYS)
                    plgpu.copy_gmem_to_smem(k_g.at[example, own_keys, kv_head], k_s.at[g], kv_full)
                    plgpu.copy_gmem_to_smem(v_g.at[example, own_keys, kv_head], v_s.at[g], kv_full)

                @pl.loop(0, count * group)
                def _(number: Any) -> None:
                    slot = slot_of(before + number)
                    head, block = kv_head * group + lax.div(number, count), first + lax.rem(number, count)
                    own_rows = pl.ds(block * BLOCK_Q, BLOCK_Q)
                    used, full = before + number >= stages, q_full.at[slot]
                    pl.when(used)(lambda: signal("sync", "q", slot))
                    plgpu.copy_gmem_to_smem(ranges_g.at[example, block], ranges_s.at[slot], full)
                    plgpu.copy_gmem_to_smem(statistics_g.at[example, head, block], statistics_s.at[slot], full)
                    plgpu.copy_gmem_to_smem(q_g.at[example, own_rows, head], q_s.at[slot], full)
                    pl.when(used)(lambda: signal("sync", "do", slot))
                    plgpu.copy_gmem_to_smem(do_g.at[example, own_rows, head], do_s.at[slot], do_full.at[slot])

                return before + count * group

            count = lax.fori_loop(0, mine, one, jnp.int32(0))
            # No barrier may be left in the middle of a phase.
            pl.when(mine > 0)(lambda: signal("sync", "kv"))

            @pl.loop(lax.max(jnp.int32(0), count - stages), count)
            def drain(count: Any) -> None:
                signal("sync", "q", slot_of(count))
                signal("sync", "do", slot_of(count))

        pl.when(warpgroup < groups)(compute)
        pl.when(warpgroup == groups)(move)

    tile_of, block_of = operand(dtype, groups, KEYS, width), operand(dtype, stages, BLOCK_Q, width)
    scratch: dict[str, Any] = {
        "k_s": tile_of,
        "v_s": tile_of,
        "q_s": block_of,
        "do_s": block_of,
        "out_s": operand(dtype, groups, KEYS, CHUNK),
        "statistics_s": plgpu.SMEM((stages, 2, BLOCK_Q), jnp.float32),
        "ranges_s": plgpu.SMEM((stages, 2, BLOCK_Q), jnp.int32),
        "entry": plgpu.SMEM((ENTRIES,), jnp.int32),
        "kv_full": plgpu.Barrier(num_arrivals=1 + 2 * groups),
        "q_full": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "do_full": plgpu.Barrier(num_barriers=stages),
    }
    if with_q:
        scratch["ds_s"] = operand(dtype, 2, groups, KEYS, BLOCK_Q)
        scratch["dq_s"] = operand(jnp.float32, groups, BLOCK_Q, CHUNK)
    if interpret:
        free = plgpu.Barrier(num_arrivals=groups, num_barriers=stages)
        scratch |= {"kv_free": plgpu.Barrier(num_arrivals=groups, num_barriers=1), "q_free": free, "do_free": free}
        scratch |= {"ds_full": plgpu.Barrier(num_arrivals=groups)} if with_q else {}
    inputs = (q, d_out, k, v, statistics, ranges, *planned)
    outputs: dict[str, Any] = {name: like(k, k.shape, dtype) for name in ("dk", "dv") if name in gradients}
    given: dict[str, Any] = {}
    if with_q and interpret:
        tiles = -(-keys // tile_keys)
        outputs = {"dq": like(q, (tiles, *q.shape), jnp.float32)} | outputs
    elif with_q:
        given = {"dq": jax.new_ref(jnp.zeros(q.shape, jnp.float32))}

    def body(*refs: Any) -> None:
        operands, places = refs[: len(inputs)], dict(zip([*given, *outputs], refs[len(inputs) :]))
        whole: Any = kernel  # its buffers come by name
        run: Any = functools.partial(whole, *operands, places)
        pl.run_scoped(run, collective_axes="warpgroup", **scratch)

    made = pl.kernel(
        body,
        out_type=list(outputs.values()),
        mesh=plgpu.Mesh(
            grid=(programs,),
            grid_names=("program",),
            num_threads=groups + 1,
            thread_name="warpgroup",
            kernel_name="range_attention_" + "_".join(gradients),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*inputs, *given.values())
    found = dict(zip(outputs, made))
    if with_q and interpret:
        # A tile writes the rows that it meets; the others are not a number here.
        found["dq"] = jnp.sum(jnp.nan_to_num(found["dq"]), axis=0).astype(dtype)
    elif with_q:
        found["dq"] = jax.freeze(given["dq"]).astype(dtype)
    return tuple(found[name] for name in gradients)

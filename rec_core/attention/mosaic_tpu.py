"""Range attention as Pallas kernels for TPU: forward, and backward in two kernels (dq; dk and dv), deterministic.

JAX's own splash attention was looked at first: its masks and the blocks it skips are fixed when the program is traced,
while our ranges are data of each batch, and its segment ids neither skip blocks nor tell queries of one user apart.
So these kernels are ours; they read the ranges, and prefetch a schedule of key blocks per tile of rows as scalars.

A tile holds ``block_q`` rows of all query heads that share a key head, stacked to N = heads x block_q rows, so that
keys and values are read once for the group and never repeated. The online softmax (Milakov & Gimelshein,
arXiv:1805.02867; Dao et al., arXiv:2205.14135) starts from the row's own key and runs in base 2. The innermost grid
axis is as long as the longest visit of any tile; a step past a tile's own last block fetches and computes nothing, and
blocks that all rows see whole run without the mask. Forward and dq hold logits as [N, block_k], with row statistics
in columns of 128 equal lanes; dk and dv hold them as [block_k, N], so that no product needs a transposed operand.
Not measured on a TPU.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from rec_core.attention.mosaic_tpu_kernels import LANES, LOG2_E, Plan, count, forward_kernel, key_kernel, query_kernel
from rec_core.attention.schedule import key_schedule, schedule
from rec_core.attention.xla import same_varying

if TYPE_CHECKING:
    from rec_core.attention.api import Call

DTYPES = ("bfloat16", "float32")
SCALAR_WORDS = 192 * 1024  # of the 256 Ki words of scalar memory that every TPU has; the compiler needs some itself


def supports(call: "Call") -> str | None:
    """None, or the reason why these kernels cannot serve the call."""
    if call.platform != "tpu":
        return f"it runs on TPU, and the default backend is {call.platform}"
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} is not one of {', '.join(DTYPES)}"
    if call.head_width % 8 or not 8 <= call.head_width <= 256:
        return f"head width {call.head_width} is not a multiple of 8 up to 256"
    group = call.heads // call.kv_heads
    if group > 128:
        return f"{group} query heads share a key head; a tile of them does not fit above 128"
    block_q, block_k = block_sizes(group, call.rows, call.keys)
    words = call.batch * (4 * count(call.rows, block_q) + 2 * count(call.keys, block_k))
    if words > SCALAR_WORDS:
        return (
            f"the schedule of {call.batch} examples takes {words} words of scalar memory, of which {SCALAR_WORDS} serve"
        )
    return None


def block_sizes(group: int, rows: int, keys: int) -> tuple[int, int]:
    """(block_q, block_k): 512 rows over the ``group`` heads of a key head and 512 keys, less where there are fewer."""
    return _fit(max(16, 512 // group), rows), _fit(512, keys)


def range_attention_tpu(
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
    interpret: Any = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """The same function as ``range_attention_reference``, differentiable once in q, k, v, k_self and v_self.

    Softmax statistics and accumulators are float32; matrix products take their operands in the dtype of the inputs,
    at JAX's default matrix precision. Any T and S, zero included: tails are padded inside. Where D is a multiple of
    128 arrays are read in place, else heads are moved before rows first.

    Args:
      block_q, block_k: rows and keys of a block, multiples of 16; chosen by ``block_sizes`` when None.
      interpret: for machines without a TPU, what ``pallas_call`` takes: True, or ``pltpu.InterpretParams``.

    Raises:
      ValueError: a dtype that the kernels do not take.
    """
    if str(q.dtype) not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; the TPU kernels take {' or '.join(DTYPES)}: cast q, k and v")
    batch, rows, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    if q.size == 0:
        return q, jnp.zeros((batch, heads, rows), jnp.float32)
    chosen = block_sizes(heads // kv_heads, rows, keys)
    plan = Plan(scale, block_q or chosen[0], block_k or chosen[1], heads, kv_heads, width, interpret)
    q, k, v, k_self, v_self, k_start, k_end = same_varying((q, k, v, k_self, v_self, k_start, k_end))
    start = jnp.clip(k_start, 0, keys).astype(jnp.int32)
    end = jnp.clip(k_end, 0, keys).astype(jnp.int32)
    own = tuple(_pack(x, plan.block_q) for x in (k_self, v_self) if x is not None)
    packed = (_pack(q, plan.block_q), _pack(k, plan.block_k), _pack(v, plan.block_k))
    out, lse = _attend(plan, *packed, own, start, end)
    return _unpack(out, plan)[:, :rows], _heads_first(lse, plan)[..., :rows]


def _fit(block: int, length: int) -> int:
    """A block for ``length`` in no more blocks, with little padding: a multiple of 128, of 16 where 64 are enough."""
    block = -(-max(length, 1) // count(length, block))
    unit = LANES if block > LANES // 2 else 16
    return -(-block // unit) * unit


# Layouts. The last axis of a block is the whole last axis of its array, or a multiple of 128 of it: hence two layouts.


def _pack(x: Array, block: int) -> Array:
    """[B, length, heads, D] -> [B, padded, heads * D] if D is a multiple of 128, else [B, heads, padded, D]."""
    batch, length, heads, width = x.shape
    padded = count(length, block) * block
    x = jnp.pad(x, [(0, 0), (0, padded - length), (0, 0), (0, 0)])
    return x.reshape(batch, padded, heads * width) if width % LANES == 0 else jnp.swapaxes(x, 1, 2)


def _unpack(x: Array, plan: Plan) -> Array:
    """[B, padded, heads, D] from either layout."""
    return x.reshape(*x.shape[:2], -1, plan.width) if x.ndim == 3 else jnp.swapaxes(x, 1, 2)


def _blocks(x: Array, block: int) -> int:
    return x.shape[1 if x.ndim == 3 else 2] // block


def _rows_last(x: Array, plan: Plan) -> Array:
    """[B, H, padded] -> [B, K, tiles, 1, N], a tile's rows head by head."""
    x = x.reshape(x.shape[0], plan.kv_heads, plan.group, -1, plan.block_q)
    return jnp.swapaxes(x, 2, 3).reshape(*x.shape[:2], x.shape[3], 1, plan.stack)


def _heads_first(x: Array, plan: Plan) -> Array:
    """Undoes ``_rows_last``."""
    x = x.reshape(*x.shape[:3], plan.group, plan.block_q)
    return jnp.swapaxes(x, 2, 3).reshape(x.shape[0], plan.heads, -1)


def _tiled_ranges(start: Array, end: Array, tiles: int, block_q: int) -> Array:
    """[B, tiles, 2, block_q]: start and end of each row; rows of padding are empty."""
    both = jnp.pad(jnp.stack([start, end], axis=1), [(0, 0), (0, 0), (0, tiles * block_q - start.shape[1])])
    return jnp.swapaxes(both.reshape(start.shape[0], 2, tiles, block_q), 1, 2)


# From arrays to kernels. ``place(b, h, i, j, *scalars)`` is where along rows or keys a step of the grid reads.


def _here(b: Any, h: Any, i: Any, j: Any, *scalars: Any) -> Any:
    return i


def _walk(number: int, low: int, high: int) -> Callable[..., Any]:
    """Step j of i reads scalars[low][i] + j; past scalars[high][i] it stays where it is, and nothing is fetched."""

    def place(b: Any, h: Any, i: Any, j: Any, *scalars: Any) -> Any:
        at = b * number + i
        return jnp.clip(scalars[low][at] + j, 0, jnp.maximum(scalars[high][at] - 1, 0))

    return place


def _packed_spec(plan: Plan, heads: int, block: int, place: Callable[..., Any]) -> pl.BlockSpec:
    """``heads`` heads and ``block`` rows or keys of a packed array."""
    if plan.width % LANES == 0:
        return pl.BlockSpec((None, block, heads * plan.width), lambda b, h, *rest: (b, place(b, h, *rest), h))
    return pl.BlockSpec((None, heads, block, plan.width), lambda b, h, *rest: (b, h, place(b, h, *rest), 0))


def _ranges_spec(plan: Plan, place: Callable[..., Any]) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, 2, plan.block_q), lambda b, h, *rest: (b, place(b, h, *rest), 0, 0))


def _stats_spec(plan: Plan, number: int, place: Callable[..., Any]) -> pl.BlockSpec:
    shape = (None, None, None, number, plan.stack)
    return pl.BlockSpec(shape, lambda b, h, *rest: (b, h, place(b, h, *rest), 0, 0))


def _call(
    name: str,
    plan: Plan,
    kernel: Callable[..., None],
    grid: tuple[Any, ...],
    scalars: Sequence[Array],
    inputs: Sequence[tuple[Array, pl.BlockSpec]],
    outputs: Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]],
    scratch: Sequence[tuple[int, int]],
) -> list[Array]:
    """One kernel: inputs are arrays, outputs shapes and dtypes, each with its blocks; scratch is float32."""
    # Inside shard_map all arrays vary over the same mesh axes.
    varying = jax.typeof(inputs[0][0]).manual_axis_type
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype, _ in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, _, spec in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=plan.interpret,
        name=name,
    )(*(x.reshape(-1) for x in scalars), *(x for x, _ in inputs))


def _forward(plan: Plan, q: Array, k: Array, v: Array, own: Any, start: Array, end: Array) -> tuple[Array, Array]:
    batch, tiles = q.shape[0], _blocks(q, plan.block_q)
    visits = schedule(start, end, plan.block_q, plan.block_k)
    rows, own_rows = (_packed_spec(plan, heads, plan.block_q, _here) for heads in (plan.group, 1))
    keys = _packed_spec(plan, 1, plan.block_k, _walk(tiles, 0, 3))
    ranges = (_tiled_ranges(start, end, tiles, plan.block_q), _ranges_spec(plan, _here))
    lse_shape = (batch, plan.kv_heads, tiles, 1, plan.stack)
    out, lse = _call(
        "range_attention_forward",
        plan,
        functools.partial(forward_kernel, plan),
        (batch, plan.kv_heads, tiles, jnp.max(visits.last - visits.first, initial=1)),
        visits,
        [ranges, (q, rows), (k, keys), (v, keys), *((x, own_rows) for x in own)],
        [(q.shape, q.dtype, rows), (lse_shape, jnp.float32, _stats_spec(plan, 1, _here))],
        [(plan.stack, LANES), (plan.stack, LANES), (plan.stack, plan.width)],
    )
    return out, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, own: Any, start: Array, end: Array) -> tuple[Array, Array]:
    return _forward(plan, q, k, v, own, start, end)


def _attend_forward(plan: Plan, *args: Any) -> Any:
    # A remat policy may save these two by name, and so never run the forward pass twice.
    out, lse = (checkpoint_name(x, "range_attention") for x in _forward(plan, *args))
    return (out, lse), (*args, out, lse)


def _attend_backward(plan: Plan, residuals: Any, cotangents: Any) -> Any:
    q, k, v, own, start, end, out, lse = residuals
    d_out, d_lse = cotangents
    some = lse > -jnp.inf
    # d logit = p * (dO . v - delta + d lse). A row that saw nothing has p = 0; its lse and d lse may not be finite.
    product = _unpack(d_out, plan).astype(jnp.float32) * _unpack(out, plan).astype(jnp.float32)
    delta = _rows_last(jnp.swapaxes(jnp.sum(product, axis=-1), 1, 2), plan) - jnp.where(some, d_lse, 0.0)
    stats = jnp.concatenate([jnp.where(some, lse, 0.0) * LOG2_E, delta], axis=3)  # [B, K, tiles, 2, N]
    batch, tiles, blocks = q.shape[0], _blocks(q, plan.block_q), _blocks(k, plan.block_k)
    ranges = _tiled_ranges(start, end, tiles, plan.block_q)
    visits = schedule(start, end, plan.block_q, plan.block_k)
    hulls = key_schedule(start, end, plan.block_q, plan.block_k, blocks * plan.block_k)

    def inputs(row_place: Any, key_place: Any) -> Any:
        rows, keys = (
            _packed_spec(plan, plan.group, plan.block_q, row_place),
            _packed_spec(plan, 1, plan.block_k, key_place),
        )
        first = [(ranges, _ranges_spec(plan, row_place)), (stats, _stats_spec(plan, 2, row_place))]
        return [*first, (q, rows), (d_out, rows), (k, keys), (v, keys)]

    own_rows = _packed_spec(plan, 1, plan.block_q, _here)
    d_q, *d_own = _call(
        "range_attention_query_gradient",
        plan,
        functools.partial(query_kernel, plan),
        (batch, plan.kv_heads, tiles, jnp.max(visits.last - visits.first, initial=1)),
        visits,
        [*inputs(_here, _walk(tiles, 0, 3)), *((x, own_rows) for x in own)],
        [
            (q.shape, q.dtype, _packed_spec(plan, plan.group, plan.block_q, _here)),
            *((x.shape, x.dtype, own_rows) for x in own),
        ],
        [(plan.stack, LANES), (plan.stack, LANES), (plan.stack, plan.width)],
    )
    keys = _packed_spec(plan, 1, plan.block_k, _here)
    d_k, d_v = _call(
        "range_attention_key_gradient",
        plan,
        functools.partial(key_kernel, plan, tiles),
        (batch, plan.kv_heads, blocks, jnp.max(hulls[1] - hulls[0], initial=1)),
        [*visits, *hulls],
        inputs(_walk(blocks, 4, 5), _here),
        [(k.shape, k.dtype, keys), (v.shape, v.dtype, keys)],
        [(plan.block_k, plan.width)] * 2,
    )
    return d_q, d_k, d_v, tuple(d_own), None, None


_attend.defvjp(_attend_forward, _attend_backward)

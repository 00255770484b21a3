"""Range attention on Hopper GPUs: which calls the kernels serve, how the work of few queries is split, gradients.

A call with fewer items (tile of rows, head) than the device has multiprocessors, as queries against a cached prefix
have, is split: the keys of each tile are cut in parts, the kernel gives output and log-sum-exp of each part, the rows'
own keys in the first, and one expression joins them. Nothing is copied for it.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from rec_core.attention.blocks import (
    BLOCK_Q,
    Backward,
    Forward,
    backward_blocks,
    check_backward,
    check_forward,
    forward_blocks,
)
from rec_core.attention.mosaic_gpu_plan import plan
from rec_core.attention.xla import same_varying

if TYPE_CHECKING:
    from rec_core.attention.api import Call

DTYPES = ("bfloat16", "float16")
WIDTHS = (64, 128, 256)
CAPABILITY = "9.0"  # of Hopper: the kernels use its instructions
MOST_ROUNDS = 2  # of items a program above which keys are not split: the rest of a round is small then
PROGRAMS = 132  # multiprocessors of an H100 SXM, for lowering without a device
TILED = 8  # rows that TMA takes together
PART = 512  # keys that a part of a split call has at least
OVERHEAD = 3  # what a tile's beginning and end, and joining parts, cost, in key blocks


def supports(call: "Call") -> str | None:
    """None, or the reason why these kernels cannot serve the call."""
    if call.platform != "gpu":
        return f"it runs on NVIDIA GPUs, and the default backend is {call.platform}"
    if (reason := _refused(call.dtype, call.head_width)) is not None:
        return reason
    if call.rows < 1 or call.keys < 1:
        return f"{call.rows} rows and {call.keys} keys: it takes 1 or more of each"
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability != CAPABILITY:
        return f"it runs on compute capability {CAPABILITY} (Hopper), and {device.device_kind} has {capability}"
    return None


def _refused(dtype: str, width: int) -> str | None:
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(DTYPES)}"
    if width not in WIDTHS:
        return f"head width {width} is not one of {', '.join(map(str, WIDTHS))}"
    return None


def range_attention_mosaic_gpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    k_self: Float[Array, "B T K D"] | None,
    v_self: Float[Array, "B T K D"] | None,
    *,
    scale: float,
    forward: Forward | None = None,
    backward: Backward | None = None,
    splits: int | None = None,
    programs: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """The same function as ``range_attention_reference``, differentiable once in q, k, v, k_self and v_self.

    Softmax statistics and accumulators are float32; matrix products take their operands, the weights among them, in
    the dtype of the inputs. Any T and S, zero included. Equal inputs give equal bits, gradients too. Where ``k_self is
    k`` and ``v_self is v`` the rows' own keys are read with their blocks of k; a row whose range holds itself, which it
    must not, then counts itself once.

    Args:
      forward, backward: blocks of the two passes; from the table of this device when None.
      splits: parts in which the keys of each tile are cut; chosen by ``split_number`` when None.
      programs: size of the grid; the multiprocessors of the device when None.
      interpret: for machines without a GPU, inside ``plgpu.force_gpu_interpret_mode``.

    Raises:
      ValueError: a dtype, head width or blocks that the kernels do not have.
    """
    batch, rows, heads, width = q.shape
    if (reason := _refused(str(q.dtype), width)) is not None:
        raise ValueError(f"q of shape {q.shape} cannot go to the GPU kernels: {reason}")
    if q.size == 0:
        return q, jnp.zeros((batch, heads, rows), jnp.float32)
    own = "none" if k_self is None else "same" if k_self is k and v_self is v else "separate"
    if k.shape[1] == 0:  # a key that no range holds: TMA knows no empty arrays
        k = v = jnp.zeros((batch, 1, *k.shape[2:]), k.dtype)
        k_end = jnp.zeros_like(k_end)
    keys = k.shape[1]
    q, k_start, k_end = (_whole_tiles(x) for x in (q, k_start, k_end))
    if keys > TILED and keys % TILED:
        k_start, k_end = jnp.minimum(k_start, keys), jnp.minimum(k_end, keys)
        k, v = _whole_tiles(k), _whole_tiles(v)
    if scale <= 0:
        q, scale = q * (-1 if scale < 0 else 0), -scale or 1.0
    device = jax.devices()[0]
    programs = programs or (device.core_count if device.platform == "gpu" else PROGRAMS)
    forward = forward or forward_blocks(device.device_kind, width, rows)
    check_forward(forward, width)
    backward = backward or backward_blocks(device.device_kind, width, rows)
    check_backward(backward, width)
    static = _Static(
        scale,
        forward,
        backward,
        splits or split_number(batch * heads * -(-rows // (BLOCK_Q * forward.groups)), k.shape[1], programs, forward),
        own,
        programs,
        interpret,
    )
    own_arrays: tuple[Array | None, Array | None] = (None, None)
    if own == "separate" and k_self is not None and v_self is not None:
        own_arrays = _whole_tiles(k_self), _whole_tiles(v_self)
    out, lse = _attend(static, *same_varying((q, k, v, *own_arrays, k_start, k_end)))
    return out[:, :rows], lse[..., :rows]


def _whole_tiles(x: Array) -> Array:
    """``x`` with zeros behind its second axis, so that it is a whole number of TMA's tiles, or less than one."""
    if x.shape[1] < TILED or x.shape[1] % TILED == 0:
        return x
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % TILED)] + [(0, 0)] * (x.ndim - 2))


def split_number(items: int, keys: int, programs: int, blocks: Forward) -> int:
    """Parts of PART keys or more in which to cut the keys, so that the busiest program is done soonest.

    A program has so many rounds of items; a round takes the key blocks of a part, and OVERHEAD. Joining costs that
    once more. The fewest parts among equals; 1 where the items fill the programs several times.
    """

    def cost(splits: int) -> int:
        rounds, size = -(-items * splits // programs), -(-keys // (blocks.block_k * splits))
        return rounds * (size + OVERHEAD) + (OVERHEAD if splits > 1 else 0)

    most = min(programs, keys // PART) if items < MOST_ROUNDS * programs else 1
    return min(range(1, max(1, most) + 1), key=cost)


class _Static(NamedTuple):
    scale: float
    forward: Forward
    backward: Backward
    splits: int
    own: str
    programs: int
    interpret: bool


def _forward(
    static: _Static, q: Array, k: Array, v: Array, k_self: Any, v_self: Any, start: Array, end: Array
) -> tuple[Array, Array]:
    # What the kernel imports of JAX is experimental: a machine that does not run it must not need it.
    from rec_core.attention.mosaic_gpu_forward import forward

    split = static.splits > 1
    own = "separate" if split and static.own == "same" else static.own
    if own != static.own:
        k_self, v_self = k, v
    items = q.shape[0] * static.splits * q.shape[2] * -(-q.shape[1] // (BLOCK_Q * static.forward.groups))
    planned = plan(start, end, k.shape[1], static.forward, own, splits=static.splits, ordered=items > static.programs)
    out, lse = forward(
        q,
        k,
        v,
        k_self,
        v_self,
        planned,
        scale=static.scale,
        blocks=static.forward,
        own=own,
        programs=static.programs,
        interpret=static.interpret,
    )
    return _join(static.splits, out, lse) if split else (out, lse)


def _join(splits: int, out: Array, lse: Array) -> tuple[Array, Array]:
    """Parts [B * splits, ...] weighted by their log-sum-exp; float32 inside."""
    outs, lses = (jnp.moveaxis(x.reshape(-1, splits, *x.shape[1:]), 1, 0) for x in (out, lse))
    top = functools.reduce(jnp.maximum, lses)  # [B, H, T]
    some = top > -jnp.inf
    top = jnp.where(some, top, 0.0)
    weights = [jnp.exp(logit - top) for logit in lses]
    total = jnp.where(some, sum(weights), 1.0)
    shares = [jnp.swapaxes(weight / total, 1, 2)[..., None] for weight in weights]
    joined = sum(part.astype(jnp.float32) * share for part, share in zip(outs, shares))
    return jnp.asarray(joined, out.dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)


def _any_batch(function: Callable[..., Any], *arrays: Any) -> Any:
    """``function(*arrays)``; under vmap the mapped axis joins the examples, for which the kernels have no rule."""

    @jax.custom_batching.custom_vmap
    def call(*arrays: Any) -> Any:
        # Inside shard_map all inputs vary over the same mesh axes; kernels do not say that their outputs do.
        axes = jax.typeof(arrays[0]).manual_axis_type.varying

        def vary(x: Array) -> Array:
            missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
            return jax.lax.pcast(x, missing, to="varying") if missing else x

        return jax.tree.map(vary, function(*arrays))

    @call.def_vmap
    def _(size: int, mapped: Any, *arrays: Any) -> Any:
        def join(x: Array, is_mapped: bool) -> Array:
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        made = _any_batch(function, *jax.tree.map(join, arrays, tuple(mapped)))
        made = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), made)
        return made, jax.tree.map(lambda _: True, made)

    return call(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, *args: Any) -> Any:
    return _any_batch(functools.partial(_forward, static), *args)


def _attend_forward(static: _Static, *args: Any) -> Any:
    # A remat policy may save these two by name, and so never run the forward pass twice.
    out, lse = (checkpoint_name(x, "range_attention") for x in _attend(static, *args))
    return (out, lse), (*args, out, lse)


def _attend_backward(static: _Static, residuals: Any, cotangents: Any) -> Any:
    from rec_core.attention.mosaic_gpu_backward import backward  # as in _forward

    function = functools.partial(
        backward,
        scale=static.scale,
        blocks=static.backward,
        own=static.own,
        programs=static.programs,
        interpret=static.interpret,
    )
    return *_any_batch(function, *residuals, *cotangents), None, None


_attend.defvjp(_attend_forward, _attend_backward)

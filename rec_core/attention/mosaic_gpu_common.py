"""What the kernels for Hopper share: layouts, barriers, the walk over items, products with weights in registers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# The only private name: the store has no public face in jax 0.11 and 0.12.
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_store
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from rec_core.attention.blocks import BLOCK_Q, CHUNK

LOG2_E = math.log2(math.e)
REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 32)}  # of computing threads, of those that move data, by groups
WGMMA = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # a value a row
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # a value a column

__all__ = ["BLOCK_Q", "CHUNK", "wgmma_accumulator_store"]


def operand(dtype: Any, *shape: int) -> Any:
    """A buffer in shared memory, tiled and swizzled as TMA and wgmma want it."""
    elements = 128 // jnp.dtype(dtype).itemsize
    transforms: Any = (plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def named_barrier(operation: str, number: Any, threads: int) -> None:
    """``bar.arrive`` or ``bar.sync``: cheaper than a barrier in memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def barrier(_: Any, number: Any) -> None:
        mgpu.utils.inline_ptx(f"bar.{operation} $0, {threads};", number.registers[()])

    barrier(number)


def hold(x: Array, never: Any, barrier: Any) -> Array:
    """``x``, behind a branch that is ``never`` taken, which the compiler cannot know.

    It moves the wait for a product up to the last branch, above the exponentials that are to run beside that product,
    and these below a branch that does not use them.
    """

    def other(x: Array) -> Array:
        plgpu.barrier_wait(barrier)
        return x * 0.0

    return lax.cond(never, other, lambda x: x, x)


def there_and_back(program: Any, programs: int, items: int) -> tuple[Any, Any]:
    """``(item, number)``: a program's items, ``item(0) .. item(number - 1)``, going over the grid there and back."""
    rounds = -(-items // programs)

    def item(place: Any) -> Any:
        forth = lax.rem(place, jnp.int32(2)) == 0
        return place * programs + jnp.where(forth, program, programs - 1 - program)

    return item, jnp.int32(rounds) - jnp.where(item(jnp.int32(rounds - 1)) < items, 0, 1)


def over_columns(x: Array, to: Array) -> Array:
    """A value a row, [R], for every column of ``to`` [R, C]."""
    return lax.broadcast_in_dim(x, to.shape, [0])


def over_rows(x: Array, to: Array) -> Array:
    """A value a column, [C], for every row of ``to`` [R, C]."""
    return lax.broadcast_in_dim(x, to.shape, [1])


def accumulate(total: Float[Array, "R C"], left: Float[Array, "R I"], right: Any, interpret: bool) -> Array:
    """``total + left @ right``, ``left`` in registers and ``right`` in shared memory; done when it returns.

    The interpreter has no such product: there the right side is read as an array.
    """
    if interpret:
        value = right[...].astype(jnp.float32)
        plgpu.commit_smem()
        return total + jnp.dot(left.astype(jnp.float32), value)

    def product(ref: Any) -> Array:
        wgmma_accumulator_store(ref, total)
        plgpu.wgmma(ref, left, right)
        return plgpu.wgmma_accumulator_load(ref, wait_n=0)

    rows, columns = total.shape
    return pl.run_scoped(product, plgpu.ACC((rows, columns), jnp.float32))


def like(x: Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """An output's type. Inside shard_map all arrays of a call vary over the same mesh axes."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)

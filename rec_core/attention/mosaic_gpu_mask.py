"""Which columns of a block a row sees, as bits: few instructions a column, where comparisons take ten.

Of a block in the layout of a matrix product's accumulator a thread holds, in each of two rows, the columns
``8 j + phase + {0, 1}``, its phase twice its place among the four threads that share a row (PTX ISA, "register
fragments" of wgmma). How many of these lie before a given column is a number, and the columns of an interval are a run
of bits: words of 32 bits are made once a row, and the compiler moves them into predicates seven at a time.
"""

import itertools
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float, Int

from rec_core.attention.mosaic_gpu_common import BLOCK_Q, ROW, WGMMA, over_columns

WORD = 32  # columns that a thread holds of a row, told by one word


def keep_columns(
    x: Float[Array, "64 C"],
    first: Int[Array, "64"],
    last: Int[Array, "64"],
    own: Int[Array, "64"] | None,
    fill: float,
    *,
    interpret: bool,
) -> Float[Array, "64 C"]:
    """``x`` in the columns ``[first, last)`` of each row and in its column ``own``, ``fill`` elsewhere.

    Args:
      x: a block in the layout of an accumulator. first, last, own: columns of the block, or any number beyond it.
      interpret: the interpreter knows no registers; there columns are compared.
    """
    if interpret:
        column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=WGMMA)
        see = (column >= over_columns(first, x)) & (column < over_columns(last, x))
        return jnp.where(see if own is None else see | (column == over_columns(own, x)), x, fill)
    phase = _phase()
    words = [column_bits(first, last, own, phase, number) for number in range(-(-x.shape[1] // (4 * WORD)))]
    return _select(x, words, fill)


def column_bits(first: Any, last: Any, own: Any, phase: Any, number: int) -> Any:
    """Bit i of word ``number`` is set if a row sees, of the columns that a thread of this phase holds, the i-th."""

    def below(column: Any) -> Any:
        """As many low bits as columns of this word lie before ``column``."""
        place = column - phase
        count = jnp.clip((place >> 3) * 2 + jnp.minimum(place & 7, 2) - WORD * number, 0, WORD)
        half = count >> 1  # all 32 places at once are more than a shift can do
        return ((1 << half) << (count - half)) - 1

    bits = below(last) & ~below(first)
    return bits if own is None else bits | (below(own + 1) & ~below(own))


def _phase() -> Int[Array, "64"]:
    """A thread's own phase. As a value a row it differs between the four threads of a row: it is never to be moved."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((BLOCK_Q,), jnp.int32, layout=ROW))
    def phase(_: Any) -> Any:
        thread = mgpu.utils.thread_idx()
        twice = arith.shli(arith.andi(thread, mgpu.c(3, thread.type)), mgpu.c(1, thread.type))
        return mgpu.FragmentedArray.splat(twice, (BLOCK_Q,), mgpu.WGMMA_ROW_LAYOUT, is_signed=True)

    return phase()


def _select(x: Array, words: list[Array], fill: float) -> Array:
    """``x`` where the bit of a column is set, else ``fill``."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, *(ROW for _ in words)),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=WGMMA),
    )
    def select(_: Any, x: Any, *words: Any) -> Any:
        held: list[list[Any]] = [[] for _ in words]  # of each word those of a thread's two rows
        for word, rows in zip(words, held):
            word.foreach(lambda value, _, rows=rows: rows.append(value))
        number = itertools.count()

        def one(value: Any, _: Any) -> Any:
            # Values come by eights of columns, in these by row, in this by column.
            eight, rest = divmod(next(number), 4)
            bit = 2 * eight + rest % 2
            word = held[bit // WORD][rest // 2]
            mask = mgpu.c(1 << bit % WORD if bit % WORD < WORD - 1 else -(2 ** (WORD - 1)), word.type)
            see = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(word, mask), mgpu.c(0, word.type))
            return arith.select(see, value, mgpu.c(fill, value.type))

        return x.foreach(one, create_array=True)

    return select(x, *words)

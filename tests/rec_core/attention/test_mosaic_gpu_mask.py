"""The mask of the GPU kernels as bits, against comparisons, and the order in which a thread holds columns."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from jax.experimental.mosaic import gpu as mgpu

from rec_core.attention.mosaic_gpu_mask import WORD, column_bits

WIDTH = 192  # columns of a block: one word and a half of each row and thread
edges = st.integers(-300, 300)


@given(st.lists(st.tuples(edges, edges, edges), min_size=1, max_size=16), st.booleans())
def test_bits_are_what_comparisons_say(rows, with_own):
    first, last, own = (jnp.asarray(x, jnp.int32)[:, None] for x in zip(*rows))
    phase = 2 * jnp.arange(4)
    words = [np.asarray(column_bits(first, last, own if with_own else None, phase, n)) for n in range(2)]
    for place in range(WIDTH // 4):
        column = 8 * (place // 2) + np.asarray(phase) + place % 2
        expected = (np.asarray(first) <= column) & (column < np.asarray(last))
        if with_own:
            expected |= column == np.asarray(own)
        np.testing.assert_array_equal(words[place // WORD] >> (place % WORD) & 1, expected)


def test_a_thread_holds_columns_in_the_order_of_the_bits():
    """By eights of columns, in these by row, in this by column: so ``_select`` counts them."""
    tiling = mgpu.WGMMA_LAYOUT.tiling
    for warp, lane in [(0, 0), (1, 5), (3, 31)]:
        held = [
            tiling.untile_indices((0, eight, warp, 0, half, 0, lane // 4, lane % 4, column))
            for eight, half, column in np.ndindex(16, 2, 2)
        ]
        phase, row = 2 * (lane % 4), 16 * warp + lane // 4
        assert held == [(row + 8 * half, 8 * eight + phase + column) for eight, half, column in np.ndindex(16, 2, 2)]
    assert mgpu.WGMMA_LAYOUT.registers_shape((64, 128)) == (1, 16, 1, 1, 2, 1, 1, 1, 1)
    assert mgpu.WGMMA_ROW_LAYOUT.registers_shape((64,)) == (1, 1, 2, 1, 1)

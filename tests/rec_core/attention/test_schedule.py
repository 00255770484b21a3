"""The schedule of key blocks per tile of rows, and its inverse, against a dense mask."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from rec_core.attention.schedule import key_schedule, schedule

BATCH, ROWS, KEYS, BLOCK_Q, BLOCK_K = 2, 11, 14, 4, 3
TILES, BLOCKS = 3, 5


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def schedules(start, end, block_q, block_k, keys):
    return schedule(start, end, block_q, block_k), key_schedule(start, end, block_q, block_k, keys)


@st.composite
def ranges(draw):
    """Any ranges within the keys; half the time wide ones, so that whole blocks are seen by whole tiles."""
    wide = draw(st.booleans())
    low = st.integers(0, 2 if wide else KEYS)
    high = st.integers(KEYS - 3 if wide else 0, KEYS)
    size = BATCH * ROWS
    start, end = (draw(st.lists(x, min_size=size, max_size=size)) for x in (low, high))
    return np.array(start, np.int32).reshape(BATCH, ROWS), np.array(end, np.int32).reshape(BATCH, ROWS)


def interval(places):
    """(first, one past the last) of the true entries; None if there are none."""
    found = np.flatnonzero(places)
    return (found[0], found[-1] + 1) if found.size else None


@given(ranges())
def test_schedules_are_what_the_dense_mask_says(bounds):
    start, end = bounds
    visits, (first_tile, last_tile) = jax.device_get(schedules(start, end, BLOCK_Q, BLOCK_K, KEYS))
    seen = np.zeros((BATCH, TILES * BLOCK_Q, BLOCKS * BLOCK_K), bool)  # rows and keys of padding are never seen
    slot = np.arange(KEYS)
    seen[:, :ROWS, :KEYS] = (slot >= start[..., None]) & (slot < end[..., None])
    seen = seen.reshape(BATCH, TILES, BLOCK_Q, BLOCKS, BLOCK_K)
    some, whole = seen.any((2, 4)), seen.all((2, 4))
    for b in range(BATCH):
        for t in range(TILES):
            first, full_first, full_last, last = (int(x[b, t]) for x in visits)
            assert first <= full_first <= full_last <= last
            assert (first, last) == (interval(some[b, t]) or (0, 0))
            if whole[b, t].any():
                assert (full_first, full_last) == interval(whole[b, t])
            else:
                assert full_first == full_last
        for j in range(BLOCKS):
            visiting = (visits.first[b] <= j) & (j < visits.last[b])
            assert (first_tile[b, j], last_tile[b, j]) == (interval(visiting) or (0, 0))


@pytest.mark.portable
def test_causal_rows_by_hand():
    """8 rows that see all before them, tiles of 4, blocks of 2: the diagonal is masked, what lies before it is not."""
    end = jnp.arange(8)[None]
    visits, hulls = jax.device_get(schedules(jnp.zeros_like(end), end, 4, 2, 8))
    # Row 0 sees nothing, so that its tile has no block without a mask; row 4 is the shortest of the second tile.
    assert [x[0].tolist() for x in visits] == [[0, 0], [0, 0], [0, 2], [2, 4]]
    assert [x[0].tolist() for x in hulls] == [[0, 0, 1, 1], [2, 2, 2, 2]]
    assert {x.dtype for x in (*visits, *hulls)} == {np.dtype(np.int32)}


def test_no_rows_and_no_keys():
    none = jnp.zeros((BATCH, 0), jnp.int32)
    visits, hulls = schedules(none, none, BLOCK_Q, BLOCK_K, KEYS)
    assert {x.shape for x in visits} == {(BATCH, 0)}
    assert all(x.shape == (BATCH, BLOCKS) and not x.any() for x in hulls)
    empty = jnp.zeros((BATCH, ROWS), jnp.int32)
    visits, hulls = schedules(empty, empty, BLOCK_Q, BLOCK_K, 0)
    assert all(x.shape == (BATCH, TILES) and not x.any() for x in visits)
    assert {x.shape for x in hulls} == {(BATCH, 0)}

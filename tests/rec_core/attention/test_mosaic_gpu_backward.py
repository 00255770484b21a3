"""Gradients of the GPU kernels on a CPU: in interpret mode, races included; their plan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_kernels import arrays, error, exact, interpreted

from rec_core.attention import ranges_from_segments
from rec_core.attention.blocks import BACKWARD_CANDIDATES, BLOCK_Q, KEYS, Backward, Forward
from rec_core.attention.mosaic_gpu import range_attention_mosaic_gpu
from rec_core.attention.mosaic_gpu_plan import HEAD, PER_GROUP, plan_keys
from rec_core.attention.reference import range_attention_reference

TILES, PLAIN = Backward(keys_tiles=2, rows_tiles=2), Backward()
WIDE = BACKWARD_CANDIDATES[256][0]
# A long user, one of a single token, queries without a prefix, more queries than prefix, padding; then one user alone.
IDS = np.array([np.repeat([1, 2, 3, 4, 0], [120, 1, 9, 40, 30]), np.repeat([1], 200)], np.int32)
QUERY = np.array([np.repeat([0, 1, 0, 1, 0, 1, 0], [90, 30, 1, 9, 10, 30, 30]), np.repeat([0, 1], [150, 50])]) > 0


def gradients(function, own, data, start, end):
    """Of a random projection of out and of the finite lse."""
    *inputs, d_out, d_lse = data
    inputs = inputs if own == "separate" else inputs[:3]

    def project(q, k, v, *given):
        row = {"same": (k, v), "separate": given, "none": (None, None)}[own]
        out, lse = function(q, k, v, start, end, *row, scale=q.shape[-1] ** -0.5)
        seen = jnp.where(lse > -jnp.inf, lse, 0.0)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(seen * d_lse)

    return jax.device_get(jax.jit(jax.grad(project, tuple(range(len(inputs)))))(*inputs))


@pytest.mark.parametrize(
    ("backward", "own", "sizes"),
    [
        (BACKWARD_CANDIDATES[64][0], "same", {"batch": 2, "heads": 2, "dtype": jnp.float16}),
        (TILES, "same", {"batch": 2, "heads": 2}),
        (PLAIN, "none", {"rows": 100, "keys": 130, "width": 128}),
        (TILES, "separate", {"rows": 70, "keys": 300, "heads": 2, "kv_heads": 2, "width": 128}),
        (WIDE, "same", {"batch": 2, "width": 256}),
        (Backward(rows_groups=3, keys_groups=3, rows_block_k=128), "none", {"rows": 210, "keys": 200}),
    ],
    ids=["of the table", "two tiles", "one tile D128", "own keys D128", "D256", "three groups"],
)
def test_gradients_are_the_reference(backward, own, sizes):
    sizes = {"rows": 200, "keys": 200} | sizes
    rows, keys, batch = sizes["rows"], sizes["keys"], sizes.get("batch", 1)
    if own == "same":
        start, end = ranges_from_segments(IDS, is_query=QUERY)
    else:
        draw = np.random.default_rng(rows + keys)
        start = draw.integers(-3, keys, (batch, rows)).astype(np.int32)
        end = np.where(draw.random(start.shape) < 1 / 6, 0, draw.integers(0, keys + 9, start.shape)).astype(np.int32)
    blocks = Forward(block_k=64, q_stages=1)
    kernel = functools.partial(
        range_attention_mosaic_gpu, forward=blocks, backward=backward, programs=2, splits=1, interpret=True
    )
    data = arrays(**sizes)
    with interpreted():
        found = gradients(kernel, own, data, start, end)
    expected = gradients(range_attention_reference, own, exact(data), start, end)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == data[0].dtype and np.isfinite(np.float32(a)).all()
        assert error(a, b) < 1e-2


@pytest.mark.parametrize("own", ["same", "none"])
def test_a_tile_of_keys_meets_every_row_that_sees_it_and_masks_those_that_see_it_in_part(own):
    start, end = (np.asarray(x) for x in ranges_from_segments(IDS, is_query=QUERY))
    rows = IDS.shape[1]
    groups = 2
    made = plan_keys(jnp.asarray(start), jnp.asarray(end), rows, groups, own)
    key, row = np.arange(rows), np.arange(rows)[:, None]
    see = (start[..., None] <= key) & (key < end[..., None])
    if own == "same":
        see |= key == row
    table = np.asarray(made.table)
    assert sorted(made.order.tolist()) == list(range(len(table)))
    assert (np.diff(table[np.asarray(made.order), 1]) <= 0).all()
    plain = 0
    for first, count, example, tile in table[:, :4]:
        visited = []
        for g in range(groups):
            walk_first, walk_last, plain_first, plain_last = table[
                (table[:, 2] == example) & (table[:, 3] == tile), HEAD + g * PER_GROUP :
            ][0, :4]
            assert 0 <= walk_first <= plain_first <= plain_last <= walk_last <= count
            mine = see[example, :, (tile * groups + g) * KEYS : (tile * groups + g + 1) * KEYS]
            blocks = [mine[at : at + BLOCK_Q] for at in range(0, rows, BLOCK_Q)]
            walk = range(first + walk_first, first + walk_last)
            assert all(number in walk for number, block in enumerate(blocks) if block.any())
            assert all(blocks[first + number].all() for number in range(plain_first, plain_last))
            visited += walk
            plain += plain_last - plain_first
        assert count == (max(visited) + 1 - min(visited) if visited else 0)
    assert plain  # some need no mask, or this says nothing of them

"""The TPU kernels on a CPU: values and gradients in interpret mode, races, work and memory, lowering at real shapes."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rec_core.attention import ranges_from_segments
from rec_core.attention.api import Call
from rec_core.attention.mosaic_tpu import block_sizes, range_attention_tpu, supports
from rec_core.attention.reference import range_attention_reference

BATCH, ROWS, KEYS, HEADS, KV_HEADS, WIDTH = 2, 21, 27, 4, 2, 8
INTERPRETED = functools.partial(range_attention_tpu, interpret=True)
SMALL_BLOCKS = functools.partial(INTERPRETED, block_q=8, block_k=8)
packed_ranges = jax.jit(ranges_from_segments)


def arrays(rows=ROWS, keys=KEYS, batch=BATCH, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH, dtype=jnp.float32):
    """q, k, v, k_self, v_self, and cotangents of out and lse in float32."""
    key = jax.random.split(jax.random.key(rows * 100 + keys), 7)
    mine, own, other = (batch, rows, heads, width), (batch, rows, kv_heads, width), (batch, keys, kv_heads, width)
    shapes = [mine, other, other, own, own, mine, (batch, heads, rows)]
    made = [jax.random.normal(k, s).astype(dtype) for k, s in zip(key, shapes)]
    return made[:5] + [x.astype(jnp.float32) for x in made[5:]]


@functools.partial(jax.jit, static_argnums=(0, 1))
def outputs_and_gradients(function, self_term, data, start, end):
    """(out, lse with -inf replaced, whether -inf) and the gradients of a random projection of out and lse."""
    *inputs, d_out, d_lse = data
    inputs = inputs if self_term else inputs[:3]

    def project(inputs):
        own = inputs[3:] if self_term else (None, None)
        out, lse = function(*inputs[:3], start, end, *own, scale=inputs[0].shape[-1] ** -0.5)
        finite = jnp.where(lse > -jnp.inf, lse, 0.0)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(finite * d_lse), (out, finite, lse == -jnp.inf)

    (_, values), gradients = jax.value_and_grad(project, has_aux=True)(inputs)
    return values, gradients


def assert_matches_reference(data, start, end, self_term=True, function=SMALL_BLOCKS):
    expected = outputs_and_gradients(range_attention_reference, self_term, data, start, end)
    got = outputs_and_gradients(function, self_term, data, start, end)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@st.composite
def packed_row(draw):
    """Users of some prefix and queries, then padding; 0 tokens, one token and more queries than prefix included."""
    users = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=6))
    tokens = [(u, i >= prefix) for u, (prefix, queries) in enumerate(users, start=1) for i in range(prefix + queries)]
    tokens = (tokens + [(0, False)] * ROWS)[:ROWS]
    return np.array([t[0] for t in tokens], np.int32), np.array([t[1] for t in tokens])


ONE_TOKEN_EACH = (np.arange(1, ROWS + 1, dtype=np.int32), np.zeros(ROWS, bool))
ONE_USER = (np.ones(ROWS, np.int32), np.arange(ROWS) >= 17)
NOBODY = (np.zeros(ROWS, np.int32), np.zeros(ROWS, bool))


@given(st.lists(packed_row(), min_size=BATCH, max_size=BATCH))
@settings(max_examples=20)
@example([ONE_TOKEN_EACH, ONE_USER])
@example([NOBODY, NOBODY])
def test_packed_rows_are_the_reference(rows):
    """Tiles of 8 rows straddle users, and the last of them ends in padding; there are more keys than any row sees."""
    ids, query = (np.stack(x) for x in zip(*rows))
    start, end = packed_ranges(ids, is_query=query)
    assert_matches_reference(arrays(), start, end)


@given(st.lists(st.integers(-3, KEYS + 3), min_size=2 * BATCH * ROWS, max_size=2 * BATCH * ROWS), st.booleans())
@settings(max_examples=20)
def test_any_ranges_over_a_cache_are_the_reference(bounds, nested):
    """More keys than rows; ranges that are empty, reversed, beyond both ends, or (nested) mostly long."""
    start, end = np.array(bounds, np.int32).reshape(2, BATCH, ROWS)
    if nested:
        start, end = start // 4, np.maximum(end, KEYS - 6)
    data = arrays()
    assert_matches_reference(data, start, end)
    assert_matches_reference(data, start, end, self_term=False)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("rows", "keys", "heads", "kv_heads", "width"),
    [(0, 9, 4, 2, 8), (1, 0, 1, 1, 64), (70, 130, 6, 2, 128)],
)
def test_any_length_group_and_width_with_default_blocks(rows, keys, heads, kv_heads, width):
    data = arrays(rows, keys, heads=heads, kv_heads=kv_heads, width=width)
    end = jnp.broadcast_to(jnp.asarray([[keys // 2], [keys]], jnp.int32), (BATCH, rows))
    assert_matches_reference(data, jnp.zeros((BATCH, rows), jnp.int32), end, function=INTERPRETED)


def test_bfloat16_is_near_the_float32_oracle():
    """2e-3 of the outputs and 1e-2 of the gradients, as norms; the inputs are the same numbers."""
    rows = 160
    ids = np.array([[1] * 100 + [2] + [3] * 40 + [0] * 19, [1] * 160], np.int32)
    query = np.zeros_like(ids, bool)
    query[:, 90:100], query[:, 130:141] = True, True
    start, end = packed_ranges(ids, is_query=query)
    data = arrays(rows, rows, width=64, dtype=jnp.bfloat16)
    function = functools.partial(INTERPRETED, block_q=32, block_k=32)
    (out, lse, _), got = outputs_and_gradients(function, True, data, start, end)
    exact = [x.astype(jnp.float32) for x in data]
    (out32, lse32, _), expected = outputs_and_gradients(range_attention_reference, True, exact, start, end)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert {g.dtype for g in got} == {jnp.dtype(jnp.bfloat16)}

    def error(a, b):
        return np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b)

    assert error(out, out32) < 2e-3 and error(lse, lse32) < 1e-5
    assert all(error(a, b) < 1e-2 for a, b in zip(got, expected, strict=True))


def test_no_race_and_no_unwritten_memory_in_any_order_of_the_grid(capfd):
    """Two simulated cores, tiles in random order, buffers that start as NaN."""
    start, end = packed_ranges(np.array([[1] * 5 + [2] * 7], np.int32), is_query=np.arange(12)[None] >= 10)
    params = pltpu.InterpretParams(detect_races=True, random_seed=1, num_cores_or_threads=2)
    function = functools.partial(range_attention_tpu, block_q=8, block_k=8, interpret=params)
    assert_matches_reference(arrays(12, 12, batch=1, heads=2, kv_heads=1), start, end, function=function)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_keys_outside_every_range_cost_no_work():
    """Blocks that nobody sees are not visited, forward and backward: they may hold NaN and the result stays exact.

    Nor does a tile of empty rows visit the block that it has to point at.
    """
    data = arrays()
    start, end = np.full((BATCH, ROWS), 8, np.int32), np.full((BATCH, ROWS), 16, np.int32)
    start[:, :8], end[:, :8] = 0, 0
    hole = jnp.ones((KEYS, 1, 1)).at[:8].set(jnp.nan).at[16:].set(jnp.nan)
    expected = outputs_and_gradients(SMALL_BLOCKS, True, data, start, end)
    got = outputs_and_gradients(SMALL_BLOCKS, True, [data[0], data[1] * hole, data[2] * hole, *data[3:]], start, end)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    for gradient in map(np.asarray, got[1][1:3]):
        assert gradient[:, 8:16].any() and not gradient[:, :8].any() and not gradient[:, 16:].any()


def test_tiles_that_do_not_see_a_key_block_cost_its_gradient_no_work():
    """Tiles 0 and 2 see the first key block, tile 1 another: NaN in the queries of tile 1 stays with what it sees."""
    data = arrays()
    start, end = np.zeros((BATCH, ROWS), np.int32), np.full((BATCH, ROWS), 8, np.int32)
    start[:, 8:16], end[:, 8:16] = 16, 24
    q = data[0].at[:, 8:16].set(jnp.nan)
    got = outputs_and_gradients(SMALL_BLOCKS, True, [q, *data[1:]], start, end)
    expected = outputs_and_gradients(SMALL_BLOCKS, True, data, start, end)
    for a, b in zip(got[1][1:3], expected[1][1:3]):
        np.testing.assert_array_equal(a[:, :8], b[:, :8])
        assert jnp.isfinite(b).all() and b[:, :8].any()
    assert jnp.isnan(got[1][1][:, 16:24]).all()


def test_the_grid_is_as_long_as_the_longest_visit():
    """One-token users next to one user of 9 tokens: two key blocks at most, however many there are."""
    visited = []

    def record(token, place, core):
        visited.append(place.tolist())
        return token

    params = pltpu.InterpretParams(grid_point_recorder=record)
    q, k, v, *_ = arrays(24, 24, batch=1, heads=1, kv_heads=1)
    start, end = packed_ranges(np.array([[1] * 9 + list(range(2, 17))], np.int32))
    function = functools.partial(range_attention_tpu, block_q=8, block_k=4, scale=0.3, interpret=params)
    jax.block_until_ready(jax.jit(function)(q, k, v, start, end, k, v))
    assert sorted(visited) == [[0, 0, tile, step] for tile in range(3) for step in range(2)]


def losses(function, q, own, shared, end):
    """One loss per example, with keys of its own for the self term and a cache that all examples share."""
    cache = jnp.broadcast_to(shared, (q.shape[0], *shared.shape))
    out = function(q, cache, 2 * cache, jnp.zeros_like(end), end, own, own, scale=0.3)[0]
    return jnp.sum(jnp.square(out), axis=(1, 2, 3))


def test_same_gradients_under_vmap():
    q, shared, _, own, *_ = arrays(12, 19, batch=3)
    shared = shared[0]
    end = jnp.minimum(jnp.arange(3)[:, None] * 6 + jnp.arange(12), 19).astype(jnp.int32)

    def gradient(function, *args):
        return jax.grad(lambda *x: jnp.sum(losses(function, *x, args[3])), (0, 1, 2))(*args[:3])

    expected = jax.jit(functools.partial(gradient, range_attention_reference))(q, own, shared, end)
    mapped = jax.jit(jax.vmap(functools.partial(gradient, SMALL_BLOCKS), (0, 0, None, 0)))
    d_q, d_own, d_shared = mapped(q[:, None], own[:, None], shared, end[:, None])
    for a, b in zip((d_q[:, 0], d_own[:, 0], d_shared.sum(0)), expected):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def gradient_of(rows, keys, batch, heads, kv_heads, width, dtype=jnp.bfloat16, self_term=True):
    """A traced gradient with default blocks, to be lowered, and the sizes of its inputs."""
    mine, own, other = (
        jax.ShapeDtypeStruct((batch, length, number, width), dtype)
        for length, number in ((rows, heads), (rows, kv_heads), (keys, kv_heads))
    )
    bounds = jax.ShapeDtypeStruct((batch, rows), jnp.int32)
    inputs = (mine, other, other, own, own) if self_term else (mine, other, other)

    def project(inputs, start, end):
        self_inputs = inputs[3:] if self_term else (None, None)
        out, lse = range_attention_tpu(*inputs[:3], start, end, *self_inputs, scale=width**-0.5)
        return jnp.sum(out) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0.0))

    return jax.jit(jax.grad(project)).trace(inputs, bounds, bounds), [x.size for x in inputs]


@pytest.mark.portable
@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 4, "rows": 4096, "keys": 4096, "heads": 16, "kv_heads": 16, "width": 64},
        {"batch": 2, "rows": 8192, "keys": 8192, "heads": 16, "kv_heads": 16, "width": 128},
        {"batch": 2, "rows": 4096, "keys": 4096, "heads": 16, "kv_heads": 4, "width": 256},
        {"batch": 2, "rows": 128, "keys": 8192, "heads": 16, "kv_heads": 2, "width": 128},
        {"batch": 3, "rows": 1000, "keys": 77, "heads": 6, "kv_heads": 2, "width": 64, "dtype": jnp.float32},
        {"batch": 1, "rows": 50_000, "keys": 50_000, "heads": 4, "kv_heads": 1, "width": 64, "self_term": False},
    ],
    ids=["D64", "D128", "grouped heads", "cached", "ragged f32", "long"],
)
def test_lowers_for_tpu_forward_and_backward(shape):
    traced, _ = gradient_of(**shape)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    names = ("forward", "query_gradient", "key_gradient")
    assert [text.count(f'kernel_name = "range_attention_{name}"') for name in names] == [1, 1, 1]


def test_lowers_for_tpu_inside_shard_map():
    """What all devices share gets a gradient that is summed over them; the kernels see one device's examples."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), P("data"), P(), P("data"))
    local = functools.partial(losses, range_attention_tpu)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))
    q, shared, _, own, *_ = arrays(12, 19, batch=8)
    args = (q, own, shared[0], jnp.ones((8, 12), jnp.int32))
    traced = jax.jit(jax.grad(lambda *x: jnp.sum(mapped(*x)), (0, 1, 2))).trace(*args)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3 and "all_reduce" in text


def array_sizes(jaxpr):
    """Elements of every array that is made in a jaxpr or within its equations, kernels included."""
    for equation in jaxpr.eqns:
        yield from (var.aval.size for var in equation.outvars if hasattr(var.aval, "size"))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from array_sizes(inner)


def test_no_array_of_rows_by_keys_and_no_copy_of_keys_per_query_head():
    """No array between or inside the kernels is larger than the largest input, here K: 16 heads share 2."""
    rows, keys = 1024, 8192
    traced, inputs = gradient_of(rows, keys, batch=1, heads=16, kv_heads=2, width=64)
    assert rows * keys > max(inputs)
    sizes = list(array_sizes(traced.jaxpr))
    assert len(sizes) > 100 and max(sizes) <= max(inputs)


CALL = Call(4, 4096, 4096, 16, 4, 64, "bfloat16", True, "tpu")


def test_what_cannot_be_served_is_refused_with_its_reason():
    assert supports(CALL) is None
    for change, reason in [
        ({"platform": "gpu"}, "the default backend is gpu"),
        ({"dtype": "float16"}, "dtype float16 is not one of bfloat16, float32"),
        ({"head_width": 20}, "head width 20"),
        ({"head_width": 512}, "head width 512"),
        ({"heads": 1024}, "256 query heads share a key head"),
        ({"batch": 40_000, "rows": 8, "keys": 8}, "240000 words of scalar memory"),
    ]:
        assert reason in supports(dataclasses.replace(CALL, **change))
    data = arrays(5, 5, dtype=jnp.float16)
    empty = jnp.zeros((BATCH, 5), jnp.int32)
    with pytest.raises(ValueError, match="q has dtype float16; the TPU kernels take bfloat16 or float32"):
        range_attention_tpu(*data[:3], empty, empty, None, None, scale=1.0)


@pytest.mark.parametrize(("group", "rows", "keys"), [(1, 4096, 4096), (8, 3000, 77), (3, 1, 1), (128, 9000, 513)])
def test_blocks_are_aligned_and_pad_little(group, rows, keys):
    block_q, block_k = block_sizes(group, rows, keys)
    for block, length in ((block_q, rows), (block_k, keys)):
        assert block % 16 == 0 and (block <= 64 or block % 128 == 0)
        padding = -length % block
        assert padding < max(16, min(block, 128) * -(-length // block))
    assert group * block_q <= 2048

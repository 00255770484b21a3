"""Range attention: the chunked path against the oracle, ranges against brute force, what must not be seen."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rec_core.attention import (
    check_segments,
    grouped_attention,
    merge,
    range_attention,
    ranges_from_lengths,
    ranges_from_segments,
)
from rec_core.attention.api import IMPLEMENTATIONS, Call, Implementation
from rec_core.attention.reference import range_attention_reference
from rec_core.attention.xla import range_attention_xla

BATCH, ROWS, HEADS, KV_HEADS, WIDTH = 2, 21, 4, 2, 8
packed_ranges = jax.jit(ranges_from_segments)
SMALL_BLOCKS = functools.partial(range_attention_xla, block_q=8, block_k=8)  # 3 x 3 blocks with a ragged tail


def arrays(rows=ROWS, keys=ROWS, dtype=jnp.float32, batch=BATCH):
    """q, k, v, k_self, v_self and cotangents of out and lse."""
    key = jax.random.split(jax.random.key(rows * 100 + keys), 7)
    own, other = (batch, rows, KV_HEADS, WIDTH), (batch, keys, KV_HEADS, WIDTH)
    shapes = [(batch, rows, HEADS, WIDTH), other, other, own, own, (batch, rows, HEADS, WIDTH), (batch, HEADS, rows)]
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(key, shapes)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def outputs_and_gradients(function, self_term, data, start, end):
    """(out, lse with -inf replaced, whether -inf) and the gradients of a random projection of out and lse."""
    q, k, v, k_self, v_self, d_out, d_lse = data
    inputs = (q, k, v, k_self, v_self) if self_term else (q, k, v)

    def project(inputs):
        own = inputs[3:] if self_term else (None, None)
        out, lse = function(*inputs[:3], start, end, *own, scale=0.3)
        finite = jnp.where(lse > -jnp.inf, lse, 0.0)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(finite * d_lse), (out, finite, lse == -jnp.inf)

    (_, values), gradients = jax.value_and_grad(project, has_aux=True)(inputs)
    return values, gradients


def assert_matches_reference(data, start, end, self_term=True, tolerance=2e-5, function=SMALL_BLOCKS):
    expected = outputs_and_gradients(range_attention_reference, self_term, data, start, end)
    got = outputs_and_gradients(function, self_term, data, start, end)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)


@st.composite
def packed_row(draw, length=ROWS):
    """Users with prefixes and queries, queries behind their prefix or all at the tail, then padding."""
    users = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=6))
    at_tail = draw(st.booleans())
    parts, tail = [], []
    for number, (prefix, queries) in enumerate(users, start=1):
        parts += [(number, False)] * prefix
        (tail if at_tail else parts).extend([(number, True)] * queries)
    tokens = (parts + tail)[:length]
    tokens += [(0, False)] * (length - len(tokens))
    limits = draw(st.lists(st.integers(-1, 12), min_size=length, max_size=length))
    return np.array([t[0] for t in tokens], np.int32), np.array([t[1] for t in tokens]), np.array(limits, np.int32)


def batch_of(rows):
    return tuple(np.stack(column) for column in zip(*rows))


def brute_force_visible(ids, query, limit):
    """[B, T, T]: which other tokens each token sees, from the definition."""
    batch, length = ids.shape
    seen = np.zeros((batch, length, length), bool)
    for b in range(batch):
        for i in range(length):
            prefix = [j for j in range(length) if ids[b, j] == ids[b, i] != 0 and not query[b, j]]
            if query[b, i]:
                prefix = prefix[: max(limit[b, i], 0)] if limit is not None else prefix
            else:
                prefix = [j for j in prefix if j < i]
            seen[b, i, prefix] = True
    return seen


@given(st.lists(packed_row(), min_size=BATCH, max_size=BATCH), st.booleans())
@example([packed for packed in [(np.zeros(ROWS, np.int32), np.zeros(ROWS, bool), np.zeros(ROWS, np.int32))] * 2], True)
def test_ranges_are_the_definition(rows, with_limit):
    ids, query, limit = batch_of(rows)
    check_segments(ids, query)
    limit = limit if with_limit else None
    start, end = packed_ranges(ids, is_query=query, limit=limit)
    slot = np.arange(ROWS)
    visible = (slot >= np.asarray(start)[..., None]) & (slot < np.asarray(end)[..., None])
    np.testing.assert_array_equal(visible, brute_force_visible(ids, query, limit))
    assert start.dtype == end.dtype == jnp.int32
    assert not (np.asarray(end) - np.asarray(start))[ids == 0].any()


@given(st.lists(packed_row(), min_size=BATCH, max_size=BATCH))
def test_chunked_is_the_reference_on_packed_rows(rows):
    ids, query, limit = batch_of(rows)
    start, end = packed_ranges(ids, is_query=query, limit=limit)
    data = arrays()
    assert_matches_reference(data, start, end)
    assert_matches_reference(data, start, end, self_term=False)


@given(st.lists(st.integers(-3, ROWS + 3), min_size=2 * BATCH * ROWS, max_size=2 * BATCH * ROWS))
@settings(max_examples=15)
def test_chunked_is_the_reference_on_any_ranges(bounds):
    """Keys as in a cache (not the rows' own), ranges of any kind: empty, reversed, beyond both ends."""
    start, end = jnp.asarray(bounds, jnp.int32).reshape(2, BATCH, ROWS)
    data = arrays()
    assert_matches_reference(data, start, end)
    assert_matches_reference(data, start, end, self_term=False)


@pytest.mark.portable
@pytest.mark.parametrize(("rows", "keys"), [(0, 9), (5, 0), (1, 1), (70, 130)])
def test_any_length_and_default_blocks(rows, keys):
    start = jnp.zeros((BATCH, rows), jnp.int32)
    end = jnp.broadcast_to(jnp.asarray([[keys // 2], [keys]], jnp.int32), (BATCH, rows))
    assert_matches_reference(arrays(rows, keys), start, end, function=range_attention_xla)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 4e-2), (jnp.float16, 5e-3)])
def test_half_precision_is_near_the_float32_oracle(dtype, tolerance):
    start, end = packed_ranges(jnp.asarray([[1] * 9 + [2] * 12, [1] * 21]))
    *data, d_out, d_lse = arrays(dtype=dtype)
    cotangents = [d_out.astype(jnp.float32), d_lse.astype(jnp.float32)]
    (out, lse, _), got = outputs_and_gradients(SMALL_BLOCKS, True, data + cotangents, start, end)
    exact = [x.astype(jnp.float32) for x in data] + cotangents
    (out32, lse32, _), expected = outputs_and_gradients(range_attention_reference, True, exact, start, end)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert {g.dtype for g in got} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(np.float32(out), out32, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(lse, lse32, atol=1e-4, rtol=1e-4)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(np.float32(a), b, atol=2 * tolerance, rtol=2 * tolerance)


@pytest.mark.portable
def test_hand_computed():
    """Logits ln 2 (itself), ln 3 and ln 5: shares .2, .3, .5 and lse ln 10; an empty range gives its own value."""
    q = jnp.ones((1, 2, 1, 1))
    k = jnp.log(jnp.asarray([3.0, 5.0, 99.0])).reshape(1, 3, 1, 1)
    v = jnp.asarray([10.0, 20.0, 1e6]).reshape(1, 3, 1, 1)
    own = {"k_self": jnp.full((1, 2, 1, 1), jnp.log(2.0)), "v_self": jnp.full((1, 2, 1, 1), 7.0)}
    start, end = jnp.asarray([[0, 1]]), jnp.asarray([[2, 1]])
    run = jax.jit(range_attention, static_argnames=("scale", "return_lse", "implementation", "self_term"))
    for name in ("reference", "xla"):
        call = functools.partial(run, q, k, v, start, end, scale=1.0, return_lse=True, implementation=name)
        out, lse = call(**own)
        np.testing.assert_allclose(out.ravel(), [0.2 * 7 + 0.3 * 10 + 0.5 * 20, 7.0], rtol=1e-6)
        np.testing.assert_allclose(lse.ravel(), np.log([10.0, 2.0]), rtol=1e-6)
        out, lse = call(self_term=False)
        np.testing.assert_allclose(out.ravel(), [10 * 3 / 8 + 20 * 5 / 8, 0.0], rtol=1e-6)
        np.testing.assert_allclose(lse.ravel(), [np.log(8.0), -np.inf], rtol=1e-6)


LAYOUT_IDS = np.array([[1] * 6 + [2] * 5 + [1] * 3 + [2] * 2 + [3] * 4 + [0]] * BATCH, np.int32)
LAYOUT_QUERY = np.zeros_like(LAYOUT_IDS, bool)
LAYOUT_QUERY[:, 11:16] = True
LAYOUT_QUERY[:, 18:20] = True


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_prove_what_is_not_seen(implementation):
    """d out_i / d (k_j, v_j) is exactly zero unless i sees j: no later token, no other user, no other query."""
    q, k, v = arrays()[:3]
    function = range_attention_reference if implementation == "reference" else SMALL_BLOCKS
    start, end = packed_ranges(LAYOUT_IDS, is_query=LAYOUT_QUERY)

    @jax.jit
    def gradients(k, v):
        def row_sums(k, v):
            return jnp.sum(function(q, k, v, start, end, k, v, scale=0.5)[0], axis=(0, 2, 3))

        return jax.vmap(jax.vjp(row_sums, k, v)[1])(jnp.eye(ROWS))

    d_k, d_v = gradients(k, v)  # [row i, B, token j, K, D]
    touched = np.asarray(jnp.any(d_k != 0, (3, 4)) | jnp.any(d_v != 0, (3, 4))).swapaxes(0, 1)
    expected = brute_force_visible(LAYOUT_IDS, LAYOUT_QUERY, None) | np.eye(ROWS, dtype=bool)
    np.testing.assert_array_equal(touched, expected)


@pytest.mark.portable
def test_grouped_equals_one_by_one_and_packed_equals_separate():
    q, k, v = arrays()[:3]
    together = jax.jit(grouped_attention)(q, k, v, LAYOUT_IDS, LAYOUT_QUERY)[0]
    cases, ids = [], []
    for place in np.flatnonzero(LAYOUT_QUERY[0]):
        alone = np.append(np.flatnonzero((LAYOUT_IDS[0] == LAYOUT_IDS[0, place]) & ~LAYOUT_QUERY[0]), place)
        padding = (0, ROWS - alone.size)
        cases.append(np.pad(alone, padding, constant_values=ROWS - 1))
        ids.append(np.pad(np.ones_like(alone), padding))
    cases, ids = np.stack(cases), np.stack(ids)
    assert len(cases) == 7
    reference = jax.jit(functools.partial(grouped_attention, implementation="reference"))
    separate = reference(q[0][cases], k[0][cases], v[0][cases], ids)
    np.testing.assert_allclose(together[cases][ids == 1], separate[ids == 1], atol=1e-5)
    assert np.isfinite(separate).all() and np.isfinite(together).all()


@pytest.mark.parametrize("self_term", [True, False])
def test_merge_of_two_halves_is_the_whole(self_term):
    """Values and gradients, also for rows that see nothing of one half, or of both."""
    q, k, v, k_self, v_self, d_out, d_lse = arrays()
    start = jnp.asarray([[0, 3, 12, 20, 5] * 4 + [0]] * BATCH)
    end = jnp.asarray([[21, 9, 20, 21, 5] * 4 + [0]] * BATCH)
    half = 10
    attend = functools.partial(SMALL_BLOCKS, scale=0.3)
    own = (k_self, v_self) if self_term else (None, None)

    def loss(joined, q, k, v):
        if joined:
            out, lse = attend(q, k, v, start, end, *own)
        else:
            low = attend(q, k, v, start, jnp.minimum(end, half), *own)
            out, lse = merge(*low, *attend(q, k, v, jnp.maximum(start, half), end, None, None))
        finite = jnp.where(lse > -jnp.inf, lse, 0.0)
        return jnp.sum(out * d_out) + jnp.sum(finite * d_lse), (out, lse)

    grad = jax.value_and_grad(loss, (1, 2, 3), has_aux=True)
    whole, halves = jax.jit(lambda *x: (grad(True, *x), grad(False, *x)))(q, k, v)
    for a, b in zip(jax.tree.leaves(halves), jax.tree.leaves(whole)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.portable
def test_memory_is_linear_in_length():
    """The compiler's own count of temporaries for forward and backward, at T and 2T."""

    def temporaries(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        ranges = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, start, end):
            out, lse = range_attention(q, k, v, start, end, return_lse=True)
            return jnp.sum(out**2) + jnp.sum(lse)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, ranges, ranges).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    length = 2048
    short, long = temporaries(length), temporaries(2 * length)
    assert 0 < long <= 2.05 * short
    assert long < 4 * (2 * length) ** 2  # less than one T x T array of one of the two heads


def test_keys_outside_every_range_cost_no_work():
    """Blocks that nobody sees are not visited: they may hold NaN and the result stays exact."""
    q, k, v, k_self, v_self = arrays(8, 64)[:5]
    start, end = jnp.full((BATCH, 8), 24, jnp.int32), jnp.full((BATCH, 8), 40, jnp.int32)
    hole = jnp.ones((64, 1, 1)).at[:24].set(jnp.nan).at[40:].set(jnp.nan)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(k, v):
        return jnp.sum(SMALL_BLOCKS(q, k, v, start, end, k_self, v_self, scale=0.5)[0] ** 2)

    value, gradients = loss(k * hole, v * hole)
    expected, expected_gradients = loss(k, v)
    assert np.isfinite(value) and value == expected
    for a, b in zip(gradients, expected_gradients):
        np.testing.assert_array_equal(a, b)
        assert np.any(np.asarray(b)[:, 24:40])


def losses(q, own, shared, end):
    """One loss per example, with keys of its own for the self term and a cache that all examples share."""
    cache = jnp.broadcast_to(shared, (q.shape[0], *shared.shape))
    out = SMALL_BLOCKS(q, cache, 2 * cache, jnp.zeros_like(end), end, own, own, scale=0.3)[0]
    return jnp.sum(jnp.square(out), axis=(1, 2, 3))


def test_same_gradients_on_a_mesh_in_shard_map_under_pmap_and_vmap():
    """Split over eight devices, values and gradients stay; what all devices share gets the sum of its gradients."""
    batch = 8
    q, shared, _, own, *_ = arrays(12, 19, batch=batch)
    shared = shared[0]
    end = jnp.minimum(jnp.arange(batch)[:, None] * 2 + jnp.arange(12), 19).astype(jnp.int32)
    args = (q, own, shared, end)

    def gradient(function):
        return jax.grad(lambda *x: jnp.sum(function(*x)), (0, 1, 2))

    expected = jax.jit(gradient(losses))(*args)

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (P("data"), P()))
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            gradient(losses), in_shardings=(split, split, whole, split), out_shardings=(split, split, whole)
        )
        on_mesh = jitted(*args)

    line = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P("data"), P("data"), P(), P("data"))
    mapped = jax.shard_map(losses, mesh=line, in_specs=specs, out_specs=P("data"))
    in_shard_map = jax.jit(gradient(mapped))(*args)

    each = [x.reshape(8, 1, *x.shape[1:]) for x in (q, own, end)]
    by_example = {}
    by_example["pmap"] = jax.pmap(gradient(losses), in_axes=(0, 0, None, 0))(each[0], each[1], shared, each[2])
    by_example["vmap"] = jax.jit(jax.vmap(gradient(losses), (0, 0, None, 0)))(each[0], each[1], shared, each[2])
    flat = [(a[:, 0], b[:, 0], c.sum(0)) for a, b, c in by_example.values()]
    for got in (on_mesh, in_shard_map, *flat):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.portable
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    q, k, v = arrays(dtype=jnp.bfloat16)[:3]

    def loss(q, k, v):
        start, end = ranges_from_segments(LAYOUT_IDS, is_query=LAYOUT_QUERY)
        return jnp.sum(jnp.square(SMALL_BLOCKS(q, k, v, start, end, k, v, scale=0.3)[0]))

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v)
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in text


def test_ranges_from_lengths():
    lengths = jnp.asarray([0, 4])
    assert [x.tolist() for x in ranges_from_lengths(lengths, 3)] == [[[0] * 3] * 2, [[0] * 3, [4] * 3]]
    assert ranges_from_lengths(lengths, 3, append=True)[1].tolist() == [[0, 1, 2], [4, 5, 6]]


def test_check_segments_names_the_row_and_position():
    with pytest.raises(ValueError, match="row 1: segment 1 begins a second time at position 4"):
        check_segments(np.array([[1, 1, 2, 2, 0], [1, 1, 2, 2, 1]]))
    with pytest.raises(ValueError, match="row 0: segment 3 begins a second time at position 2"):
        check_segments(np.array([[3, 3, 3]]), np.array([[False, True, False]]))
    check_segments(np.array([[1, 1, 2, 2, 1]]), np.array([[False, False, False, False, True]]))


def test_errors_say_what_is_wrong():
    q, k, v, k_self, v_self = arrays(5, 7)[:5]
    ranges = (jnp.zeros((BATCH, 5), jnp.int32),) * 2
    with pytest.raises(ValueError, match="k has 7 rows and q 5: the self term needs"):
        range_attention(q, k, v, *ranges)
    with pytest.raises(ValueError, match="one of them is None"):
        range_attention(q, k, v, *ranges, k_self=k_self)
    with pytest.raises(ValueError, match="self_term=False leaves no use"):
        range_attention(q, k, v, *ranges, k_self=k_self, v_self=v_self, self_term=False)
    with pytest.raises(ValueError, match="q has 4 heads and k 3"):
        range_attention(q, k[:, :, [0, 1, 1]], v, *ranges, self_term=False)
    with pytest.raises(ValueError, match=r"v has shape \(2, 6, 2, 8\), expected \(2, 7, 2, 8\)"):
        range_attention(q, k, v[:, :6], *ranges, self_term=False)
    with pytest.raises(ValueError, match="k_end has dtype float32"):
        range_attention(q, k, v, ranges[0], ranges[1].astype(jnp.float32), self_term=False)
    with pytest.raises(ValueError, match="v has dtype bfloat16 and q float32"):
        range_attention(q, k, v.astype(jnp.bfloat16), *ranges, self_term=False)
    with pytest.raises(
        ValueError,
        match="implementation='flash' is unknown; choose None or one of mosaic_gpu, ",
    ):
        range_attention(q, k, v, *ranges, self_term=False, implementation="flash")


def test_a_named_implementation_that_cannot_serve_says_why_and_none_passes_it_by(monkeypatch):
    def supports(call: Call) -> str | None:
        return None if call.head_width % 64 == 0 else f"head width {call.head_width} is not a multiple of 64"

    def never(*args, **kwargs):
        raise AssertionError("must not be called")

    others = dict(IMPLEMENTATIONS)
    monkeypatch.setattr("rec_core.attention.api.IMPLEMENTATIONS", {"fast": Implementation(supports, never), **others})
    q, k, v = arrays()[:3]
    with pytest.raises(ValueError, match="'fast' cannot serve this call: head width 8 is not a multiple of 64"):
        grouped_attention(q, k, v, LAYOUT_IDS, LAYOUT_QUERY, implementation="fast")
    jaxpr = str(jax.make_jaxpr(grouped_attention)(q, k, v, LAYOUT_IDS, LAYOUT_QUERY))
    assert "custom_vjp" in jaxpr  # the next in the table, "xla", took it


@pytest.mark.parametrize("self_term", ["own", "same", "none"])
@pytest.mark.parametrize("kv_heads", [2, 3])
def test_a_kernel_runs_on_each_devices_examples_and_heads(monkeypatch, self_term, kv_heads):
    """A kernel that the compiler cannot split sees its part alone: all heads where the mesh does not divide them."""
    batch, rows, width = 8, 12, 8
    seen = []

    def opaque(q, k, v, start, end, k_self, v_self, *, scale):
        seen.append((q.shape, k.shape, start.shape, k_self is k and v_self is v, k_self is None))
        return range_attention_xla(q, k, v, start, end, k_self, v_self, scale=scale)

    monkeypatch.setitem(IMPLEMENTATIONS, "opaque", Implementation(lambda call: None, opaque, opaque=True))
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (batch, rows, 2 * kv_heads, width))
    k, v, k_self, v_self = (jax.random.normal(key, (batch, rows, kv_heads, width)) for key in keys[1:])
    end = jnp.broadcast_to(jnp.arange(rows), (batch, rows))
    own = {"own": {"k_self": k_self, "v_self": v_self}, "same": {}, "none": {"self_term": False}}[self_term]

    def loss(arrays, implementation):
        out = range_attention(*arrays, jnp.zeros_like(end), end, implementation=implementation, **own)
        return jnp.sum(jnp.square(out))

    expected = jax.jit(jax.value_and_grad(functools.partial(loss, implementation="xla")))((q, k, v))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(functools.partial(loss, implementation="opaque")))((q, k, v))
    heads = kv_heads // 2 if kv_heads == 2 else kv_heads
    part = (2, rows, 2 * heads, width), (2, rows, heads, width), (2, rows)
    assert set(seen) == {(*part, self_term == "same", self_term == "none")}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)

"""The GPU kernels on a CPU: the plan of their work, values and races in interpret mode, lowering at real shapes."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_kernels import arrays, error, exact, interpreted
from hypothesis import example, given, settings
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rec_core.attention import blocks as tables
from rec_core.attention import mosaic_gpu_forward as kernel
from rec_core.attention import ranges_from_segments
from rec_core.attention.api import Call
from rec_core.attention.blocks import Backward, Forward
from rec_core.attention.mosaic_gpu import range_attention_mosaic_gpu, split_number, supports
from rec_core.attention.mosaic_gpu_plan import plan, plan_keys
from rec_core.attention.reference import range_attention_reference

SMALL = Forward(block_k=64)
packed_ranges = jax.jit(ranges_from_segments)

# The plan: what each warpgroup visits, against a dense mask.

BATCH, ROWS, KEYS = 2, 500, 500  # tiles of 3 x 64 rows: two whole ones and 116 rows; blocks of 64 or 128 keys


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def planned(start, end, blocks, own, splits):
    return plan(start, end, KEYS, blocks, own, splits=splits)


@st.composite
def ranges(draw):
    """Runs of rows with equal, causal or empty ranges, anywhere; none holds its row."""
    edge = st.integers(0, KEYS // 20).map(lambda x: 20 * x)
    runs = draw(st.lists(st.tuples(st.sampled_from([200, 128, 64, 30, 1]), edge, edge, st.booleans()), max_size=9))
    start, end, row = np.zeros(ROWS, int), np.zeros(ROWS, int), 0
    for length, low, high, causal in runs:
        rows = np.arange(row, row := min(row + length, ROWS))
        start[rows], end[rows] = low, np.minimum(high, rows) if causal else high
    at = np.arange(ROWS)
    holds = (start <= at) & (at < end)
    behind = draw(st.booleans())  # of a range that holds the row keep what is behind it, or before
    return np.where(holds & behind, at + 1, start), np.where(holds & (not behind), at, end)


def walks(made, blocks, own):
    """(part, first row, (key block, on the diagonal) of a warpgroup's steps, those of them without mask, all)."""
    call = kernel._Call(blocks, 64, 1, 1, 1, 1, 1.0, own, True, jnp.bfloat16, True)
    program = kernel._Program(call, None, None, None)
    table = np.asarray(made.table)
    steps = np.arange(table[:, 0].max(initial=1))
    block_of = jax.vmap(lambda *head: program.block(steps, *head))
    at = np.asarray(block_of(*jnp.asarray(table[:, 1:4].T)))
    for entry, block in zip(table, at):
        count, diag, _, _, example, tile, part, _ = entry[:8]
        visits = [(int(x), j < diag) for j, x in enumerate(block[:count])]
        for g in range(blocks.groups):
            first, last, plain_first, plain_last = entry[8 + 8 * g :][:4]
            assert 0 <= first < last <= count and first <= plain_first <= plain_last <= last
            row = (tile * blocks.groups + g) * 64
            yield part, example, row, visits[first:last], visits[plain_first:plain_last], visits


@given(st.lists(ranges(), min_size=BATCH, max_size=BATCH))
@settings(max_examples=10)
@example([(np.zeros(ROWS, int), np.arange(ROWS)), (np.zeros(ROWS, int), np.zeros(ROWS, int))])
@pytest.mark.parametrize(
    ("blocks", "own", "splits"),
    [
        (Forward(groups=3), "same", 1),
        (Forward(groups=3, block_k=64), "same", 1),
        (Forward(groups=1), "same", 1),
        (Forward(groups=2), "separate", 1),
        (Forward(groups=2, block_k=64), "none", 4),
        (Forward(groups=2, block_k=64), "separate", 3),
    ],
)
def test_each_warpgroup_visits_what_its_rows_see_once_and_masks_what_they_see_in_part(blocks, own, splits, bounds):
    start, end = (np.stack(x) for x in zip(*bounds))
    made = planned(start, end, blocks, own, splits)
    steps = np.asarray(made.table)[:, 0]
    assert sorted(made.order.tolist()) == list(range(steps.size)) and (np.diff(steps[made.order]) <= 0).all()
    size, slot = blocks.block_k, np.arange(blocks.block_k)
    part_start, part_end = np.asarray(made.start), np.asarray(made.end)
    for part, batch, row, visits, plain, whole_walk in walks(made, blocks, own):
        assert len(set(whole_walk)) == len(whole_walk)
        rows = np.arange(row, min(row + 64, ROWS))
        if not rows.size:
            continue
        assert batch == part // splits
        low, high = part_start[part, rows], part_end[part, rows]
        seen = {x for a, b in zip(low, high) if a < b for x in range(a // size, -(-b // size))}
        mine = {x for x in rows // size} if own != "none" and part % splits == 0 else set()
        if own == "same":
            assert seen | mine <= {x for x, _ in visits}
        else:
            assert seen <= {x for x, diag in visits if not diag} and mine <= {x for x, diag in visits if diag}
        for x, diag in plain:
            keys = x * size + slot
            assert (own == "same" or not diag) and (low[:, None] <= keys).all() and (keys < high[:, None]).all()
    for b in range(BATCH):  # the parts of a row's range are its range
        for i in range(0, ROWS, 7):
            parts = [range(part_start[b * splits + p, i], part_end[b * splits + p, i]) for p in range(splits)]
            assert sorted(x for part in parts for x in part) == list(range(start[b, i], min(end[b, i], KEYS)))


def test_parts_of_a_long_range_are_even():
    zero = jnp.zeros((1, 64), jnp.int32)
    made = jax.jit(lambda end: plan(zero, end, 4096, Forward(groups=1), "none", splits=4, ordered=False))(zero + 4000)
    assert made.table[:, 0].tolist() == [8, 8, 8, 8] and made.order.tolist() == [0, 1, 2, 3]


def test_a_user_of_50_000_tokens_is_planned_as_by_hand():
    tokens, tile, block = 50_000, 192, 128
    end = jnp.arange(tokens, dtype=jnp.int32)[None]
    made = jax.jit(lambda end: plan(0 * end, end, tokens, Forward(groups=3), "same"))(end)
    steps = np.asarray(made.table)[:, 0]
    assert steps.tolist() == [-(-min((t + 1) * tile, tokens) // block) for t in range(-(-tokens // tile))]
    by_keys = jax.jit(lambda end: plan_keys(0 * end, end, tokens, 2, "same"))(end)
    first, count = np.asarray(by_keys.table)[:, :2].T
    assert first.tolist() == [2 * t for t in range(-(-tokens // block))]
    assert (first + count == -(-tokens // 64)).all()


# Values in interpret mode: outputs are not a number until they are written.


def test_the_interpreter_poisons_what_is_not_written():
    assert plgpu.InterpretGPUParams().uninitialized_memory == "nan"


@functools.partial(jax.jit, static_argnums=(0, 1))
def values(function, own, data, start, end):
    q, k, v, k_self, v_self, *_ = data
    row = {"same": (k, v), "separate": (k_self, v_self), "none": (None, None)}[own]
    return function(q, k, v, start, end, *row, scale=q.shape[-1] ** -0.5)


def gpu(blocks=SMALL, programs=2, **settings):
    settings = {"forward": blocks, "programs": programs, "interpret": True} | settings
    return functools.partial(range_attention_mosaic_gpu, **settings)


def assert_matches_reference(function, own, data, start, end, limit=3e-3):
    """``limit``: weights and outputs are rounded to the dtype, 1.6e-3 each as a norm in bfloat16; so are parts."""
    with interpreted():
        out, lse = jax.device_get(values(function, own, data, start, end))
    expected, expected_lse = jax.device_get(values(range_attention_reference, own, exact(data), start, end))
    assert out.dtype == data[0].dtype and lse.dtype == np.float32 and out.shape == expected.shape
    assert error(out, expected) < limit
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)  # -inf where it is -inf
    assert not np.float32(out)[~np.isfinite(np.swapaxes(expected_lse, 1, 2))].any()


ROW = 200  # two tiles of 128, four blocks of 64


@st.composite
def packed_row(draw):
    """Users of some prefix and queries, then padding: no tokens, one, more queries than prefix, tiles straddled."""
    sizes = st.sampled_from([0, 1, 5, 40, 90])
    users = draw(st.lists(st.tuples(sizes, sizes), max_size=8))
    tokens = [(u, i >= prefix) for u, (prefix, queries) in enumerate(users, start=1) for i in range(prefix + queries)]
    if draw(st.booleans()):
        tokens.sort(key=lambda token: not token[1])  # all queries first: their keys stand behind them
    tokens = (tokens + [(0, False)] * ROW)[:ROW]
    return np.array([t[0] for t in tokens], np.int32), np.array([t[1] for t in tokens])


@given(packed_row())
@settings(max_examples=2)
@example((np.arange(1, ROW + 1, dtype=np.int32), np.zeros(ROW, bool)))  # one-token users
@example(
    (
        np.repeat([1, 2, 3, 0], [130, 3, 60, 7]).astype(np.int32),
        np.repeat([0, 1, 0, 1, 0, 1, 0], [90, 40, 1, 2, 20, 40, 7]) > 0,
    )
)
def test_packed_rows_are_the_reference(row):
    ids, query = (x[None] for x in row)
    start, end = packed_ranges(ids, is_query=query)
    assert_matches_reference(PACKED, "same", arrays(ROW, ROW), start, end)


PACKED = gpu()


@pytest.mark.parametrize(
    ("blocks", "sizes", "own", "settings"),
    [
        (
            Forward(groups=3, split_loop=True, turns=False),
            {"rows": 300, "keys": 300, "dtype": jnp.float16},
            "same",
            {},
        ),
        (
            Forward(block_k=64, groups=1),
            {"rows": 70, "keys": 200, "heads": 2, "width": 128},
            "separate",
            {"splits": 2},
        ),
        (SMALL, {"rows": 70, "keys": 200, "batch": 2}, "none", {"splits": 2}),
        (Forward(block_k=64, q_stages=1), {"rows": 100, "keys": 130, "width": 256}, "separate", {}),
        (Forward(block_k=64, split_loop=True, lazy=True), {"rows": 130, "keys": 130}, "same", {}),
        (Forward(block_k=64, lazy=True, groups=1), {"rows": 70, "keys": 200}, "separate", {"splits": 2}),
    ],
    ids=["f16 groups 3", "D128 grouped heads split", "none split", "D256", "lazy", "lazy split"],
)
def test_any_ranges_are_the_reference(blocks, sizes, own, settings):
    """Ranges at random, one row in six empty or reversed; the output of an empty row without self term is 0."""
    batch, rows, keys = sizes.get("batch", 1), sizes["rows"], sizes["keys"]
    draw = np.random.default_rng(rows + keys)
    start = draw.integers(-3, keys, (batch, rows)).astype(np.int32)
    end = np.where(draw.random(start.shape) < 1 / 6, 0, draw.integers(0, keys + 9, start.shape)).astype(np.int32)
    if own == "same":
        end = np.minimum(end, np.arange(rows, dtype=np.int32))
    limit = 5e-4 if sizes.get("dtype") == jnp.float16 else 3e-3
    assert_matches_reference(gpu(blocks, **settings), own, arrays(**sizes), start, end, limit)


def test_gradients_are_the_reference_under_vmap_with_a_negative_scale():
    """Two examples are mapped, which share their values; the keys are split beside rows that are their own keys."""
    data = arrays(100, 100, batch=2)
    ids = [[1] * 40 + [2] + [3] * 50 + [0] * 9, [1] * 100]
    start, end = packed_ranges(np.array(ids, np.int32))
    data[2] = data[2].at[1].set(data[2][0])

    def project(function, q, k, v, start, end, *cotangents):
        out, lse = function(q, k, v, start, end, k, v, scale=-0.2)
        return sum(jnp.sum(x.astype(jnp.float32) * d) for x, d in zip((out, lse), cotangents))

    def one_by_one(q, k, v):
        def one(q, k, start, end, *cotangents):
            given = (x[None] for x in (q, k, v, start, end, *cotangents))
            return project(gpu(splits=2), *given)

        return jnp.sum(jax.vmap(one)(q, k, start, end, *data[5:]))

    with interpreted():
        d_q, d_k, d_v = jax.device_get(jax.jit(jax.grad(one_by_one, (0, 1, 2)))(*data[:2], data[2][0]))
    gradient = jax.jit(jax.grad(project, (1, 2, 3)), static_argnums=0)
    expected = gradient(range_attention_reference, *exact(data[:3]), start, end, *data[5:])
    for a, b in zip((d_q, d_k, d_v), (*expected[:2], expected[2].sum(0)), strict=True):
        assert a.dtype == jnp.bfloat16 and error(a, b) < 1e-2


def test_no_rows_no_keys_and_a_scale_of_zero():
    empty = jnp.zeros((1, 0), jnp.int32)
    q, k, v, k_self, v_self, *_ = arrays(0, 5)
    out, lse = range_attention_mosaic_gpu(q, k, v, empty, empty, k_self, v_self, scale=1.0)
    assert out.shape == q.shape and lse.shape == (1, 1, 0)
    q, k, v, k_self, v_self, *_ = arrays(3, 0)
    bounds = jnp.zeros((1, 3), jnp.int32)
    with interpreted():
        out, lse = gpu(Forward(block_k=64, groups=1))(q, k, v, bounds, bounds + 9, k_self, v_self, scale=0.0)
    np.testing.assert_array_equal(np.float32(out), np.float32(v_self))
    assert not lse.any()


# Lowering for Hopper, without one.


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(mosaic_utils, "_infer_arch", lambda: (9, 0))


def traced(rows, keys, batch, heads, kv_heads, width, own="same", dtype=jnp.bfloat16, gradient=False, **settings):
    """A traced call with the blocks of the table, to be lowered, and the sizes of its inputs."""
    mine, other, row = (
        jax.ShapeDtypeStruct((batch, length, number, width), dtype)
        for length, number in ((rows, heads), (keys, kv_heads), (rows, kv_heads))
    )
    bounds = jax.ShapeDtypeStruct((batch, rows), jnp.int32)

    def call(q, k, v, start, end, k_self, v_self):
        row = {"same": (k, v), "separate": (k_self, v_self), "none": (None, None)}[own]
        out, lse = range_attention_mosaic_gpu(q, k, v, start, end, *row, scale=width**-0.5, **settings)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse) if gradient else (out, lse)

    inputs = (mine, other, other, bounds, bounds, row, row)
    function = jax.grad(call, (0, 1, 2)) if gradient else call
    return jax.jit(function).trace(*inputs), [x.size for x in inputs]


REAL = {
    "causal D64": {"batch": 4, "rows": 4096, "keys": 4096, "heads": 16, "kv_heads": 16, "width": 64},
    "causal D128": {"batch": 2, "rows": 8192, "keys": 8192, "heads": 16, "kv_heads": 16, "width": 128},
    "D256 f16": {"batch": 2, "rows": 4096, "keys": 4096, "heads": 8, "kv_heads": 4, "width": 256, "dtype": jnp.float16},
    "cached D64": {"batch": 4, "rows": 128, "keys": 4096, "heads": 16, "kv_heads": 16, "width": 64, "own": "separate"},
    "no whole tiles": {
        "batch": 2,
        "rows": 3997,
        "keys": 8005,
        "heads": 4,
        "kv_heads": 2,
        "width": 64,
        "own": "separate",
    },
    "50,000 tokens": {
        "batch": 1,
        "rows": 50_000,
        "keys": 50_000,
        "heads": 4,
        "kv_heads": 1,
        "width": 64,
        "own": "none",
    },
}


@pytest.mark.portable
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL)
def test_lowers_for_hopper(hopper, shape):
    text = traced(**shape)[0].lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1 and text.count("range_attention_forward") >= 1


@pytest.mark.portable
@pytest.mark.parametrize(
    ("shape", "kernels"),
    [("causal D64", ["dq", "dk_dv"]), ("causal D128", ["dq", "dk_dv"]), ("no whole tiles", ["dq", "dk_dv"])],
)
def test_gradients_lower_for_hopper(hopper, shape, kernels):
    text = traced(**REAL[shape], gradient=True)[0].lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1 + len(kernels)
    assert all(f"range_attention_{name}" in text for name in kernels)


@pytest.mark.parametrize("width", tables.FORWARD_CANDIDATES)
def test_every_candidate_fits(width):
    for blocks in tables.FORWARD_CANDIDATES[width]:
        tables.check_forward(blocks, width)
    for blocks in tables.BACKWARD_CANDIDATES[width]:
        tables.check_backward(blocks, width)


def test_lowers_for_hopper_inside_shard_map(hopper):
    q, k, v, k_self, v_self, *_ = arrays(128, 256, batch=8)
    bounds = jnp.zeros((8, 128), jnp.int32)

    def call(q, k, v, end, k_self, v_self):
        out, _ = range_attention_mosaic_gpu(q, k, v, 0 * end, end, k_self, v_self, scale=0.1)
        return jnp.sum(jnp.square(out.astype(jnp.float32)), axis=(1, 2, 3))

    def gradients(function):
        grad = jax.grad(lambda *x: jnp.sum(function(*x)), (0, 1, 4))
        return jax.jit(grad).trace(q, k[0], v[0], bounds, k_self, v_self).lower(lowering_platforms=("cuda",)).as_text()

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    local = lambda q, k, v, *rest: call(q, k[None], v[None], *rest)  # noqa: E731
    specs = (P("data"), P(), P(), P("data"), P("data"), P("data"))
    text = gradients(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data")))
    assert "@mosaic_gpu" in text and "all_reduce" in text


def array_sizes(jaxpr):
    """Elements of every array that is made in a jaxpr or within its equations, kernels included."""
    for equation in jaxpr.eqns:
        yield from (var.aval.size for var in equation.outvars if hasattr(var.aval, "size"))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from array_sizes(inner)


@pytest.mark.parametrize(("rows", "splits"), [(1024, 1), (128, 8)])
def test_no_array_of_rows_by_keys_and_no_copy_of_keys_per_query_head(rows, splits):
    """Nothing that is made is larger than the largest input, here K: 16 query heads share 2, and parts share K."""
    found, inputs = traced(rows, 8192, 1, 16, 2, 64, own="separate", splits=splits)
    assert 16 * rows * 8192 > max(inputs)
    sizes = list(array_sizes(found.jaxpr))
    assert len(sizes) > 100 and max(sizes) <= max(inputs)


# Choice.

CALL = Call(4, 4096, 4096, 16, 4, 64, "bfloat16", True, "gpu")


@dataclasses.dataclass
class Device:
    compute_capability: str
    device_kind: str = "NVIDIA Some GPU"


def test_what_cannot_be_served_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device("9.0")])
    assert supports(CALL) is None
    for change, reason in [
        ({"platform": "tpu"}, "the default backend is tpu"),
        ({"dtype": "float32"}, "dtype float32 is not one of bfloat16, float16"),
        ({"head_width": 96}, "head width 96 is not one of 64, 128, 256"),
        ({"rows": 0}, "0 rows and 4096 keys"),
        ({"keys": 0}, "4096 rows and 0 keys"),
    ]:
        assert reason in supports(dataclasses.replace(CALL, **change))
    monkeypatch.setattr(jax, "devices", lambda: [Device("10.0")])
    assert "NVIDIA Some GPU has 10.0" in supports(CALL)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"dtype": jnp.float32}, {}, "dtype float32 is not one of"),
        ({"width": 32}, {}, "head width 32 is not one of"),
        ({}, {"forward": Forward(block_k=100)}, "block_k one of 64"),
        ({}, {"forward": Forward(groups=4)}, "groups is 1 to 3"),
        ({}, {"forward": Forward(block_k=64, stages=6)}, "\\+ q_stages \\+ 2 stages at most 12"),
        ({"width": 256}, {"forward": Forward()}, "bytes of shared memory, of which there are 232448"),
        ({}, {"backward": Backward(keys_groups=4)}, "groups at most 3"),
        ({}, {"backward": Backward(rows_tiles=0)}, "counts are 1 or more"),
        ({}, {"backward": Backward(keys_stages=6)}, "keys_groups \\+ keys_tiles \\+ 2 keys_stages is at most 14"),
        ({"width": 128}, {"backward": Backward(keys_tiles=2, keys_stages=3)}, "give fewer keys_tiles or keys_stages"),
        ({"width": 256}, {"backward": Backward(keys_stages=1)}, "give fewer rows_tiles or rows_stages"),
    ],
)
def test_arrays_and_blocks_that_the_kernel_does_not_have(change, settings, message):
    q, k, v, *_ = arrays(64, 64, **change)
    bounds = jnp.zeros((1, 64), jnp.int32)
    with pytest.raises(ValueError, match=message):
        range_attention_mosaic_gpu(q, k, v, bounds, bounds, k, v, scale=1.0, **settings)


@pytest.mark.parametrize(
    ("items", "keys", "splits"),
    [
        (64, 4096, 2),
        (32, 8192, 4),
        (67, 4096, 3),
        (192, 4096, 2),
        (264, 4096, 1),
        (1, 100_000, 131),
        (1, 1500, 2),
        (1, 5, 1),
    ],
)
def test_keys_are_split_so_that_the_busiest_program_is_done_soonest(items, keys, splits):
    assert split_number(items, keys, 132, Forward()) == splits


@pytest.mark.portable
def test_blocks_are_found_by_device_head_width_and_length(monkeypatch):
    long, short, other = Forward(groups=3), Forward(), Forward(groups=1)
    monkeypatch.setattr(
        tables,
        "TABLE",
        {
            ("NVIDIA H100", "forward", 64): ((128, short), (4096, long)),
            ("NVIDIA H100 PCIe", "forward", 64): ((4096, other),),
            ("NVIDIA H100", "backward", 64): ((4096, Backward()),),
        },
    )
    find = tables.forward_blocks
    assert [find("NVIDIA H100 80GB HBM3", 64, n) for n in (1, 128, 129, 10**6)] == [short, short, long, long]
    assert find("NVIDIA H100 PCIe", 64, 128) == other and find("NVIDIA H200", 64, 128) == short
    assert tables.backward_blocks("NVIDIA H100 PCIe", 64, 1) == Backward()
    with pytest.raises(ValueError, match=r"no forward blocks for head width 96 .* head widths \[64\]"):
        find("NVIDIA H100", 96, 1)

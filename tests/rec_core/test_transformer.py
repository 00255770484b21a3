"""The decoder: against a plain NumPy Llama / Qwen layer, packed and cached against recomputed, on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rec_core.attention import ranges_from_lengths, ranges_from_segments
from rec_core.sharding import make_mesh, path_name, spec_for
from rec_core.transformer import (
    KVCache,
    RopeScaling,
    Transformer,
    TransformerConfig,
    check_append,
    empty_cache,
    rotary_angles,
    rotate,
)

CONFIG = TransformerConfig(
    width=16, layers=2, heads=4, kv_heads=2, head_width=6, hidden=24, qkv_bias=True, qk_norm=True
)
BATCH, LENGTH = 2, 12


def tokens(length=LENGTH, batch=BATCH, seed=1):
    return jax.random.normal(jax.random.key(seed), (batch, length, CONFIG.width))


def causal(length=LENGTH, batch=BATCH):
    """positions, k_start, k_end of rows with one user each."""
    row = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return row, jnp.zeros_like(row), row


@functools.cache
def parameters(config=CONFIG):
    """Every parameter moved off its initial value, so that no bias or scale is without effect."""
    params = jax.jit(Transformer(config).init)(jax.random.key(0), tokens(), *causal())
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return jax.tree.unflatten(tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@functools.partial(jax.jit, static_argnames=("config", "return_kv"))
def run(params, *args, config=CONFIG, **kwargs):
    return Transformer(config).apply(params, *args, **kwargs)


def numpy_decoder(params, x, config):
    """One user's causal decoder in float64, written after Llama / Qwen3 of Hugging Face `transformers`."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    c, length = config, len(x)

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + c.norm_eps) * weight

    inverse = 1.0 / c.rope_theta ** (np.arange(0, c.head_width, 2) / c.head_width)
    angles = np.outer(np.arange(length), inverse)
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def rope(x):
        half = c.head_width // 2
        return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin

    for layer in range(c.layers):
        w = jax.tree.map(lambda a, n=layer: a[n], p["layers"])
        a, h = w["attention"], norm(x, w["attention_norm"]["scale"])
        q, k, v = (
            (h @ a[n]["kernel"] + a[n].get("bias", 0.0)).reshape(length, -1, c.head_width)
            for n in ("query", "key", "value")
        )
        if c.qk_norm:
            q, k = norm(q, a["query_norm"]["scale"]), norm(k, a["key_norm"]["scale"])
        q, k = rope(q), rope(k)
        k, v = (np.repeat(x, c.heads // c.kv_heads, axis=1) for x in (k, v))
        logits = np.einsum("thd,shd->hts", q, k) / np.sqrt(c.head_width)
        logits = np.where(np.tril(np.ones((length, length), bool)), logits, -np.inf)
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        out = np.einsum("hts,shd->thd", weight / weight.sum(-1, keepdims=True), v).reshape(length, -1)
        x = x + out @ a["output"]["kernel"]
        m, h = w["mlp"], norm(x, w["mlp_norm"]["scale"])
        gate = h @ m["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"]["kernel"])) @ m["down"]["kernel"]
    return norm(x, p["final_norm"]["scale"])


@pytest.mark.portable
@pytest.mark.parametrize("qwen", [True, False])
def test_is_the_published_decoder(qwen):
    config = CONFIG if qwen else dataclasses.replace(CONFIG, qkv_bias=False, qk_norm=False)
    params = parameters(config)
    out = run(params, tokens(), *causal(), config=config)
    for got, x in zip(out, np.asarray(tokens(), np.float64)):
        np.testing.assert_allclose(got, numpy_decoder(params, x, config), rtol=2e-4, atol=2e-4)
    assert config.parameters == sum(x.size for x in jax.tree.leaves(params))


def test_parameter_names_and_leading_layer_axis():
    names = {path_name(path).removeprefix("params/") for path, _ in jax.tree.leaves_with_path(parameters())}
    inside = {f"layers/attention/{n}/kernel" for n in ("query", "key", "value", "output")}
    inside |= {f"layers/attention/{n}/bias" for n in ("query", "key", "value")}
    inside |= {f"layers/attention/{n}/scale" for n in ("query_norm", "key_norm")}
    inside |= {f"layers/mlp/{n}/kernel" for n in ("gate", "up", "down")}
    inside |= {"layers/attention_norm/scale", "layers/mlp_norm/scale"}
    assert names == inside | {"final_norm/scale"}
    assert {x.shape[0] for x in jax.tree.leaves(parameters()["params"]["layers"])} == {CONFIG.layers}


@pytest.mark.portable
def test_rotary_turns_pairs_and_keeps_only_distance():
    x = jnp.asarray([1.0, 0.0, 0.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 6)  # pairs (0, 3), (1, 4), (2, 5)
    turned = rotate(x, rotary_angles(jnp.asarray([[5]]), 6, 1000.0)).ravel()
    slow = 5 * 1000.0 ** (-4 / 6)
    np.testing.assert_allclose(
        turned, [np.cos(5), 0, -2 * np.sin(slow), np.sin(5), 0, 2 * np.cos(slow)], rtol=1e-5, atol=1e-6
    )
    q, k = tokens(1, 1)[..., None, :6], tokens(1, 1, seed=3)[..., None, :6]
    products = [
        jnp.sum(
            rotate(q, rotary_angles(jnp.asarray([[i]]), 6, 1e4)) * rotate(k, rotary_angles(jnp.asarray([[j]]), 6, 1e4))
        )
        for i, j in ((9, 4), (105, 100))
    ]
    np.testing.assert_allclose(*products, rtol=1e-4)


def test_scaled_rotary_turns_slowly_where_it_turns_seldom():
    """Llama 3: periods below context / high keep, above context / low are `factor` times as long, between a blend."""
    theta, width, position = 1000.0, 8, jnp.asarray([[3]])
    frequency = np.array([1000.0 ** (-2 * i / 8) for i in range(4)])  # periods 6.3, 35, 199, 1117
    linear = rotary_angles(position, width, theta, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(linear.ravel(), 3 * frequency / 4, rtol=1e-5)
    llama3 = RopeScaling("llama3", 8.0, low_turns=1.0, high_turns=4.0, context=400)
    turns = 400 * frequency[2] / (2 * np.pi)
    assert 1 < turns < 4
    blend = (turns - 1) / 3
    expected = [frequency[0], frequency[1], frequency[2] * (blend + (1 - blend) / 8), frequency[3] / 8]
    np.testing.assert_allclose(rotary_angles(position, width, theta, llama3).ravel() / 3, expected, rtol=1e-5)
    scaled = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 2.0))
    row, start, end = causal()
    np.testing.assert_allclose(
        run(parameters(), tokens(), 2 * row, start, end, config=scaled),
        run(parameters(), tokens(), row, start, end),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("yarn", 2.0), "kind='yarn': choose one of linear, llama3"),
        (("linear", 0.5), "factor=0.5: must be finite and at least 1"),
        (("llama3", 8.0, 4.0, 4.0), "low_turns=4.0, high_turns=4.0"),
        (("llama3", 8.0, 1.0, 4.0, 0), "context=0"),
    ],
)
def test_rope_scaling_says_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(*values)


PACKED_IDS = np.array([[1] * 5 + [2] * 3 + [1] * 2 + [2] + [0]] * BATCH, np.int32)
PACKED_QUERY = np.array([[False] * 8 + [True] * 3 + [False]] * BATCH)
PACKED_POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 5, 5, 3, 0]] * BATCH, np.int32)


def packed_inputs():
    return tokens(), PACKED_POSITIONS, *ranges_from_segments(PACKED_IDS, is_query=PACKED_QUERY)


@pytest.mark.portable
def test_packed_equals_separate_and_grouped_equals_one_by_one():
    out = np.asarray(run(parameters(), *packed_inputs()))
    assert np.isfinite(out).all()
    x = np.asarray(tokens())
    for user, queries in ((1, (8, 9)), (2, (10,))):
        prefix = np.flatnonzero((PACKED_IDS[0] == user) & ~PACKED_QUERY[0])
        for query in queries:
            alone = np.append(prefix, query)
            padded = np.zeros_like(x)
            padded[:, : alone.size] = x[:, alone]
            separate = run(parameters(), padded, *causal())  # what stands behind a user changes nothing
            np.testing.assert_allclose(out[:, alone], separate[:, : alone.size], rtol=1e-5, atol=1e-5)


def test_gradients_prove_what_a_token_may_depend_on():
    """Through all layers: a later token, another user and another query have gradient exactly zero."""
    x, *layout = packed_inputs()

    @jax.jit
    def gradients(x):
        _, vjp = jax.vjp(lambda x: jnp.sum(Transformer(CONFIG).apply(parameters(), x, *layout) ** 3, (0, 2)), x)
        return jax.vmap(vjp)(jnp.eye(LENGTH))[0]

    touched = np.asarray(jnp.any(gradients(x) != 0, axis=-1))  # [row i, B, token j]
    row = np.arange(LENGTH)
    start, end = (np.asarray(a)[0][:, None] for a in layout[1:])
    expected = ((row >= start) & (row < end)) | np.eye(LENGTH, dtype=bool)
    np.testing.assert_array_equal(touched, np.broadcast_to(expected[:, None], touched.shape))


@pytest.mark.portable
def test_prefix_then_append_is_full_recomputation_and_cached_queries_are_grouped_queries():
    """Prefixes of 5 and 3 tokens, 4 more appended to each, then 3 queries that must not see each other."""
    params, x, slots, new, asked = parameters(), tokens(), 14, 4, 3
    full, own = run(params, x, *causal(), return_kv=True)
    assert own.k.shape == (CONFIG.layers, BATCH, LENGTH, CONFIG.kv_heads, CONFIG.head_width)

    lengths = jnp.asarray([5, 3])
    position, start, end = causal()
    first, cache = run(
        params,
        x,
        position,
        start,
        end,
        cache=empty_cache(CONFIG, BATCH, slots),
        cache_lengths=lengths * 0,
        return_kv=True,
    )
    np.testing.assert_allclose(first, full, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cache.k[:, :, :LENGTH], own.k, rtol=1e-5, atol=1e-5)
    # Forget all but the prefix; what stood in the other slots must not matter, so leave rubbish there.
    keep = (jnp.arange(slots) < lengths[:, None])[None, :, :, None, None]
    cache = KVCache(*(jnp.where(keep, a, 55.0) for a in cache))

    place = lengths[:, None] + jnp.arange(new)
    added = jnp.take_along_axis(x, place[..., None], axis=1)
    out, cache = run(
        params, added, place, *ranges_from_lengths(lengths, new, append=True),
        cache=cache, cache_lengths=lengths, return_kv=True,
    )  # fmt: skip
    np.testing.assert_allclose(out, jnp.take_along_axis(full, place[..., None], axis=1), rtol=1e-5, atol=1e-5)

    lengths = lengths + new
    queries = tokens(asked, seed=5)
    position = jnp.broadcast_to(lengths[:, None], (BATCH, asked))
    answers, same = run(params, queries, position, *ranges_from_lengths(lengths, asked), cache=cache, return_kv=True)
    np.testing.assert_array_equal(same.k, cache.k)
    row = np.arange(LENGTH)
    query = (row >= lengths[:, None]) & (row < lengths[:, None] + asked)
    ids = np.where(row < lengths[:, None] + asked, 1, 0)
    at = lengths[:, None] + jnp.arange(asked)
    grouped = x.at[jnp.arange(BATCH)[:, None], at].set(queries)
    position = jnp.minimum(row, lengths[:, None])
    expected = run(params, grouped, position, *ranges_from_segments(ids, is_query=query))
    np.testing.assert_allclose(answers, jnp.take_along_axis(expected, at[..., None], 1), rtol=1e-5, atol=1e-5)


def test_a_token_without_a_slot_leaves_the_cache_alone_and_check_append_names_it():
    full = KVCache(*(x + 1.0 for x in empty_cache(CONFIG, BATCH, 6)))
    lengths = jnp.asarray([4, 6])
    ranges = ranges_from_lengths(lengths, 3, append=True)
    args = (tokens(3), ranges[1], *ranges)
    _, cache = run(parameters(), *args, cache=full, cache_lengths=lengths, return_kv=True)
    changed = np.asarray(jnp.any(cache.k != full.k, axis=(0, 3, 4)))
    np.testing.assert_array_equal(changed, [[False] * 4 + [True] * 2, [False] * 6])
    with pytest.raises(ValueError, match="example 1: 6 cached and 3 new tokens do not fit a cache of 6 slots"):
        check_append(full, lengths, np.array([2, 3]))
    check_append(full, lengths, np.array([2, 0]))


def test_rematerialisation_and_unrolling_change_memory_only():
    x, *layout = packed_inputs()

    def loss(params, remat, scanned=True):
        config = dataclasses.replace(CONFIG, remat=remat)
        return jnp.sum(Transformer(config).apply(params, x, *layout, deterministic=scanned) ** 2)

    modes = (("none",), ("full",), ("dots",), ("none", False))
    gradients = jax.jit(lambda p: [jax.grad(loss)(p, *mode) for mode in modes])(parameters())
    for other in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), other, gradients[0])

    def saved(remat):
        residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, remat), p)[1], parameters())
        return sum(x.size for x in jax.tree.leaves(residuals))

    assert saved("full") < saved("dots") < saved("none")


def test_dropout_follows_its_key():
    config = dataclasses.replace(CONFIG, dropout=0.5)

    @functools.partial(jax.jit, static_argnums=1)
    def out(seed, deterministic):
        rngs = {"dropout": jax.random.key(seed)}
        return Transformer(config).apply(parameters(), tokens(), *causal(), deterministic=deterministic, rngs=rngs)

    np.testing.assert_array_equal(out(1, False), out(1, False))
    assert not np.allclose(out(1, False), out(2, False))
    np.testing.assert_allclose(out(1, True), run(parameters(), tokens(), *causal()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_compute_is_near_float32(dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    out = run(parameters(), tokens(), *causal(), config=config)
    assert out.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.float32(out), run(parameters(), tokens(), *causal()), atol=0.15)
    fresh = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens(), *causal())
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


def test_a_mesh_gives_the_numbers_of_one_device():
    """4 x 2 with the kernels split over "model": loss and gradients."""
    batch, params = 8, parameters()
    x, layout = tokens(batch=batch), [jnp.tile(a[:1], (batch, 1)) for a in packed_inputs()[1:]]

    def loss(params, x, *layout):
        return jnp.mean(Transformer(CONFIG).apply(params, x, *layout) ** 2)

    expected = jax.jit(jax.value_and_grad(loss))(params, x, *layout)
    mesh = make_mesh(4, 2)
    split = jax.NamedSharding(mesh, P("data"))
    placed = jax.tree.map_with_path(
        lambda path, a: jax.NamedSharding(mesh, spec_for(path_name(path), a.shape, mesh)), params
    )
    assert any("model" in s.spec for s in jax.tree.leaves(placed))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss), in_shardings=(placed, *[split] * 4), out_shardings=(None, placed))
        got = step(params, x, *layout)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got[1], expected[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "heads=4, kv_heads=3: kv_heads must divide heads"),
        ({"head_width": 5}, "head_width=5: rotary positions turn pairs"),
        ({"layers": 0}, "layers=0: must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"dtype": "int8"}, "dtype='int8': choose float32, bfloat16 or float16"),
        ({"remat": "some"}, "remat='some': choose one of none, full, dots"),
        ({"attention": "flash"}, "attention='flash': choose None or one of"),
    ],
)
def test_config_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_calls_say_what_is_wrong():
    shapes = functools.partial(jax.eval_shape, Transformer(CONFIG).apply, parameters())
    position, start, end = causal()
    with pytest.raises(ValueError, match=r"x has shape \(2, 12, 15\), expected \[batch, length, width=16\]"):
        shapes(tokens()[..., :15], position, start, end)
    with pytest.raises(ValueError, match=r"positions has shape \(2, 11\)"):
        shapes(tokens(), position[:, 1:], start, end)
    with pytest.raises(ValueError, match="cache_lengths without a cache"):
        shapes(tokens(), position, start, end, cache_lengths=jnp.zeros(BATCH, jnp.int32))
    with pytest.raises(ValueError, match=r"cache.k is float32\(2, 3, 5, 2, 6\), expected float32\(2, 2, 5, 2, 6\)"):
        shapes(tokens(), position, start, end, cache=empty_cache(CONFIG, 3, 5))

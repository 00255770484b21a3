"""The language model: `transformers`' logits, its layers in two runs, texts packed and alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bahe_jax import language_model, pack_texts, read
from bahe_jax.language_model import Config
from rec_core.attention import ranges_from_segments
from rec_core.sharding import make_mesh, put_batch
from rec_core.transformer import TransformerConfig

DECODER = TransformerConfig(width=8, layers=2, heads=2, kv_heads=1, head_width=4, hidden=12)
TINY = Config("llama", vocabulary=11, transformer=DECODER, tied=True)


@pytest.mark.portable
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gguf"])
def test_logits_are_those_of_transformers(golden, name):
    case = golden(name)
    out = case.apply(case.params, case.batch, case.config)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, case.stored["logits"], atol=1e-3)
    assert case.config.parameters == sum(x.size for x in jax.tree.leaves(case.params))


def test_lower_and_then_upper_layers_are_the_whole_model(golden):
    case, at = golden("llama"), 1
    batch = case.batch

    @jax.jit
    def both(params):
        lower, upper = language_model.cut(params, 0, at), language_model.cut(params, at)
        middle = language_model.hidden(lower, batch, case.config)
        ranges = ranges_from_segments(batch.segment_ids)
        top = language_model.layers(upper, middle, batch.positions, *ranges, case.config)
        return language_model.logits(upper, top, case.config)

    np.testing.assert_allclose(both(case.params), case.stored["logits"], atol=1e-4)
    none, x = language_model.cut(case.params, 3), jnp.ones((1, 2, 24))
    zeros = jnp.zeros((1, 2), jnp.int32)
    np.testing.assert_array_equal(language_model.layers(none, x, zeros, zeros, zeros, case.config), x)


def test_a_cut_parts_what_is_trained_from_what_is_frozen(golden):
    case = golden("qwen2")
    upper = language_model.cut(case.params, 2)
    assert {x.shape[0] for x in jax.tree.leaves(upper["decoder"]["layers"])} == {1}
    squares = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(language_model.cut(p, 2)))  # noqa: E731
    gradient = jax.jit(jax.grad(squares))(case.params)
    for x in jax.tree.leaves(gradient["decoder"]["layers"]):
        assert not x[:2].any() and x[2].any()
    with pytest.raises(ValueError, match=r"layers \[2, 5\) of 3: need 0 <= start <= stop <= 3"):
        language_model.cut(case.params, 2, 5)


@pytest.mark.portable
def test_packed_texts_are_texts_alone(golden):
    case, draw = golden("llama"), np.random.default_rng(1)
    texts = [draw.integers(0, case.config.vocabulary, length) for length in (5, 1, 6, 7, 3, 1)]
    packed = pack_texts(texts, 12)
    out = np.asarray(case.apply(case.params, packed.batch(), case.config))
    assert packed.rows == 2 and (packed.batch().segment_ids[:, -1] == 0).any() and np.isfinite(out).all()
    alone = [pack_texts([text], 12).batch() for text in texts]
    for first in range(0, len(texts), 2):
        pair = jax.tree.map(lambda *rows: np.concatenate(rows), *alone[first : first + 2])
        for number, each in enumerate(np.asarray(case.apply(case.params, pair, case.config)), start=first):
            row, begin, length = packed.plan.row[number], packed.plan.offset[number], len(texts[number])
            np.testing.assert_allclose(out[row, begin : begin + length], each[:length], atol=1e-4)


def test_loss_is_the_mean_over_tokens_after_the_first_of_their_text(golden):
    case = golden("qwen3")
    texts = [case.stored["tokens"][0, :5], case.stored["tokens"][0, 5:12], case.stored["tokens"][1, :1]]
    batch = pack_texts(texts, 12).batch()
    scores = jax.nn.log_softmax(case.apply(case.params, batch, case.config))
    expected = [
        -scores[r, t, batch.tokens[r, t + 1]]
        for r in range(len(batch.tokens))
        for t in range(11)
        if batch.segment_ids[r, t] == batch.segment_ids[r, t + 1] > 0
    ]
    assert len(expected) == 4 + 6 + 0
    of = jax.jit(language_model.loss, static_argnums=2)
    loss, aux = of(case.params, jax.tree.map(jnp.asarray, batch), case.config)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)
    assert aux["loss"][1] == 10


def test_a_mesh_gives_the_numbers_of_one_device(golden):
    case, mesh = golden("qwen3"), make_mesh(4, 2)
    params, _ = read(case.path, mesh=mesh)
    assert params["tables"]["token"].sharding.spec[0] == ("data", "model")
    batch = jax.tree.map(lambda x: np.tile(x, (2, 1)), case.batch)
    with jax.set_mesh(mesh):
        out = case.apply(params, put_batch(batch, mesh), case.config)
    np.testing.assert_allclose(out, np.tile(case.stored["logits"], (2, 1, 1)), atol=1e-3)


def test_half_precision_is_near(golden):
    case = golden("llama")
    params, config = read(case.path, dtype="bfloat16")
    assert config.transformer.dtype == "bfloat16"
    batch = case.batch.replace(positions=jnp.broadcast_to(jnp.arange(12), (2, 12)))
    np.testing.assert_allclose(
        case.apply(params, batch, config), case.apply(case.params, batch, case.config), atol=0.35
    )  # fmt: skip
    assert case.config.running(remat="full").transformer.remat == "full"


def test_fresh_parameters():
    table = jax.jit(lambda key: language_model.init(key, TINY)["tables"]["token"])(jax.random.key(0))
    assert table.shape == (11, 8) and 0.01 < table.std() < 0.03
    untied = dataclasses.replace(TINY, tied=False)
    shapes = jax.eval_shape(functools.partial(language_model.init, config=untied), jax.random.key(0))
    assert untied.parameters == sum(x.size for x in jax.tree.leaves(shapes)) == TINY.parameters + 8 * 11


def test_check_names_row_and_value(golden):
    case = golden("llama")
    good = pack_texts([np.arange(5), np.arange(3)], 8).batch()
    language_model.check(good, case.config)
    for change, message in (
        ({"tokens": good.tokens + 36}, r"Batch.tokens\[0, 4\] is 40: must be from 0 to 39"),
        ({"tokens": good.tokens * 1.0}, r"Batch.tokens is float64\(1, 8\)"),
        ({"positions": good.positions - 1}, r"Batch.positions\[0, 0\] is -1"),
        ({"segment_ids": good.segment_ids[:, 1:]}, r"Batch.segment_ids is int32\(1, 7\)"),
        ({"segment_ids": np.array([[1, 2, 1, 1, 1, 1, 1, 0]])}, "segment 1 begins a second time"),
    ):
        with pytest.raises(ValueError, match=message):
            language_model.check(good.replace(**change), case.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gpt2"}, "architecture='gpt2': choose one of llama, qwen2, qwen3"),
        ({"architecture": "qwen2"}, "architecture='qwen2' with transformer.qkv_bias=False"),
        ({"vocabulary": 0}, "vocabulary=0"),
        ({"eos": (3, 11)}, r"eos=\(3, 11\): must be below vocabulary=11"),
        ({"bos": -1}, "bos=-1"),
    ],
)
def test_config_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
    with pytest.raises(ValueError, match=r"\['width'\] is part of the model"):
        TINY.running(width=3)

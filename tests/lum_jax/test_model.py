"""LUM step 1: the loss by hand, packing, and what an output may depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lum_examples import apply, init, loss, objective, packed, tiny

import lum_jax
from lum_jax import model


@pytest.mark.portable
@pytest.mark.parametrize("condition_tokens", [True, False])
def test_packed_rows_equal_one_user_a_row(condition_tokens):
    config = tiny(condition_tokens=condition_tokens)
    users = [[5, 9, 2, 7], [3], [8, 8, 21, 4, 6]]
    params = init(jax.random.key(0), config)
    together = apply(params, packed([users, [], []], 11), config).outputs[0]  # one shape, compiled once
    apart = apply(params, packed([[u] for u in users], 11), config).outputs
    np.testing.assert_allclose(together[:4], apart[0, :4], atol=2e-6)
    np.testing.assert_allclose(together[4:5], apart[1, :1], atol=2e-6)
    np.testing.assert_allclose(together[5:10], apart[2, :5], atol=2e-6)
    assert float(jnp.abs(together[:4]).max()) > 0.1  # not equal because all zero


def test_output_at_a_condition_sees_the_past_and_its_own_condition_only():
    """Gradients with respect to every token: zero at and past i_l, at other users, alive before."""
    config = tiny()
    params = init(jax.random.key(1), config)
    tokens, segments, positions, _ = model.prefix_tokens(params, packed([[[5, 9, 2, 7], [3, 4, 6]]], 8), config)
    k_start, k_end = model.ranges_from_segments(segments)

    def output(tokens, place):
        return model.encode(params, config, tokens, positions, k_start, k_end)[0, place].sum()

    influence = jax.jit(jax.vmap(jax.grad(output), in_axes=(None, 0)))(tokens, jnp.arange(0, 14, 2))
    influence = np.abs(influence[:, 0]).max(-1)  # [condition l, token]
    for event in range(7):
        first = 0 if event < 4 else 8
        allowed = np.zeros(16, bool)
        allowed[first : 2 * event + 1] = True
        assert (influence[event][~allowed] == 0).all()
        assert (influence[event][allowed] > 0).all()


def test_without_condition_tokens_an_item_is_found_from_the_items_before_it():
    config = tiny(condition_tokens=False)
    params = init(jax.random.key(2), config)
    first, second = packed([[[5, 9, 2, 7]]], 4), packed([[[5, 9, 11, 12]]], 4)
    a, b = (apply(params, x, config).outputs[0] for x in (first, second))
    np.testing.assert_array_equal(a[:3], b[:3])
    assert not np.allclose(a[3], b[3])
    assert (np.asarray(a[0]) == 0).all()
    np.testing.assert_array_equal(model.weights(first, config), [[0, 1, 1, 1]])


@pytest.mark.portable
def test_objective_by_hand():
    """Two rows, one padded slot, a repeated item: -log softmax over the positive and the batch's other items."""
    config = tiny(similarity="dot", temperature=0.5, transformer=lum_jax.encoder("6k"))
    batch = packed([[[5, 9]], [[5]]], 2)
    rng = np.random.default_rng(0)
    outputs, items = (rng.standard_normal((2, 2, 16)).astype(np.float32) for _ in range(2))
    items[1, 0] = items[0, 0]  # item 5 has one embedding
    outputs[1, 1] = np.nan  # what padding holds must not matter
    value, aux = objective({"net": {}}, model.Output(outputs, items), batch, config)

    def term(o, positive, negatives):
        scores = np.array([o @ positive, *(o @ n for n in negatives)]) / 0.5
        return -(scores[0] - np.log(np.exp(scores).sum()))

    five, nine = items[0, 0], items[0, 1]
    expected = [
        term(outputs[0, 0], five, [nine]),  # the other 5 is the positive itself, so it is masked
        term(outputs[0, 1], nine, [five, five]),
        term(outputs[1, 0], five, [nine]),
    ]
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(aux["loss"], (sum(expected), 3), rtol=1e-5)


def test_own_items_can_be_left_out_of_the_negatives():
    config = tiny(similarity="dot", temperature=1.0, own_items=False)
    batch = packed([[[5, 9], [7]]], 3)
    rng = np.random.default_rng(1)
    outputs, items = (rng.standard_normal((1, 3, 16)).astype(np.float32) for _ in range(2))
    value, _ = objective({"net": {}}, model.Output(outputs, items), batch, config)
    rivals = {0: [2], 1: [2], 2: [0, 1]}
    scores = outputs[0] @ items[0].T
    expected = [np.log1p(np.exp(scores[l, r] - scores[l, l]).sum()) for l, r in rivals.items()]
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)


def test_drawn_negatives_are_valid_and_near_uniform():
    valid = np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)
    pool = {"id": jnp.arange(8), "valid": jnp.asarray(valid)}
    drawn = np.asarray(model._draw(pool, 4000, jax.random.key(0))["id"])
    counts = np.bincount(drawn, minlength=8)
    assert (counts[~valid] == 0).all()
    np.testing.assert_allclose(counts[valid] / 4000, 0.25, atol=0.04)
    evenly = np.bincount(np.asarray(model._draw(pool, 8, None)["id"]), minlength=8)
    np.testing.assert_array_equal(evenly, 2 * valid)


def test_given_negatives_and_popularity_correction_change_the_loss():
    config = tiny(negatives="given", popularity_correction=True, similarity="dot", temperature=1.0)
    batch = packed([[[5, 9]]], 2)
    batch = batch.replace(
        log_q=np.log(np.array([[0.5, 0.25]], np.float32)),
        negatives={"item": np.array([[7, 9]], np.int32)},
        negative_log_q=np.log(np.array([[0.125, 0.25]], np.float32)),
    )
    lum_jax.check(batch, config)
    params = init(jax.random.key(0), tiny())  # the same parameters
    output = apply(params, batch, config)
    o, e, n = (np.asarray(x[0], np.float64) for x in (output.outputs, output.items, output.negatives))
    first = [o[0] @ e[0] - np.log(0.5), o[0] @ n[0] - np.log(0.125), o[0] @ n[1] - np.log(0.25)]
    second = [o[1] @ e[1] - np.log(0.25), o[1] @ n[0] - np.log(0.125)]  # the given 9 is the positive
    expected = np.mean([-(s[0] - np.log(np.exp(s).sum())) for s in (first, second)])
    value, _ = loss(params, batch, config)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_learned_temperature_receives_a_gradient():
    config = tiny(learn_temperature=True)
    made = jax.eval_shape(lambda key: lum_jax.init(key, config), jax.random.key(0))["net"]
    assert made["log_temperature"].shape == ()
    rng = np.random.default_rng(0)
    output = model.Output(*rng.standard_normal((2, 1, 3, 16)).astype(np.float32))

    def value(net):
        return lum_jax.objective({"net": net}, output, packed([[[5, 9, 2]]], 3), config)[0]

    at = jnp.float32(np.log(0.3))
    loss, slope = jax.jit(jax.value_and_grad(value))({"log_temperature": at})
    fixed = objective({"net": {}}, output, packed([[[5, 9, 2]]], 3), tiny(temperature=0.3))[0]
    np.testing.assert_allclose(loss, fixed, rtol=1e-5)
    step = 1e-2
    around = [
        objective({"net": {}}, output, packed([[[5, 9, 2]]], 3), tiny(temperature=float(np.exp(at + d))))[0]
        for d in (-step, step)
    ]
    np.testing.assert_allclose(slope["log_temperature"], (around[1] - around[0]) / (2 * step), rtol=1e-2)


@pytest.mark.parametrize("size", lum_jax.SIZES)
def test_sizes_are_named_by_their_parameters(size):
    unit = {"k": 1e3, "m": 1e6, "b": 1e9}[size[-1]]
    transformer = lum_jax.encoder(size)
    shapes = jax.eval_shape(
        lambda key: lum_jax.init(key, tiny(transformer=transformer))["net"]["encoder"], jax.random.key(0)
    )
    counted = sum(x.size for x in jax.tree.leaves(shapes))
    assert abs(counted / (float(size[:-1]) * unit) - 1) < 0.07
    assert counted == transformer.parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": {"item": np.array([[5, 30, 0]], np.int32)}}, r"item.*30.*row 0, position 1.*\[0, 30\)"),
        ({"positions": np.array([[0, 2, 0]], np.int32)}, r"positions\[0, 1\] is 2, must be 1"),
        ({"segment_ids": np.zeros((1, 3), np.int32)}, "every event is padding"),
        ({"content": np.array([[[0.0], [np.nan], [0.0]]], np.float32)}, "content.*nan.*row 0, position 1"),
    ],
)
def test_check_names_field_row_and_value(change, message):
    config = tiny(item_content=1)
    batch = packed([[[5, 9]]], 3, content=1)
    lum_jax.check(batch, config)
    with pytest.raises(ValueError, match=message):
        lum_jax.check(batch.replace(**change), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "movie"}, "target='movie' must name"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"condition": ()}, "condition=\\(\\)"),
        ({"negatives": "all"}, "negatives='all'"),
    ],
)
def test_config_says_value_rule_and_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny(), **change)

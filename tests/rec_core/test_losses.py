import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_core import losses

N, K, D = 13, 9, 4


def data(seed=0):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    arrays = {"queries": normal(N, D), "positives": normal(N, D), "negatives": normal(K, D)}
    options = {
        "positive_ids": jnp.asarray(draw.integers(0, 6, N)),
        "negative_ids": jnp.asarray(draw.integers(0, 6, K)),
        "weights": jnp.asarray(draw.integers(0, 3, N), jnp.float32),
        "negative_mask": jnp.asarray(draw.random(K) < 0.8),
        "query_users": jnp.asarray(draw.integers(0, 4, N)),
        "negative_users": jnp.asarray(draw.integers(0, 4, K)),
        "log_q": normal(K),
        "positive_log_q": normal(N),
    }
    return arrays, options


def slow_info_nce(queries, positives, negatives, o, temperature, cosine):
    """One query and one negative at a time, in float64."""
    queries, positives, negatives = (np.asarray(x, np.float64) for x in (queries, positives, negatives))
    o = {name: np.asarray(x, np.float64) for name, x in o.items()}
    total = 0.0
    for n in range(len(queries)):

        def sim(other, n=n):
            length = np.linalg.norm(queries[n]) * np.linalg.norm(other) if cosine else 1.0
            return queries[n] @ other / length / temperature

        positive = np.exp(sim(positives[n]) - o["positive_log_q"][n])
        rivals = 0.0
        for k in range(len(negatives)):
            same = o["positive_ids"][n] == o["negative_ids"][k] or o["query_users"][n] == o["negative_users"][k]
            if o["negative_mask"][k] and not same:
                rivals += np.exp(sim(negatives[k]) - o["log_q"][k])
        total -= float(o["weights"][n]) * np.log(positive / (positive + rivals))
    return total, float(np.sum(o["weights"]))


@pytest.mark.portable
def test_bce_by_hand():
    logits = jnp.array([0.0, np.log(3.0), -200.0, 200.0, np.nan])
    total, weight = losses.bce_with_logits(logits, jnp.array([1.0, 0, 0, 0, 1]), jnp.array([1.0, 2, 1, 0.5, 0]))
    assert weight == 4.5
    np.testing.assert_allclose(total, np.log(2) + 2 * np.log(4) + 0 + 0.5 * 200, rtol=1e-6)
    assert jnp.isfinite(
        jax.grad(lambda x: losses.bce_with_logits(x, jnp.ones(5), jnp.array([1.0, 1, 1, 1, 0]))[0])(logits)
    ).all()


@pytest.mark.portable
def test_info_nce_by_hand():
    """cos = 1 with the positive, 0 and -1 with the negatives, temperature .5; the second query's items are its own."""
    queries = jnp.array([[2.0, 0.0], [0.0, 3.0]])
    positives = jnp.array([[5.0, 0.0], [0.0, -1.0]])
    negatives = jnp.array([[0.0, 4.0], [-1.0, 0.0]])
    total, weight = losses.info_nce(queries, positives, negatives, temperature=0.5)
    first = -np.log(np.exp(2) / (np.exp(2) + np.exp(0) + np.exp(-2)))
    second = -np.log(np.exp(-2) / (np.exp(-2) + np.exp(2) + np.exp(0)))
    np.testing.assert_allclose(total, first + second, rtol=1e-6)
    assert weight == 2
    dot = losses.info_nce(queries[:1], positives[:1], negatives, similarity="dot")[0]
    np.testing.assert_allclose(dot, -np.log(np.exp(10) / (np.exp(10) + 1 + np.exp(-2))), rtol=1e-3)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_info_nce_is_the_slow_one_in_any_chunks(similarity, chunk):
    arrays, options = data()
    loss = lambda a: losses.info_nce(**a, **options, temperature=0.7, similarity=similarity, chunk=chunk)  # noqa: E731
    total, weight = jax.jit(loss)(arrays)
    expected, expected_weight = slow_info_nce(*arrays.values(), options, 0.7, similarity == "cosine")
    np.testing.assert_allclose([total, weight], [expected, expected_weight], rtol=1e-5)


def test_gradients_do_not_depend_on_chunks_and_are_right():
    arrays, options = data(1)

    def loss(a, temperature, chunk):
        return losses.info_nce(**a, **options, temperature=temperature, chunk=chunk)[0]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    whole, parts = gradient(arrays, 0.7, N), gradient(arrays, 0.7, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    step = 1e-6
    for name in arrays:
        values = {k: np.asarray(v, np.float64) for k, v in arrays.items()}
        values[name][2, 1] += step
        above = slow_info_nce(*values.values(), options, 0.7, True)[0]
        values[name][2, 1] -= 2 * step
        below = slow_info_nce(*values.values(), options, 0.7, True)[0]
        np.testing.assert_allclose(parts[0][name][2, 1], (above - below) / (2 * step), rtol=1e-3, atol=1e-5)
    above, below = (slow_info_nce(*arrays.values(), options, 0.7 + s, True)[0] for s in (step, -step))
    np.testing.assert_allclose(parts[1], (above - below) / (2 * step), rtol=1e-3)


def test_a_query_without_negatives_has_loss_and_gradient_zero():
    arrays, _ = data(2)
    same = {"positive_ids": jnp.full(N, 3), "negative_ids": jnp.full(K, 3)}
    value, gradient = jax.jit(jax.value_and_grad(lambda a: losses.info_nce(**a, **same)[0]))(arrays)
    assert value == 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradient)


def test_what_has_no_weight_may_hold_anything():
    arrays, options = data(3)
    options["weights"] = options["weights"].at[0].set(0)
    options["negative_mask"] = options["negative_mask"].at[1].set(False)
    gradient = jax.jit(jax.value_and_grad(lambda a: losses.info_nce(**a, **options)[0]))
    clean = gradient(arrays)
    spoilt = arrays | {
        "queries": arrays["queries"].at[0].set(jnp.nan),
        "positives": arrays["positives"].at[0].set(jnp.inf),
        "negatives": arrays["negatives"].at[1].set(jnp.nan),
    }
    dirty = gradient(spoilt)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_zero_vectors_have_finite_gradients():
    arrays, options = data(4)
    zero = jax.tree.map(jnp.zeros_like, arrays)
    value, gradient = jax.jit(jax.value_and_grad(lambda a: losses.info_nce(**a, **options)[0]))(zero)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradient)))


def test_constant_popularity_changes_nothing():
    arrays, _ = data(5)
    plain = losses.info_nce(**arrays)[0]
    corrected = losses.info_nce(**arrays, log_q=jnp.full(K, -3.0), positive_log_q=jnp.full(N, -3.0))[0]
    np.testing.assert_allclose(plain, corrected, rtol=1e-5)


def test_32k_by_32k_stays_below_a_gigabyte():
    count, width = 2**15 - 5, 64  # ragged on purpose
    vectors, ids = jax.ShapeDtypeStruct((count, width), jnp.float32), jax.ShapeDtypeStruct((count,), jnp.int32)

    def loss(queries, items, ids):
        return losses.info_nce(queries, items, items, positive_ids=ids, negative_ids=ids, temperature=0.05)[0]

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(vectors, vectors, ids).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert 1024 * count * 4 < temporaries < 2**30  # at least one chunk of scores: the analysis did look


def test_gathered_negatives_give_the_loss_of_the_whole_batch():
    devices, each = 8, 3
    draw = np.random.default_rng(6)
    queries, items = (draw.normal(size=(devices * each, D)).astype(np.float32) for _ in range(2))
    ids, weights = draw.integers(0, 9, devices * each), draw.integers(0, 2, devices * each).astype(np.float32)

    def loss(queries, items, ids, weights, axis_name=None):
        negatives, negative_ids, present = losses.gather_over(axis_name, (items, ids, weights > 0))
        sums = losses.info_nce(
            queries,
            items,
            negatives,
            positive_ids=ids,
            negative_ids=negative_ids,
            weights=weights,
            negative_mask=present,
        )
        return losses.mean(*losses.sum_over(axis_name, sums))

    whole, gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(queries, items, ids, weights)

    def device_loss(queries, items, ids, weights):
        value, gradient = jax.value_and_grad(loss, argnums=(0, 1))(queries, items, ids, weights, "data")
        return value, gradient

    split = jax.tree.map(lambda x: x.reshape(devices, each, *x.shape[1:]), (queries, items, ids, weights))
    values, parts = jax.pmap(device_loss, axis_name="data")(*split)
    np.testing.assert_allclose(values, whole, rtol=1e-5)
    for part, expected in zip(parts, gradient):  # data gradients: the psum's transpose counts each device once more
        np.testing.assert_allclose(part.reshape(expected.shape) / devices, expected, rtol=1e-4, atol=1e-7)


def test_mean_of_nothing_is_zero():
    assert losses.mean(jnp.float32(0), jnp.float32(0)) == 0
    assert jax.grad(lambda x: losses.mean(x, jnp.float32(0)))(1.0) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negative_ids": None}, "positive_ids is given without negative_ids"),
        ({"positive_log_q": None}, "log_q is given without positive_log_q"),
        ({"query_users": jnp.zeros(3, int)}, r"query_users has shape \(3,\), must be \(13,\)"),
        ({"weights": jnp.ones(2)}, r"weights has shape \(2,\)"),
        ({"negative_mask": jnp.ones(2, bool)}, r"negative_mask has shape \(2,\)"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"similarity": "euclid"}, "similarity is 'euclid'"),
        ({"negatives": jnp.zeros((0, D))}, "no negatives"),
        ({"positives": jnp.zeros((2, D))}, r"positives \(2, 4\)"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arrays, options = data()
    with pytest.raises(ValueError, match=message):
        losses.info_nce(**(arrays | options | change))

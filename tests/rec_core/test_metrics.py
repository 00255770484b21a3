import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_core import metrics

ranks, top_k = (
    jax.jit(metrics.ranks, static_argnames=("ties", "chunk")),
    jax.jit(metrics.top_k, static_argnums=2, static_argnames="chunk"),
)
add_clicks = jax.jit(metrics.add_clicks)


def slow_auc(labels, scores, weights):
    right = pairs = 0.0
    for i in np.flatnonzero(labels):
        for j in np.flatnonzero(np.asarray(labels) == 0):
            pairs += weights[i] * weights[j]
            right += weights[i] * weights[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    return right / pairs


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3), st.integers(0, 3)), max_size=20),
    st.floats(-1e6, 1e6, allow_nan=False),
)
def test_auc_counts_pairs_with_ties_and_weights(rows, shift):
    rows = [(1, 0, 1), (0, 1, 2), *rows]
    labels, scores, weights = (np.array(column, float) for column in zip(*rows))
    expected = slow_auc(labels, scores, weights)
    np.testing.assert_allclose(metrics.auc(labels, scores, weights), expected, atol=1e-12)
    np.testing.assert_allclose(metrics.auc(labels, np.exp(scores) + shift // 1, weights), expected, atol=1e-9)
    np.testing.assert_allclose(metrics.auc(1 - labels, scores, weights), 1 - expected, atol=1e-12)


def test_auc_by_hand():
    assert metrics.auc([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1]) == 0.75
    assert metrics.auc([1, 0, 1, 0], [5, 5, 5, 5]) == 0.5
    assert metrics.auc([1, 0], [np.inf, -np.inf]) == 1


def clicks(count=3000, seed=0):
    draw = np.random.default_rng(seed)
    logits = draw.normal(-2, 1.5, count).astype(np.float32)
    labels = (draw.random(count) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return labels, (logits + draw.normal(size=count)).astype(np.float32), draw.integers(0, 3, count).astype(np.float32)


@pytest.mark.parametrize("bins", [16, 8192])
def test_streaming_sums_hold_what_they_promise_and_merge(bins):
    labels, logits, weights = clicks()
    whole = add_clicks(metrics.click_sums(bins), labels, logits, weights)
    parts = [metrics.click_sums(bins)] * 3
    for i in range(3):
        rows = slice(1000 * i, 1000 * (i + 1))
        parts[i] = add_clicks(parts[i], labels[rows], logits[rows], weights[rows])
    merged = metrics.merge(parts[2], metrics.merge(parts[0], parts[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, merged)

    streaming = metrics.click_metrics(merged)
    exact = metrics.auc(labels, logits, weights)
    assert 0 < streaming.auc_bound < (0.2 if bins == 16 else 1e-3)
    assert abs(streaming.auc - exact) <= streaming.auc_bound
    p = 1 / (1 + np.exp(-logits.astype(float)))
    np.testing.assert_allclose(streaming.log_loss, metrics.log_loss(labels, p, weights), rtol=1e-5)
    calibration = metrics.calibration(labels, p, weights)
    np.testing.assert_allclose(streaming.calibration.ratio, calibration.ratio, rtol=1e-5)
    if bins == 8192:
        np.testing.assert_allclose(streaming.calibration.error, calibration.error, atol=2e-3)
    assert streaming.weight == weights.sum()


def test_streaming_sums_take_extremes_and_report_nan():
    labels, logits = np.array([0.0, 1, 0, 1]), np.array([-np.inf, np.inf, -1e9, 3], np.float32)
    weights = np.array([0.0, 0, 1, 1])
    sums = metrics.add_clicks(metrics.click_sums(64), labels, logits, weights)
    assert metrics.click_metrics(sums).auc == 1
    sums = metrics.add_clicks(sums, labels, logits * np.nan, weights)
    with pytest.raises(ValueError, match="2 logits were NaN"):
        metrics.click_metrics(sums)
    with pytest.raises(ValueError, match="both classes"):
        metrics.click_metrics(metrics.click_sums(64))


def test_gauc_weighs_users_by_impressions_and_leaves_out_one_class():
    users = np.array(["b", "a", "a", "b", "c", "b", "a", "c"])
    labels = np.array([1, 1, 0, 0, 1, 0, 0, 1])
    scores = np.array([0.5, 0.2, 0.9, 0.5, 0.1, 0.1, 0.1, 0.3])
    result = metrics.gauc(users, labels, scores)
    # a: 1 of 2 pairs. b: a tie and a win, 1.5 of 2. c has no negatives.
    assert result == pytest.approx((0.5 * (3 * 0.5 + 3 * 0.75) / 3, 2, 1, 2))
    result = metrics.gauc(users, labels, scores, weights=np.where(users == "a", 2.0, 1.0))
    assert result.value == pytest.approx((6 * 0.5 + 3 * 0.75) / 9)
    with pytest.raises(ValueError, match="none of 1 users"):
        metrics.gauc(users[4:5], labels[4:5], scores[4:5])


def test_auc_by_group_is_that_of_each_group_the_largest_first():
    groups = np.array([5, 9, 9, 5, 9, 2, 9, 2, 7])
    labels = np.array([1, 1, 0, 0, 1, 1, 0, 0, 1])
    scores = np.array([0.2, 0.9, 0.5, 0.2, 0.4, 0.1, 0.3, 0.8, 0.5])
    # 9: of (.9, .4) against (.5, .3) three pairs are right; 5: a tie; 2: wrong; 7 has one class.
    assert metrics.auc_by_group(groups, labels, scores) == {9: (0.75, 4), 2: (0.0, 2), 5: (0.5, 2)}
    with pytest.raises(ValueError, match=r"groups has shape \(3,\), labels \(9,\)"):
        metrics.auc_by_group(groups[:3], labels, scores)


def test_gauc_is_the_mean_of_auc_over_users():
    labels, logits, weights = clicks(500, seed=1)
    users, scores = np.random.default_rng(2).integers(0, 12, 500), np.round(logits)
    each = [
        (weights[users == u].sum(), metrics.auc(*(x[users == u] for x in (labels, scores, weights)))) for u in range(12)
    ]
    size, value = np.array(each).T
    np.testing.assert_allclose(metrics.gauc(users, labels, scores, weights).value, np.average(value, weights=size))


def test_log_loss_and_calibration_by_hand():
    assert metrics.log_loss([1, 0], [0.5, 0.25]) == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)
    assert np.isfinite(metrics.log_loss([1, 0], [0.0, 1.0]))
    result = metrics.calibration([1, 0, 1, 0], [0.9, 0.9, 0.1, 0.1], bins=2)
    assert result.ratio == pytest.approx(1) and result.error == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: metrics.auc([1, 1], [0.1, 0.2]), "both classes, got weight 2 of positives and 0 of negatives"),
        (lambda: metrics.auc([1, 0], [0.1, np.nan]), "score nan in row 1"),
        (lambda: metrics.auc([1, 0.5], [0.1, 0.2]), "label 0.5 in row 1"),
        (lambda: metrics.auc([1, 0], [0.1, 0.2], [1, -1]), "weight -1.0 in row 1"),
        (lambda: metrics.auc([], []), "not 0"),
        (lambda: metrics.auc([1, 0], [0.1]), r"scores \(1,\)"),
        (lambda: metrics.log_loss([1, 0], [0.1, 1.5]), "probability 1.5 in row 1"),
        (lambda: metrics.calibration([0, 0], [0.1, 0.2]), "at least one positive"),
        (lambda: metrics.top_k(jnp.ones((1, 2)), jnp.ones((3, 2)), 4), "k is 4"),
        (lambda: metrics.recall(jnp.ones((1, 2), int), jnp.ones((1, 1), int), 3), "Recall@3"),
        (lambda: metrics.ranks(jnp.ones((1, 2)), jnp.ones((3, 2)), jnp.array([0]), ties="first"), "'first'"),
    ],
)
def test_wrong_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


B, V, D = 5, 23, 3


def catalogue(seed=0, repeated=False):
    """Whole-number vectors: every product is exact in any order of addition, so ties are true ties."""
    draw = np.random.default_rng(seed)
    queries, items = draw.integers(-2, 3, (B, D)).astype(np.float32), draw.integers(-2, 3, (V, D)).astype(np.float32)
    seen = np.where(draw.random((B, 4)) < 0.3, -1, draw.integers(0, V, (B, 4)))
    return queries, items, draw.integers(0, V, B), seen, draw.random(V) < 0.8


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
def test_ranks_and_top_k_are_those_of_a_full_sort(chunk):
    queries, items, target, seen, valid = catalogue()
    scores = queries @ items.T
    assert any(len(np.unique(row)) < V / 2 for row in scores)  # ties there are
    for use in (False, True):
        options = {"seen": seen, "valid": valid} if use else {}
        worst, half = (
            np.asarray(ranks(queries, items, target, **options, ties=t, chunk=chunk)) for t in ("pessimistic", "half")
        )
        best, ids = map(np.asarray, top_k(queries, items, 18, **options, chunk=chunk))
        for row in range(B):
            out = set(seen[row]) | set(np.flatnonzero(~valid)) if use else set()
            left = [i for i in range(V) if i not in out]
            rivals = np.array([scores[row, i] for i in left if i != target[row]])
            better, equal = (rivals > scores[row, target[row]]).sum(), (rivals == scores[row, target[row]]).sum()
            assert (worst[row], half[row]) == (1 + better + equal, 1 + better + equal / 2)
            order = sorted(left, key=lambda i: (-scores[row, i], i))[:18]
            assert list(ids[row]) == order + [-1] * (18 - len(order))
            np.testing.assert_array_equal(best[row, : len(order)], scores[row, order])
            assert (best[row, len(order) :] == -np.inf).all()


def test_ranks_of_random_vectors_agree_with_top_k():
    draw = np.random.default_rng(3)
    queries, items = draw.normal(size=(B, 64)).astype(np.float32), draw.normal(size=(V, 64)).astype(np.float32)
    target = draw.integers(0, V, B)
    ids = top_k(queries, items, V, chunk=7)[1]
    np.testing.assert_array_equal(metrics.ranks_in(ids, target), ranks(queries, items, target, chunk=7))


def test_a_broken_model_ranks_last():
    queries, items, target, _, _ = catalogue()
    np.testing.assert_array_equal(ranks(queries * 0, items, target, chunk=7), V)
    np.testing.assert_array_equal(ranks(queries * np.nan, items, target, chunk=7), V)
    scores, ids = top_k(queries * np.nan, items, 2, chunk=7)
    assert (ids == -1).all() and (scores == -np.inf).all()


def test_no_array_of_all_scores():
    queries, items = jax.ShapeDtypeStruct((64, 16), jnp.float32), jax.ShapeDtypeStruct((100_000, 16), jnp.float32)
    target = jax.ShapeDtypeStruct((64,), jnp.int32)
    for function in (
        lambda q, i, t: metrics.ranks(q, i, t, chunk=1000),
        lambda q, i, t: metrics.top_k(q, i, 10, chunk=1000),
    ):
        memory = jax.jit(function).lower(queries, items, target).compile().memory_analysis().temp_size_in_bytes
        assert 64 * 1000 * 4 / 8 < memory < 64 * 100_000 * 4 / 8


def test_hit_rate_ndcg_and_recall_by_hand():
    position = jnp.array([1.0, 3.0, jnp.inf, 2.0])
    weights = jnp.array([1.0, 2.0, 1.0, 0.0])
    np.testing.assert_allclose(metrics.hit_rate(position, 2), (2, 4))
    np.testing.assert_allclose(metrics.hit_rate(position, 3, weights), (3, 4))
    np.testing.assert_allclose(metrics.ndcg(position, 3, weights), (1 + 2 * 0.5, 4))
    ids = jnp.array([[4, 2, 9], [1, 2, 3], [1, 2, 3]])
    relevant = jnp.array([[9, 4, 4, 7], [3, -1, -1, -1], [-1, -1, -1, -1]])
    np.testing.assert_allclose(metrics.recall(ids, relevant, 3), (2 / 3 + 1, 2), rtol=1e-6)
    np.testing.assert_allclose(metrics.recall(ids, relevant, 2), (1 / 3, 2), rtol=1e-6)


def test_imp_is_the_gain_over_what_chance_leaves():
    assert metrics.imp(0.75, 0.75) == 0
    assert metrics.imp(0.66, 0.65) == pytest.approx(100 * 0.01 / 0.15)
    assert metrics.imp(0.5, 0.75) == -100
    for auc, base, message in (
        (0.7, 0.5, "base is 0.5, must be above"),
        (1.2, 0.7, "auc is 1.2"),
        (np.nan, 0.7, "nan"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.imp(auc, base)

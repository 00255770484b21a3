"""Multi-head, CAN and TWIN against their equations, one behaviour at a time in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_core.interest import CAN, TWIN, MultiHead
from rec_core.interest.can import by_layer, by_unit, parameters, summed

B, T, D = 3, 6, 4
MASK = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], bool)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(module, target, sequence, time=None):
    shapes = jax.eval_shape(module.init, jax.random.key(0), target, sequence, MASK, time=time)
    return jax.tree.map(lambda x: draw(*x.shape, seed=x.size), shapes)


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


@pytest.mark.portable
@pytest.mark.parametrize("per_item", [False, True])
def test_multi_head_is_the_equation(per_item):
    module, sequence = MultiHead(heads=2, width=3), draw(B, T, D)
    target = draw(B, T, D, seed=1) if per_item else draw(B, D, seed=1)
    params = build(module, target, sequence)
    w_q, w_k, w_v = (params["params"][name]["kernel"] for name in ("query", "key", "value"))
    expected = np.zeros((B, 2, 3))
    for b in range(2):
        rows = np.flatnonzero(MASK[b])
        for h in range(2):
            score = [(target[b, t] if per_item else target[b]) @ w_q[:, h] @ (sequence[b, t] @ w_k[:, h]) for t in rows]
            expected[b, h] = softmax(np.array(score) / np.sqrt(3)) @ (sequence[b, rows] @ w_v[:, h])
    out = jax.jit(module.apply)(params, target, sequence, MASK)
    np.testing.assert_allclose(out, expected.reshape(B, 6), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_multi_head_takes_over_linear_maps(groups):
    """A map of the behaviours and one of the queries, both left to it: values and gradients are those of mapping first.

    One and three queries go to the space of the behaviours; of six, keys are made.
    """
    module, sequence, target = MultiHead(heads=2, width=3), draw(B, T, D), draw(B, groups, 5, seed=1)
    params, weight, bias, of_target = build(module, target, sequence), draw(B, D, D, seed=2), draw(B, D), draw(5, 5)
    answer = draw(B, 6, seed=3)

    def first(params, target, sequence, weight, bias):
        mapped = jnp.einsum("bti,bio->bto", sequence, weight) + bias[:, None]
        return module.apply(params, target @ of_target, mapped, MASK)

    def left(params, target, sequence, weight, bias):
        bound = module.bind(params)
        encoded = bound.encode_mapped(sequence, MASK, weight, bias)
        of_parameter = bound.project(of_target, encoded, groups)  # it is linear: of the map, not of what is mapped
        return bound.attend(encoded, jnp.einsum("bgq,qhd->bghd", target, of_parameter))

    def both(function):
        value, back = jax.vjp(function, params, target, sequence, weight, bias)
        return value, back(answer)

    for wanted, got in zip(*(jax.tree.leaves(jax.jit(both, static_argnums=0)(f)) for f in (first, left)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_multi_head_makes_no_keys_or_values_of_all_behaviours_for_a_shared_query():
    module, target, sequence = MultiHead(heads=2, width=3), draw(B, D), draw(B, T, D)
    params = build(module, target, sequence)
    program = jax.make_jaxpr(jax.grad(lambda *a: module.apply(*a, MASK).sum(), (0, 2)))(params, target, sequence)
    sizes = [variable.aval.size for equation in program.eqns for variable in equation.outvars]
    assert max(sizes) < B * T * 6


def test_target_and_behaviours_may_differ_in_width():
    """SIM's exact search attends over `[e ; e_time]`."""
    target, sequence = draw(B, D), draw(B, T, D + 2)
    module = MultiHead(heads=2, width=3)
    assert module.apply(build(module, target, sequence), target, sequence, MASK).shape == (B, 6)


def test_can_by_hand():
    """One unit: h = w e + b, and for the second power w e^2 + b; summed over two behaviours, side by side."""
    target, sequence = jnp.array([[3.0, 0.5]]), jnp.array([[[2.0], [-1.0], [9.0]]])
    out = CAN(hidden=(1,), orders=2, generate=False).apply({}, target, sequence, jnp.array([[True, True, False]]))
    np.testing.assert_array_equal(out, [[3 * (2 - 1) + 1, 3 * (4 + 1) + 1]])


@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("generate", [False, True])
def test_can_is_the_equation(generate, per_item):
    hidden, orders, sequence = (3, 2), 2, draw(B, T, D)
    size = parameters(D, hidden)
    assert size == 4 * 3 + 3 + 3 * 2 + 2
    width = 5 if generate else size
    target = draw(B, T, width, seed=1) if per_item else draw(B, width, seed=1)
    module = CAN(hidden, orders, generate)
    params = build(module, target, sequence)
    expected = np.zeros((B, orders * 5))
    for b, t in np.argwhere(MASK):
        p = target[b, t] if per_item else target[b]
        p = p @ params["params"]["induction"]["kernel"] if generate else p
        w_0, b_0, w_1, b_1 = np.split(p, [12, 15, 21])
        parts = []
        for order in (1, 2):
            h_1 = np.tanh(sequence[b, t] ** order @ w_0.reshape(4, 3) + b_0)
            parts += [h_1, h_1 @ w_1.reshape(3, 2) + b_1]
        expected[b] += np.concatenate(parts)
    out = jax.jit(module.apply)(params, target, sequence, MASK)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_can_unit_by_unit_is_can_layer_by_layer(groups):
    """Values and gradients, of one micro-MLP for all behaviours, one for two of them, and one for each."""
    hidden, orders = (3, 2), 3
    rows, present = draw(B, groups, T // groups, D), MASK.reshape(B, groups, T // groups, 1)
    induction, answer = draw(B, groups, parameters(D, hidden), seed=1), draw(B, orders * 5, seed=2)

    def both(through):
        def value(rows, induction):
            return summed(through, hidden, orders, rows, induction, present)

        out, back = jax.vjp(value, rows, induction)
        return out, back(answer)

    for wanted, got in zip(
        *(jax.tree.leaves(jax.jit(both, static_argnums=0)(f)) for f in (by_layer, by_unit)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("platform", "first", "products"), [("cpu", 3, True), ("cuda", 3, False), ("cuda", 9, True)])
def test_can_makes_small_products_where_they_are_cheap(platform, first, products):
    """Narrow layers are sums on an accelerator, forward and backward; wide ones are products of matrices anywhere."""
    module, sequence = CAN((first, 2), 2, generate=False), draw(B, T, D)
    target = draw(B, 3, parameters(D, (first, 2)))
    step = jax.jit(jax.grad(lambda target: module.apply({}, target, sequence, MASK).sum()))
    assert ("dot_general" in step.trace(target).lower(lowering_platforms=(platform,)).as_text()) == products


def test_can_says_how_wide_a_micro_mlp_is():
    with pytest.raises(ValueError, match=r"target has width 4, must be 76, the parameters of a micro-MLP \(4, 8, 4\)"):
        CAN(generate=False).init(jax.random.key(0), draw(B, D), draw(B, T, D), MASK)


def numpy_twin(p, target, inherent, cross, time, ages, top):
    """`cross` is a list of features; the age's embedding comes after them."""
    heads, width = p["query"]["kernel"].shape[1:]
    age = p["cross_features"]["age"]["embedding"][np.searchsorted(ages, time, side="right")]
    cross, features = [*cross, age], np.concatenate([inherent, *cross, age], axis=-1)
    out = np.zeros((B, D))
    for b in range(2):
        rows, answer = np.flatnonzero(MASK[b]), []
        for h in range(heads):
            key = inherent[b] @ p["key"]["kernel"][:, h]
            alpha = key @ (target[b] @ p["query"]["kernel"][:, h]) / np.sqrt(width)
            start = 0
            for j, part in enumerate(cross):
                w = p["cross_features"]["kernel"][start : start + part.shape[-1], h]
                alpha, start = alpha + (part[b] @ w) * p["cross_features"]["beta"][j, h], start + part.shape[-1]
            best = rows[np.argsort(-alpha[rows])][:top]
            answer.append(softmax(alpha[best]) @ features[b, best] @ p["value"]["kernel"][h])
        out[b] = np.concatenate(answer) @ p["out"]["kernel"]
    return out


@pytest.mark.parametrize("top", [2, 9])
def test_twin_is_the_equation(top):
    module = TWIN(top=top, heads=2, width=3, cross=(2, 1), ages=(10.0, 100.0), age_width=2)
    target, inherent, cross = draw(B, D), draw(B, T, D, seed=1), [draw(B, T, 2, seed=2), draw(B, T, 1, seed=3)]
    time = np.array([[5, 10, 50, 100, 1e9, 0]] * B, np.float32)
    sequence = np.concatenate([inherent, *cross], axis=-1)
    params = build(module, target, sequence, time)
    run = jax.jit(module.apply)
    out = run(params, target, sequence, MASK, time=time)
    expected = numpy_twin(params["params"], target, inherent, cross, time, module.ages, top)
    np.testing.assert_allclose(out, expected, rtol=5e-5, atol=5e-5)
    # A target with features in the place of the cross features: these are not read.
    wide = np.concatenate([target, np.full((B, 3), np.nan, np.float32)], axis=-1)
    np.testing.assert_allclose(run(params, wide, sequence, MASK, time=time), out, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"target has width 5, must be 4 .* or 7"):
        module.apply(params, wide[:, :5], sequence, MASK, time=time)


def test_twins_two_stages_agree():
    """What the search leaves out has no say, however large it is; what a head chooses it also weighs most."""
    module, target, sequence = TWIN(top=2, heads=1, width=3), draw(B, D), draw(B, T, D, seed=1)
    params = build(module, target, sequence)
    encoded = module.apply(params, sequence, MASK, method="encode")
    alpha = np.where(MASK, module.apply(params, encoded, target, method="relevance")[:, 0], -np.inf)
    kept = MASK & (alpha >= np.sort(alpha, axis=-1)[:, -2:-1])
    out = module.apply(params, target, sequence, MASK)
    np.testing.assert_allclose(module.apply(params, target, sequence, kept), out, rtol=1e-5, atol=1e-6)
    everything = module.clone(top=T).apply(params, target, sequence, MASK)
    assert np.abs(everything - out)[:2].max() > 1e-3

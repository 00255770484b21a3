"""DIEN and MIMN: the members that go through the behaviours one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rec_core.interest import DIEN, MIMN, dien
from rec_core.interest.dien import GatedGRU

B, T, D = 3, 6, 4
MASK = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], bool)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def build(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), draw(B, D), draw(B, T, D), MASK)
    params = jax.tree.map(lambda x: 0.5 * draw(*x.shape, seed=x.size), shapes)
    return params, jax.jit(lambda *a: module.apply(params, *a, method="encode"))


@pytest.mark.portable
def test_gated_gru_is_flaxs_gru_the_old_state_or_augru():
    x = draw(B, T, D)
    params = jax.tree.map(
        lambda leaf: draw(*leaf.shape, seed=leaf.size),
        jax.eval_shape(GatedGRU().init, jax.random.key(0), x, jnp.ones((B, T))),
    )
    run = jax.jit(lambda a: GatedGRU().apply(params, x, a))
    last, states = run(jnp.ones((B, T)))
    flax = nn.RNN(nn.GRUCell(D)).apply({"params": {"cell": params["params"]["cell"]}}, x)
    np.testing.assert_allclose(states, flax, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(last, states[:, -1])
    last, states = run(jnp.zeros((B, T)).at[:, 0].set(1))
    np.testing.assert_allclose(states, np.repeat(flax[:, :1], T, axis=1), rtol=1e-5, atol=1e-6)

    # Equations 2-5 and 10-12, the paper's u being 1 - z of Flax.
    a, p, h = np.abs(draw(B, T, seed=1)) % 1, params["params"]["cell"], np.zeros((B, D))
    for t in range(T):

        def gate(name, p=p, t=t, h=h):
            return x[:, t] @ p[f"i{name}"]["kernel"] + p[f"i{name}"]["bias"] + h @ p[f"h{name}"]["kernel"]

        r, u = 1 / (1 + np.exp(-gate("r"))), 1 / (1 + np.exp(gate("z")))
        new = x[:, t] @ p["in"]["kernel"] + p["in"]["bias"] + r * (h @ p["hn"]["kernel"] + p["hn"]["bias"])
        u = a[:, t, None] * u
        h = (1 - u) * h + u * np.tanh(new)
    np.testing.assert_allclose(run(a)[0], h, rtol=1e-5, atol=1e-6)


@pytest.mark.portable
@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_several_steps_a_turn_as_on_a_gpu_are_the_same_numbers_and_gradients(monkeypatch, dtype, atol):
    monkeypatch.setattr(dien, "_TURN", 3)
    length = 8  # turns, and steps that fill none
    x, a, cut = draw(B, length, D), np.abs(draw(B, length, seed=1)) % 1, draw(B, length, D, seed=2)
    module = GatedGRU(dtype)
    params = jax.jit(module.init)(jax.random.key(0), x, a)

    def loss(params, x, a):
        last, states = module.apply(params, x, a)
        assert last.dtype == states.dtype == jnp.float32
        return jnp.sum(last**2) + jnp.mean(states * cut), (last, states)

    def run():
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(params, x, a)

    wanted = run()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "unroll=3" in str(jax.make_jaxpr(module.apply)(params, x, a))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=10 * atol, atol=atol), run(), wanted)
    made = jax.jit(module.init)(jax.random.key(0), x, a)
    jax.tree.map(np.testing.assert_array_equal, made, params)


def test_dien_auxiliary_loss_by_hand():
    module, sequence, negatives = DIEN(), draw(B, T, D), draw(B, T, D, seed=1)
    _, encode = build(module)
    encoded = encode(sequence, MASK)
    spoilt = np.where(MASK[..., None], negatives, np.nan)
    total, weight = module.apply({}, encoded, spoilt, method="auxiliary")["next_behavior"]
    expected = 0
    pairs = [(0, t, t + 1) for t in range(5)] + [(1, 1, 3), (1, 3, 4)]  # row 1 has behaviours 1, 3 and 4
    for row, t, following in pairs:
        h = np.asarray(encoded.states[row, t], np.float64)
        expected += np.log1p(np.exp(-h @ sequence[row, following])) + np.log1p(np.exp(h @ negatives[row, following]))
    assert weight == len(pairs)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_dien_auxiliary_loss_needs_negatives_that_fit():
    encoded = build(DIEN())[1](draw(B, T, D), MASK)
    with pytest.raises(ValueError, match="needs negatives"):
        DIEN().apply({}, encoded, method="auxiliary")
    with pytest.raises(ValueError, match=r"negatives has shape \(3, 4\), must be \(3, 6, 4\)"):
        DIEN().apply({}, encoded, draw(B, D), method="auxiliary")


def test_mimn_goes_on_from_its_state_as_if_it_had_seen_all():
    module = MIMN(units=5, induction=2)
    params, encode = build(module)
    sequence = draw(B, T, D)
    whole = encode(sequence, MASK)
    np.testing.assert_array_equal(whole.written, MASK.sum(1))
    update = jax.jit(lambda *a: module.apply(params, *a, method="update"))
    state = module.initial_state(B, D)
    for t in range(T):  # as they arrive
        state = update(state, sequence[:, t : t + 1], MASK[:, t : t + 1])
    np.testing.assert_array_equal(whole.present, MASK)
    whole = whole._replace(present=None)  # of the sequence, no part of the state
    for ours, theirs in zip(state[:-1], whole[:-1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    part = update(update(module.initial_state(B, D), sequence[:, :2], MASK[:, :2]), sequence[:, 2:], MASK[:, 2:])
    for ours, theirs in zip(part[:-1], whole[:-1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    # The state is all that a read needs, and of one size.
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, module.initial_state(B, D))


def test_mimn_by_hand():
    """With all weights zero but the add vector's bias and one slot's share of the shift: the write weight is uniform,
    the erase vector 1/2, nothing else moves."""
    module = MIMN(slots=4, units=3, induction=0)
    params, _ = build(module)
    cell = jax.tree.map(np.zeros_like, params["params"]["cell"])
    bias = cell["controls"]["bias"]
    add = 2 * (D + 1) + D  # after both keys, both betas and the erase vector
    bias[add : add + D] = np.arctanh([0.4, -0.8, 0, 0.2])
    bias[add + D + 1] = 5.0  # the shift by one slot: of uniform weights it makes uniform ones
    zero = {"params": params["params"] | {"cell": cell}}
    state = jax.jit(lambda *a: module.apply(zero, *a, method="encode"))(draw(1, 2, D), np.ones((1, 2), bool))
    # M_1 = a / 4, M_2 = (1 - 1/8) M_1 + a / 4, in each of four slots; r_2 reads M_1.
    first = np.array([0.1, -0.2, 0, 0.05])
    np.testing.assert_allclose(state.memory[0], np.tile(first * (2 - 1 / 8), (4, 1)), rtol=1e-5)
    np.testing.assert_allclose(state.last_read[0], first, rtol=1e-5)
    np.testing.assert_allclose(state.usage[0], 0.5 * np.ones(4), rtol=1e-5)
    np.testing.assert_array_equal(state.controller, 0)
    spread, users = module.apply(zero, state, method="auxiliary")["utilisation"]
    assert users == 1 and abs(spread) < 1e-9
    uneven = state._replace(usage=jnp.array([[1.0, 2.0, 3.0, 6.0]]))
    assert module.apply(zero, uneven, method="auxiliary")["utilisation"][0] == (4 + 1 + 0 + 9) / 2**2  # of two writes


@pytest.mark.parametrize("induction", [1, 2])
def test_mimn_induction_moves_so_many_channels_a_step(induction):
    module = MIMN(units=5, induction=induction)
    params, encode = build(module)
    state = encode(draw(B, T, D), np.ones((B, T), bool))
    after = module.apply(params, state, draw(B, 1, D, seed=9), method="update")
    moved = np.abs(after.channels - state.channels).max(-1) > 0
    np.testing.assert_array_equal(moved.sum(1), induction)


def test_mimn_regulariser_evens_the_writing_out():
    module = MIMN(slots=4, units=5, induction=0)
    params, _ = build(module)
    sequence, mask = draw(8, 12, D), np.ones((8, 12), bool)

    def spread(params):
        state = module.apply(params, sequence, mask, method="encode")
        total, users = module.apply(params, state, method="auxiliary")["utilisation"]
        return total / users

    step = jax.jit(jax.value_and_grad(spread))
    first, gradient = step(params)
    assert np.abs(gradient["params"]["cell"]["controls"]["kernel"][:, -4:]).max() > 0
    for _ in range(20):
        _, gradient = step(params)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
    assert step(params)[0] < 0.7 * first
    assert MIMN(balance=False).apply({}, None, method="auxiliary") == {}


def test_mimn_reads_several_queries_as_their_mean():
    module = MIMN(units=5)
    params, encode = build(module)
    encoded, queries = encode(draw(B, T, D), MASK), draw(B, 2, D)
    weight = MASK.reshape(B, 2, T // 2).sum(2) / np.maximum(MASK.sum(1, keepdims=True), 1)
    means = {"of the behaviours": (encoded, np.einsum("bg,bgd->bd", weight, queries))}
    means["of the queries, for a state"] = encoded._replace(present=None), queries.mean(axis=1)
    read = jax.jit(lambda *a: module.apply(params, *a, method="read"))
    for what, (state, mean) in means.items():
        np.testing.assert_allclose(read(state, queries), read(state, mean), rtol=1e-5, atol=1e-6, err_msg=what)
    first, second = (read(state, queries) for state, _ in means.values())
    assert np.abs(first - second)[MASK.any(1)].max() > 1e-3

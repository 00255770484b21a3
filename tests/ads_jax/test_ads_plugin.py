"""PSRG and PCRG by hand, and what must hold of the plug-in around any target attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ads_jax import ADS, PCRG, PSRG, candidates
from rec_core.interest import INTEREST

B, T, D, DOMAIN = 3, 7, 4, 3
OPTIONS = {
    "din": {"hidden": (6, 4)},
    "can": {"hidden": (4, 2)},
    "mimn": {"hidden": (4,), "units": 5},
    "sdim": {"bits": 1},
    "multi_head": {"heads": 2, "width": 2},  # so narrow that keys are made for a query of each behaviour
}
PAPER = ("din", "multi_head", "can")


def data(seed=0):
    draw = np.random.default_rng(seed)
    target, sequence = draw.normal(size=(B, D)), draw.normal(size=(B, T, D))
    mask = np.arange(T) >= np.array([0, 3, T])[:, None]  # full, short, empty
    domain, time = draw.normal(size=(B, DOMAIN)), draw.exponential(1e4, (B, T))
    return [jnp.asarray(x, jnp.float32) for x in (target, sequence)] + [
        jnp.asarray(mask),
        *map(jnp.float32, (domain, time)),
    ]


def drawn(params, seed=1):
    """Parameters of which none is zero."""
    leaves, tree = jax.tree.flatten(params)
    draw = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(0.5 * draw.normal(size=x.shape), jnp.float32) for x in leaves])


@functools.cache
def build(name, items=1, fresh=False, **options):
    module = ADS(INTEREST[name](**OPTIONS.get(name, {})), length=T, items=items, hidden=5, **options)
    target, sequence, mask, domain, time = data()
    params = jax.jit(module.init)(jax.random.key(0), target, sequence, mask, domain, time=time)
    params = params if fresh else drawn(params)
    return module, params, jax.jit(lambda *a: module.apply(params, *a[:4], time=a[4]))


def relu(x):
    return np.maximum(x, 0)


@pytest.mark.portable
def test_equations_2_to_5_by_hand():
    _, sequence, _, domain, _ = data()
    module = PSRG(hidden=5, eta=1.5)
    params = drawn(module.init(jax.random.key(0), domain, sequence))
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])

    def generated(name, row):
        hidden = relu(np.asarray(domain[row]) @ w[name]["first"]["kernel"] + w[name]["first"]["bias"])
        return (hidden @ w[name]["second"]["kernel"] + w[name]["second"]["bias"]) / 5  # parameters are 5 times weights

    for row in range(B):
        private = 1 / (1 + np.exp(-generated("weight", row)))  # (2)
        weight = 1.5 * w["w_shared"].reshape(-1) / D * private  # (3)
        wanted = np.asarray(sequence[row]) @ weight.reshape(D, D).T + generated("bias", row)  # (4), (5)
        np.testing.assert_allclose(module.apply(params, domain, sequence)[row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.portable
def test_equations_6_and_7_by_hand():
    target, _, _, domain, _ = data()
    module = PCRG(chunks=3, hidden=5)
    params = drawn(module.init(jax.random.key(0), domain, target))
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    first = np.concatenate([w["first_domain"]["kernel"], w["first_target"]["kernel"]])  # of E_D and E_Q side by side
    for row in range(B):
        both = np.concatenate([domain[row], target[row]])
        private = relu(both @ first + w["first_domain"]["bias"]) @ w["second"]["kernel"] + w["second"]["bias"]
        wanted = private.reshape(3, D) / 5 + np.asarray(target[row])
        np.testing.assert_allclose(module.apply(params, domain, target)[row], wanted, rtol=1e-4, atol=1e-5)
    many = jnp.stack([target, target[::-1]], axis=1)
    both = module.apply(params, domain, many)
    np.testing.assert_allclose(both[:, 0], module.apply(params, domain, target), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both[:, 1], module.apply(params, domain, target[::-1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(INTEREST))
def test_a_new_plugin_is_the_plain_attention(name):
    module, params, run = build(name, items=3, fresh=True)
    target, sequence, mask, _, time = data()
    plain = module.unit.apply({"params": params["params"].get("unit", {})}, target, sequence, mask, time=time)
    np.testing.assert_allclose(run(*data()), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PAPER)
def test_chunks_are_the_literal_queries_of_every_item(name):
    """Against the formula itself: generated queries repeated over their chunk's items, cut at the newest."""
    for items in (1, 3) if name == "multi_head" else (3,):
        module, params, run = build(name, items=items)
        target, sequence, mask, domain, time = data()
        bound = module.bind(params)
        queries = np.asarray(bound.pcrg(domain, target))  # [B, G, d], 0 the newest
        literal = np.stack([queries[:, (T - 1 - t) // items] for t in range(T)], axis=1)
        personal = bound.psrg(domain, sequence)
        unit = {"params": params["params"]["unit"]}
        wanted = module.unit.apply(unit, jnp.asarray(literal), personal, mask, time=time)
        np.testing.assert_allclose(run(*data()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("items", [1, 3])
def test_what_multi_head_takes_over_has_the_gradients_of_the_literal_formula(items):
    module, params, _ = build("multi_head", items=items)
    target, sequence, mask, domain, _ = data()

    def literal(params, target, sequence, domain):
        bound = module.bind(params)
        newest = (T - 1 - jnp.arange(T)) // items
        personal, queries = bound.psrg(domain, sequence), bound.pcrg(domain, target)[:, newest]
        return module.unit.apply({"params": params["params"]["unit"]}, queries, personal, mask)

    def taken(params, target, sequence, domain):
        return module.apply(params, target, sequence, mask, domain)

    def gradients(function):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), (0, 1, 2, 3))(params, target, sequence, domain)

    run = jax.jit(gradients, static_argnums=0)
    for wanted, got in zip(jax.tree.leaves(run(literal)), jax.tree.leaves(run(taken)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


def test_a_map_of_the_queries_may_be_left_to_pcrg():
    target, _, _, domain, _ = data()
    module = PCRG(chunks=3, hidden=5)
    params = drawn(module.init(jax.random.key(0), domain, target))
    matrix = jnp.asarray(np.random.default_rng(2).normal(size=(2, D, 3)), jnp.float32)
    many = jnp.stack([target, target[::-1]], axis=1)

    def project(queries):
        return jnp.einsum("...d,edf->...ef", queries, matrix)

    for oldest_of in (None, 2):
        queries = module.apply(params, domain, many, oldest_of=oldest_of)
        got = module.apply(params, domain, many, oldest_of=oldest_of, project=project)
        np.testing.assert_allclose(got, project(queries), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["din", "multi_head", "can", "dien"])
def test_the_side_of_the_padding_and_more_of_it_change_nothing(name):
    _, _, run = build(name, items=3)
    target, sequence, mask, domain, time = data()
    out = np.asarray(run(target, sequence, mask, domain, time))
    np.testing.assert_array_equal(out[2], 0)
    other = np.argsort(~np.asarray(mask), axis=1, kind="stable")  # behaviours first, padding after them
    moved = [
        jnp.asarray(np.take_along_axis(np.asarray(x), other.reshape(B, T, *[1] * (x.ndim - 2)), 1))
        for x in (sequence, mask, time)
    ]
    assert (np.asarray(moved[1]) != np.asarray(mask)).any()
    np.testing.assert_allclose(run(target, moved[0], moved[1], domain, moved[2]), out, rtol=1e-5, atol=1e-6)
    spoilt = [jnp.where(m, x, jnp.nan) for m, x in ((mask[..., None], sequence), (mask, time))]
    np.testing.assert_array_equal(run(target, spoilt[0], mask, domain, spoilt[1]), out)
    short = [x[1:2, 3:] for x in (sequence, mask, time)]  # the short row without its padding, another length
    np.testing.assert_allclose(
        run(target[1:2], short[0], short[1], domain[1:2], short[2]), out[1:2], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", PAPER)
def test_candidates_of_a_request_get_the_numbers_of_each_alone(name):
    module, params, run = build(name, items=3)
    target, sequence, mask, domain, time = data()
    many = jnp.stack([target, 2 * target, target[::-1]], axis=1)
    got = jax.jit(lambda *a: candidates(module, params, *a[:4], time=a[4], chunk=2))(many, sequence, mask, domain, time)
    for c in range(3):
        np.testing.assert_allclose(got[:, c], run(many[:, c], sequence, mask, domain, time), rtol=1e-4, atol=1e-5)


def test_memory_stays_below_one_array_of_all_queries():
    size, length, d = 500, 1000, 16
    for name in PAPER:
        module = ADS(INTEREST[name](**({"hidden": (16, 8)} if name == "din" else {})), length=length, items=10)
        shapes = [(1, size, d), (1, length, d), (1, length), (1, 8)]
        arrays = [jax.ShapeDtypeStruct(s, bool if i == 2 else jnp.float32) for i, s in enumerate(shapes)]
        first = [jax.ShapeDtypeStruct((1, d), jnp.float32), *arrays[1:]]
        params = jax.eval_shape(module.init, jax.random.key(0), *first)
        compiled = jax.jit(functools.partial(candidates, module)).lower(params, *arrays).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * size * length * d, name


def test_ablations_leave_their_half_out_and_gradients_reach_all_of_the_rest():
    for options, missing in (({"sequence": False}, "psrg"), ({"candidate": False}, "pcrg")):
        module, params, run = build("multi_head", items=3, **options)
        assert missing not in params["params"] and len(params["params"]) == 2
        assert (np.asarray(run(*data()))[0] != np.asarray(build("multi_head", items=3)[2](*data()))[0]).any()
    module, params, _ = build("multi_head", items=3)
    target, sequence, mask, domain, time = data()

    def total(params):
        return jnp.sum(module.apply(params, target, sequence, mask, domain, time=time) ** 2)

    gradients = jax.jit(jax.grad(total))(params)
    assert all((np.asarray(g) != 0).any() for g in jax.tree.leaves(gradients))


def test_impossible_settings_and_sequences_are_refused():
    target, sequence, mask, domain, _ = data()
    with pytest.raises(ValueError, match="the sequence has 7 slots, length is 5; raise it"):
        ADS(INTEREST["din"](), length=5).init(jax.random.key(0), target, sequence, mask, domain)
    with pytest.raises(ValueError, match="length is 7 and items 0; both must be at least 1"):
        ADS(INTEREST["din"](), length=7, items=0).init(jax.random.key(0), target, sequence, mask, domain)

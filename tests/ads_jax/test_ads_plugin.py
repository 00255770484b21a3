"""PSRG and PCRG by hand, and what must hold of the plug-in around any target attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ads_jax import ADS, PCRG, PSRG, Around, candidates
from rec_core.interest import INTEREST, MultiHead

B, T, D, DOMAIN = 3, 7, 4, 3
OPTIONS = {
    "din": {"hidden": (6, 4)},
    "can": {"hidden": (4, 2)},
    "mimn": {"hidden": (4,), "units": 5},
    "sdim": {"bits": 1},
    "multi_head": {"heads": 2, "width": 2},  # so narrow that keys are made for a query of each behaviour
}
BROAD = "multi_head, broad"  # queries go to the space of the behaviours, and no keys are made
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


def unit(name):
    return MultiHead(heads=2, width=16) if name == BROAD else INTEREST[name](**OPTIONS.get(name, {}))


@functools.cache
def build(name, items=1, fresh=False, **options):
    module = ADS(unit(name), length=T, items=items, hidden=5, **options)
    target, sequence, mask, domain, time = data()
    params = jax.jit(module.init)(jax.random.key(0), target, sequence, mask, domain, time=time)
    params = params if fresh else drawn(params)
    return module, params, jax.jit(lambda *a: module.apply(params, *a[:4], time=a[4]))


def of_unit(params):
    return {"params": params["params"].get("unit", {})}  # the mean has none


def literal(module, params):
    """Equations 2 to 7 themselves: the personal sequence, and queries repeated over their items, cut at the newest."""
    target, sequence, _, domain, _ = data()
    bound = module.bind(params)
    queries = bound.pcrg(domain, target)  # [B, G, d], 0 the newest
    return bound.psrg(domain, sequence), queries[:, (T - 1 - np.arange(T)) // module.items]


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
    plain = module.unit.apply(of_unit(params), target, sequence, mask, time=time)
    np.testing.assert_allclose(run(*data()), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "items"), [*((name, 3) for name in (*sorted(INTEREST), BROAD)), *((name, 1) for name in (*PAPER, BROAD))]
)
def test_chunks_are_the_literal_queries_of_every_item(name, items):
    """Against the formula itself; chunks of one item are a query for each, G = T."""
    module, params, run = build(name, items=items)
    _, _, mask, _, time = data()
    personal, queries = literal(module, params)
    wanted = module.unit.apply(of_unit(params), queries, personal, mask, time=time)
    np.testing.assert_allclose(run(*data()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("items", [1, 3])
@pytest.mark.parametrize("name", ["multi_head", BROAD])
def test_multi_head_is_tested_both_ways(name, items, monkeypatch):
    taken = []
    for way in ("_score_keys", "_score_behaviors"):
        original = getattr(MultiHead, way)
        monkeypatch.setattr(
            MultiHead, way, lambda *a, way=way, original=original: taken.append((way, a[1].linear)) or original(*a)
        )
    module, params, _ = build(name, items=items)
    jax.eval_shape(module.apply, params, *data()[:4])
    ((way, linear),) = taken
    assert way == ("_score_behaviors" if name == BROAD else "_score_keys") and linear is not None


@pytest.mark.parametrize("items", [1, 3])
@pytest.mark.parametrize("name", ["multi_head", BROAD])
def test_what_multi_head_takes_over_has_the_gradients_of_the_literal_formula(name, items):
    module, params, _ = build(name, items=items)
    target, sequence, mask, domain, _ = data()

    def formula(params, target, sequence, domain):
        bound = module.bind(params)
        newest = (T - 1 - jnp.arange(T)) // items
        personal, queries = bound.psrg(domain, sequence), bound.pcrg(domain, target)[:, newest]
        return module.unit.apply(of_unit(params), queries, personal, mask)

    def taken(params, target, sequence, domain):
        return module.apply(params, target, sequence, mask, domain)

    def gradients(function):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), (0, 1, 2, 3))(params, target, sequence, domain)

    run = jax.jit(gradients, static_argnums=0)
    for wanted, got in zip(jax.tree.leaves(run(formula)), jax.tree.leaves(run(taken)), strict=True):
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


@pytest.mark.parametrize("name", [*sorted(INTEREST), BROAD])
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


@pytest.mark.parametrize("items", [10, 1])
@pytest.mark.parametrize("name", PAPER)
def test_memory_stays_below_one_array_of_all_queries(name, items):
    size, length, d = 501, 1000, 16  # no multiple of the candidates read at a time
    module = ADS(INTEREST[name](**({"hidden": (16, 8)} if name == "din" else {})), length=length, items=items)
    shapes = [(1, size, d), (1, length, d), (1, length), (1, 8)]
    arrays = [jax.ShapeDtypeStruct(s, bool if i == 2 else jnp.float32) for i, s in enumerate(shapes)]
    first = [jax.ShapeDtypeStruct((1, d), jnp.float32), *arrays[1:]]
    params = jax.eval_shape(module.init, jax.random.key(0), *first)
    compiled = jax.jit(functools.partial(candidates, module)).lower(params, *arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * 4 * size * length * d


def test_fewer_candidates_are_read_at_a_time_where_each_has_many_queries():
    target, sequence, mask, domain, _ = data()
    many = jnp.stack([target] * 96, axis=1)
    for options, wanted in (({"items": 1}, 4), ({"items": 3}, 12), ({"items": 1, "candidate": False}, 32)):
        module, params, _ = build("din", **options)
        assert module.at_a_time == wanted
        program = jax.make_jaxpr(functools.partial(candidates, module))(params, many, sequence, mask, domain)
        (loop,) = [found for found in program.eqns if found.primitive.name == "scan"]
        assert loop.params["length"] == 96 // wanted
    assert [ADS(MultiHead(), length=T, items=items).at_a_time for items in (8, 10, 90)] == [32, 32, 32]


@pytest.mark.parametrize("name", [*PAPER, BROAD])
def test_ablations_leave_their_half_out_and_the_rest_as_it_was(name):
    """With the same parameters, of which none is zero."""
    module, params, run = build(name, items=3)
    target, sequence, mask, domain, time = data()
    personal, queries = literal(module, params)
    for left, wanted in (
        ({"pcrg"}, (queries, sequence)),
        ({"psrg"}, (target, personal)),
        (set(), (target, sequence)),  # the attention alone
    ):
        ablation = module.copy(sequence="psrg" in left, candidate="pcrg" in left)
        own = {"params": {part: params["params"][part] for part in ("unit", *left)}}
        assert jax.tree.map(jnp.shape, own) == jax.tree.map(
            jnp.shape, jax.eval_shape(ablation.init, jax.random.key(0), target, sequence, mask, domain)
        )
        got = np.asarray(jax.jit(ablation.apply)(own, target, sequence, mask, domain, time=time))
        alone = module.unit.apply(of_unit(params), *wanted, mask, time=time)
        np.testing.assert_allclose(got, alone, rtol=1e-4, atol=1e-5)
        assert np.abs(got - run(*data()))[:2].max(axis=1).min() > 1e-3  # all but the row without behaviours


def test_gradients_reach_all_parameters():
    module, params, _ = build("multi_head", items=3)
    target, sequence, mask, domain, time = data()

    def total(params):
        return jnp.sum(module.apply(params, target, sequence, mask, domain, time=time) ** 2)

    gradients = jax.jit(jax.grad(total))(params)
    assert all((np.asarray(g) != 0).any() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 5}, "the sequence has 7 slots, length is 5; raise it"),
        ({"items": 0}, "length is 7 and items 0; both must be at least 1"),
        ({"hidden": 0}, "PSRG: hidden is 0, must be at least 1"),
        ({"hidden": 0, "sequence": False}, "PCRG: hidden is 0, must be at least 1"),
        ({"eta": 0.0}, r"PSRG: eta is 0\.0, must be above 0 and finite"),
        ({"eta": -1.0}, r"eta is -1\.0"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"eta": float("inf")}, "eta is inf"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ADS(unit("din"), **{"length": T, **settings}).init(jax.random.key(0), *data()[:4])
    for attention in (TheirAttention(), "din"):
        with pytest.raises(
            ValueError, match=r"ADS: unit is .*, must be a member of rec_core\.interest, or ads_jax\.Ar"
        ):
            ADS(attention, length=T).init(jax.random.key(0), *data()[:4])
    with pytest.raises(ValueError, match="PCRG: chunks is 0, must be at least 1"):
        PCRG(chunks=0).init(jax.random.key(0), jnp.zeros((B, DOMAIN)), jnp.zeros((B, D)))


BAD = [  # what is cut or repeated, and the message
    ({"mask": lambda x: x[:, :-1]}, r"ADS: mask has shape \(3, 6\), must be \[3, 7\] to go with the sequence"),
    ({"mask": lambda x: x[:, 0]}, r"mask has shape \(3,\), must be \[3, 7\]"),
    ({"time": lambda x: x[:1]}, r"time has shape \(1, 7\), must be \[3, 7\]"),
    ({"domain": lambda x: x[:1]}, r"domain has shape \(1, 3\), must be \[3, d_D\], d_D at least 1"),
    ({"domain": lambda x: x[:, :0]}, r"domain has shape \(3, 0\), must be \[3, d_D\], d_D at least 1"),
    ({"domain": lambda x: x[0]}, r"domain has shape \(3,\), must be \[3, d_D\]"),
    ({"sequence": lambda x: x[0]}, r"sequence has shape \(7, 4\), must be \[B, T, d_S\], B, T, d_S at least 1"),
    (
        {"sequence": lambda x: x[:, :0], "mask": lambda x: x[:, :0], "time": lambda x: x[:, :0]},
        r"sequence has shape \(3, 0, 4\), must be \[B, T, d_S\], B, T, d_S at least 1",
    ),
]
BAD_TARGET = [
    (lambda x: x[:1], r"target has shape \(1, 4\), must be \[3, d_Q\], d_Q at least 1"),
    (lambda x: jnp.repeat(x[:, None], T, axis=1), r"target has shape \(3, 7, 4\), must be \[3, d_Q\]"),
]


@pytest.mark.parametrize("name", PAPER)
def test_arrays_that_do_not_go_together_are_named(name):
    module, params, _ = build(name, items=3)
    good = dict(zip(("target", "sequence", "mask", "domain", "time"), data(), strict=True))

    def call(target, sequence, mask, domain, time):
        return module.apply(params, target, sequence, mask, domain, time=time)

    def request(target, sequence, mask, domain, time, chunk=None):
        return candidates(module, params, target, sequence, mask, domain, time=time, chunk=chunk)

    many = good | {"target": good["target"][:, None]}
    for function, given in ((call, good), (request, many)):
        jax.eval_shape(function, **given)
        for change, message in BAD:
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(function, **given | {key: cut(given[key]) for key, cut in change.items()})
    encoded = module.apply(params, *data()[1:4], method="encode")
    for cut, message in BAD_TARGET:
        with pytest.raises(ValueError, match=message):
            call(**good | {"target": cut(good["target"])})
        with pytest.raises(ValueError, match=message):
            module.apply(params, encoded, cut(good["target"]), good["domain"], method="read")
    with pytest.raises(ValueError, match=r"ADS: domain has shape \(1, 3\)"):
        module.apply(params, encoded, good["target"], good["domain"][:1], method="read")
    for targets in (good["target"], many["target"][:1], many["target"][:, :0]):
        with pytest.raises(ValueError, match=r"targets has shape .*, must be \[3, C, d_Q\], C, d_Q at least 1"):
            request(**many | {"target": targets})
    with pytest.raises(ValueError, match="chunk is 0, must be at least 1"):
        request(**many, chunk=0)


class TheirAttention(nn.Module):
    """A model of somebody else's: it asks each behaviour for itself."""

    @nn.compact
    def __call__(self, query, history, mask):
        read = nn.Dense(6)(jnp.concatenate([query, history, query * history], axis=-1))
        score = jnp.where(mask, nn.Dense(1)(nn.relu(read))[..., 0], -1e9)
        return jnp.einsum("bt,btd->bd", jax.nn.softmax(score), history)


def test_an_existing_flax_model_is_made_personal_in_five_lines():
    draw = np.random.default_rng(0)
    item, history = draw.normal(size=(4, 5)), draw.normal(size=(4, 7, 5))
    mask, domain = np.arange(7) >= np.array([0, 2, 6, 3])[:, None], draw.normal(size=(4, 3))

    personal = ADS(Around(TheirAttention()), length=7, items=3)
    params = personal.init(jax.random.key(0), item, history, mask, domain)
    interest = personal.apply(params, item, history, mask, domain)

    theirs = {"params": params["params"]["unit"]["attention"]}
    everywhere = np.broadcast_to(item[:, None], history.shape)
    plain = TheirAttention().apply(theirs, everywhere, np.where(mask[..., None], history, 0), mask)
    np.testing.assert_allclose(interest, plain, rtol=1e-5, atol=1e-6)  # as long as nothing was learned
    learned = jax.tree.map(lambda x: x + 0.1, params)
    changed = [np.asarray(personal.apply(learned, item, history, mask, sign * domain)) for sign in (1, -1)]
    assert np.abs(changed[0] - changed[1]).max(axis=1).min() > 1e-3

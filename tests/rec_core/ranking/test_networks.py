"""What holds for every network, and each against its formula, written again in NumPy for one example at a time."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_formulas import FORMULAS, norm

from rec_core.ranking.networks import NETWORKS, Inputs, Network

B, D, F, K, D_D, DOMAINS = 8, 7, 4, 3, 3, 3
COMMON = {"hidden": (6, 4), "tasks": 2}
CASES = {
    "mlr": ("mlr", {"regions": 3}),
    "dnn": ("dnn", {}),
    "deepfm": ("deepfm", {}),
    "xdeepfm": ("xdeepfm", {"cin": (3, 2)}),
    "dcnv2": ("dcnv2", {}),
    "dcnv2 of low rank": ("dcnv2", {"rank": 2, "structure": "stacked"}),
    "dcnv2 of experts": ("dcnv2", {"rank": 2, "experts": 3}),
    "masknet": ("masknet", {"blocks": 2}),
    "serial masknet": ("masknet", {"structure": "serial", "reduction": 1.5}),
    "dffm": ("dffm", {}),
    "apg": ("apg", {"rank": 3}),
    "apg through more": ("apg", {"rank": 2, "over": 5}),
    "adasparse": ("adasparse", {"epsilon": 0.6}),
    "binary adasparse": ("adasparse", {"form": "binary", "alpha": 2.0, "epsilon": 0.3}),
    "scaling adasparse": ("adasparse", {"form": "scaling"}),
    "star": ("star", {"domains": DOMAINS, "auxiliary": (5,)}),
    "ple": ("ple", {"domains": DOMAINS, "own": 2, "tower": (5,)}),
    "ple of one domain": ("ple", {"shared": 2, "tower": (5,)}),
}
PORTABLE = ("mlr", "dcnv2 of experts", "dffm", "star", "ple")
READS = {"dffm": "domain", "apg": "domain", "adasparse": "domain", "star": "domain_id", "ple": "domain_id"}


def data(seed=0):
    draw = np.random.default_rng(seed)
    x, fields, domain = (draw.normal(size=(B, *n)).astype(np.float32) for n in ((D,), (F, K), (D_D,)))
    return Inputs(x=x, fields=fields, domain=domain, domain_id=np.arange(B, dtype=np.int32) % DOMAINS)


INPUTS = data()
WEIGHT = np.random.default_rng(7).normal(size=(B, COMMON["tasks"])).astype(np.float32)


@functools.cache
def build(case):
    """A network, parameters of which none is zero, and one compiled call for all tests.

    It gives the logits, those of bfloat16 (of networks with their default options), and the gradient of a weighted sum
    of the logits for parameters and inputs.
    """
    name, options = CASES[case]
    network = NETWORKS[name](**COMMON, **options)
    half = NETWORKS[name](**COMMON, **options, dtype="bfloat16")
    leaves, tree = jax.tree.flatten(jax.eval_shape(network.init, jax.random.key(0), INPUTS))
    draw = np.random.default_rng(1)
    params = jax.tree.unflatten(tree, [0.5 * draw.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])

    def loss(params, floats, domain_id):
        logits = network.apply(params, Inputs(**floats, domain_id=domain_id))
        return jnp.sum(logits * WEIGHT), logits

    @jax.jit
    def run(params, inputs):
        floats = {part: getattr(inputs, part) for part in ("x", "fields", "domain")}
        (_, logits), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            params, floats, inputs.domain_id
        )
        return logits, half.apply(params, inputs) if case in NETWORKS else None, gradients

    return params, lambda params, inputs: jax.tree.map(np.asarray, run(params, inputs))


@functools.cache
def answer(case):
    params, run = build(case)
    return run(params, INPUTS)


def test_every_network_has_the_face_and_a_formula():
    assert set(FORMULAS) == set(NETWORKS) == {name for name, _ in CASES.values()}
    for name, network in NETWORKS.items():
        assert list(inspect.signature(network.__call__).parameters) == ["self", "inputs", "deterministic"]
        fields = [field.name for field in dataclasses.fields(network)]
        assert fields[:4] == ["hidden", "tasks", "dropout", "dtype"], name
        assert hash(network(**COMMON)) == hash(network(**COMMON))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.portable) if case in PORTABLE else case for case in CASES]
)
def test_logits_are_those_of_the_formula(case):
    name, options = CASES[case]
    params, _ = build(case)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    rows = (INPUTS.x, INPUTS.fields, INPUTS.domain, INPUTS.domain_id)
    expected = [FORMULAS[name](p, options, *(part[row] for part in rows)) for row in range(B)]
    logits = answer(case)[0]
    assert logits.shape == (B, 2) and logits.dtype == np.float32 and np.std(expected) > 1e-2
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_finite_and_reach_every_parameter(case):
    of_params, of_inputs = answer(case)[2]
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_params):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    assert all(np.isfinite(leaf).all() for leaf in of_inputs.values())
    assert (np.abs(of_inputs["x"]).max(-1) > 0).all()
    needs = NETWORKS[CASES[case][0]](**COMMON).needs
    for part in ("fields", "domain"):
        assert (np.abs(of_inputs[part]).max() > 0) == (part in needs), part


@pytest.mark.parametrize("case", CASES)
def test_an_example_does_not_depend_on_the_others(case):
    params, run = build(case)
    order = np.r_[1:B, 0]
    other = data(seed=5)
    mixed = jax.tree.map(lambda mine, theirs: np.concatenate([mine[order][:-1], theirs[-1:]]), INPUTS, other)
    np.testing.assert_allclose(run(params, mixed)[0][:-1], answer(case)[0][order][:-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_gives_float32_logits_close_by(name):
    logits, half, _ = answer(name)
    assert half.dtype == np.float32
    # A neuron next to the threshold may be pruned in one precision and kept in the other.
    share = 0.75 if name == "adasparse" else 1.0
    close = np.abs(half - logits) < 0.05 * max(1.0, np.abs(logits).max())
    assert close.mean() >= share and (half != logits).any()


@pytest.mark.parametrize("name", NETWORKS)
def test_another_domain_gives_other_logits_where_the_network_reads_it(name):
    params, run = build(name)
    changed = {
        "domain": INPUTS.replace(domain=INPUTS.domain[::-1].copy()),
        "domain_id": INPUTS.replace(domain_id=(INPUTS.domain_id + 1) % DOMAINS),
    }
    network = NETWORKS[name](**COMMON, **CASES[name][1])
    assert (READS.get(name) in network.needs) == (name in READS)
    for part, inputs in changed.items():
        difference = np.abs(run(params, inputs)[0] - answer(name)[0]).max(-1)
        assert (difference > 1e-3).all() if part in network.needs else (difference == 0).all(), part


def test_domain_ids_out_of_range_are_clipped():
    for name in ("star", "ple"):
        params, run = build(name)
        wild = INPUTS.replace(domain_id=np.array([-5, 3, 10**9, 0, 1, 2, -1, 7], np.int32))
        tame = INPUTS.replace(domain_id=np.array([0, 2, 2, 0, 1, 2, 0, 2], np.int32))
        got, want = run(params, wild), run(params, tame)
        np.testing.assert_array_equal(got[0], want[0])
        jax.tree.map(np.testing.assert_array_equal, got[2], want[2])


def test_what_is_of_one_domain_learns_from_its_examples_only():
    one = INPUTS.replace(domain_id=np.ones(B, np.int32))
    params, run = build("star")
    gradient = run(params, one)[2][0]["params"]
    for name in (name for name in gradient if name.endswith("_domain")):
        assert np.abs(gradient[name][1]).max() > 0
        np.testing.assert_array_equal(gradient[name][[0, 2]], 0)
    params, run = build("ple")
    gradient = run(params, one)[2][0]["params"]
    moved = np.abs(gradient["tower_0_kernel"]).max((1, 2)) > 0
    np.testing.assert_array_equal(moved, [False, False, True, True, False, False])
    # Through the shared experts of the second level, what other groups hold at the first is of use as well.
    assert np.abs(gradient["own_0_kernel"][0]).max() > 0 and np.abs(gradient["own_1_kernel"][0]).max() == 0


def zeroed(tree, *names):
    return {name: jax.tree.map(np.zeros_like, leaf) if name in names else leaf for name, leaf in tree.items()}


def test_networks_without_what_their_papers_add_are_the_dnn():
    params = dict(build("dnn")[0]["params"])
    of_dnn = build("dnn")[1]
    expected = answer("dnn")[0]

    def same(case, p, inputs=INPUTS, want=expected):
        np.testing.assert_allclose(build(case)[1]({"params": p}, inputs)[0], want, rtol=1e-4, atol=1e-5)

    fm = {name: build("deepfm")[0]["params"][name] for name in ("first_order",)}
    same("deepfm", params | fm, INPUTS.replace(fields=np.zeros_like(INPUTS.fields)))

    own = build("scaling adasparse")[0]["params"]
    same(
        "scaling adasparse", params | zeroed({n: own[n] for n in own if n.startswith("pruner")}, "pruner_0", "pruner_1")
    )

    # STAR with domains alike, nothing beside it: the DNN on normalised x.
    own, p = build("star")[0]["params"], {name: params[name] for name in ("dice_0", "dice_1")}
    for layer in ("mlp_0", "mlp_1", "logit"):
        p |= {f"{layer}_{part}": params[layer][part] for part in ("kernel", "bias")}
        p |= {f"{layer}_kernel_domain": np.ones_like(own[f"{layer}_kernel_domain"])}
        p |= {f"{layer}_bias_domain": np.zeros_like(own[f"{layer}_bias_domain"])}
    p |= {name: np.ones_like(own[name]) for name in ("gamma", "gamma_domain")}
    p |= {name: np.zeros_like(own[name]) for name in ("beta", "beta_domain")}
    p["auxiliary"] = zeroed(own["auxiliary"], "logit")
    normalised = np.stack([norm(row) for row in INPUTS.x]).astype(np.float32)
    plain = of_dnn({"params": params}, INPUTS.replace(x=normalised))[0]
    same("star", p, want=plain)

    # APG with S the identity: the DNN whose kernels are U V.
    own = dict(build("apg")[0]["params"])
    p, low = dict(own), {"logit": own["logit"]}
    for i in range(2):
        generate = {"kernel": np.zeros((D_D, 9), np.float32), "bias": np.eye(3, dtype=np.float32).reshape(-1)}
        p[f"generate_{i}"] = generate
        low[f"mlp_{i}"] = {"kernel": own[f"u_{i}"] @ own[f"v_{i}"], "bias": own[f"bias_{i}"]}
        low[f"dice_{i}"] = own[f"dice_{i}"]
    same("apg", p, want=of_dnn({"params": low}, INPUTS)[0])


@pytest.mark.parametrize("name", ["dffm", "star"])
def test_new_networks_treat_domains_alike(name):
    """What a new network generates, or holds for a domain, is the same for all: differences are learned."""
    _, run = build(name)
    network = NETWORKS[name](**COMMON, **CASES[name][1])
    params = jax.jit(network.init)(jax.random.key(0), INPUTS)
    if name == "star":
        other = INPUTS.replace(domain_id=(INPUTS.domain_id + 1) % DOMAINS)
        np.testing.assert_array_equal(run(params, other)[0], run(params, INPUTS)[0])
    else:
        np.testing.assert_array_equal(params["params"]["generate"]["kernel"], 0)
        np.testing.assert_array_equal(params["params"]["generate"]["bias"].reshape(K, K), np.eye(K))


def test_the_mixture_stays_finite_where_a_probability_rounds_to_one():
    params, run = build("mlr")
    logits, _, (of_params, _) = run(params, INPUTS.replace(x=1e4 * INPUTS.x))
    assert np.abs(logits).max() > 1e3  # float32 has no probability so near to 0 or 1
    assert np.isfinite(logits).all() and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_params))


def test_pruned_neurons_are_cut_off_and_binary_factors_still_learn():
    for case, learns in (("adasparse", False), ("binary adasparse", True)):
        params, run = build(case)
        pruner = np.zeros_like(params["params"]["pruner_0"]["kernel"])
        pruner[0, 0] = 2.0  # neuron 0 is pruned for examples whose first domain entry is -1
        p = params["params"] | {"pruner_0": {"kernel": pruner}}
        of_params, of_inputs = run({"params": p}, INPUTS.replace(domain=-np.ones_like(INPUTS.domain)))[2]
        np.testing.assert_array_equal(of_inputs["x"][:, 0], 0)
        assert (np.abs(of_inputs["x"][:, 1:]).max(0) > 0).all()
        assert (np.abs(of_params["params"]["pruner_0"]["kernel"][:, 0]).max() > 0) == learns


@pytest.mark.parametrize("case", ["serial masknet", "ple"])
def test_dropout_acts_in_training_only(case):
    name, options = CASES[case]
    network, params = NETWORKS[name](**COMMON, **options, dropout=0.5), build(case)[0]
    run = jax.jit(lambda key: network.apply(params, INPUTS, deterministic=False, rngs={"dropout": key}))
    first = np.asarray(run(jax.random.key(0)))
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    assert np.abs(first - run(jax.random.key(1))).max() > 1e-3 and np.abs(first - answer(case)[0]).max() > 1e-3


def shapes(name, inputs=INPUTS, **options):
    return jax.eval_shape(NETWORKS[name](**(COMMON | options)).init, jax.random.key(0), inputs)


@pytest.mark.parametrize(
    ("name", "options", "missing", "message"),
    [
        ("deepfm", {}, "fields", r"DeepFM: inputs.fields is None.*give all features one width"),
        ("xdeepfm", {}, "fields", "XDeepFM: inputs.fields is None"),
        ("dffm", {}, "domain", r"DFFM: inputs.domain is None, it reads the vector of the domain features"),
        ("apg", {"rank": 2}, "domain", "APG: inputs.domain is None"),
        ("adasparse", {}, "domain", "AdaSparse: inputs.domain is None"),
        ("star", {}, "domain_id", "STAR: inputs.domain_id is None, it reads the explicit domain"),
        ("ple", {"domains": 2}, "domain_id", "PLE: inputs.domain_id is None"),
    ],
)
def test_missing_inputs_are_named(name, options, missing, message):
    with pytest.raises(ValueError, match=message):
        shapes(name, INPUTS.replace(**{missing: None}), **options)


def test_networks_without_domains_or_fields_need_neither():
    bare = Inputs(x=INPUTS.x, fields=None)
    for name in ("mlr", "dnn", "dcnv2", "masknet", "ple"):
        shapes(name, bare)
    with pytest.raises(ValueError, match=r"DNN: inputs.fields has shape \(8, 12\), must be \[B, F, k\]"):
        shapes("dnn", INPUTS.replace(fields=INPUTS.fields.reshape(B, -1)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dnn", {"hidden": ()}, "DNN: hidden is .*, must be at least 1"),
        ("dnn", {"tasks": 0}, "DNN: tasks is 0"),
        ("mlr", {"regions": 0}, "MLR: regions is 0"),
        ("xdeepfm", {"cin": (4, 0)}, "XDeepFM: cin is"),
        ("dcnv2", {"cross": 0}, "DCNv2: cross is 0"),
        ("dcnv2", {"experts": 2}, "DCNv2: rank is 0 with 2 experts"),
        ("dcnv2", {"structure": "serial"}, r"DCNv2: structure is 'serial', must be one of \('parallel', 'stacked'\)"),
        ("masknet", {"structure": "stacked"}, "MaskNet: structure is 'stacked'"),
        ("masknet", {"reduction": 0.0}, "MaskNet: reduction is 0.0, must be above 0"),
        ("apg", {"rank": 5}, r"APG: rank is 5, must be at most 4, the smallest of widths \(7, 6, 4\)"),
        ("apg", {"rank": 3, "over": 2}, "APG: over is 2, must be 0 or at least rank, 3"),
        ("adasparse", {"form": "soft"}, "AdaSparse: form is 'soft'"),
        ("adasparse", {"form": "binary", "epsilon": 1.0}, r"epsilon 1.0 in \[0, 1.0\)"),
        ("star", {"domains": 0}, "STAR: domains is 0"),
        ("ple", {"own": 0}, "PLE: own is 0"),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        shapes(name, **options)


def test_a_network_without_its_methods_says_so():
    with pytest.raises(NotImplementedError, match="Network defines no logits"):
        Network((4,)).apply({}, INPUTS)
    with pytest.raises(NotImplementedError, match="Network defines no flops"):
        Network((4,)).flops(4)

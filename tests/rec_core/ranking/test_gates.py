"""FRNet and PEPNet against their formulas in NumPy, and what must hold of a gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rec_core.ranking.gates import EPNet, FRNet, PPNet

B, F, K, DOMAIN, PRIOR = 3, 4, 2, 3, 5
DRAW = np.random.default_rng(0)
FIELDS, X = DRAW.normal(size=(B, F, K)).astype(np.float32), DRAW.normal(size=(B, F * K)).astype(np.float32)
E_D, WHO = DRAW.normal(size=(B, DOMAIN)).astype(np.float32), DRAW.normal(size=(B, PRIOR)).astype(np.float32)
MODULES = {
    "frnet": (FRNet(attention=3, hidden=5), (FIELDS,)),
    "epnet": (EPNet(hidden=5), (X, E_D)),
    "ppnet": (PPNet((4, 3), tasks=2, gate_hidden=5), (X, WHO)),
}


def drawn(module, *inputs):
    """Parameters of which none is zero; nothing is compiled."""
    shapes, draw = jax.eval_shape(module.init, jax.random.key(0), *inputs), np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.7 * draw.normal(size=x.shape).astype(np.float32), shapes)


PARAMS = {name: drawn(module, *inputs) for name, (module, inputs) in MODULES.items()}
OUTPUTS = {name: np.asarray(module.apply(PARAMS[name], *inputs)) for name, (module, inputs) in MODULES.items()}


def weights(name):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS[name]["params"])


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def gate(p, x):
    return 2 * sigmoid(dense(p["second"], np.maximum(dense(p["first"], x), 0)))


def dice(s, alpha):
    centered = s - s.mean()
    p = sigmoid(centered / np.sqrt((centered**2).mean() + 1e-6))
    return p * s + (1 - p) * alpha * s


@pytest.mark.portable
def test_frnet_by_hand():
    w = weights("frnet")

    def prelu(p, x):
        return np.where(x >= 0, x, p["negative_slope"] * x)

    def unit(p, fields):
        q, k, v = (fields @ p[name]["kernel"] for name in ("queries", "keys", "values"))
        mixed = np.stack([softmax(k @ query) @ v for query in q])
        context = prelu(p["first_slope"], dense(p["first"], fields.reshape(-1)))
        return mixed @ p["back"]["kernel"] * prelu(p["second_slope"], dense(p["second"], context))

    for row, fields in enumerate(FIELDS):
        weight = sigmoid(unit(w["weight"], fields))
        wanted = weight * fields + (1 - weight) * unit(w["complementary"], fields)
        np.testing.assert_allclose(OUTPUTS["frnet"][row], wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(OUTPUTS["frnet"] - FIELDS).max() > 0.1


@pytest.mark.portable
def test_pepnet_by_hand():
    w, v = weights("epnet"), weights("ppnet")
    for row in range(B):
        wanted = gate(w["gate"], np.concatenate([E_D[row], X[row]])) * X[row]
        np.testing.assert_allclose(OUTPUTS["epnet"][row], wanted, rtol=1e-4, atol=1e-5)
        read = np.concatenate([WHO[row], X[row]])
        gates = [gate(v[f"gate_{i}"], read).reshape(2, -1) for i in range(3)]
        for task in range(2):
            h = X[row]
            for i in range(2):
                h = dice(dense(v[f"mlp_{i}_{task}"], gates[i][task] * h), v[f"dice_{i}_{task}"]["alpha"])
            wanted = dense(v[f"logit_{task}"], gates[2][task] * h)
            np.testing.assert_allclose(OUTPUTS["ppnet"][row, task], wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["epnet", "ppnet"])
def test_a_gate_reads_the_embeddings_and_does_not_teach_them(name):
    """One row: gates that see this row's embeddings as a constant give the same gradient as gates that read them."""
    module, (x, prior) = MODULES[name]
    x, prior, size = x[:1], prior[:1], prior.shape[1] if name == "ppnet" else DOMAIN

    def blind(path, leaf):  # into the bias with what the gate's first layer makes of the embeddings
        first = PARAMS[name]["params"][path[1].key].get("first") if path[1].key.startswith("gate") else None
        if first is None or path[2].key != "first":
            return leaf
        if path[3].key == "bias":
            return leaf + (x @ first["kernel"][size:])[0]
        return np.concatenate([leaf[:size], np.zeros_like(leaf[size:])])

    changed = jax.tree_util.tree_map_with_path(blind, PARAMS[name])

    def gradients(params):
        return jax.grad(lambda x, prior: jnp.sum(module.apply(params, x, prior)), (0, 1))(x, prior)

    read, held = gradients(PARAMS[name]), gradients(changed)
    for got, wanted in zip(read, held, strict=True):
        assert np.abs(got).min() > 0
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


def test_a_gate_that_says_one_leaves_embeddings_as_they_are():
    closed = jax.tree.map(np.zeros_like, PARAMS["epnet"])  # 2 sigmoid(0)
    np.testing.assert_array_equal(MODULES["epnet"][0].apply(closed, X, E_D), X)


@pytest.mark.parametrize("name", MODULES)
def test_rows_are_apart_and_bfloat16_is_close_by(name):
    module, inputs = MODULES[name]
    alone = module.apply(PARAMS[name], *(x[1:2] for x in inputs))
    np.testing.assert_allclose(alone[0], OUTPUTS[name][1], rtol=1e-5, atol=1e-6)
    half = module.clone(dtype="bfloat16").apply(PARAMS[name], *inputs)
    assert half.dtype == (jnp.float32 if name == "ppnet" else jnp.bfloat16)  # logits are float32
    np.testing.assert_allclose(np.asarray(half, np.float32), OUTPUTS[name], rtol=0.05, atol=0.1)


def test_dropout_acts_in_training_only():
    _, inputs = MODULES["ppnet"]
    module = PPNet((4, 3), tasks=2, gate_hidden=5, dropout=0.5)
    np.testing.assert_array_equal(module.apply(PARAMS["ppnet"], *inputs), OUTPUTS["ppnet"])
    dropped = module.apply(PARAMS["ppnet"], *inputs, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert np.abs(dropped - OUTPUTS["ppnet"]).max() > 1e-3


def test_units_below_one_are_named():
    for module, message in (
        (FRNet(attention=0), "InformationExtraction: attention is 0, must be at least 1"),
        (FRNet(hidden=-1), "InformationExtraction: hidden is -1, must be at least 1"),
        (EPNet(hidden=0), "Gate: hidden is 0, must be at least 1"),
        (PPNet((4,), gate_hidden=0), "Gate: hidden is 0, must be at least 1"),
    ):
        inputs = {FRNet: "frnet", EPNet: "epnet", PPNet: "ppnet"}[type(module)]
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.init, jax.random.key(0), *MODULES[inputs][1])

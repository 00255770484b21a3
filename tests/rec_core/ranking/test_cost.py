"""Operations against the compiler's count, parameters against a count by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

from rec_core.ranking import ctr
from rec_core.ranking.cost import compiler_flops, flops, gate_flops, parameters
from rec_core.ranking.gates import EPNet, FRNet, PPNet
from rec_core.ranking.networks import NETWORKS, Inputs

B, D, F, K, D_D = 64, 256, 8, 32, 64
COMMON = {"hidden": (256, 128), "tasks": 2}
CASES = {
    **{name: (name, {}) for name in NETWORKS},
    "dcnv2 of low rank": ("dcnv2", {"rank": 64, "structure": "stacked"}),
    "dcnv2 of experts": ("dcnv2", {"rank": 32, "experts": 4}),
    "serial masknet": ("masknet", {"structure": "serial", "reduction": 2.0}),
    "apg": ("apg", {"rank": 32}),
    "star": ("star", {"domains": 3}),
    "ple": ("ple", {"domains": 2, "own": 2, "tower": (64,)}),
}
# Elementwise work is left out of our count and is in the compiler's: some per cent at these widths.
TOLERANCE = 0.04


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


INPUTS = Inputs(x=shape(B, D), fields=shape(B, F, K), domain=shape(B, D_D), domain_id=shape(B, dtype=jnp.int32))


@pytest.mark.parametrize("case", CASES)
def test_operations_agree_with_the_compiler(case):
    name, options = CASES[case]
    network = NETWORKS[name](**COMMON, **options)
    params = jax.eval_shape(network.init, jax.random.key(0), INPUTS)
    counted = flops(network, INPUTS) * B
    compiled = compiler_flops(network.apply, params, INPUTS)
    assert 0 <= compiled / counted - 1 <= TOLERANCE, compiled / counted


GATES = {
    "frnet": (FRNet(), (shape(B, F, K),)),
    "narrow frnet": (FRNet(attention=8, hidden=128), (shape(B, 2 * F, K),)),
    "epnet": (EPNet(hidden=64), (shape(B, D), shape(B, D_D))),
    "ppnet": (PPNet(**COMMON), (shape(B, D), shape(B, 2 * K))),
    "wide ppnet": (PPNet((256,), tasks=3, gate_hidden=64), (shape(B, D), shape(B, 2 * K))),
}


@pytest.mark.parametrize("case", GATES)
def test_operations_of_a_gate_agree_with_the_compiler(case):
    gate, inputs = GATES[case]
    params = jax.eval_shape(gate.init, jax.random.key(0), *inputs)
    compiled = compiler_flops(gate.apply, params, *inputs) / B
    assert 0 <= compiled / gate_flops(gate, *inputs) - 1 <= TOLERANCE, compiled / gate_flops(gate, *inputs)


def test_operations_of_gates_by_hand():
    # Each of FRNet's two units: queries, keys, values and back; scores and what they mix; the bit-level MLP.
    unit = 3 * (4 * 2) * 4 + 2 * 3 * 3 * 4 + (3 * 2 * 5 + 5 * 2)
    assert FRNet(attention=4, hidden=5).flops(F=3, k=2) == 2 * 2 * unit
    assert EPNet(hidden=5).flops(D=4, d_D=3) == 2 * (7 * 5 + 5 * 4)
    gates, towers = 2 * 6 * 5 + 5 * 2 * 4 + 5 * 2 * 3, 2 * (4 * 3 + 3 * 1)
    assert PPNet((3,), tasks=2, gate_hidden=5).flops(D=4, d_P=2) == 2 * (gates + towers)


def test_operations_of_an_mlp_by_hand():
    network = NETWORKS["dnn"]((4, 3), tasks=2)
    assert network.flops(5) == 2 * (5 * 4 + 4 * 3 + 3 * 2)
    assert flops(network, Inputs(x=shape(9, 5), fields=None)) == network.flops(5)


def test_parameters_are_counted_by_group():
    config, _ = ctr.example()
    params = jax.eval_shape(functools.partial(ctr.init, config=config), jax.random.key(0))
    count = parameters(params)
    # user, activity, item, brand, hour, user_x_brand: rows times width (hashed features are summed at full width)
    assert count["tables"] == 4 * (20 + 4 + 30 + 16 + 24 + 16)
    assert sum(count.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert parameters({"params": {"kernel": shape(3, 4), "bias": shape(4)}}) == {"tables": 0, "rest": 16}


@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("frnet", 2 * (4 * K * 16 + (F * K + 1) * 64 + 65 * K + 2)),  # two units; 2: the slope of each PReLU
        ("epnet", (D + D_D + 1) * 64 + 65 * D),
        # Of each layer its gate, and of each of two tasks a linear layer and Dice, then the logit.
        (
            "ppnet",
            3 * (D + 2 * K + 1) * 32 + 33 * 2 * (D + 256 + 128) + 2 * ((D + 2) * 256 + (256 + 2) * 128 + 129),
        ),
    ],
)
def test_parameters_of_a_gate_by_hand(case, count):
    gate, inputs = GATES[case]
    params = jax.eval_shape(gate.init, jax.random.key(0), *inputs)
    assert parameters(params["params"]) == {"tables": 0, "rest": count}

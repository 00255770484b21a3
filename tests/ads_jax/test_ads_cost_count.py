"""Operations of PSRG and PCRG against the compiler's count, their parameters against a count by hand."""

import jax
import jax.numpy as jnp
import pytest

from ads_jax import PCRG, PSRG, pcrg_flops, psrg_flops
from rec_core.ranking.cost import compiler_flops, parameters

B, T, C, G, D, D_D, HIDDEN, HEADS, WIDTH = 1024, 64, 8, 16, 32, 24, 48, 4, 16  # C candidates, G chunks of T behaviours
# Elementwise work, and what is computed from parameters alone, are left out of our count and in the compiler's.
TOLERANCE = 0.05
PSRG_, PCRG_ = PSRG(HIDDEN), PCRG(G, HIDDEN)
DOMAIN, TARGET, SEQUENCE, QUERY = (
    jax.ShapeDtypeStruct(sizes, jnp.float32) for sizes in ((B, D_D), (B, D), (B, T, D), (D, HEADS, WIDTH))
)
CANDIDATES = jax.ShapeDtypeStruct((B, C, D), jnp.float32)


def generate(params, domain):
    return PSRG_.apply(params, domain, D, method="generate")


def projected(params, domain, target, query):
    return PCRG_.apply(params, domain, target, project=lambda x: jnp.einsum("...q,qhd->...hd", x, query))


CASES = {
    "psrg": (PSRG_.apply, PSRG_, (DOMAIN, SEQUENCE), psrg_flops(PSRG_, D_D, D, T)),
    "weights alone": (generate, PSRG_, (DOMAIN,), psrg_flops(PSRG_, D_D, D, 0)),
    "pcrg": (PCRG_.apply, PCRG_, (DOMAIN, TARGET), pcrg_flops(PCRG_, D_D, D)),
    "candidates": (PCRG_.apply, PCRG_, (DOMAIN, CANDIDATES), pcrg_flops(PCRG_, D_D, D, candidates=C)),
    "projected": (
        projected, PCRG_, (DOMAIN, TARGET, QUERY), pcrg_flops(PCRG_, D_D, D, projected=HEADS * WIDTH),
    ),
}  # fmt: skip


def shapes(module):
    return jax.eval_shape(module.init, jax.random.key(0), DOMAIN, SEQUENCE if module is PSRG_ else TARGET)


@pytest.mark.parametrize("case", CASES)
def test_operations_agree_with_the_compiler(case):
    function, module, inputs, counted = CASES[case]
    compiled = compiler_flops(function, shapes(module), *inputs) / B
    assert 0 <= compiled / counted - 1 <= TOLERANCE, compiled / counted


def test_operations_by_hand():
    weight, bias, behaviours = 3 * 5 + 6 * 16, 3 * 5 + 6 * 4, 7 * 4 * 4
    assert psrg_flops(PSRG(hidden=5), d_D=3, d=4, T=7) == 2 * (weight + bias + behaviours)
    domain, candidate, asked = 3 * 5, 4 * 5 + 5 * 2 * 4, 4 * 5 + (5 + 4 + 1) * 2 * 6
    assert pcrg_flops(PCRG(2, hidden=5), d_D=3, d_Q=4, candidates=9) == 2 * (domain + 9 * candidate)
    assert pcrg_flops(PCRG(2, hidden=5), d_D=3, d_Q=4, projected=6) == 2 * (domain + asked)


def test_parameters_by_hand():
    first = (D_D + 1) * HIDDEN
    made = (
        D * D + 2 * first + (HIDDEN + 1) * (D * D + D)
    )  # W_shared, and a generator of the weights and one of the bias
    assert parameters(shapes(PSRG_)["params"]) == {"tables": 0, "rest": made}
    assert parameters(shapes(PCRG_)["params"]) == {"tables": 0, "rest": first + D * HIDDEN + (HIDDEN + 1) * G * D}

"""Operations of ADS's generators: two a multiply-add of their matrix products.

Elementwise work, and what is computed from parameters alone (once a batch), is left out, as in `rec_core.ranking.cost`.
"""

from ads_jax.pcrg import PCRG
from ads_jax.psrg import PSRG
from rec_core.ranking.networks.base import dense_flops


def psrg_flops(psrg: PSRG, d_D: int, d: int, T: int) -> int:
    """Of one request: weights and bias generated from a domain d_D wide, and T behaviours d wide sent through them.

    T = 0 leaves the behaviours out: a unit with `encode_mapped` is given the weights alone, and applies them its way.
    """
    # The bias of a second layer is one more row of its matrix: see `ads_jax.generator.Second`.
    generators = sum(dense_flops(d_D, psrg.hidden) + dense_flops(psrg.hidden + 1, size) for size in (d * d, d))
    return generators + T * dense_flops(d, d)


def pcrg_flops(pcrg: PCRG, d_D: int, d_Q: int, *, candidates: int = 1, projected: int = 0) -> int:
    """Of one request: the first layer's part of the domain once, and the queries of each candidate, d_Q wide.

    Args:
      projected: the width, of all heads, that `project` gives a query; 0 where none is given.
    """
    first = dense_flops(d_Q, pcrg.hidden)
    if projected:
        queries = dense_flops(pcrg.hidden + d_Q + 1, pcrg.chunks * projected)
    else:
        queries = dense_flops(pcrg.hidden, pcrg.chunks * d_Q)
    return dense_flops(d_D, pcrg.hidden) + candidates * (first + queries)

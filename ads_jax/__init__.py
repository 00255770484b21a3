"""ADS: adaptive domain scaling (arXiv 2502.05523): target attention made personal per domain.

`PSRG` and `PCRG` are the paper's generators; `ADS` puts both around any member of `rec_core.interest`, or, through
`Around`, around an attention of somebody else's. `init`, `apply`, `loss` and `score` are the ranking model's.
"""

from ads_jax.config import Config
from ads_jax.cost import pcrg_flops, psrg_flops
from ads_jax.model import Batch, apply, check, example, init, loss, objective, score, touched
from ads_jax.pcrg import PCRG
from ads_jax.plugin import ADS, Around, candidates
from ads_jax.psrg import PSRG

__all__ = [
    "ADS",
    "PCRG",
    "PSRG",
    "Around",
    "Batch",
    "Config",
    "apply",
    "candidates",
    "check",
    "example",
    "init",
    "loss",
    "objective",
    "pcrg_flops",
    "psrg_flops",
    "score",
    "touched",
]

"""ADS: adaptive domain scaling (arXiv 2502.05523): target attention made personal per domain, as a plug-in.

`PSRG` and `PCRG` are the paper's generators; `ADS` puts both around any member of `rec_core.interest`.
"""

from ads_jax.pcrg import PCRG
from ads_jax.plugin import ADS, candidates
from ads_jax.psrg import PSRG

__all__ = ["ADS", "PCRG", "PSRG", "candidates"]

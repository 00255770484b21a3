"""Mixture of logistic regressions, or large-scale piece-wise linear model (Gai et al., arXiv 1704.05194)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.interest.base import check_positive
from rec_core.ranking.networks.base import Inputs, Network, dense_flops


class MLR(Network):
    """`p(y = 1 | x) = sum_j softmax_j(u_j . x) sigmoid(w_j . x)`: a softmax divides the space, regressions fit it.

    What is returned is the mixture's logit, `log p - log(1 - p)`, from logarithms throughout: it stays finite where p
    rounds to 0 or 1. Each task has its own mixture. Ours: x are learned vectors, where the paper has the sparse
    features themselves, both layers have a bias, and there is no L1 and L2,1 penalty. There is no hidden layer:
    `hidden` and `dropout` are not read.
    """

    regions: int = 12

    @nn.compact
    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        check_positive(self, "regions")
        x, shape = inputs.x.astype(jnp.float32), (-1, self.tasks, self.regions)
        divide = jax.nn.log_softmax(nn.Dense(self.tasks * self.regions, name="divide")(x).reshape(shape))
        fit = nn.Dense(self.tasks * self.regions, name="fit")(x).reshape(shape)
        clicked = jax.nn.logsumexp(divide + jax.nn.log_sigmoid(fit), axis=-1)
        skipped = jax.nn.logsumexp(divide + jax.nn.log_sigmoid(-fit), axis=-1)
        return clicked - skipped

    @nn.nowrap
    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        return 2 * dense_flops(D, self.tasks * self.regions)

"""STAR: star topology adaptive recommender (Sheng et al., arXiv 2101.11427)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.interest.base import check_positive
from rec_core.ranking.networks.base import Inputs, Network, activate, dense_flops, take_domain
from rec_core.ranking.networks.dnn import DNN


class STAR(Network):
    """An MLP with weights `W * W_p` and biases `b + b_p`, shared ones and those of domain p; the last layer as well.

    Before it, partitioned normalisation `(gamma gamma_p) z + (beta + beta_p)`; beside it, an auxiliary MLP on E_D and x
    whose logit is added. Ours: z is x normalised over its own entries (a layer norm), where the paper has the mean and
    variance of a domain's examples: no running statistics. All that is of one domain starts at one (W_p, gamma_p) or
    zero (b_p, beta_p), so that domains are alike at first.

    A batch may mix domains: every domain's layer is computed, and each example takes its own, `domains` times the
    paper's cost. That fits some tens of domains.

    Attributes:
      domains: number of domains.
      auxiliary: hidden layers of the auxiliary MLP.
    """

    domains: int = 1
    auxiliary: tuple[int, ...] = (32,)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("domain", "domain_id")

    @nn.compact
    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        check_positive(self, "domains", "auxiliary")
        own = jnp.clip(jnp.asarray(inputs.domain_id), 0, self.domains - 1)
        ones, zeros, d = nn.initializers.ones, nn.initializers.zeros, (inputs.x.shape[-1],)
        gamma, beta = self.param("gamma", ones, d), self.param("beta", zeros, d)
        gammas = self.param("gamma_domain", ones, (self.domains, *d))
        betas = self.param("beta_domain", zeros, (self.domains, *d))
        z = nn.LayerNorm(use_scale=False, use_bias=False, dtype=jnp.float32)(inputs.x)
        h = (gamma * gammas[own] * z + beta + betas[own]).astype(self.dtype)
        for i, units in enumerate(self.hidden):
            h = activate(self._layer(h, own, units, f"mlp_{i}"), i, self.dropout, self.dtype, deterministic)
        main = self._layer(h.astype(jnp.float32), own, self.tasks, "logit")
        together = jnp.concatenate([jnp.asarray(inputs.domain), inputs.x], axis=-1)
        auxiliary = DNN(self.auxiliary, self.tasks, self.dropout, self.dtype, name="auxiliary")
        return main + auxiliary(Inputs(together, None), deterministic)

    def _layer(self, h: Float[Array, "B n"], own: Array, units: int, name: str) -> Float[Array, "B units"]:
        n = h.shape[-1]
        kernel = self.param(f"{name}_kernel", nn.initializers.lecun_normal(), (n, units), jnp.float32)
        kernels = self.param(f"{name}_kernel_domain", nn.initializers.ones, (self.domains, n, units), jnp.float32)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (units,), jnp.float32)
        biases = self.param(f"{name}_bias_domain", nn.initializers.zeros, (self.domains, units), jnp.float32)
        every = jnp.einsum("bi,gio->bgo", h, (kernel * kernels).astype(h.dtype))
        return take_domain(every, own) + (bias + biases[own]).astype(h.dtype)

    @nn.nowrap
    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        main = dense_flops(D, *self.hidden, self.tasks)
        return self.domains * main + dense_flops(d_D + D, *self.auxiliary, self.tasks)

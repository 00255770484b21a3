"""DFFM: domain facilitated feature modelling (Guo et al., CIKM 2023), its feature interaction."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.ranking.networks.base import Inputs, Network, dense_flops, last, mlp


class DFFM(Network):
    """`MLP(x + p + E_D)`, `+` being concatenation, with products of fields whose parameters the domain generates:

        p_ij = e_i^T W(E_D) e_j for i < j,    W(E_D) = reshape(E_D A + a), [k, k]

    Taken is the paper's idea that domain information goes into the parameters of the feature interaction, and that
    these products, with the features and the domain's, go through an MLP; the form of W is ours. Its other half, the
    same for user behaviours, belongs to the interest module and is not here. Ours: W starts at the identity for all
    domains, so that a new network has plain inner products.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        return ("fields", "domain")

    @nn.compact
    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        fields, domain = jnp.asarray(inputs.fields), jnp.asarray(inputs.domain)
        count, k = fields.shape[1:]
        weight = nn.Dense(
            k * k,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            bias_init=lambda *_: jnp.eye(k).reshape(-1),
            name="generate",
        )(domain).reshape(-1, k, k)
        products = jnp.einsum("bil,bjl->bij", jnp.einsum("bik,bkl->bil", fields, weight), fields)
        first, second = np.triu_indices(count, 1)
        x = jnp.concatenate([inputs.x, products[:, first, second], domain], axis=-1)
        return last(mlp(x, self.hidden, self.dropout, self.dtype, deterministic), self.tasks)

    @nn.nowrap
    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        products = dense_flops(d_D, k * k) + F * dense_flops(k, k, F)
        return products + dense_flops(D + F * (F - 1) // 2 + d_D, *self.hidden, self.tasks)

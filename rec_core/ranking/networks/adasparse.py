"""AdaSparse: neurons weighed, and pruned, per domain (Yang et al., arXiv 2206.13108)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.ranking.networks.base import Inputs, Network, activate, dense_flops, last


class AdaSparse(Network):
    """An MLP in which what goes into each layer is weighed by factors `pi` of the domain: `f(W (pi * h) + b)`.

    A pruner a layer, `v = [E_D, h] P`, gives the factors in one of three forms:

    - "binary": 1 where `sigmoid(alpha v) > epsilon`, else 0; its gradient is the sigmoid's (straight through);
    - "scaling": `beta sigmoid(v)`, which prunes nothing;
    - "fusion": `beta sigmoid(alpha v)`, and 0 where that is not above epsilon.

    Ours: alpha is fixed, where the paper lets it grow during training (a network here has no state and knows no step),
    and the loss has no term that steers how many neurons are pruned. A new pruner is near v = 0: no neuron is pruned.

    Attributes:
      form, alpha, beta, epsilon: see above.
    """

    form: str = "fusion"
    alpha: float = 1.0
    beta: float = 2.0
    epsilon: float = 0.25

    @property
    def needs(self) -> tuple[str, ...]:
        return ("domain",)

    @nn.compact
    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        self.choose("form", ("binary", "scaling", "fusion"))
        top = 1.0 if self.form == "binary" else self.beta
        if self.alpha <= 0 or self.beta <= 0 or not 0 <= self.epsilon < top:
            raise ValueError(
                f"AdaSparse: alpha {self.alpha} and beta {self.beta} must be above 0, epsilon {self.epsilon} in "
                f"[0, {top}): at or above it every neuron is pruned"
            )
        h = inputs.x
        for i, units in enumerate(self.hidden):
            pruner = nn.Dense(h.shape[-1], use_bias=False, dtype=self.dtype, name=f"pruner_{i}")
            h = h * self._factors(pruner(jnp.concatenate([jnp.asarray(inputs.domain), h], axis=-1)))
            h = nn.Dense(units, dtype=self.dtype, name=f"mlp_{i}")(h)
            h = activate(h, i, self.dropout, self.dtype, deterministic)
        return last(h, self.tasks)

    def _factors(self, v: Float[Array, "B n"]) -> Float[Array, "B n"]:
        if self.form == "scaling":
            return self.beta * nn.sigmoid(v)
        soft = nn.sigmoid(self.alpha * v)
        if self.form == "fusion":
            return jnp.where(self.beta * soft > self.epsilon, self.beta * soft, 0)
        hard = (soft > self.epsilon).astype(soft.dtype)
        return hard + (soft - jax.lax.stop_gradient(soft))

    @nn.nowrap
    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        pruners = sum(dense_flops(d_D + width, width) for width in (D, *self.hidden[:-1]))
        return pruners + dense_flops(D, *self.hidden, self.tasks)

"""ADS, personalized sequence representation generation (arXiv 2502.05523, equations 2-5)."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ads_jax.generator import Generator


class PSRG(nn.Module):
    """The sequence as users of a domain see it: each behaviour through weights generated from the domain.

        W_private = sigmoid(relu(E_D W1^T + b1) W2^T + b2)            (2)
        W_generated = eta (W_shared * W_private)                      (3)
        b_generated = relu(E_D W1'^T + b1') W2'^T + b2'               (4)
        E_S_personalized = E_S reshape(W_generated)^T + b_generated   (5)

    It does not depend on the candidate. Ours: W_shared starts as the identity and W_private at 1/2, so that with
    eta = 2 the sequence is unchanged at first; and it is its parameters over d (see `ads_jax.generator.Second`).

    Raises:
      ValueError: when called, if `hidden` is below 1, or `eta` not a finite number above 0.
    """

    hidden: int = 32
    eta: float = 2.0  # widens the sigmoid's (0, 1)
    dtype: str = "float32"

    @nn.compact
    def generate(self, domain: Float[Array, "B d_D"], d: int) -> tuple[Float[Array, "B d d"], Float[Array, "B d"]]:
        """`reshape(W_generated)^T` and `b_generated`, for behaviours `d` wide: equations 2-4."""
        if self.hidden < 1:
            raise ValueError(f"PSRG: hidden is {self.hidden}, must be at least 1")
        if not 0 < self.eta < math.inf:
            raise ValueError(f"PSRG: eta is {self.eta}, must be above 0 and finite (2 leaves a new sequence as it is)")
        w_shared = self.param("w_shared", lambda _: d * jnp.eye(d)) / d
        w_private = nn.sigmoid(Generator(self.hidden, d * d, True, self.dtype, name="weight")(domain))
        w_generated = self.eta * w_shared.T.astype(self.dtype) * w_private.reshape(-1, d, d)
        b_generated = Generator(self.hidden, d, False, self.dtype, name="bias")(domain)
        return w_generated, b_generated

    def __call__(self, domain: Float[Array, "B d_D"], sequence: Float[Array, "B T d_S"]) -> Float[Array, "B T d_S"]:
        """The personal sequence, equation 5. What stands at padding is not masked."""
        w_generated, b_generated = self.generate(domain, sequence.shape[-1])
        return jnp.einsum("bti,bio->bto", sequence.astype(self.dtype), w_generated) + b_generated[:, None]

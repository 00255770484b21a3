"""Token encoder: `e^t = proj_t(concat(f_1^t; f_2^t; ...))`, t in {item, condition} (LUM, step 1)."""

from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Float


class TokenEncoder(nn.Module):
    """One projection per token type over any number of concatenated features.

    Args:
      width: of the token.
      dtype: compute dtype; parameters stay float32.
    """

    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Float[Array, "*n f"]) -> Float[Array, "*n width"]:
        return nn.Dense(self.width, dtype=jnp.dtype(self.dtype), name="projection")(features)

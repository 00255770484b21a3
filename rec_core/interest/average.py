"""Mean of the behaviours, blind to the target: the sequence part of a plain DNN ranker."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float


class Average(nn.Module):
    """Mean over the unpadded behaviours, `d_out = d`. It reads neither target nor time."""

    dtype: str = "float32"

    def __call__(
        self,
        target: Float[Array, "B d"] | Float[Array, "B T d"],
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Float[Array, "B d"]:
        mask = mask.astype(bool)
        sequence = jnp.where(mask[..., None], sequence, 0).astype(self.dtype)
        # Summed in float32: bfloat16 cannot count past 256.
        total = jnp.sum(sequence, axis=-2, dtype=jnp.float32)
        return (total / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)).astype(self.dtype)

"""Mean of the behaviours, blind to the target: the sequence part of a plain DNN ranker."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rec_core.interest.base import Behaviors, Interest


class Average(Interest):
    """Mean over the unpadded behaviours, `d_out = d`. It reads neither target nor time."""

    def read(self, encoded: Behaviors, target: Float[Array, "B d"] | Float[Array, "B T d"]) -> Float[Array, "B d"]:
        return mean_of(encoded.sequence, encoded.mask).astype(self.dtype)


def mean_of(sequence: Float[Array, "*n T d"], mask: Bool[Array, "*n T"]) -> Float[Array, "*n d"]:
    """Mean over the unpadded behaviours, float32, of a sequence with zeros at padding; zeros without any."""
    # Summed in float32: bfloat16 cannot count past 256.
    total = jnp.sum(sequence, axis=-2, dtype=jnp.float32)
    return total / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)

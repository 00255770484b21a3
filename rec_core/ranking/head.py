"""The MLP that ends the click models, over what is known of an impression."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.ranking.networks.base import last, mlp


class Head(nn.Module):
    """The MLP over what is known of an impression: parts side by side, float features through a layer of their own."""

    hidden: tuple[int, ...]
    dropout: float = 0.0
    tasks: int = 1
    dense_width: int = 32
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        parts: Sequence[Float[Array, "B _"] | None],
        dense: Float[Array, "B F"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B tasks"]:
        """Logits, float32. Parts that are None are left out."""
        given = [part for part in parts if part is not None]
        if dense is not None:
            given.append(nn.Dense(self.dense_width, dtype=self.dtype, name="dense")(tamed(dense)))
        x = jnp.concatenate([part.astype(self.dtype) for part in given], axis=-1)
        return last(mlp(x, self.hidden, self.dropout, self.dtype, deterministic), self.tasks)


def tamed(dense: Float[Array, "*n F"]) -> Float[Array, "*n F"]:
    """`sign(x) log(1 + |x|)`: large counts come down, small values stay as they are.

    A layer norm would not do: it erases the size of a single feature.
    """
    return jnp.sign(dense) * jnp.log1p(jnp.abs(dense))

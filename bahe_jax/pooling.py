"""F_p: from the states of a text to one vector."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def pool(
    x: Float[Array, "n T d"], mask: Bool[Array, "n P T"], pooling: str, query: Float[Array, " d"] | None = None
) -> Float[Array, "n P d"]:
    """Pools P texts of each row.

    Args:
      x: states.
      mask: which tokens are of each text.
      pooling: "mean", "last" (the text's last token) or "attention" (softmax of `x . query / sqrt(d)`).
      query: of "attention"; zeros give the mean.

    Returns:
      Vectors in the dtype of `x`, summed in float32; zeros for a text without tokens.
    """
    weights: Any = mask
    if pooling == "last":
        place = jnp.arange(mask.shape[-1])
        weights = mask & (place == jnp.max(jnp.where(mask, place, -1), axis=-1, keepdims=True))
    elif pooling == "attention":
        scores = jnp.einsum("ntd,d->nt", x, query, preferred_element_type=jnp.float32)[:, None] * x.shape[-1] ** -0.5
        scores = jnp.where(mask, scores, -1e30)  # finite, so that a text without tokens has gradients
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    # The weights are rounded to the dtype of x before both sums, so that they still add up to one.
    weights = weights.astype(x.dtype)
    total = jnp.sum(weights, axis=-1, keepdims=True, dtype=jnp.float32)
    summed = jnp.einsum("npt,ntd->npd", weights, x, preferred_element_type=jnp.float32)
    return (summed / jnp.where(total > 0, total, 1.0)).astype(x.dtype)

"""Behaviours at the end of their slots: chunks are cut there, so that the side of the padding cannot matter."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def newest_last(mask: Bool[Array, "B T"], arrays: Any) -> Any:
    """A pytree of arrays `[B, T, ...]` with the padding first and the behaviours, in their order, after it.

    Where every row of the batch lies so already, nothing is sorted or moved. It is cheapest on ids, before they are
    looked up.
    """
    mask = mask.astype(bool)

    def move(arrays: Any) -> Any:
        order = jnp.argsort(mask, axis=1, stable=True)
        return jax.tree.map(
            lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1), arrays
        )

    lies_so = jnp.all(mask[:, :-1] <= mask[:, 1:])
    return jax.lax.cond(lies_so, lambda arrays: arrays, move, jax.tree.map(jnp.asarray, arrays))

"""A function of each of a request's candidates, some at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_chunks(f: Callable[[Any], Any], xs: Any, chunk: int) -> Any:
    """`f` of each candidate along the leading axis of `xs`, stacked: at most `chunk` at a time, vectorised.

    There are as few chunks as can be, all of one size, the last filled up with the last candidate: `jax.lax.map` with a
    `batch_size` that does not divide their number would compile `f` twice, and hold twice what the chunks share.

    Args:
      xs: a pytree of arrays `[C, ...]`.

    Raises:
      ValueError: `chunk` or C is below 1.
    """
    n = len(jax.tree.leaves(xs)[0])
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, must be at least 1")
    if n < 1:
        raise ValueError("there is nothing to map over; at least one candidate is needed")
    count = -(-n // chunk)
    size = -(-n // count)

    def whole(x: Any) -> Any:
        return jnp.pad(x, [(0, count * size - n)] + [(0, 0)] * (jnp.ndim(x) - 1), mode="edge")

    found = jax.lax.map(f, jax.tree.map(whole, xs), batch_size=size)
    return jax.tree.map(lambda x: x[:n], found)

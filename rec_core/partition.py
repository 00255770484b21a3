"""A tree of parameters in two: what training moves, and the rest, which needs no gradient and no optimizer state."""

from typing import Any

import jax


def split(params: Any, mask: Any) -> tuple[Any, Any]:
    """`(moved, rest)`, both like `params` with None (no leaf to JAX and Optax) where a leaf is the other's.

    Args:
      mask: tree of bools like `params`, such as a model's `trainable(params, config)` gives.
    """
    moved = jax.tree.map(lambda leaf, taken: leaf if taken else None, params, mask)
    rest = jax.tree.map(lambda leaf, taken: None if taken else leaf, params, mask)
    return moved, rest


def join(moved: Any, rest: Any) -> Any:
    """The tree that `split` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, moved, rest, is_leaf=lambda leaf: leaf is None)

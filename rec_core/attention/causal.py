"""Plain causal attention, which others have as well: cuDNN trains it where that was measured to be faster than ours."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rec_core.attention.api import Call, choose, range_attention

CUDNN_WIDTHS = (128, 256)  # head widths at which cuDNN's backward pass is the faster one (NOTES.md)


def causal_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention of each row over itself and all rows before it; one sequence an example, nothing packed.

    Args:
      q: queries. k, v: keys and values; K heads, K divides H, query head h reads key head h // (H // K).
      scale: factor on the logits, 1 / sqrt(D) when None.
      implementation: as in ``range_attention``. None is its choice, but on Hopper and head widths 128 and 256 what is
        differentiated goes to cuDNN, forward and backward, through ``jax.nn.dot_product_attention``.

    Raises:
      ValueError: shapes or dtypes that do not go together.
    """
    if implementation is None and _cudnn_trains(q, k):
        return _trained_by_cudnn(q.shape[-1] ** -0.5 if scale is None else scale, q, k, v)
    return _ranged(q, k, v, scale=scale, implementation=implementation)


def _ranged(q: Array, k: Array, v: Array, **options: Any) -> Array:
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}, must be [batch, length, heads, width]")
    place = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    return range_attention(q, k, v, jnp.zeros_like(place), place, **options)  # type: ignore[return-value]


def _cudnn_trains(q: Array, k: Array) -> bool:
    if q.ndim != 4 or k.ndim != 4 or q.shape[-1] not in CUDNN_WIDTHS or q.shape[1] % 2:  # it takes even lengths
        return False
    return choose(Call.of(q, k, self_term=True)) == "mosaic_gpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _trained_by_cudnn(scale: float, q: Array, k: Array, v: Array) -> Array:
    return _ranged(q, k, v, scale=scale)


def _forward(scale: float, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, scale=scale, implementation="cudnn")
    return jax.vjp(attend, q, k, v)


def _backward(scale: float, pull_back: Any, d_out: Array) -> tuple[Array, Array, Array]:
    d_q, d_k, d_v = pull_back(d_out)
    return d_q, d_k, d_v


_trained_by_cudnn.defvjp(_forward, _backward)

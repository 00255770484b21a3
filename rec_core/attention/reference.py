"""Range attention, written the plain way: a dense mask, one softmax. Slow on purpose; it is the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def range_attention_reference(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    k_self: Float[Array, "B T K D"] | None,
    v_self: Float[Array, "B T K D"] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """Softmax attention of row i over the keys ``[k_start_i, k_end_i)`` and, if given, its own key and value.

    Builds the full ``[B, H, T, S]`` matrix of logits and repeats keys and values once per query head, all in
    float32 (float64 if the inputs are) at the highest matrix precision.

    Args:
      q: queries; k, v: keys and values, K heads with K dividing H; k_start, k_end: the range of each row.
      k_self, v_self: the row's own key and value, or None for a row that sees its range only.
      scale: factor on the logits.

    Returns:
      ``out`` in the dtype of ``q``, and ``lse``, the natural logarithm of the sum of exponentials of each row's
      logits, in the accumulation dtype. A row that sees nothing has out 0 and lse -inf.
    """
    acc = jnp.promote_types(jnp.float32, q.dtype)
    group = q.shape[2] // k.shape[2]
    query = q.astype(acc)
    key, value = (jnp.repeat(x.astype(acc), group, axis=2) for x in (k, v))
    highest = jax.lax.Precision.HIGHEST

    slot = jnp.arange(k.shape[1], dtype=jnp.int32)
    visible = (slot >= k_start[..., None]) & (slot < k_end[..., None])  # [B, T, S]
    logits = jnp.einsum("bthd,bshd->bhts", query, key, precision=highest) * scale
    logits = jnp.where(visible[:, None], logits, -jnp.inf)
    if k_self is not None and v_self is not None:
        own_key, own_value = (jnp.repeat(x.astype(acc), group, axis=2) for x in (k_self, v_self))
        own = jnp.einsum("bthd,bthd->bht", query, own_key, precision=highest) * scale
        logits = jnp.concatenate([logits, own[..., None]], axis=-1)

    # A row without any key has only -inf logits; its maximum is replaced so that neither value nor gradient is NaN.
    seen = jnp.any(logits > -jnp.inf, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    weight = jnp.exp(logits - jnp.where(seen, top, 0.0))
    total = jnp.sum(weight, axis=-1, keepdims=True)
    probability = weight / jnp.where(seen, total, 1.0)
    out = jnp.einsum("bhts,bshd->bthd", probability[..., : k.shape[1]], value, precision=highest)
    if k_self is not None and v_self is not None:
        out = out + jnp.swapaxes(probability[..., -1:], 1, 2) * own_value
    lse = jnp.where(seen, jnp.log(jnp.where(seen, total, 1.0)) + jnp.where(seen, top, 0.0), -jnp.inf)
    return out.astype(q.dtype), lse[..., 0]

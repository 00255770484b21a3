"""Losses as mergeable sums: each function gives `(sum, weight)`, and the loss of any whole is sum / weight."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30  # finite: with every negative masked, logsumexp and its gradient stay defined
_SIMILARITIES = ("cosine", "dot")

Sum = tuple[Float[Array, ""], Float[Array, ""]]


def gather_over(axis_name: str | None, tree: Any) -> Any:
    """Concatenate the leaves' leading axes over a mapped axis, such as in-batch negatives under pmap or shard_map.
    Without an axis name the tree is whole already and comes back as it is."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis_name, tiled=True), tree)


def sum_over(axis_name: str | None, tree: Any) -> Any:
    """Add the leaves up over a mapped axis, or give the tree back where there is none."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def mean(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    """`total / weight`, and 0 where nothing has weight (a batch of padding only)."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def bce_with_logits(
    logits: Float[Array, "..."], labels: Float[Array, "..."], weights: Float[Array, "..."] | None = None
) -> Sum:
    """Binary cross-entropy `-y ln p - (1 - y) ln(1 - p)`, p = sigmoid(logits); labels in [0, 1], in float32.

    Entries of weight 0 add nothing, whatever they hold.

    Raises:
      ValueError: labels have another shape than logits.
    """
    if jnp.shape(labels) != logits.shape:
        raise ValueError(f"labels have shape {jnp.shape(labels)}, logits {logits.shape}; they must be the same")
    logits, labels = logits.astype(jnp.float32), jnp.asarray(labels, jnp.float32)
    weights = jnp.ones_like(logits) if weights is None else jnp.broadcast_to(weights, logits.shape).astype(jnp.float32)
    logits, labels = jnp.where(weights > 0, logits, 0), jnp.where(weights > 0, labels, 0)
    return jnp.sum((jax.nn.softplus(logits) - labels * logits) * weights), jnp.sum(weights)


def normalize(x: Float[Array, "... d"], eps: float = 1e-6) -> Float[Array, "... d"]:
    """Length one along the last axis, in float32; a zero vector stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps * eps))


def info_nce(
    queries: Float[Array, "N d"],
    positives: Float[Array, "N d"],
    negatives: Float[Array, "K d"],
    *,
    positive_ids: Int[Array, " N"] | None = None,
    negative_ids: Int[Array, " K"] | None = None,
    weights: Float[Array, " N"] | None = None,
    negative_mask: Bool[Array, " K"] | None = None,
    query_users: Int[Array, " N"] | None = None,
    negative_users: Int[Array, " K"] | None = None,
    log_q: Float[Array, " K"] | None = None,
    positive_log_q: Float[Array, " N"] | None = None,
    temperature: float | Float[Array, ""] = 1.0,
    similarity: str = "cosine",
    chunk: int = 1024,
) -> Sum:
    """InfoNCE, also known as sampled softmax: each query must find its positive among itself and the negatives.

    `-w_n log( exp(s_n) / (exp(s_n) + sum_k exp(s_nk)) )` with `s = sim / temperature - log_q`
    (arXiv 1807.03748; LUM's equation of step 1). In-batch negatives are `negatives = positives` with their ids.

    Args:
      positive_ids, negative_ids: a negative of the positive's id is left out. Given together, or neither.
      weights: 0 leaves a query out (padding).
      negative_mask: False leaves a negative out for all queries (padding).
      query_users, negative_users: a negative that comes from the query's own user is left out.
      log_q, positive_log_q: log of the probability that an item is drawn as a negative, for the popularity correction
        (Yi et al., RecSys 2019). The positive is corrected like the rest, so both are given, or neither.
      temperature: a number, or a traced scalar where it is learned.
      similarity: "cosine" or "dot".
      chunk: queries at a time. Memory is `O(chunk K)`; each chunk is computed again in the backward pass.

    Returns:
      Sum over the queries and sum of weights, float32. A query whose negatives are all left out has loss 0.
    """
    count, pool = queries.shape[0], negatives.shape[0]
    if queries.shape != positives.shape or queries.shape[1:] != negatives.shape[1:]:
        raise ValueError(
            f"info_nce: queries {queries.shape}, positives {positives.shape} and negatives {negatives.shape} "
            "must be [N, d], [N, d] and [K, d]"
        )
    if not pool:
        raise ValueError("info_nce: there are no negatives (K = 0); without rivals there is nothing to learn")
    _pair("positive_ids", positive_ids, count, "negative_ids", negative_ids, pool)
    _pair("query_users", query_users, count, "negative_users", negative_users, pool)
    if negative_mask is not None and negative_mask.shape != (pool,):
        raise ValueError(f"info_nce: negative_mask has shape {negative_mask.shape}, must be ({pool},)")
    if weights is not None and weights.shape != (count,):
        raise ValueError(f"info_nce: weights has shape {weights.shape}, must be ({count},)")
    _pair("positive_log_q", positive_log_q, count, "log_q", log_q, pool)
    if similarity not in _SIMILARITIES:
        raise ValueError(f"similarity is {similarity!r}, must be one of {_SIMILARITIES}")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}, must be above 0")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, must be at least 1")

    weights = jnp.ones(count, jnp.float32) if weights is None else weights.astype(jnp.float32)
    # What has no weight may hold anything: replaced first, since 0 * NaN would reach the sums and the gradients.
    queries = jnp.where(weights[:, None] > 0, queries, 0)
    positives = jnp.where(weights[:, None] > 0, positives, 0)
    if negative_mask is not None:
        negatives = jnp.where(negative_mask[:, None], negatives, 0)
    if similarity == "cosine":
        compute = queries.dtype
        queries, positives, negatives = (normalize(x).astype(compute) for x in (queries, positives, negatives))
    score = jnp.sum(queries.astype(jnp.float32) * positives.astype(jnp.float32), axis=-1) / temperature
    if positive_log_q is not None:
        score = score - positive_log_q
    score = jnp.where(weights > 0, score, 0)

    def chunk_loss(part: dict[str, Array]) -> Float[Array, ""]:
        scores = jnp.einsum("nd,kd->nk", part["query"], negatives, preferred_element_type=jnp.float32) / temperature
        if log_q is not None:
            scores = scores - log_q
        masked = jnp.zeros(scores.shape, bool) if negative_mask is None else ~negative_mask[None]
        if negative_ids is not None:
            masked = masked | (part["id"][:, None] == negative_ids[None])
        if negative_users is not None:
            masked = masked | (part["user"][:, None] == negative_users[None])
        rivals = jax.nn.logsumexp(jnp.where(masked, _MASKED, scores), axis=-1)
        return jnp.sum(jax.nn.softplus(rivals - part["score"]) * part["weight"])

    parts = {"query": queries, "score": score, "weight": weights, "id": positive_ids, "user": query_users}
    parts = {name: array for name, array in parts.items() if array is not None}
    chunk = min(chunk, max(count, 1))
    chunks = max(1, -(-count // chunk))

    def split(array: Array) -> Array:
        # Strided, not consecutive: with queries split over devices each chunk then has rows from all of them, where
        # consecutive chunks would be one device's work each.
        padded = jnp.pad(array, [(0, chunks * chunk - count)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(chunk, chunks, *array.shape[1:]).swapaxes(0, 1)

    sums = jax.lax.map(jax.checkpoint(chunk_loss, prevent_cse=False), jax.tree.map(split, parts))
    return jnp.sum(sums), jnp.sum(weights)


def _pair(first: str, a: Array | None, a_size: int, second: str, b: Array | None, b_size: int) -> None:
    if (a is None) != (b is None):
        given, absent = (first, second) if b is None else (second, first)
        raise ValueError(f"info_nce: {given} is given without {absent}; give both or neither")
    for name, array, size in ((first, a, a_size), (second, b, b_size)):
        if array is not None and array.shape != (size,):
            raise ValueError(f"info_nce: {name} has shape {array.shape}, must be ({size},)")

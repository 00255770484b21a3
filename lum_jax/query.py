"""LUM step 2, knowledge querying by group query over packed rows (arXiv 2502.08309, section 4.2).

All questions about a user stand behind one prefix `c_1, i_1, ..., c_L, i_L`, which is computed once. Each sees the
prefix and itself, never another question, and all take the position that the next condition token would have. The
answers equal those of separate passes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lum_jax import model
from lum_jax.batch import Batch, Queries
from lum_jax.config import Config
from rec_core.attention import ranges_from_segments


def query(params: dict, batch: Batch, queries: Queries, config: Config) -> Float[Array, "B Q width"]:
    """Answers o to Q questions a row, each about one user of its row.

    Args:
      params: from `init` or training.
      batch: packed prefixes, B rows of L events.
      queries: the questions; a `limit` makes an answer as of an earlier time.
      config: settings; must have condition tokens.

    Returns:
      o at each question's condition token, `[B, Q, width]`; zeros where `segment_ids` is 0.
    """
    require_conditions(config)
    tokens, segments, positions, _ = model.prefix_tokens(params, batch, config)
    length, asked = tokens.shape[1], queries.segment_ids.shape[1]
    questions = model.condition_embeddings(params, queries.condition, config)

    def join(a: Array, b: Array) -> Array:
        return jnp.concatenate([a, b], axis=1)

    limit = None
    if queries.limit is not None:
        limit = join(jnp.zeros_like(segments), config.stride * queries.limit)
    k_start, k_end = ranges_from_segments(
        join(segments, queries.segment_ids),
        is_query=join(jnp.zeros(segments.shape, bool), jnp.ones((segments.shape[0], asked), bool)),
        limit=limit,
    )
    hidden = model.encode(
        params,
        config,
        join(tokens, questions.astype(tokens.dtype)),
        join(positions, (k_end - k_start)[:, length:]),
        k_start,
        k_end,
    )
    return hidden[:, length:] * (queries.segment_ids > 0)[..., None]


def require_conditions(config: Config) -> None:
    """Raises ValueError where the model has no condition tokens, so that nothing can be asked."""
    if not config.condition_tokens:
        raise ValueError("lum_jax: condition_tokens=False; a model without condition tokens cannot be queried")

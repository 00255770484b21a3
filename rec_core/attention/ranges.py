"""From how rows are packed to the range of keys that each token sees.

A token sees the keys ``[k_start, k_end)`` of its row and, through the self term of ``range_attention``, itself. The
ranges are made once per batch and shared by all layers and heads. Everything but ``check_segments`` is pure jnp with
memory linear in the row length.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def ranges_from_segments(
    segment_ids: Int[Array, "B T"],
    *,
    is_query: Bool[Array, "B T"] | None = None,
    limit: Int[Array, "B T"] | None = None,
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Ranges of packed rows: causal inside a segment; a query sees the prefix of its segment.

    Args:
      segment_ids: the user of each token; 0 is padding. The prefix tokens of one segment must be contiguous (see
        ``check_segments``); any ids in any order otherwise.
      is_query: True for query tokens (LUM's group query). They may stand anywhere in the row: behind their prefix, or
        all at the tail. None means no queries.
      limit: how many prefix tokens of its segment a query may see (as-of-time queries); read at queries only. A
        limit beyond the prefix means all of it, a limit below 1 none.

    Returns:
      ``(k_start, k_end)`` int32 [B, T]: for a prefix token i, [start of its segment, i); for a query, [start of its
      segment, end of its segment's prefix) cut to ``limit``. Padding, and queries of a segment without prefix tokens,
      get an empty range.
    """
    row = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    used = segment_ids != 0
    query = jnp.zeros_like(used) if is_query is None else is_query & used
    prefix = used & ~query
    start, end = jax.vmap(_prefix_bounds)(segment_ids, prefix)
    if limit is not None:
        limited = jnp.clip(start + jnp.maximum(limit, 0), start, end).astype(jnp.int32)
        end = jnp.where(query, limited, end)
    end = jnp.where(prefix, row, end)
    empty = start >= end
    return jnp.where(empty | ~used, 0, start), jnp.where(empty | ~used, 0, end)


def _prefix_bounds(segment_ids: Int[Array, " T"], prefix: Bool[Array, " T"]) -> tuple[Array, Array]:
    """Start and end of the prefix of each token's segment in one row; a segment without one gets start > end."""
    length = segment_ids.shape[0]
    row = jnp.arange(length, dtype=jnp.int32)
    order = jnp.argsort(segment_ids, stable=True)
    ordered = segment_ids[order]
    new = jnp.concatenate([jnp.zeros(1, jnp.int32), (ordered[1:] != ordered[:-1]).astype(jnp.int32)])[:length]
    rank = jnp.zeros(length, jnp.int32).at[order].set(jnp.cumsum(new))
    first = jnp.full(length, length, jnp.int32).at[rank].min(jnp.where(prefix, row, length))
    last = jnp.zeros(length, jnp.int32).at[rank].max(jnp.where(prefix, row + 1, 0))
    return first[rank], last[rank]


def ranges_from_lengths(
    lengths: Int[Array, " B"], rows: int, *, append: bool = False
) -> tuple[Int[Array, "B rows"], Int[Array, "B rows"]]:
    """Ranges of ``rows`` new tokens over a cache that holds ``lengths`` tokens per example, from slot 0.

    With ``append=False`` the tokens are queries: each sees the whole cache and itself, never another query. With
    ``append=True`` they are written behind the cache, and token t also sees the t new tokens before it.
    """
    end = jnp.broadcast_to(lengths.astype(jnp.int32)[:, None], (lengths.shape[0], rows))
    if append:
        end = end + jnp.arange(rows, dtype=jnp.int32)
    return jnp.zeros_like(end), end


def check_segments(segment_ids: np.ndarray, is_query: np.ndarray | None = None) -> None:
    """Raises ValueError if the prefix tokens of a segment are not contiguous, naming row, segment and position.

    Host side: a range could not describe such a row, and its tokens would see another user's.
    """
    segment_ids = np.asarray(segment_ids)
    if segment_ids.ndim != 2:
        raise ValueError(f"segment_ids has shape {segment_ids.shape}, expected [rows, length]")
    if is_query is not None and np.shape(is_query) != segment_ids.shape:
        raise ValueError(f"is_query has shape {np.shape(is_query)}, segment_ids {segment_ids.shape}; they must agree")
    prefix = segment_ids != 0 if is_query is None else (segment_ids != 0) & ~np.asarray(is_query, bool)
    for number, (ids, mask) in enumerate(zip(segment_ids, prefix)):
        place = np.flatnonzero(mask)
        if not place.size:
            continue
        own = ids[place]
        # A run of prefix tokens ends where the segment changes or where anything else stands in between.
        begins = np.flatnonzero(np.concatenate([[True], (own[1:] != own[:-1]) | (np.diff(place) != 1)]))
        _, seen = np.unique(own[begins], return_index=True)
        again = np.setdiff1d(np.arange(begins.size), seen)
        if again.size:
            at = begins[again[0]]
            raise ValueError(
                f"segment_ids: row {number}: segment {own[at]} begins a second time at position {place[at]}; the "
                "prefix tokens of a segment must be contiguous: give each user one segment and mark queries in is_query"
            )

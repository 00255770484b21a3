"""What LUM reads: packed rows of behaviour sequences, and questions about them; NumPy on the host, JAX on a device."""

from typing import Any

from flax import struct
from jaxtyping import Float, Int


@struct.dataclass
class Batch:
    """Packed rows. B rows of L events; a row holds several users' sequences one behind the other, padding last.

    Length L counts events; the user encoder sees 2L tokens, `c_1 i_1 ... c_L i_L`, or L without condition tokens.

    Attributes:
      item: raw values of each item feature, `[B, L]`.
      condition: raw values of each condition feature, `[B, L]`: under which condition the event's item was chosen.
      segment_ids: 1, 2, ... for the users of a row, 0 for padding.
      positions: index of the event in its user's sequence, from 0.
      content: item content vectors, `[B, L, item_content]`, or None.
      log_q: log of the probability with which an event's item is drawn as a negative, `[B, L]`, or None.
      negatives: raw item features of given negatives, `[B, N]` each, or None; the loss uses the global batch's B N.
      negative_content: content vectors of the given negatives, `[B, N, item_content]`, or None.
      negative_log_q: as `log_q` for the given negatives, `[B, N]`, or None.
    """

    item: dict[str, Any]
    condition: dict[str, Any]
    segment_ids: Int[Any, "B L"]
    positions: Int[Any, "B L"]
    content: Float[Any, "B L C"] | None = None
    log_q: Float[Any, "B L"] | None = None
    negatives: dict[str, Any] | None = None
    negative_content: Float[Any, "B N C"] | None = None
    negative_log_q: Float[Any, "B N"] | None = None


@struct.dataclass
class Queries:
    """Q questions a row: under this condition, what would that user choose?

    Attributes:
      condition: raw values of each condition feature, `[B, Q]`.
      segment_ids: which user of the row is asked, 0 for padding.
      limit: how many of the user's events the answer may rest on (the first `limit`; the as-of time in events), or None
        for all of them. The answer equals that of a separate pass over the first `limit` events.
    """

    condition: dict[str, Any]
    segment_ids: Int[Any, "B Q"]
    limit: Int[Any, "B Q"] | None = None

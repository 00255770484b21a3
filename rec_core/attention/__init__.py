"""Range attention: every row sees one range of keys and itself."""

from rec_core.attention.api import IMPLEMENTATIONS, grouped_attention, merge, range_attention
from rec_core.attention.causal import causal_attention
from rec_core.attention.ranges import check_segments, ranges_from_lengths, ranges_from_segments

__all__ = [
    "IMPLEMENTATIONS",
    "causal_attention",
    "check_segments",
    "grouped_attention",
    "merge",
    "range_attention",
    "ranges_from_lengths",
    "ranges_from_segments",
]

"""Short texts as token ids, packed many to a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Int, Integer

from rec_core.data.packing import Plan, Windows, gather, pack


@struct.dataclass
class Batch:
    """Packed rows of texts; B rows of T tokens.

    Attributes:
      tokens: token ids, `[B, T]`; any valid id at padding.
      segment_ids: 1, 2, ... for the texts of a row, 0 for padding; the tokens of a text are contiguous.
      positions: index of the token in its text, from 0.
    """

    tokens: Int[Any, "B T"]
    segment_ids: Int[Any, "B T"]
    positions: Int[Any, "B T"]


@dataclass(frozen=True, eq=False)
class PackedTexts:
    """Texts dealt out to rows; made by `pack_texts`, on the host.

    Text n lies in row `plan.row[n]` from slot `plan.offset[n]` on and takes `lengths[n]` slots, as the segment that
    `segment[n]` numbers.
    """

    tokens: Int[np.ndarray, " total"]
    lengths: Int[np.ndarray, " n"]
    plan: Plan

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.plan.rows

    @cached_property
    def segment(self) -> Int[np.ndarray, " n"]:
        """int32[n], the number of each text in its row, from 1."""
        segment = np.empty(len(self.lengths), np.int32)
        first = np.repeat(self.plan.starts[:-1], np.diff(self.plan.starts))
        segment[self.plan.order] = 1 + np.arange(len(self.lengths)) - first
        return segment

    def batch(self, rows: Integer[np.ndarray, " b"] | None = None) -> Batch:
        """Rows by number (None: all of them) as one batch, `[b, row_length]` each."""
        rows = np.arange(self.rows) if rows is None else rows
        return Batch(**gather(self.plan, self._windows, {"tokens": self.tokens}, rows))

    @cached_property
    def _windows(self) -> Windows:  # of all texts: made once, not for each batch of a large catalogue
        ends = np.cumsum(self.lengths, dtype=np.int64)
        return Windows(np.arange(len(ends)), ends - self.lengths, self.lengths)


def pack_texts(texts: Sequence[Integer[np.ndarray, " _"]], row_length: int) -> PackedTexts:
    """Deals texts out to rows of `row_length` tokens, first-fit-decreasing; each text is whole in one row.

    Raises:
      ValueError: no texts, an empty text or one longer than a row, naming it.
    """
    lengths = np.fromiter(map(len, texts), np.int32, len(texts))
    wrong = np.flatnonzero((lengths < 1) | (lengths > row_length))
    if len(wrong):
        number = int(wrong[0])
        raise ValueError(
            f"text {number} has {lengths[number]} tokens, must have 1 to row_length={row_length}: cut it when it is "
            "tokenised (limit), or use longer rows"
        )
    plan = pack(lengths, row_length)
    return PackedTexts(np.concatenate(texts).astype(np.int32, copy=False), lengths, plan)

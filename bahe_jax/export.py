"""Q_u and Q_i for a downstream ranking model, whose AUC is the paper's AUC_d.

A downstream model reads them as float features (`dense` of `rec_core.ranking.ctr`) beside its own, or as vectors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from bahe_jax import model
from bahe_jax.batch import Batch
from bahe_jax.config import Config


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors by id, the ids rising; made by `export`."""

    ids: Int[np.ndarray, " n"]
    values: Float[np.ndarray, "n d"]

    def of(self, ids: Integer[np.ndarray, "*s"]) -> Float[np.ndarray, "*s d"]:
        """The vectors of ids, such as those of a batch.

        Raises:
          ValueError: an id that was not exported, naming it.
        """
        ids = np.asarray(ids)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        absent = np.argwhere(self.ids[at] != ids)
        if len(absent):
            where = tuple(int(i) for i in absent[0])
            raise ValueError(f"id {ids[where]} at {where} was not exported ({len(absent)} such of {ids.size})")
        return self.values[at]


def export(
    params: Mapping[str, Any], config: Config, batches: Iterable[tuple[Integer[np.ndarray, " B"], Batch]], *, of: str
) -> Vectors:
    """Runs the model over batches and keeps Q_u or Q_i of each sample.

    Args:
      params, config: the trained model.
      batches: ids and samples, all batches of one shape. Of `of="user"` the items are not read, of `of="item"` the
        behaviours, so they may be anything valid (a catalogue's first item; sequences of -1). An id may come again,
        such as the padding of the last batch: its first vector counts. Where what is known of a user changes with time,
        give each (user, time) an id of its own.
      of: "user" or "item".

    Raises:
      ValueError: no batches, or ids that do not fit their batch.
    """
    if of not in ("user", "item"):
        raise ValueError(f'of is {of!r}: must be "user" or "item"')
    found: list[np.ndarray] = []
    names: list[np.ndarray] = []
    for ids, batch in batches:
        ids = np.asarray(ids)
        if ids.shape != np.shape(batch.item_length) or ids.dtype.kind not in "iu":
            raise ValueError(f"batch {len(names)}: ids are {ids.dtype}{ids.shape}, must be integers, one a sample")
        names.append(ids.astype(np.int64))
        found.append(np.asarray(_run(params, batch, config, of), np.float32))
    if not found:
        raise ValueError("there are no batches: nothing to export")
    ids, first = np.unique(np.concatenate(names), return_index=True)
    return Vectors(ids, np.concatenate(found)[first])


@partial(jax.jit, static_argnames=("config", "of"))
def _run(params: Any, batch: Batch, config: Config, of: str) -> Array:
    none = {"lengths": batch.lengths * 0} if of == "item" else {"item_length": batch.item_length * 0}
    q: tuple[Array, Array] = model.vectors(params, batch.replace(**none), config)  # type: ignore[attr-defined]
    return q[of == "item"]

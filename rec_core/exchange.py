"""Rows of tables between devices, each of which works for its own examples: what a step reads, and what it changes.

Under a mapped axis (`jax.pmap`, `jax.shard_map`) every device has the ids that its own examples read, in order and
without repetitions. A table is either whole on each device or split by row over the axis. Of a split table the rows
come from their owners (`read`), and gradients go back to them (`combine`), where those of one row are added up; of a
whole table every device is an owner of all, and does the same work as the others.

With D devices, n ids each and rows of w floats, a device receives a step `4 (D - 1) n` bytes of ids, and
`4 (D - 1) n w` of rows and of gradients each. n is the size that always suffices, as in `rec_core.embedding`. Sums are
taken in the order of the devices, so a step gives the same bits each time and, for a whole table, on each device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rec_core.embedding import Rows, distinct, take_rows
from rec_core.optimizers import gradient_norm


def read(
    table: Float[Array, "rows width"], ids: Int[Array, "..."], axis_name: str, *, split: bool
) -> tuple[Rows, Int[Array, "D n"]]:
    """This device's rows for its own ``ids``, and the ids of all devices' rows, which `combine` takes.

    Args:
      table: all of the table, or this device's part of it.
      ids: rows of the whole table, with repetitions; out of range they are clipped as in `embedding.lookup`.
      split: the table is split by row over the axis, in equal parts in the order of the devices.
    """
    parts = jax.lax.axis_size(axis_name) if split else 1
    own = distinct(ids, table.shape[0] * parts)
    everyones = jax.lax.all_gather(own, axis_name)
    if not split:
        return Rows(own, take_rows(table, own)), everyones
    found = take_rows(table, _within(everyones, table, axis_name, split))  # zeros where another device is the owner
    return Rows(own, jax.lax.psum_scatter(found, axis_name)), everyones


def combine(
    gradient: Rows,
    everyones: Int[Array, "D n"],
    table: Float[Array, "rows width"],
    axis_name: str,
    *,
    split: bool,
) -> Rows:
    """The gradient of the rows that this device owns: the sum over the devices by id.

    Args:
      gradient: of the rows that `read` gave this device.
      everyones: as `read` gave it. table and split: as given to `read`.

    Returns:
      Distinct rows of ``table`` (of this device's part, counted from its first row) in a fixed size that always
      suffices; those that fill it up have ids past the end and a gradient of zero.
    """
    devices, rows = everyones.shape[0], table.shape[0]
    values = jax.lax.all_gather(gradient.values, axis_name, tiled=True)
    ids = _within(everyones, table, axis_name, split).reshape(-1)
    ids, source = jax.lax.sort_key_val(ids, jnp.arange(ids.size, dtype=jnp.int32))
    first = (ids < rows) & (ids != jnp.roll(ids, 1)).at[0].set(True)
    place = jnp.nonzero(first, size=min(ids.size, rows), fill_value=ids.size)[0]
    owned = _at(ids, place, rows)
    total = jnp.zeros((place.size, values.shape[1]), values.dtype)
    # A device names a row once, so equal ids are at most as many neighbours as there are devices. Shifted sums, where
    # a scatter would add in an order that a GPU does not fix.
    for k in range(devices):
        same = _at(ids, place + k, rows) == owned
        part = take_rows(values, _at(source, place + k, ids.size))
        total = total + jnp.where(same[:, None], part, 0)
    return Rows(owned, total)


def global_norm(gradients: Any, axis_name: str, split: frozenset[str]) -> Float[Array, ""]:
    """Global norm, the same on each device: the tables named by ``split`` are this device's part, the rest is whole."""
    tables = gradients["tables"]
    here = gradient_norm({name: tables[name] for name in split})
    whole = {name: table for name, table in tables.items() if name not in split}
    return optax.tree.norm([gradient_norm({**gradients, "tables": whole}), jnp.sqrt(jax.lax.psum(here**2, axis_name))])


def _within(
    ids: Int[Array, "D n"], table: Float[Array, "rows width"], axis_name: str, split: bool
) -> Int[Array, "D n"]:
    """Ids counted from this device's first row; past the table's end where another device is the owner."""
    if not split:
        return ids
    ids = ids - jax.lax.axis_index(axis_name) * table.shape[0]
    return jnp.where((ids >= 0) & (ids < table.shape[0]), ids, table.shape[0])


def _at(values: Int[Array, " m"], place: Int[Array, " n"], missing: int) -> Int[Array, " n"]:
    return values.at[place].get(mode="fill", fill_value=missing)

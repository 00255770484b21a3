"""Rows of tables between devices, each of which works for its own examples: what a step reads, and what it changes.

Under a mapped axis (`jax.pmap`, `jax.shard_map`) every device has the ids that its own examples read, in order and
without repetitions. A table is either whole on each device or split by row over the axis. Of a split table the rows
come from their owners (`read`), and gradients go back to them (`combine`), where those of one row are added up; of a
whole table every device is an owner of all, and does the same work as the others.

With D devices and n ids each, a device sends each owner of a part of a table as many ids, gets as many rows back and
sends as many gradients: n / D, times the share of ids that are said to be distinct, and a tenth, where that is enough
(`fits`: ids that are hashed, or in any order but that of popularity), else n, which always is. Rows and gradients may
travel in fewer bits than they are added up in. Rows stay in the order in which they came, owner by owner, with what
filled up the room between them. A table of no more rows than n travels whole. Sums are taken in the order of the
devices, so a step gives the same bits each time and, for a whole table, on each device.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rec_core.embedding import Rows, apart, distinct, take_rows
from rec_core.optimizers import gradient_norm

FEW_IDS = 2**16  # so many for each owner cost nothing to speak of; there is always room for all


@struct.dataclass
class Plan:
    """What a device reads of a table: its own ids, as `distinct` gives them, and how those of each owner lie in them.

    Owner d has ``count[d]`` of them, from ``start[d]`` on. `rows` are of the whole table. `scant` is how many ids of an
    owner there is room for where owners are asked alike, and no more ids are distinct than was said. `dtype` is of rows
    and gradients on their way between a split table and those that read it.
    """

    own: Int[Array, " n"]
    start: Int[Array, " D"]
    count: Int[Array, " D"]
    rows: int = struct.field(pytree_node=False)
    scant: int = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False, default="float32")

    @property
    def small(self) -> bool:
        """Whether the table has no more rows than the batch has ids."""
        return self.own.size == self.rows


@struct.dataclass
class Route:
    """How rows came, for their gradients to go back: the plan, and which of this device's rows each device asked for.

    `asked` counts from the device's first row; what fills it up is past its end. None for a whole or small table.
    """

    plan: Plan
    asked: Int[Array, "D room"] | None


def plan(
    table: Float[Array, "rows width"],
    ids: Int[Array, "..."],
    axis_name: str,
    *,
    split: bool,
    distinct_share: float = 1.0,
    dtype: str = "float32",
) -> Plan:
    """What this device reads.

    Args:
      table: all of the table, or this device's part of it.
      ids: rows of the whole table, with repetitions; out of range they are clipped as in `embedding.lookup`.
      split: the table is split by row over the axis, in equal parts in the order of the devices.
      distinct_share: of the ids, that are distinct; `Plan.scant` follows from it.
      dtype: as of `Plan`.
    """
    devices = jax.lax.axis_size(axis_name) if split else 1
    own = distinct(ids, table.shape[0] * devices)
    # A comparison with every id is one kernel, a search many.
    end = jnp.sum(own < table.shape[0] * jnp.arange(1, devices + 1)[:, None], axis=1, dtype=jnp.int32)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]])
    even = math.ceil(1.1 * distinct_share * own.size / devices) + 8
    scant = own.size if own.size <= FEW_IDS else min(even, own.size)
    return Plan(own, start, end - start, table.shape[0] * devices, scant, dtype)


def fits(plans: Iterable[Plan], axis_name: str) -> Bool[Array, ""] | None:
    """Whether `Plan.scant` suffices on every device, the same on each; None where it always does."""
    tight = [plan for plan in plans if not plan.small and plan.scant < plan.own.size]
    if not tight:
        return None
    over = sum(jnp.sum(plan.count > plan.scant) for plan in tight)
    return jax.lax.psum(over, axis_name) == 0


def read(
    table: Float[Array, "rows width"], plan: Plan, axis_name: str, *, split: bool, scant: bool = False
) -> tuple[Rows, Route]:
    """This device's rows, for what it planned.

    Args:
      table, split: as for `plan`.
      scant: only `Plan.scant` ids are sent to each owner. Where `fits` does not allow that, some rows do not come, and
        a look-up of theirs gives NaN.
    """
    if plan.small and split:
        table, split = jax.lax.all_gather(table, axis_name, tiled=True), False
    if not split:
        return Rows(plan.own, take_rows(table, plan.own), plan.rows), Route(plan, None)
    own, part, devices = plan.own, table.shape[0], plan.count.size
    place = jnp.arange(plan.scant if scant else own.size, dtype=jnp.int32)
    there = place < plan.count[:, None]
    ids = jnp.take(own, plan.start[:, None] + place, mode="clip")
    mine = jnp.where(there, ids - part * jnp.arange(devices)[:, None], part)
    asked = jax.lax.all_to_all(mine, axis_name, 0, 0)
    found = jax.lax.all_to_all(take_rows(table, asked).astype(plan.dtype), axis_name, 0, 0).astype(table.dtype)
    ids = jnp.where(there, ids, plan.rows).reshape(-1)
    return Rows(ids, found.reshape(-1, table.shape[1]), plan.rows, ordered=False), Route(plan, asked)


def combine(gradient: Rows, route: Route, table: Float[Array, "rows width"], axis_name: str) -> Rows:
    """The gradient of the rows that this device owns: the sum over the devices by id.

    Args:
      gradient: of the rows that `read` gave this device. route: as `read` gave it. table: as given to `read`.

    Returns:
      Distinct rows of ``table`` (of this device's part, counted from its first row), in any order and a fixed size that
      always suffices; those that fill it up have ids past the end.
    """
    rows, plan, values = table.shape[0], route.plan, gradient.values
    if route.asked is not None:
        sent = values.reshape(*route.asked.shape, -1).astype(plan.dtype)
        return _add_up(route.asked, jax.lax.all_to_all(sent, axis_name, 0, 0).astype(values.dtype), rows)
    if not plan.small:
        return _add_up(jax.lax.all_gather(plan.own, axis_name), jax.lax.all_gather(values, axis_name), rows)
    counted = jnp.concatenate([values, jnp.ones_like(values[:, :1])], axis=1)
    total = jnp.zeros((plan.rows, counted.shape[1]), values.dtype).at[plan.own].set(counted, mode="drop")
    if rows < plan.rows:
        total = jax.lax.psum_scatter(total, axis_name, tiled=True)
    else:
        total = jax.lax.psum(total, axis_name)
    ids = jnp.where(total[:, -1] > 0, jnp.arange(rows, dtype=jnp.int32), rows)
    return Rows(ids, total[:, :-1], ordered=False)


def global_norm(gradients: Any, axis_name: str, split: frozenset[str]) -> Float[Array, ""]:
    """Global norm, the same on each device: the tables named by ``split`` are this device's part, the rest is whole."""
    tables = gradients["tables"]
    here = gradient_norm({name: tables[name] for name in split})
    whole = {name: table for name, table in tables.items() if name not in split}
    return optax.tree.norm([gradient_norm({**gradients, "tables": whole}), jnp.sqrt(jax.lax.psum(here**2, axis_name))])


def _add_up(ids: Int[Array, "D m"], values: Float[Array, "D m width"], rows: int) -> Rows:
    """Each device's rows, distinct among themselves, as rows that all are: what was there first takes the others in."""
    devices, m = ids.shape
    first = jnp.full(rows, devices * m, jnp.int32)  # where a row stands
    total, kept = values.reshape(devices * m, -1), []
    for d in range(devices):
        there = first.at[ids[d]].get(mode="fill", fill_value=devices * m)
        new = there == devices * m
        kept.append(jnp.where(new, ids[d], rows))
        if d:
            # No two of them meet, so nothing depends on an order.
            added = jnp.where(new[:, None], 0, values[d])
            total = total.at[apart(there, devices * m)].add(added, mode="drop", unique_indices=True)
        if d < devices - 1:
            own = jnp.arange(d * m, (d + 1) * m, dtype=jnp.int32)
            first = first.at[apart(kept[-1], rows)].set(own, mode="drop", unique_indices=True)
    kept_ids = jnp.concatenate(kept)
    return Rows(kept_ids, jnp.where(kept_ids[:, None] < rows, total, 0), ordered=False)

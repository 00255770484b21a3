"""`CAN.read` on a GPU in one pass over the behaviours forward and one backward (Pallas, lowered by Triton).

A program reads one example. Its behaviours come in blocks of `block` rows: whole groups where they fit, else parts of
one. A layer of a few units is no work for a matrix unit, so a block's groups are taken together: columns are (slot of
the group in the block, unit), at least 16 of them, and a number counts only where row and column are of one group. A
later layer is then a matrix that has each group's on its diagonal. With x a behaviour, w_u the first layer's column of
unit u, and g_cu the slope before that unit's tanh for the power c:

    dx = sum_c c x^(c-1) sum_u g_cu w_u,   dw_u = sum_t sum_c x_t^c g_cu

Units are made again in the backward pass. The reference is what `CAN.read` does elsewhere;
tests/rec_core/test_interest_can_gpu.py compares the two, NOTES.md has times and tuning.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from rec_core.interest.triton_gpu import (
    Blocks,
    Shape,
    Tuning,
    call,
    cut,
    dot,
    load_rows,
    loop,
    on_each_device,
    rows_of,
    serves,
    triton,
)  # fmt: skip

COLUMNS = 64  # of a block at most, as registers are limited
SMALLEST = 4  # behaviours of a group: with fewer, most of what is computed is of no group; not timed
WIDEST_LAYER = 16  # units; not timed above
DEFAULT = Tuning(Shape(32, 1), Shape(16, 1))
GROUPED = Tuning(Shape(32, 1), Shape(32, 2))  # more than one group


@dataclass(frozen=True)
class Units(Blocks):
    """Blocks, and the micro-MLP's layers and powers."""

    hidden: tuple[int, ...]
    orders: int

    @property
    def columns(self) -> tuple[int, ...]:
        """By layer."""
        return tuple(max(16, pl.next_power_of_2(self.groups * units)) for units in self.hidden)


class Layer(NamedTuple):
    """Weights of a block's groups [rows or columns, columns], and biases [columns]."""

    weight: Any
    bias: Any


def runs(dtype: str, shape: tuple[int, ...], induction: tuple[int, ...], hidden: Sequence[int]) -> bool:
    """Whether this process's device, and JAX, run these kernels, for a computation's dtype and the shapes of sequence
    and induction."""
    if not serves(dtype, shape) or max(hidden) > WIDEST_LAYER:
        return False
    return induction[1] * SMALLEST <= shape[1] and math.prod(induction) < 2**31  # offsets are of 32 bits


def summed(
    sequence: Float[Array, "B T d"],
    mask: Bool[Array, "B T"],
    induction: Float[Array, "B G size"],
    hidden: tuple[int, ...],
    orders: int,
    tuning: Tuning | None = None,
) -> Float[Array, "B d_out"]:
    """All layers of the micro-MLPs for all powers, summed over the behaviours that are present, in float32.

    Args:
      sequence, mask: behaviours, finite everywhere, and which are no padding.
      induction: weights and biases, each of T / G neighbouring behaviours; G divides T. Products are of its dtype.
      tuning: default `DEFAULT`, with several groups `GROUPED`.
    """
    kernels = Kernels(_blocks, _forward_kernel, _backward_kernel)
    tuning = tuning or (DEFAULT if induction.shape[1] == 1 else GROUPED)
    return on_each_device(partial(read, kernels, hidden, orders, tuning), sequence, mask, induction)


class Kernels(NamedTuple):
    """A way of reading: its kernels, and what they are told (`Units`, or what has its `columns` and `groups`)."""

    blocks: Callable[[Shape, tuple[int, ...], int, Array, Array], Any]
    forward: Callable[..., None]
    backward: Callable[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def read(
    kernels: Kernels,
    hidden: tuple[int, ...],
    orders: int,
    tuning: Tuning,
    sequence: Float[Array, "B T d"],
    mask: Bool[Array, "B T"],
    induction: Float[Array, "B G size"],
) -> Float[Array, "B d_out"]:
    """`summed` of one device's examples by these kernels, with their gradient."""
    return _forward(kernels, hidden, orders, tuning, sequence, mask, induction)[0]


def _forward(
    kernels: Kernels,
    hidden: tuple[int, ...],
    orders: int,
    tuning: Tuning,
    sequence: Array,
    mask: Array,
    induction: Array,
) -> tuple[Array, Any]:
    given = sequence, mask, induction
    blocks = kernels.blocks(tuning.forward, hidden, orders, sequence, induction)
    made = [((len(sequence), orders, columns), jnp.float32) for columns in blocks.columns]
    found = call(partial(kernels.forward, blocks), given, made, tuning.forward, tuning.interpret)
    sums = [
        x[..., : blocks.groups * units].reshape(len(x), orders, blocks.groups, units).sum(2)
        for x, units in zip(found, hidden, strict=True)
    ]
    return jnp.concatenate(sums, axis=-1).reshape(len(sequence), -1), given


def _backward(
    kernels: Kernels, hidden: tuple[int, ...], orders: int, tuning: Tuning, given: Any, gradient: Array
) -> Any:
    sequence, _, induction = given
    blocks = kernels.blocks(tuning.backward, hidden, orders, sequence, induction)
    given = (*given, gradient.reshape(len(gradient), orders, -1))
    made = [(x.shape, x.dtype) for x in (sequence, induction)]
    of_sequence, of_induction = call(partial(kernels.backward, blocks), given, made, tuning.backward, tuning.interpret)
    return of_sequence, None, of_induction


read.defvjp(_forward, _backward)


def _blocks(shape: Shape, hidden: tuple[int, ...], orders: int, sequence: Array, induction: Array) -> Units:
    most = COLUMNS // max(hidden)
    return Units(*cut(shape.block, sequence.shape[1], induction.shape[1], most), hidden, orders)


def _forward_kernel(blocks: Units, sequence: Any, mask: Any, induction: Any, *sums: Any) -> None:
    def step(i: Any, totals: Any) -> Any:
        layers = _load_layers(blocks, induction, i, sequence.shape[-1])

        def part(j: Any, totals: Any) -> Any:
            _, rows, own = _load_rows(blocks, sequence, mask, i, j)
            found = []
            for c, total in enumerate(totals, 1):
                units = _through(layers, own, rows**c)
                found.append(tuple(x + y.sum(0) for x, y in zip(total, units, strict=True)))
            return tuple(found)

        return loop(blocks.parts, part, totals)

    zeros = tuple(jnp.zeros(columns, jnp.float32) for columns in blocks.columns)
    for c, total in enumerate(loop(blocks.steps, step, (zeros,) * blocks.orders)):
        for ref, x in zip(sums, total, strict=True):
            ref[c] = x


def _backward_kernel(
    blocks: Units, sequence: Any, mask: Any, induction: Any, gradient: Any, of_sequence: Any, of_induction: Any
) -> None:
    dtype = induction.dtype

    def step(i: Any, state: Any) -> Any:
        layers = _load_layers(blocks, induction, i, sequence.shape[-1])

        def part(j: Any, totals: Any) -> Any:
            (place, inside), rows, own = _load_rows(blocks, sequence, mask, i, j)

            def order(c: Any, state: Any) -> Any:
                of_rows, below, totals = state  # below: rows ** c
                power, totals, slope = below * rows, list(totals), _load_slopes(blocks, gradient, c)
                units = _through(layers, own, power)
                above: Any = None  # the slopes of the layer above
                for k in reversed(range(len(layers))):
                    g = jnp.where(own[k], slope[k][None], 0)
                    if k < len(layers) - 1:
                        g = (g + dot(above, layers[k + 1].weight, 1, 1)) * (1 - units[k] * units[k])
                        g = jnp.where(own[k], g, 0)
                    above = g.astype(dtype)
                    under = power if k == 0 else units[k - 1]
                    totals[k] = Layer(
                        totals[k].weight + dot(under.astype(dtype), above, 0, 0), totals[k].bias + g.sum(0)
                    )
                of_rows += (c + 1) * below * dot(above, layers[0].weight, 1, 1)
                return of_rows, power, tuple(totals)

            state = jnp.zeros(rows.shape, jnp.float32), jnp.ones(rows.shape, jnp.float32), totals
            of_rows, _, totals = loop(blocks.orders, order, state)
            triton.store(rows_of(of_sequence, place), of_rows.astype(of_sequence.dtype), mask=inside)
            return totals

        zeros = tuple(Layer(*(jnp.zeros(x.shape, jnp.float32) for x in layer)) for layer in layers)
        found = loop(blocks.parts, part, zeros)
        for places, layer in zip(_places(blocks, i, sequence.shape[-1]), found, strict=True):
            for (at, there), x in zip(places, layer, strict=True):
                triton.store(of_induction.at[at], x.astype(dtype), mask=there)
        return state

    loop(blocks.steps, step, ())


def _through(layers: Any, own: Any, power: Any) -> list[Any]:
    """By layer, the units [rows, columns] in float32, 0 where row and column are not of one group."""
    found, below = [], power
    for k, (weight, bias) in enumerate(layers):
        y = dot(below.astype(weight.dtype), weight, 1, 0) + bias[None]
        below = jnp.where(own[k], y if k == len(layers) - 1 else jnp.tanh(y), 0)
        found.append(below)
    return found


def _places(blocks: Units, i: Any, d: int) -> list[Any]:
    """By layer, where in the example's `[G, size]` its matrix [rows or columns, columns] and its biases [columns] are,
    and which of these there are: those of one group."""
    found, start = [], 0
    below: Any = None  # slots and units of the columns of the layer below; the first layer's rows are of all groups
    for (before, units), columns in zip(pairwise((d, *blocks.hidden)), blocks.columns, strict=True):
        column = jnp.arange(columns)
        slot, unit = jax.lax.div(column, units), jax.lax.rem(column, units)
        group = i * blocks.groups + slot
        there = (slot < blocks.groups) & (group < blocks.length // blocks.size)
        row = jnp.arange(d) if below is None else below[1]
        place = start + row[:, None] * units + unit[None]
        own = jnp.broadcast_to(there[None], place.shape)
        if below is not None:
            own = own & (below[0][:, None] == slot[None])
            place = jnp.where(own, place, 0)  # none that is written beside (an interpreter writes what it read there)
        at = jnp.broadcast_to(group[None], place.shape), place
        found.append(((at, own), ((group, start + before * units + unit), there)))
        below, start = (slot, unit), start + (before + 1) * units
    return found


def _load_layers(blocks: Units, induction: Any, i: Any, d: int) -> list[Layer]:
    def load(place: Any) -> Any:
        at, there = place
        return triton.load(induction.at[at], mask=there, other=0)

    return [Layer(load(weight), load(bias).astype(jnp.float32)) for weight, bias in _places(blocks, i, d)]


def _load_slopes(blocks: Units, gradient: Any, c: int) -> list[Any]:
    """By layer, the slopes of the sums [columns] for one power."""
    found, start = [], 0
    for units, columns in zip(blocks.hidden, blocks.columns, strict=True):
        unit = start + jax.lax.rem(jnp.arange(columns), units)
        found.append(gradient[jnp.full_like(unit, c), unit])
        start += units
    return found


def _load_rows(blocks: Units, sequence: Any, mask: Any, i: Any, j: Any) -> tuple[Any, Any, list[Any]]:
    """Where behaviours are, themselves in float32, and by layer which columns are of their group: [rows, columns]."""
    where, there, rows, group = load_rows(blocks, sequence, mask, i, j)
    own = [
        there[:, None] & (group[:, None] == jax.lax.div(jnp.arange(columns), units)[None])
        for units, columns in zip(blocks.hidden, blocks.columns, strict=True)
    ]
    return where, rows.astype(jnp.float32), own

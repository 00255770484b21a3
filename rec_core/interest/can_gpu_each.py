"""`CAN.read` with a micro-MLP for each behaviour, on a GPU in one pass forward and one backward (Pallas, by Triton).

A program reads one example in blocks of rows: behaviours [rows, width] and their matrices [rows, width, units], as they
lie; products are sums over the middle axis. No matrix unit could help: nothing is shared. Gradients are those of
`can_gpu`; units are made again for them. The reference is what `CAN.read` does elsewhere;
tests/rec_core/test_interest_can_gpu.py compares the two, NOTES.md has times.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rec_core.interest import can_gpu
from rec_core.interest.triton_gpu import Shape, Tuning, loop, on_each_device, power_of_2, serves, triton

LARGEST = 512  # entries of the first layer's matrix, which a program's registers hold for each row; not timed above
DEFAULT = Tuning(Shape(8, 2), Shape(8, 2))


class Unit(NamedTuple):
    """The micro-MLPs' layers and powers; behaviours, and how many of them are a block."""

    hidden: tuple[int, ...]
    orders: int
    length: int
    rows: int

    @property
    def columns(self) -> tuple[int, ...]:
        """By layer."""
        return self.hidden

    @property
    def groups(self) -> int:
        """Whose sums are apart."""
        return 1


def runs(dtype: str, shape: tuple[int, ...], induction: tuple[int, ...], hidden: Sequence[int]) -> bool:
    """Whether this process's device, and JAX, run these kernels, for a computation's dtype and the shapes of sequence
    and induction."""
    if not serves(dtype, shape) or induction[1] != shape[1] or not all(map(power_of_2, hidden)):
        return False
    return shape[2] * max(hidden) <= LARGEST and math.prod(induction) < 2**31


def summed(
    sequence: Float[Array, "B T d"],
    mask: Bool[Array, "B T"],
    induction: Float[Array, "B T size"],
    hidden: tuple[int, ...],
    orders: int,
    tuning: Tuning | None = None,
) -> Float[Array, "B d_out"]:
    """As `can_gpu.summed`; tuning: default `DEFAULT`."""
    kernels = can_gpu.Kernels(_blocks, _forward_kernel, _backward_kernel)
    return on_each_device(partial(can_gpu.read, kernels, hidden, orders, tuning or DEFAULT), sequence, mask, induction)


def _blocks(shape: Shape, hidden: tuple[int, ...], orders: int, sequence: Array, induction: Array) -> Unit:
    return Unit(hidden, orders, sequence.shape[1], shape.block)


def _forward_kernel(unit: Unit, sequence: Any, mask: Any, induction: Any, *sums: Any) -> None:
    def step(i: Any, totals: Any) -> Any:
        _, there, rows, layers = _load(unit, sequence, mask, induction, i)
        found, power = [], rows
        for total in totals:
            units = _through(layers, power)
            found.append(tuple(t + jnp.where(there[:, None], h, 0).sum(0) for t, h in zip(total, units, strict=True)))
            power = power * rows
        return tuple(found)

    zeros = tuple(jnp.zeros(units, jnp.float32) for units in unit.hidden)
    totals = loop(-(-unit.length // unit.rows), step, (zeros,) * unit.orders)
    for c, total in enumerate(totals):
        for ref, x in zip(sums, total, strict=True):
            ref[c] = x


def _backward_kernel(
    unit: Unit, sequence: Any, mask: Any, induction: Any, gradient: Any, of_sequence: Any, of_induction: Any
) -> None:
    def step(i: Any, state: Any) -> Any:
        place, there, rows, layers = _load(unit, sequence, mask, induction, i)
        inside = place < unit.length

        def order(c: Any, state: Any) -> Any:
            of_rows, below, totals = state  # below: rows ** c
            power, totals = below * rows, list(totals)
            units = _through(layers, power)
            start = sum(unit.hidden)
            above: Any = None
            for k in reversed(range(len(layers))):
                start -= unit.hidden[k]
                column = start + jnp.arange(unit.hidden[k])
                g = jnp.where(there[:, None], gradient[jnp.full_like(column, c), column][None], 0)
                if k < len(layers) - 1:
                    weight = layers[k + 1][0]
                    g = (g + (weight * above[:, None]).sum(2)) * (1 - units[k] * units[k])
                under = power if k == 0 else units[k - 1]
                totals[k] = totals[k][0] + under[:, :, None] * g[:, None], totals[k][1] + g
                above = g
            of_rows += (c + 1) * below * (layers[0][0] * above[:, None]).sum(2)
            return of_rows, power, tuple(totals)

        zeros = jax.tree.map(jnp.zeros_like, tuple(layers))
        begin = jnp.zeros_like(rows), jnp.ones_like(rows), zeros
        of_rows, _, totals = loop(unit.orders, order, begin)
        at = of_sequence.at[place[:, None], jnp.arange(rows.shape[1])[None]]
        triton.store(at, of_rows.astype(of_sequence.dtype), mask=inside[:, None])
        for (weight, bias), (of_weight, of_bias) in zip(_places(unit, place, rows.shape[1]), totals, strict=True):
            triton.store(of_induction.at[weight], of_weight.astype(of_induction.dtype), mask=inside[:, None, None])
            triton.store(of_induction.at[bias], of_bias.astype(of_induction.dtype), mask=inside[:, None])
        return state

    loop(-(-unit.length // unit.rows), step, ())


def _places(unit: Unit, place: Any, d: int) -> list[Any]:
    """By layer, where its matrices [rows, inputs, units] and biases [rows, units] are in the example's `[T, size]`."""
    found, start = [], 0
    for before, units in pairwise((d, *unit.hidden)):
        entry = start + jnp.arange(before)[:, None] * units + jnp.arange(units)[None]
        weight = jnp.broadcast_to(place[:, None, None], (len(place), *entry.shape)), entry[None]
        column = start + before * units + jnp.arange(units)
        found.append((weight, (jnp.broadcast_to(place[:, None], (len(place), units)), column[None])))
        start += (before + 1) * units
    return found


def _load(unit: Unit, sequence: Any, mask: Any, induction: Any, i: Any) -> tuple[Any, Any, Any, list[Any]]:
    """Where a block's behaviours are, which are no padding, themselves and their layers in float32."""
    place = i * unit.rows + jnp.arange(unit.rows)
    inside, d = place < unit.length, sequence.shape[-1]
    there = triton.load(mask.at[place], mask=inside, other=False)
    rows = triton.load(sequence.at[place[:, None], jnp.arange(d)[None]], mask=inside[:, None], other=0)
    layers = []
    for weight, bias in _places(unit, place, d):
        w = triton.load(induction.at[weight], mask=inside[:, None, None], other=0).astype(jnp.float32)
        b = triton.load(induction.at[bias], mask=inside[:, None], other=0).astype(jnp.float32)
        layers.append((w, b))
    return place, there, rows.astype(jnp.float32), layers


def _through(layers: Any, power: Any) -> list[Any]:
    """By layer, the units [rows, units]."""
    found, below = [], power
    for k, (weight, bias) in enumerate(layers):
        y = (below[:, :, None] * weight).sum(1) + bias
        below = y if k == len(layers) - 1 else jnp.tanh(y)
        found.append(below)
    return found

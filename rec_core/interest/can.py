"""Co-action network: the target is a small MLP that each behaviour goes through (Bian et al., WSDM 2022, arXiv
2011.05625, section 4).

A layer of two or four units is no work for a matrix unit, and where each chunk of behaviours has an MLP of its own
its products are many and tiny: laid out, padded and stored one by one, they cost more than what they read. Such layers
are written unit by unit for accelerators, as sums that a compiler makes of the behaviours in few passes for all powers:
with ADS in chunks of 10 the dense part of a training step takes 2.56 ms so and 4.43 as products (4,096 examples of 200
behaviours, one H100, two runs). An MLP for each behaviour reads as much as it is given, and stays a product (6.15 ms,
7.19 so). In bfloat16 on a GPU, with examples enough for it, kernels take one pass forward and one backward (`can_gpu`).
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import pairwise
from operator import add, mul

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from rec_core.interest import can_gpu, can_gpu_each
from rec_core.interest.base import Behaviors, Interest, by_query, check_positive

NARROW = 8  # units of a layer, up to which it is written unit by unit


class CAN(Interest):
    """`sum_t || _c F(P_induction, (P_feed,t)^c)`: the co-action unit over the behaviours, for their powers c = 1 ...

    P_induction, of the target, is cut into the weights `w_i` and biases `b_i` of a micro-MLP. From `h_0 = P_feed`, a
    behaviour, it makes `h_i = tanh(w_(i-1) h_(i-1) + b_(i-1))`, the last layer without tanh, and F is all `h_i` side by
    side (equations 6-9). Powers are taken entry by entry, and all go through the same micro-MLP ("multi-order"). As in
    the authors' code, the sum over behaviours is not normalised. `d_out = orders * sum(hidden)`. It reads no time.

    The paper looks P_induction up in a table of its own: with `generate=False` the target is P_induction as it is, of
    width `parameters(d, hidden)`, while behaviours keep their own width d. With `generate=True` a linear layer makes
    it from a target of any width, so that the unit fits where the others do.
    """

    hidden: Sequence[int] = (8, 4)
    orders: int = 3
    generate: bool = True

    @nn.compact
    def read(self, encoded: Behaviors, target: Float[Array, "B d"] | Float[Array, "B G d"]) -> Float[Array, "B d_out"]:
        check_positive(self, "hidden", "orders")
        sequence, mask = encoded
        size = parameters(sequence.shape[-1], self.hidden)
        induction = target.astype(self.dtype)
        if self.generate:
            induction = nn.Dense(size, use_bias=False, dtype=self.dtype, name="induction")(induction)
        elif target.shape[-1] != size:
            raise ValueError(
                f"CAN: target has width {target.shape[-1]}, must be {size}, the parameters of a micro-MLP "
                f"{(sequence.shape[-1], *self.hidden)}; give it that width, or generate=True"
            )
        induction = induction[:, None] if induction.ndim == 2 else induction  # a micro-MLP a query
        given = sequence, mask, induction, tuple(self.hidden), self.orders
        for kernels in (can_gpu, can_gpu_each):
            if kernels.runs(self.dtype, sequence.shape, induction.shape, self.hidden):
                return kernels.summed(*given).astype(self.dtype)
        return by_xla(*given)


def by_xla(
    sequence: Float[Array, "B T d"],
    mask: Bool[Array, "B T"],
    induction: Float[Array, "B G size"],
    hidden: tuple[int, ...],
    orders: int,
) -> Float[Array, "B d_out"]:
    """All that comes through the micro-MLPs, side by side, summed over the behaviours that are present."""
    _, grouped = by_query(induction, sequence)
    given = grouped, induction, mask.reshape(*grouped.shape[:-1], 1)
    layers, units = (partial(summed, f, hidden, orders) for f in (by_layer, by_unit))
    if max(hidden) > NARROW or grouped.shape[2] == 1:
        return layers(*given)
    # A CPU has small products of its own, and is slower at the sums.
    read: Array = jax.lax.platform_dependent(*given, cpu=layers, default=units)
    return read


def summed(
    through: Callable[..., list[Array]],
    hidden: tuple[int, ...],
    orders: int,
    rows: Float[Array, "B G t d"],
    induction: Float[Array, "B G size"],
    present: Bool[Array, "B G t 1"],
) -> Float[Array, "B d_out"]:
    """All that comes `through` the micro-MLPs, side by side, summed over the rows that are present."""
    # Without the mask a bias would come through at padding.
    parts = [jnp.where(present, h, 0) for h in through(rows, induction, hidden, orders)]
    sums = [jnp.sum(h, axis=(1, 2), dtype=jnp.float32) for h in parts]
    return jnp.concatenate(sums, axis=-1).astype(rows.dtype)


def by_layer(
    rows: Float[Array, "B G t d"], induction: Float[Array, "B G size"], hidden: tuple[int, ...], orders: int
) -> list[Float[Array, "B G t units"]]:
    """All layers of the micro-MLPs `induction` for the powers 1 to `orders` of the rows, an array a layer."""
    outputs = []
    for order in range(1, orders + 1):
        h, start = rows**order, 0
        for i, (fan_in, fan_out) in enumerate(pairwise((rows.shape[-1], *hidden))):
            w, b = jnp.split(induction[..., start : start + (fan_in + 1) * fan_out], [fan_in * fan_out], axis=-1)
            h = jnp.einsum("bgti,bgio->bgto", h, w.reshape(*w.shape[:-1], fan_in, fan_out)) + b[:, :, None]
            h = h if i == len(hidden) - 1 else nn.tanh(h)
            outputs.append(h)
            start += (fan_in + 1) * fan_out
    return outputs


def by_unit(
    rows: Float[Array, "B G t d"], induction: Float[Array, "B G size"], hidden: tuple[int, ...], orders: int
) -> list[Float[Array, "B G t 1"]]:
    """What `by_layer` gives, an array a unit."""
    width, first = rows.shape[-1], hidden[0]
    matrix = induction[..., : width * first].reshape(*induction.shape[:-1], width, first)
    outputs = []
    for h in powers_times(rows, matrix, orders):
        start = width * first
        for i, fan_out in enumerate(hidden):
            if i:
                w = [induction[..., start + k, None] for k in range(len(h) * fan_out)]
                h = [reduce(add, map(mul, h, w[unit::fan_out])) for unit in range(fan_out)]
                start += len(w)
            h = [x + induction[..., start + unit, None] for unit, x in enumerate(h)]
            h = h if i == len(hidden) - 1 else [nn.tanh(x) for x in h]
            outputs += [x[..., None] for x in h]
            start += fan_out
    return outputs


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def powers_times(
    rows: Float[Array, "B G t d"], matrix: Float[Array, "B G d units"], orders: int
) -> list[list[Float[Array, "B G t"]]]:
    """`rows ** c @ matrix` for c = 1 to `orders`, an array a unit, added up in float32 and stored as the rows are.

    Its gradients add the powers up before they add up rows or units, so that each is a single pass and nothing as
    large as the rows is made for a power. Only for few units.
    """
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    x, units = rows.astype(wide), columns(matrix, wide)
    return [[jnp.sum(x**c * w, axis=-1).astype(rows.dtype) for w in units] for c in range(1, orders + 1)]


def _forward(rows: Array, matrix: Array, orders: int) -> tuple[list[list[Array]], tuple[Array, Array]]:
    return powers_times(rows, matrix, orders), (rows, matrix)


def _backward(orders: int, saved: tuple[Array, Array], gradient: list[list[Array]]) -> tuple[Array, Array]:
    rows, matrix = saved
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    x, units = rows.astype(wide), columns(matrix, wide)
    of_rows, of_units = jnp.zeros_like(x), []
    for w, of_unit in zip(units, zip(*gradient, strict=True), strict=True):
        g = [y[..., None].astype(wide) for y in of_unit]
        of_rows += w * sum(c * x ** (c - 1) * y for c, y in enumerate(g, 1))
        of_units.append(jnp.sum(jnp.asarray(sum(x**c * y for c, y in enumerate(g, 1))), axis=-2).astype(matrix.dtype))
    # Else the sums are made where they are put side by side, which is four times the work.
    of_units = jax.lax.optimization_barrier(of_units)
    return of_rows.astype(rows.dtype), jnp.stack(of_units, axis=-1)


powers_times.defvjp(_forward, _backward)


def columns(matrix: Float[Array, "B G d units"], dtype: jnp.dtype) -> list[Float[Array, "B G 1 d"]]:
    """Slices, not a matrix turned round: they are read where they lie, and not stored anew."""
    return [matrix[..., None, :, unit].astype(dtype) for unit in range(matrix.shape[-1])]


def parameters(width: int, hidden: Sequence[int]) -> int:
    """Number of weights and biases of a micro-MLP from `width` through the layers `hidden`."""
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise((width, *hidden)))

"""Co-action network: the target is a small MLP that each behaviour goes through (Bian et al., WSDM 2022, arXiv
2011.05625, section 4)."""

from collections.abc import Sequence
from itertools import pairwise

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.interest.base import Behaviors, Interest, by_query, check_positive


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
        induction, grouped = by_query(induction, sequence)  # a micro-MLP a query
        outputs = []
        for order in range(1, self.orders + 1):
            h, start = grouped**order, 0
            for i, (fan_in, fan_out) in enumerate(pairwise((sequence.shape[-1], *self.hidden))):
                w, b = jnp.split(induction[..., start : start + (fan_in + 1) * fan_out], [fan_in * fan_out], axis=-1)
                h = jnp.einsum("bgti,bgio->bgto", h, w.reshape(*w.shape[:-1], fan_in, fan_out)) + b[:, :, None]
                h = h if i == len(self.hidden) - 1 else nn.tanh(h)
                outputs.append(h)
                start += (fan_in + 1) * fan_out
        # Without the mask a bias would come through at padding.
        outputs = [h.reshape(*mask.shape, -1) for h in outputs]
        h = jnp.where(mask[..., None], jnp.concatenate(outputs, axis=-1), 0)
        return jnp.sum(h, axis=1, dtype=jnp.float32).astype(self.dtype)


def parameters(width: int, hidden: Sequence[int]) -> int:
    """Number of weights and biases of a micro-MLP from `width` through the layers `hidden`."""
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise((width, *hidden)))

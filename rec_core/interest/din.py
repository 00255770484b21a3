"""Deep interest network's local activation unit (Zhou et al., KDD 2018, arXiv 1706.06978, sections 4.3 and 5.3)."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.interest.base import Behaviors, Interest, by_query, check_positive, masked_softmax


class Dice(nn.Module):
    """`f(s) = p(s) s + (1 - p(s)) alpha s`, with alpha learned per unit, from 0 (equation 4).

    The paper's p is the sigmoid of s standardised over the mini-batch. Here s is standardised over its units instead
    (a layer norm without parameters): no running statistics, and an example's output does not depend on the others.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, s: Float[Array, "... units"]) -> Float[Array, "... units"]:
        alpha = self.param("alpha", nn.initializers.zeros, (s.shape[-1],), jnp.float32).astype(s.dtype)
        p = nn.sigmoid(nn.LayerNorm(use_scale=False, use_bias=False, dtype=self.dtype)(s))
        return p * s + (1 - p) * alpha * s


class DIN(Interest):
    """`v = sum_t a(e_t, target) e_t` (equation 3), `d_out = d`.

    a is an MLP on `[q, k, q - k, q * k]` with Dice. The paper's sum is not normalised, so that its length tells how
    strong the interest is; `softmax=True` normalises over the unpadded behaviours. It does not read time.
    """

    hidden: Sequence[int] = (80, 40)
    softmax: bool = False

    @nn.compact
    def read(self, encoded: Behaviors, target: Float[Array, "B d"] | Float[Array, "B G d"]) -> Float[Array, "B d"]:
        check_positive(self, "hidden")
        sequence, mask = encoded
        query, grouped = by_query(target.astype(self.dtype), sequence)

        hidden = Dice(self.dtype, name="dice_0")(self._first_layer(query[:, :, None], grouped))
        for i, units in enumerate(self.hidden[1:], start=1):
            hidden = Dice(self.dtype, name=f"dice_{i}")(nn.Dense(units, dtype=self.dtype, name=f"dense_{i}")(hidden))
        score = nn.Dense(1, dtype=self.dtype, name="score")(hidden).reshape(mask.shape).astype(jnp.float32)

        if self.softmax:
            score = masked_softmax(score, mask)
        weight = jnp.where(mask, score, 0).astype(self.dtype)
        total = jnp.einsum("...t,...td->...d", weight, sequence, preferred_element_type=jnp.float32)
        return total.astype(self.dtype)

    def _first_layer(self, q: Float[Array, "B G 1 d"], k: Float[Array, "B G T/G d"]) -> Float[Array, "B G T/G units"]:
        """`[q, k, q - k, q * k] W + b` without the `[B, T, 4 d]` concatenation: the part of a shared q is computed
        once a row, and for many candidates of one request the part of k once for all."""
        d, units = k.shape[-1], self.hidden[0]
        kernel = self.param("kernel_0", nn.initializers.lecun_normal(), (4 * d, units), jnp.float32)
        bias = self.param("bias_0", nn.initializers.zeros, (units,), jnp.float32)
        w_q, w_k, w_difference, w_product = jnp.split(kernel, 4)
        q_part = q @ (w_q + w_difference).astype(self.dtype)
        k_part = k @ (w_k - w_difference).astype(self.dtype)
        return q_part + k_part + (q * k) @ w_product.astype(self.dtype) + bias.astype(self.dtype)

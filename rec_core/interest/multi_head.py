"""Multi-head target attention: the candidate asks, the behaviours answer (Vaswani et al., arXiv 1706.03762, section
3.2, with one query; ADS, arXiv 2502.05523, equations 8-12; the exact search unit of SIM, arXiv 2006.05639)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from rec_core.interest.base import Interest, by_query, check_positive, masked_softmax


class Keys(NamedTuple):
    """Keys and values of all heads, made once for all targets."""

    key: Float[Array, "B T heads width"]
    value: Float[Array, "B T heads width"]
    mask: Bool[Array, "B T"]


class MultiHead(Interest):
    """Per head `s = sum_t softmax_t(Q_t . K_t / sqrt(width)) V_t`; the heads side by side, `d_out = heads * width`.

    No bias and no matrix after the concatenation: what reads `s` is an MLP, whose first layer is one. It does not read
    time; a model that wants it gives behaviours `[e ; e_time]` (SIM), since target and sequence may differ in width.
    """

    heads: int = 4
    width: int = 16  # of a head

    def setup(self) -> None:
        check_positive(self, "heads", "width")
        shape = (self.heads, self.width)
        self.query = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype)
        self.key = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype)
        self.value = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype)

    def encode(
        self,
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Keys:
        sequence, mask = super().encode(sequence, mask)
        return Keys(self.key(sequence), self.value(sequence), mask)

    def read(self, encoded: Keys, target: Float[Array, "B d"] | Float[Array, "B G d"]) -> Float[Array, "B heads*width"]:
        key, value, mask = encoded
        queries, keys = by_query(target, key)
        score = jnp.einsum("bghw,bgthw->bhgt", self.query(queries), keys, preferred_element_type=jnp.float32)
        score = score.reshape(*score.shape[:2], -1)
        weight = masked_softmax(score * self.width**-0.5, mask[:, None]).astype(self.dtype)
        heads = jnp.einsum("bht,bthw->bhw", weight, value, preferred_element_type=jnp.float32)
        return heads.reshape(len(heads), -1).astype(self.dtype)

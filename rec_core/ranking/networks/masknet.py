"""MaskNet: feature-wise multiplication by instance-guided masks (Wang et al., arXiv 2102.07619)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.ranking.networks.base import Inputs, Network, dense_flops, last, mlp


class MaskNet(Network):
    """MaskBlocks: `relu(LN(W (mask * v)))`, `mask = W_2 relu(W_1 x + b_1) + b_2` made from the impression itself.

    - "serial": a block a hidden layer; v is LN(x) for the first, the block before for the others.
    - "parallel": `blocks` blocks of `hidden[0]` units on LN(x), side by side, then the MLP `hidden[1:]`.

    Ours: LN(x) normalises x as a whole, the paper each field for itself (interest and float features are no fields).

    Attributes:
      blocks: of the parallel form.
      reduction: width of the mask's hidden layer, as a multiple of the mask's.
    """

    structure: str = "parallel"
    blocks: int = 3
    reduction: float = 1.0

    @nn.compact
    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        structure = self.choose("structure", ("parallel", "serial"))
        for name in ("blocks", "reduction"):
            if getattr(self, name) <= 0:
                raise ValueError(f"MaskNet: {name} is {getattr(self, name)}, must be above 0")
        x, v = inputs.x, nn.LayerNorm(dtype=self.dtype, name="norm")(inputs.x)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        if structure == "serial":
            for i, units in enumerate(self.hidden):
                v = drop(self._block(x, v, units, f"block_{i}"))
            return last(v, self.tasks)
        parallel = [drop(self._block(x, v, self.hidden[0], f"block_{i}")) for i in range(self.blocks)]
        deep = mlp(jnp.concatenate(parallel, axis=-1), self.hidden[1:], self.dropout, self.dtype, deterministic)
        return last(deep, self.tasks)

    def _block(self, x: Float[Array, "B D"], v: Float[Array, "B n"], units: int, name: str) -> Float[Array, "B h"]:
        width = v.shape[-1]
        hidden = nn.relu(nn.Dense(self._aggregate(width), dtype=self.dtype, name=f"{name}_aggregate")(x))
        mask = nn.Dense(width, dtype=self.dtype, name=f"{name}_project")(hidden)
        h = nn.Dense(units, use_bias=False, dtype=self.dtype, name=name)(mask * v)  # the norm has a bias
        return nn.relu(nn.LayerNorm(dtype=self.dtype, name=f"{name}_norm")(h))

    def _aggregate(self, width: int) -> int:
        return max(1, round(self.reduction * width))

    @nn.nowrap
    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        def block(width: int, units: int) -> int:
            return dense_flops(D, self._aggregate(width), width, units)

        if self.structure == "serial":
            total = sum(block(a, b) for a, b in zip((D, *self.hidden), self.hidden))
            return total + dense_flops(self.hidden[-1], self.tasks)
        top = dense_flops(self.blocks * self.hidden[0], *self.hidden[1:], self.tasks)
        return self.blocks * block(D, self.hidden[0]) + top

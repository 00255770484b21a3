"""Deep and cross network, version 2 (Wang et al., arXiv 2008.13535)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.interest.base import check_positive
from rec_core.ranking.networks.base import Inputs, Network, dense_flops, last, mlp


class DCNv2(Network):
    """Cross layers `x_(l+1) = x_0 * (W_l x_l + b_l) + x_l`, `*` entry by entry, beside an MLP or under it.

    - `rank` r > 0: `W_l = U_l V_l^T` of rank r.
    - `experts` K > 1 as well: `x_(l+1) = sum_i G_i(x_l) E_i(x_l) + x_l` with
      `E_i(x_l) = x_0 * (U_i g(C_i g(V_i^T x_l)) + b_l)`, g = tanh and G a softmax over the experts.

    Attributes:
      cross: number of cross layers.
      rank, experts: see above; rank 0 is the whole matrix.
      structure: "parallel" (cross and MLP side by side on x) or "stacked" (the MLP on what the cross layers give).
    """

    cross: int = 2
    rank: int = 0
    experts: int = 1
    structure: str = "parallel"

    @nn.compact
    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        check_positive(self, "cross", "experts")
        self.choose("structure", ("parallel", "stacked"))
        if self.rank < 0 or (self.experts > 1 and self.rank == 0):
            raise ValueError(
                f"DCNv2: rank is {self.rank} with {self.experts} experts; experts are of low rank: give a rank of at "
                "least 1, or one expert and rank 0"
            )
        x = inputs.x
        for i in range(self.cross):
            x = self._cross(inputs.x, x, i)
        stacked = self.structure == "stacked"
        deep = mlp(x if stacked else inputs.x, self.hidden, self.dropout, self.dtype, deterministic)
        return last(deep if stacked else jnp.concatenate([x, deep], axis=-1), self.tasks)

    def _cross(self, x0: Float[Array, "B D"], x: Float[Array, "B D"], i: int) -> Float[Array, "B D"]:
        d, r = x.shape[-1], self.rank
        if not r:
            return x0 * nn.Dense(d, dtype=self.dtype, name=f"cross_{i}")(x) + x
        if self.experts == 1:
            low = nn.Dense(r, use_bias=False, dtype=self.dtype, name=f"cross_v_{i}")(x)
            return x0 * nn.Dense(d, dtype=self.dtype, name=f"cross_{i}")(low) + x
        init = nn.initializers.lecun_normal(batch_axis=0)
        shapes = {"v": (d, r), "c": (r, r), "u": (r, d)}
        v, c, u = (
            self.param(f"cross_{name}_{i}", init, (self.experts, *shape), jnp.float32).astype(self.dtype)
            for name, shape in shapes.items()
        )
        bias = self.param(f"cross_bias_{i}", nn.initializers.zeros, (d,), jnp.float32).astype(self.dtype)
        low = nn.tanh(jnp.einsum("bd,ndr->bnr", x, v))
        low = nn.tanh(jnp.einsum("bnr,nrs->bns", low, c))
        gate = nn.Dense(self.experts, dtype=jnp.float32, name=f"cross_gate_{i}")(x.astype(jnp.float32))
        gate = jax.nn.softmax(gate).astype(self.dtype)
        # The gates sum to one and b is shared: the mixture may be taken before U, and b added once.
        return x0 * (jnp.einsum("bnr,nrd->bd", gate[..., None] * low, u) + bias) + x

    @nn.nowrap
    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        layer = dense_flops(D, self.rank, D) if self.rank else dense_flops(D, D)
        if self.experts > 1:
            layer = self.experts * dense_flops(D, self.rank, self.rank, D) + dense_flops(D, self.experts)
        beside = dense_flops(D, self.tasks) if self.structure == "parallel" else 0
        return self.cross * layer + dense_flops(D, *self.hidden, self.tasks) + beside

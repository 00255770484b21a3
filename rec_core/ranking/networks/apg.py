"""APG: adaptive parameter generation (Yan et al., arXiv 2203.16218)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.interest.base import check_positive
from rec_core.ranking.networks.base import Inputs, Network, activate, dense_flops, last


class APG(Network):
    """An MLP whose layers are `U S V`: U and V shared by all examples, S `[rank, rank]` generated from the domain.

        h = f(V^T (S(E_D) (U^T h)) + b),    S(E_D) = reshape(E_D A + a)

    The products are taken from the right, so that no `[in, out]` matrix of an example is made. With `over` p > 0, U and
    V are products through p units each (over-parametrisation; of the parameters alone, once a batch). The condition is
    the domain's vector (the paper's group-wise form). Ours: a is the identity at first, so that a new network is a
    low-rank MLP on which domains differ only a little. The last layer is plain.

    Attributes:
      rank: of S, at most the smallest width.
      over: 0, or at least the rank.
    """

    rank: int = 8
    over: int = 0

    @property
    def needs(self) -> tuple[str, ...]:
        return ("domain",)

    @nn.compact
    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        check_positive(self, "rank")
        widths = (inputs.x.shape[-1], *self.hidden)
        if self.rank > min(widths):
            raise ValueError(
                f"APG: rank is {self.rank}, must be at most {min(widths)}, the smallest of widths {widths}"
            )
        if self.over and self.over < self.rank:
            raise ValueError(f"APG: over is {self.over}, must be 0 or at least rank, {self.rank}")
        h, r = inputs.x, self.rank
        for i, units in enumerate(self.hidden):
            s = nn.Dense(r * r, dtype=self.dtype, bias_init=lambda *_: jnp.eye(r).reshape(-1), name=f"generate_{i}")(
                inputs.domain
            ).reshape(-1, r, r)
            low = jnp.einsum("br,brs->bs", h @ self._matrix(f"u_{i}", h.shape[-1], r), s)
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (units,), jnp.float32).astype(self.dtype)
            h = activate(low @ self._matrix(f"v_{i}", r, units) + bias, i, self.dropout, self.dtype, deterministic)
        return last(h, self.tasks)

    def _matrix(self, name: str, fan_in: int, fan_out: int) -> Float[Array, "fan_in fan_out"]:
        init = nn.initializers.lecun_normal()
        if not self.over:
            return self.param(name, init, (fan_in, fan_out), jnp.float32).astype(self.dtype)
        left = self.param(f"{name}_left", init, (fan_in, self.over), jnp.float32)
        right = self.param(f"{name}_right", init, (self.over, fan_out), jnp.float32)
        return (left @ right).astype(self.dtype)

    @nn.nowrap
    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        r = self.rank
        layers = sum(dense_flops(a, r, r, b) for a, b in zip((D, *self.hidden), self.hidden))
        return layers + len(self.hidden) * dense_flops(d_D, r * r) + dense_flops(self.hidden[-1], self.tasks)

"""ADS, personalized candidate representation generation (arXiv 2502.05523, equations 6 and 7)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class Queries(nn.Module):
    """A linear layer to a vector for each chunk; it starts at zero. See `PCRG` for `oldest_of`."""

    chunks: int
    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, hidden: Float[Array, "*n hidden"], oldest_of: int | None = None) -> Float[Array, "*n G width"]:
        size = self.chunks * self.width
        kernel = self.param("kernel", nn.initializers.zeros, (hidden.shape[-1], size), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (size,), jnp.float32)
        kernel, bias = (x.reshape(*x.shape[:-1], self.chunks, self.width) for x in (kernel, bias))
        if oldest_of is not None:  # the layer is turned round, which is small, and not what it makes for each example
            kernel, bias = (x[..., :oldest_of, :][..., ::-1, :] for x in (kernel, bias))
        return jnp.einsum("...h,hgd->...gd", hidden, kernel.astype(self.dtype)) + bias.astype(self.dtype)


class PCRG(nn.Module):
    """A query of the candidate for each of G chunks of neighbouring behaviours, generated from domain and candidate.

        E_Q_private = relu((E_D + E_Q) Wq1^T + bq1) Wq2^T + bq2     (6), `+` inside the brackets being concatenation
        E_Q_personalized = reshape(E_Q_private) + tile(E_Q)         (7)

    G = T is a query for each behaviour. Query 0 is of the newest chunk. The first layer is taken apart, into
    `E_D W + E_Q W'`, so that many candidates of a request share the domain's part. Ours: the second layer starts at
    zero, so that all queries are the candidate itself at first.
    """

    chunks: int
    hidden: int = 32  # well below G d_Q
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, domain: Float[Array, "B d_D"], target: Float[Array, "B *C d_Q"], *, oldest_of: int | None = None
    ) -> Float[Array, "B *C G d_Q"]:
        """The queries, the newest chunk's first; with `oldest_of`, of that many newest chunks, the oldest first."""
        if self.chunks < 1:
            raise ValueError(f"PCRG: chunks is {self.chunks}, must be at least 1")
        d_q, target = target.shape[-1], target.astype(self.dtype)
        of_domain = nn.Dense(self.hidden, dtype=self.dtype, name="first_domain")(domain)
        of_target = nn.Dense(self.hidden, use_bias=False, dtype=self.dtype, name="first_target")(target)
        of_domain = of_domain.reshape(len(domain), *[1] * (target.ndim - 2), self.hidden)
        private = Queries(self.chunks, d_q, self.dtype, name="second")(nn.relu(of_domain + of_target), oldest_of)
        return private + target[..., None, :]

"""ADS, personalized candidate representation generation (arXiv 2502.05523, equations 6 and 7)."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class Queries(nn.Module):
    """Matrix and bias of a linear layer to a vector for each chunk, both zero at first: the parameters over the number
    of inputs, as in `ads_jax.generator.Second`. See `PCRG` for `oldest_of`."""

    chunks: int
    width: int

    @nn.compact
    def __call__(
        self, hidden: int, oldest_of: int | None = None
    ) -> tuple[Float[Array, "hidden G width"], Float[Array, "G width"]]:
        size = self.chunks * self.width
        kernel = self.param("kernel", nn.initializers.zeros, (hidden, size), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (size,), jnp.float32)
        kernel, bias = (x.reshape(*x.shape[:-1], self.chunks, self.width) / hidden for x in (kernel, bias))
        if oldest_of is not None:  # the layer is turned round, which is small, and not what it makes for each example
            kernel, bias = (x[..., :oldest_of, :][..., ::-1, :] for x in (kernel, bias))
        return kernel, bias


class PCRG(nn.Module):
    """A query of the candidate for each of G chunks of neighbouring behaviours, generated from domain and candidate.

        E_Q_private = relu((E_D + E_Q) Wq1^T + bq1) Wq2^T + bq2     (6), `+` inside the brackets being concatenation
        E_Q_personalized = reshape(E_Q_private) + tile(E_Q)         (7)

    G = T is a query for each behaviour. Query 0 is of the newest chunk. The first layer is taken apart, into
    `E_D W + E_Q W'`, so that many candidates of a request share the domain's part. Ours: the second layer starts at
    zero, so that all queries are the candidate itself at first.

    Raises:
      ValueError: when called, if `chunks` or `hidden` is below 1.
    """

    chunks: int
    hidden: int = 32  # well below G d_Q
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        domain: Float[Array, "B d_D"],
        target: Float[Array, "B *C d_Q"],
        *,
        oldest_of: int | None = None,
        project: Callable[[Float[Array, "*n d_Q"]], Array] | None = None,
    ) -> Float[Array, "B *C G d_Q"] | Float[Array, "B *CG heads d_K"]:
        """The queries, the newest chunk's first; with `oldest_of`, of that many newest chunks, the oldest first.

        Args:
          domain: E_D, one for all candidates of an example. target: E_Q, of one candidate an example or of more.
          project: a linear map of queries, which is then in the result; it acts on parameters instead of examples.
        """
        for name in ("chunks", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"PCRG: {name} is {getattr(self, name)}, must be at least 1")
        d_q, target = target.shape[-1], target.astype(self.dtype)
        of_domain = nn.Dense(self.hidden, dtype=self.dtype, name="first_domain")(domain)
        of_target = nn.Dense(self.hidden, use_bias=False, dtype=self.dtype, name="first_target")(target)
        of_domain = of_domain.reshape(len(domain), *[1] * (target.ndim - 2), self.hidden)
        hidden = nn.relu(of_domain + of_target)
        kernel, bias = Queries(self.chunks, d_q, name="second")(self.hidden, oldest_of)
        if project is None:
            kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
            private = jnp.einsum("...h,hgd->...gd", hidden, kernel) + bias  # (6)
            return private + target[..., None, :]  # (7)
        # The same as a single product, of [hidden ; E_Q ; 1]: no sum, forward or backward, is a pass of its own.
        bias = project(bias)
        tile = jnp.broadcast_to(project(jnp.eye(d_q))[:, None], (d_q, *bias.shape))
        matrix = jnp.concatenate([project(kernel), tile, bias[None]]).astype(self.dtype)
        given = jnp.concatenate([hidden, target, jnp.ones_like(target[..., :1])], axis=-1)
        return (given @ matrix.reshape(len(matrix), -1)).reshape(*given.shape[:-1], *bias.shape)

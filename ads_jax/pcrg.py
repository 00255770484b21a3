"""ADS, personalized candidate representation generation (arXiv 2502.05523, equations 6 and 7)."""

from flax import linen as nn
from jaxtyping import Array, Float


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
    def __call__(self, domain: Float[Array, "B d_D"], target: Float[Array, "B *C d_Q"]) -> Float[Array, "B *C G d_Q"]:
        if self.chunks < 1:
            raise ValueError(f"PCRG: chunks is {self.chunks}, must be at least 1")
        d_q, target = target.shape[-1], target.astype(self.dtype)
        of_domain = nn.Dense(self.hidden, dtype=self.dtype, name="first_domain")(domain)
        of_target = nn.Dense(self.hidden, use_bias=False, dtype=self.dtype, name="first_target")(target)
        of_domain = of_domain.reshape(len(domain), *[1] * (target.ndim - 2), self.hidden)
        second = nn.Dense(self.chunks * d_q, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="second")
        private = second(nn.relu(of_domain + of_target)).reshape(*target.shape[:-1], self.chunks, d_q)
        return private + target[..., None, :]

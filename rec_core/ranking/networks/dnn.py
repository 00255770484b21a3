"""The plain MLP, the network of the base ranking model."""

from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.ranking.networks.base import Inputs, Network, dense_flops, last, mlp


class DNN(Network):
    """`MLP(x)`. It knows of a domain only what x says."""

    @nn.compact
    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        return last(mlp(inputs.x, self.hidden, self.dropout, self.dtype, deterministic), self.tasks)

    @nn.nowrap
    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        return dense_flops(D, *self.hidden, self.tasks)

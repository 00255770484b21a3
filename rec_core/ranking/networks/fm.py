"""DeepFM (Guo et al., arXiv 1703.04247) and xDeepFM (Lian et al., arXiv 1803.05170): explicit crosses beside an MLP.

First-order terms of both: a linear layer of the field vectors. A feature's weight is what the layer reads from its
vector, in place of a table of width 1 of its own.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rec_core.interest.base import check_positive
from rec_core.ranking.networks.base import Inputs, Network, dense_flops, last, mlp


def _first_order(fields: Float[Array, "B F k"], tasks: int) -> Float[Array, "B tasks"]:
    flat = fields.reshape(len(fields), -1).astype(jnp.float32)
    return nn.Dense(tasks, use_bias=False, dtype=jnp.float32, name="first_order")(flat)


class DeepFM(Network):
    """`sum_i <w_i, e_i> + sum_(i < j) <e_i, e_j> + MLP(x)`, e_i the field vectors.

    The second term has no parameters but the vectors, and is the same for all tasks. Ours: the MLP reads all of x, not
    the fields alone.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        return ("fields",)

    @nn.compact
    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        fields = jnp.asarray(inputs.fields, jnp.float32)
        # sum_(i < j) <e_i, e_j> = (|sum_i e_i|^2 - sum_i |e_i|^2) / 2: linear in F.
        second = 0.5 * (jnp.sum(fields.sum(1) ** 2, axis=-1) - jnp.sum(fields**2, axis=(1, 2)))
        deep = last(mlp(inputs.x, self.hidden, self.dropout, self.dtype, deterministic), self.tasks)
        return _first_order(fields, self.tasks) + second[:, None] + deep

    @nn.nowrap
    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        return dense_flops(F * k, self.tasks) + dense_flops(D, *self.hidden, self.tasks)


class XDeepFM(Network):
    """First-order terms, the compressed interaction network (CIN) and an MLP, summed.

    CIN: `X^l_h = sum_ij W^l_(h,i,j) (X^(l-1)_i * X^0_j)`, `*` entry by entry and X^0 the field vectors, so that layer l
    holds crosses of l + 1 fields. Each X^l_h is summed over its k entries, and a linear layer reads these sums of all
    layers. No activation in between, which the paper found best.

    Attributes:
      cin: number of vectors of each CIN layer.
    """

    cin: tuple[int, ...] = (16, 16)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("fields",)

    @nn.compact
    def logits(self, inputs: Inputs, deterministic: bool) -> Float[Array, "B tasks"]:
        check_positive(self, "cin")
        x0 = x = jnp.asarray(inputs.fields)
        sums = []
        for i, vectors in enumerate(self.cin):
            init = nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
            w = self.param(f"cin_{i}", init, (x.shape[1], x0.shape[1], vectors), jnp.float32)
            crosses = x[:, :, None] * x0[:, None]
            x = jnp.einsum("bijk,ijh->bhk", crosses, w.astype(self.dtype))
            sums.append(jnp.sum(x, axis=-1, dtype=jnp.float32))
        read = nn.Dense(self.tasks, use_bias=False, dtype=jnp.float32, name="cin_logit")(jnp.concatenate(sums, axis=-1))
        deep = last(mlp(inputs.x, self.hidden, self.dropout, self.dtype, deterministic), self.tasks)
        return _first_order(x0, self.tasks) + read + deep

    @nn.nowrap
    def flops(self, D: int, F: int = 0, k: int = 0, d_D: int = 0) -> int:
        cin = sum(2 * a * F * b * k for a, b in zip((F, *self.cin), self.cin))
        read = dense_flops(F * k, self.tasks) + dense_flops(sum(self.cin), self.tasks)
        return cin + read + dense_flops(D, *self.hidden, self.tasks)

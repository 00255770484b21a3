"""The two-layer networks that generate weights from the domain (ADS, arXiv 2502.05523, inside equations 2 and 4)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class Second(nn.Module):
    """A linear layer that starts at zero. Its weights are the parameters over the number of inputs.

    Adam moves a parameter by its rate whatever its gradient, so what n inputs generate moves by n times that: faster
    than weights that are parameters themselves, and the rest of the net does not follow. Divided by n it moves as they
    do (the output multiplier of Yang et al., arXiv 2203.03466); what can be learned is the same. NOTES.md has its gain.

    The bias is multiplied as one more row of the matrix, by ones: so its gradient comes with the matrix's, and is no
    pass of its own over what is large here, the layer's output.

    Attributes:
      square: the output is a square matrix, row by row, and is wanted transposed. The layer is turned round for it,
        which is small, and not what it makes for each example.
    """

    size: int
    square: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, hidden: Float[Array, "*n hidden"]) -> Float[Array, "*n size"]:
        kernel = self.param("kernel", nn.initializers.zeros, (hidden.shape[-1], self.size), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.size,), jnp.float32)
        matrix = (jnp.concatenate([kernel, bias[None]]) / len(kernel)).astype(self.dtype)
        if self.square:
            side = round(self.size**0.5)
            matrix = matrix.reshape(-1, side, side).swapaxes(1, 2).reshape(matrix.shape)
        return jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1) @ matrix


class Generator(nn.Module):
    """`relu(E_D W1^T + b1) W2^T + b2`. The second layer starts at zero, so that nothing is generated at first."""

    hidden: int
    size: int
    square: bool = False  # see `Second`
    dtype: str = "float32"

    @nn.compact
    def __call__(self, domain: Float[Array, "*n d_D"]) -> Float[Array, "*n size"]:
        hidden = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="first")(domain))
        generated: Array = Second(self.size, self.square, self.dtype, name="second")(hidden)
        return generated

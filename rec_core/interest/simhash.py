"""SimHash: signs of random projections, of which similar vectors share more (Charikar, STOC 2002). ETA compares all
signs of two vectors, SDIM asks in how many rounds a few of them agree entirely."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt

_WORD = 32


class SimHash(nn.Module):
    """`bits` signs in each of `rounds` rounds, as unsigned integers: `[..., rounds, words]`, 32 signs a word.

    Two vectors at angle `theta` differ in a sign with probability `theta / pi`. The directions are drawn once and
    never learned (no gradient reaches them), but they stand among the parameters: what was hashed and stored stays
    valid wherever the parameters go. Signs are taken in float32, and 0 counts as negative.
    """

    bits: int
    rounds: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> UInt[Array, "... rounds words"]:
        shape = (x.shape[-1], self.rounds, self.bits)
        directions = self.param("directions", nn.initializers.normal(1.0), shape, jnp.float32)
        x, directions = jax.lax.stop_gradient((x.astype(jnp.float32), directions))
        signs = jnp.einsum("...d,drb->...rb", x, directions, precision="highest") > 0
        spare = -self.bits % _WORD
        signs = jnp.pad(signs, [(0, 0)] * (signs.ndim - 1) + [(0, spare)])
        words = signs.reshape(*signs.shape[:-1], signs.shape[-1] // _WORD, _WORD).astype(jnp.uint32)
        return jnp.sum(words << jnp.arange(_WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def hamming(a: UInt[Array, "... words"], b: UInt[Array, "... words"]) -> Int[Array, "..."]:
    """In how many bits two hashes differ."""
    return jnp.sum(jax.lax.population_count(a ^ b), axis=-1, dtype=jnp.int32)

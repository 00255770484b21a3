"""Sampling-based deep interest modelling: the behaviours that fall into the target's hash buckets (Cao et al., CIKM
2022, arXiv 2205.10249)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rec_core.interest.base import Interest, check_positive, per_item
from rec_core.interest.simhash import SimHash
from rec_core.losses import normalize

_MAX_BITS = 16  # 2^bits buckets a round are stored


class Buckets(NamedTuple):
    """The behaviours, the bucket of each in every round, and the table that a target looks its answer up in."""

    sequence: Float[Array, "B T d"]
    mask: Bool[Array, "B T"]
    bucket: Int[Array, "B T rounds"]
    table: Float[Array, "B rounds buckets d"]  # sum of each bucket's behaviours at length one, float32


class SDIM(Interest):
    """`1 / G sum_g l2( sum_t [hash_g(e_t) = hash_g(target)] e_t )` over G rounds, `d_out = d`. It does not read time.

    A behaviour at angle theta from the target falls into its bucket in a share `(1 - theta / pi)^bits` of the rounds,
    which is the attention that the paper shows to be near a softmax's. The sums are made for all buckets when the
    sequence is encoded (the paper's behaviour sequence encoding server): a target costs `O(rounds (bits d + d))`,
    whatever the length of the sequence. No gradient goes through the hashes, so none reaches the target.

    The paper's m hash functions, tau of them a signature, are `rounds = m / tau` and `bits = tau`.
    """

    rounds: int = 16
    bits: int = 3

    def setup(self) -> None:
        check_positive(self, "rounds", "bits")
        if self.bits > _MAX_BITS:
            raise ValueError(f"SDIM: bits is {self.bits}, must be at most {_MAX_BITS}: a round has 2^bits buckets")
        self.hash = SimHash(self.bits, self.rounds)

    def encode(
        self,
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Buckets:
        # Hashed before the cast: signs must not depend on the dtype of the computation.
        bucket = self.bucket(jnp.where(mask[..., None], sequence, 0))
        sequence, mask = super().encode(sequence, mask)

        sums = jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, 2**self.bits))
        # A round at a time: all at once would repeat the sequence for each.
        rounds = jax.lax.map(lambda ids: sums(sequence.astype(jnp.float32), ids), jnp.moveaxis(bucket, -1, 0))
        return Buckets(sequence, mask, bucket, normalize(jnp.moveaxis(rounds, 0, 1)))

    def read(self, encoded: Buckets, target: Float[Array, "B d"] | Float[Array, "B G d"]) -> Float[Array, "B d"]:
        target = per_item(target, encoded.mask.shape[1])
        if target.ndim == 3:  # no bucket is the target's: item by item instead of from the table
            hit = self.collisions(encoded, target).astype(self.dtype)
            sums = jnp.einsum("btg,btd->bgd", hit, encoded.sequence, preferred_element_type=jnp.float32)
            found = normalize(sums)
        else:
            bucket = self.bucket(target)[..., None, None]
            found = jnp.take_along_axis(encoded.table, bucket, axis=2)[:, :, 0]
        return jnp.mean(found, axis=1).astype(self.dtype)

    def bucket(self, x: Float[Array, "... d"]) -> Int[Array, "... rounds"]:
        """The bucket of a vector in each round, in `[0, 2^bits)`."""
        return self.hash(x)[..., 0].astype(jnp.int32)

    def collisions(
        self, encoded: Buckets, target: Float[Array, "B d"] | Float[Array, "B G d"]
    ) -> Bool[Array, "B T rounds"]:
        """In which rounds a behaviour shares the target's bucket; never at padding."""
        bucket = self.bucket(target)
        same = encoded.bucket == (bucket if target.ndim == 3 else bucket[:, None])
        return same & encoded.mask[..., None]

"""End-to-end target attention: the K behaviours nearest to the target by hash, then attention over these alone (Chen
et al., arXiv 2108.04468)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from rec_core.interest.base import Interest, check_positive, newest_top_k, per_item
from rec_core.interest.multi_head import MultiHead
from rec_core.interest.simhash import SimHash, hamming


class Hashed(NamedTuple):
    """The behaviours and their hashes."""

    sequence: Float[Array, "B T d"]
    mask: Bool[Array, "B T"]
    code: UInt[Array, "B T words"]


class ETA(Interest):
    """Multi-head target attention over the `top` behaviours of least Hamming distance, `d_out = heads * width`.

    Target and behaviours are hashed by the same SimHash as they are at the moment, so that search and attention see
    the same vectors; no gradient goes through the search. Of equally distant behaviours the newer are taken. It does
    not read time.
    """

    top: int = 48
    bits: int = 64
    heads: int = 4
    width: int = 16  # of a head

    def setup(self) -> None:
        check_positive(self, "top", "bits", "heads", "width")
        self.hash = SimHash(self.bits)
        self.attention = MultiHead(self.heads, self.width, dtype=self.dtype)

    def encode(
        self,
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Hashed:
        # Hashed before the cast: signs must not depend on the dtype of the computation.
        code = self.hash(jnp.where(mask[..., None], sequence, 0))[..., 0, :]
        sequence, mask = super().encode(sequence, mask)
        return Hashed(sequence, mask, code)

    def read(
        self, encoded: Hashed, target: Float[Array, "B d"] | Float[Array, "B G d"]
    ) -> Float[Array, "B heads*width"]:
        target = per_item(target, encoded.mask.shape[1])
        position, found = self.search(encoded, target)
        nearest = jnp.take_along_axis(encoded.sequence, position[..., None], axis=1)
        if target.ndim == 3:
            target = jnp.take_along_axis(target, position[..., None], axis=1)
        return self.attention.read(self.attention.encode(nearest, found), target)

    def search(
        self, encoded: Hashed, target: Float[Array, "B d"] | Float[Array, "B G d"]
    ) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
        """Slots of the nearest behaviours, nearest first, and which of them are behaviours; K is at most T."""
        code = self.hash(target)[..., 0, :]
        distance = hamming(encoded.code, code if target.ndim == 3 else code[:, None])
        return newest_top_k(-distance, encoded.mask, self.top)

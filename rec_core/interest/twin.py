"""Two-stage interest network: one target attention both finds the top behaviours and weighs them (Chang et al., KDD
2023, arXiv 2302.02352, section 4)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from rec_core.interest.base import (
    AGES,
    Interest,
    age_bucket,
    check_positive,
    masked_softmax,
    newest_top_k,
    per_item,
)


class Projected(NamedTuple):
    """The behaviours' features and the parts of their scores that no target changes."""

    inherent: Float[Array, "B T d_h"]
    cross: Float[Array, "B T d_c"]
    mask: Bool[Array, "B T"]
    key: Float[Array, "B T heads width"]  # K_h W^h
    bias: Float[Array, "B heads T"]  # K_c W^c beta, float32


class CrossFeatures(nn.Module):
    """`K_c`, with the embedding of each behaviour's age where its time is known, and the bias `(K_c W^c) beta`.

    Each cross feature j is pressed into a number a head, `k_j . w_j` (equation 3), weighed by `beta_j`.
    """

    widths: tuple[int, ...]
    ages: tuple[float, ...]
    age_width: int
    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, features: Float[Array, "B T d"], mask: Bool[Array, "B T"], time: Float[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T d_c"], Float[Array, "B heads T"]]:
        widths = self.widths
        if time is not None:
            bucket = age_bucket(time, mask, self.ages)
            age = nn.Embed(len(self.ages) + 1, self.age_width, dtype=self.dtype, name="age")(bucket)
            features, widths = jnp.concatenate([features, age], axis=-1), (*widths, self.age_width)
        if not widths:
            return features, jnp.zeros((len(mask), self.heads, mask.shape[1]), jnp.float32)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (sum(widths), self.heads), jnp.float32)
        beta = self.param("beta", nn.initializers.ones, (len(widths), self.heads), jnp.float32)
        # The sum over features of beta_j (k_j . w_j), as one product.
        weight = kernel * jnp.repeat(beta, np.array(widths), axis=0, total_repeat_length=sum(widths))
        return features, jnp.einsum("btc,ch->bht", features.astype(jnp.float32), weight)


class TWIN(Interest):
    """Per head `alpha = (K_h W^h)(q W^q) / sqrt(width) + (K_c W^c) beta` (equation 4), over all T behaviours for the
    search (GSU), and `softmax(alpha)^T K W^v` over its `top` behaviours (ESU, equation 5); heads side by side through
    W^o to `d_out`, the width of the inherent features.

    Behaviour features are split (equations 2 and 3). Inherent ones, `K_h`, belong to the item and stand first; their
    projection is the part that can be stored per item. Cross features, `K_c`, are of user and item; each is pressed
    into one number a head, a bias that needs no target. They are the last `sum(cross)` entries of the sequence, `cross`
    holding the width of each, and after them the age of the behaviour, where `time` is given, as a bucket between the
    `ages` (seconds) with an embedding of `age_width`. Give time always or never: without it the bias has no age.

    Each head searches by its own alpha, so that its two stages agree; of equal scores the newer behaviour is taken. No
    gradient goes through the choice. The target may have the width of the inherent features or of the sequence, whose
    last entries are then not read.
    """

    reads_time = True
    top: int = 100
    heads: int = 4
    width: int = 16  # of a head
    cross: Sequence[int] = ()
    ages: Sequence[float] = AGES
    age_width: int = 8

    def setup(self) -> None:
        check_positive(self, "top", "heads", "width", "age_width", *(("cross",) if self.cross else ()))
        if not self.ages or (np.diff(self.ages) <= 0).any():
            raise ValueError(f"TWIN: ages is {self.ages}, must be increasing numbers of seconds, at least one")
        shape = (self.heads, self.width)
        self.query = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype)
        self.key = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype)
        self.cross_features = CrossFeatures(tuple(self.cross), tuple(self.ages), self.age_width, self.heads, self.dtype)

    def encode(
        self,
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Projected:
        width = sequence.shape[-1] - sum(self.cross)
        if width < 1:
            raise ValueError(
                f"TWIN: cross is {self.cross}, {sum(self.cross)} entries of a sequence of width {sequence.shape[-1]}; "
                "at least one must be left for the inherent features"
            )
        sequence, mask = super().encode(sequence, mask)
        inherent, cross = sequence[..., :width], sequence[..., width:]
        cross, bias = self.cross_features(cross, mask, time)
        return Projected(inherent, cross, mask, self.key(inherent), bias)

    @nn.compact
    def read(self, encoded: Projected, target: Float[Array, "B d"] | Float[Array, "B G d"]) -> Float[Array, "B d_h"]:
        alpha = self.relevance(encoded, target)
        position, found = newest_top_k(alpha, encoded.mask[:, None], self.top)
        weight = masked_softmax(jnp.take_along_axis(alpha, position, axis=-1), found).astype(self.dtype)

        def pool(features: Float[Array, "B T d"]) -> Float[Array, "heads B d"]:
            chosen = jnp.take_along_axis(features[:, None], position[..., None], axis=2)
            return jnp.einsum("bhk,bhkd->hbd", weight, chosen, preferred_element_type=jnp.float32)

        # (softmax(alpha)^T K) W^v: pooled before it is projected, and so never projected over all T.
        pooled = jnp.concatenate([pool(encoded.inherent), pool(encoded.cross)], axis=-1)
        value = nn.DenseGeneral(self.width, batch_dims=(0,), use_bias=False, dtype=self.dtype, name="value")(pooled)
        heads = jnp.moveaxis(value, 0, 1).reshape(len(alpha), -1)
        return nn.Dense(encoded.inherent.shape[-1], use_bias=False, dtype=self.dtype, name="out")(heads)

    def relevance(
        self, encoded: Projected, target: Float[Array, "B d"] | Float[Array, "B G d"]
    ) -> Float[Array, "B heads T"]:
        """alpha of every behaviour, float32: what the GSU ranks by and the ESU weighs by. Padding is not masked."""
        width = encoded.inherent.shape[-1]
        whole = width + sum(self.cross)
        if target.shape[-1] not in (width, whole):
            raise ValueError(
                f"TWIN: target has width {target.shape[-1]}, must be {width} (the inherent features) or {whole}"
            )
        query = self.query(per_item(target, encoded.mask.shape[1])[..., :width])
        queries = "bhw" if query.ndim == 3 else "bthw"
        score = jnp.einsum(f"{queries},bthw->bht", query, encoded.key, preferred_element_type=jnp.float32)
        return score * self.width**-0.5 + encoded.bias

"""SIM's general search unit: from a lifetime of behaviours to the few hundred that matter to a candidate (Pi et al.,
CIKM 2020, arXiv 2006.05639).

Hard and soft search here are those of a sequence that is on the device. `sim_jax.tree` is the index that answers hard
search for a history that is not.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from rec_core.interest import Dice
from rec_core.interest.base import newest_top_k
from rec_core.ranking.head import tamed


def hard(
    target: Int[Array, " B"], category: Int[Array, "B T"], mask: Bool[Array, "B T"], k: int
) -> tuple[Int[Array, "B k"], Bool[Array, "B k"]]:
    """The k newest behaviours of the target's category, `r_i = 1[C_i = C_a]`.

    Args:
      target: the target's category; 0 is none, and finds nothing.
      category: those of the behaviours, oldest first; padding anywhere.

    Returns:
      positions, newest first (all T if T is smaller than k), and which of them were found.
    """
    same = mask & (category == target[:, None]) & (target != 0)[:, None]
    return newest_top_k(same.astype(jnp.int32), same, k)


def soft(
    relevance: Float[Array, "B T"], mask: Bool[Array, "B T"], k: int, *, recall: float = 1.0
) -> tuple[Int[Array, "B k"], Bool[Array, "B k"]]:
    """The k behaviours of the highest relevance: positions, highest first, and which of them are behaviours.

    Exact with `recall` 1, the newest of equals first. Below 1 it is `jax.lax.approx_max_k` with that recall aimed at,
    which JAX has for TPUs (not measured on one); elsewhere that is exact as well. No gradient goes through the choice.
    """
    if not 0 < recall <= 1:
        raise ValueError(f"recall is {recall}, must be above 0 and at most 1 (exact)")
    if recall == 1:
        return newest_top_k(relevance, mask, k)
    score = jnp.where(mask, jax.lax.stop_gradient(relevance).astype(jnp.float32), -jnp.inf)
    position = jax.lax.approx_max_k(score, min(k, score.shape[-1]), recall_target=recall)[1]
    return position, jnp.take_along_axis(mask, position, axis=-1)


def sample(key: Array, mask: Bool[Array, "B T"], n: int) -> tuple[Int[Array, "B n"], Bool[Array, "B n"]]:
    """n behaviours of each row at random, each at most once: the sub-sampling of a long sequence in training.

    Returns positions (all T if T is smaller) and which of them are behaviours.
    """
    draw = jnp.where(mask, jax.random.uniform(key, mask.shape), -1)
    position = jax.lax.top_k(draw, min(n, mask.shape[-1]))[1]
    return position, jnp.take_along_axis(mask, position, axis=-1)


class SoftSearch(nn.Module):
    """`W_b^T W_a e_a`, float32: its inner product with e_i is the relevance `r_i = (W_b e_i) . (W_a e_a)`.

    So a target is projected once and the T behaviours not at all. Ours: W_a and W_b start as one projection, so that
    the behaviours nearest to the candidate are found at first; of two unrelated ones the relevance is noise.
    """

    width: int

    @nn.compact
    def __call__(self, target: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        shape = (target.shape[-1], self.width)

        def alike(_: Array) -> Array:
            projection: Array = nn.initializers.orthogonal()(jax.random.key(0), shape, jnp.float32)
            return projection

        w_a, w_b = (self.param(name, alike) for name in ("w_a", "w_b"))
        return target.astype(jnp.float32) @ w_a @ w_b.T


def relevance(query: Float[Array, "B d"], sequence: Float[Array, "B T d"]) -> Float[Array, "B T"]:
    """`r_i` of each behaviour, float32, for `SoftSearch`'s query. Padding is not masked."""
    return jnp.einsum("bd,btd->bt", query, sequence, preferred_element_type=jnp.float32)


def pool(
    r: Float[Array, "B T"],
    sequence: Float[Array, "B T d"],
    mask: Bool[Array, "B T"],
    count: Float[Array, "B"] | None = None,
) -> Float[Array, "B d"]:
    """`U_r = sum_i r_i e_i`, float32: the users' interest as the search alone sees it; 0 for a row without behaviours.

    Ours: as `sign(x) log(1 + |x|)`, which reads 100 behaviours and 54,000 in one scale and keeps that they are many.

    Args:
      count: behaviours that those given were drawn from; the sum is scaled to them. None: there are no others.
    """
    sequence = jnp.where(mask[..., None], sequence, 0)
    total = jnp.einsum("bt,btd->bd", jnp.where(mask, r, 0), sequence, preferred_element_type=jnp.float32)
    if count is not None:
        total = total * (count / jnp.maximum(jnp.sum(mask, axis=-1), 1))[:, None]
    return tamed(total)


class SearchClick(nn.Module):
    """The auxiliary task that teaches the soft search: the logit of a click from an MLP on `[U_r ; e_a]`."""

    hidden: tuple[int, ...]
    dtype: str = "float32"

    @nn.compact
    def __call__(self, pooled: Float[Array, "B d"], target: Float[Array, "B d"]) -> Float[Array, " B"]:
        x = jnp.concatenate([pooled, target], axis=-1).astype(self.dtype)
        for i, units in enumerate(self.hidden):
            x = Dice(self.dtype, name=f"dice_{i}")(nn.Dense(units, dtype=self.dtype, name=f"mlp_{i}")(x))
        return nn.Dense(1, dtype=jnp.float32, name="logit")(x.astype(jnp.float32))[:, 0]

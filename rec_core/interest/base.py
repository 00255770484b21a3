"""The face of the interest modules in two steps, what they share, and many candidates of one request at once."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped

from rec_core import losses
from rec_core.chunks import map_chunks

_HOUR, _DAY = 3600.0, 86_400.0
AGES = (
    *(60.0, 600.0, _HOUR, 6 * _HOUR, _DAY, 2 * _DAY, 4 * _DAY, 7 * _DAY, 14 * _DAY, 30 * _DAY),
    *(60 * _DAY, 90 * _DAY, 180 * _DAY, 365 * _DAY, 730 * _DAY),
)  # seconds: between them are the buckets of a behaviour's age


class Behaviors(NamedTuple):
    """A sequence that is ready to be read: zeros at padding, in the dtype of the computation."""

    sequence: Float[Array, "B T d"]
    mask: Bool[Array, "B T"]


class Interest(nn.Module, kw_only=True):
    """What every member is: `read(encode(sequence, mask, time=time), target)`.

    `encode` holds all that does not depend on the target, so that a request computes it once for all its candidates.
    What it gives is a pytree of arrays, a kind of its own for each member.
    """

    dtype: str = "float32"  # of the computation; parameters are float32
    reads_time: ClassVar[bool] = False  # whether there are parameters of the behaviours' age

    def __call__(
        self,
        target: Float[Array, "B d"] | Float[Array, "B G d"],
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Float[Array, "B d_out"]:
        check_shapes(target, sequence, mask, time)
        if target.shape[:-1] == mask.shape:
            target = jnp.where(mask.astype(bool)[..., None], target, 0)
        return self.read(self.encode(sequence, mask, time=time), target)

    def encode(
        self,
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Any:
        """The part that is the same for all targets. Here: padding replaced by zeros, whatever stood there."""
        mask = mask.astype(bool)
        return Behaviors(jnp.where(mask[..., None], sequence, 0).astype(self.dtype), mask)

    def read(self, encoded: Any, target: Float[Array, "B d"] | Float[Array, "B G d"]) -> Float[Array, "B d_out"]:
        """The interest in the target, from what `encode` gave. Of G queries each is of T / G neighbouring slots."""
        raise NotImplementedError(f"{type(self).__name__} defines no read(encoded, target); every member does")

    def auxiliary(self, encoded: Any, negatives: Float[Array, "B T d"] | None = None) -> dict[str, losses.Sum]:
        """The member's own extra losses by name, as mergeable sums; most members have none.

        Args:
          encoded: what `encode` gave. negatives: see the member that reads them.
        """
        return {}


def candidates(
    module: nn.Module,
    params: Any,
    targets: Float[Array, "B C d"] | Float[Array, "B C G d"],
    sequence: Float[Array, "B T d"],
    mask: Bool[Array, "B T"],
    *,
    time: Float[Array, "B T"] | None = None,
    chunk: int = 32,
) -> Float[Array, "B C d_out"]:
    """The interest in each of C candidates of a request. The sequence is encoded once and never repeated.

    Args:
      module, params: a member and its variables, as for `module.apply(params, ...)`.
      targets: one query a candidate, or G a candidate, each of T / G neighbouring items (T: one an item).
      sequence, mask, time: one sequence a request.
      chunk: candidates at a time; memory grows with it.
    """
    if targets.ndim not in (3, 4):
        raise ValueError(f"targets has shape {targets.shape}, must be [B, C, d] or [B, C, G, d]")
    check_shapes(targets[:, 0], sequence, mask, time)
    encoded = module.apply(params, sequence, mask, time=time, method="encode")

    def one(target: Array) -> Any:
        return module.apply(params, encoded, target, method="read")

    return map_chunks(one, targets.swapaxes(0, 1), chunk).swapaxes(0, 1)


def masked_softmax(score: Float[Array, "... T"], mask: Bool[Array, "... T"]) -> Float[Array, "... T"]:
    """Softmax over the unpadded entries of the last axis, in float32, 0 at padding; all zeros without any entry."""
    # A finite floor, so that a row of padding only has a defined softmax before it is masked to zeros.
    score = jnp.where(mask, score.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    return jnp.where(mask, jax.nn.softmax(score, axis=-1), 0)


def newest_top_k(
    score: Shaped[Array, "... T"], mask: Bool[Array, "... T"], k: int
) -> tuple[Int[Array, "... k"], Bool[Array, "... k"]]:
    """Positions of the k highest scores (all T if T is smaller), highest first, and which of them are not padding.

    Of equal scores the newest goes first: the sequence is oldest first. Scores are float, or signed integers above
    their type's minimum.
    """
    floor = jnp.iinfo(score.dtype).min if jnp.issubdtype(score.dtype, jnp.integer) else -jnp.inf
    score, length = jnp.where(mask, score, floor), score.shape[-1]
    # top_k takes the first of equals: turned round, that is the newest.
    position = length - 1 - jax.lax.top_k(jax.lax.stop_gradient(score)[..., ::-1], min(k, length))[1]
    return position, jnp.take_along_axis(mask, position, axis=-1)


def by_query(
    target: Float[Array, "B d"] | Float[Array, "B G d"], sequence: Float[Array, "B T d"]
) -> tuple[Float[Array, "B G d"], Float[Array, "B G T/G d"]]:
    """Queries, and the sequence cut into the T / G neighbouring slots of each; a shared query has G = 1."""
    queries = target[:, None] if target.ndim == 2 else target
    size, length, *rest = sequence.shape
    return queries, sequence.reshape(size, queries.shape[1], length // queries.shape[1], *rest)


def per_item(
    target: Float[Array, "B d"] | Float[Array, "B G d"], length: int
) -> Float[Array, "B d"] | Float[Array, "B T d"]:
    """Queries of neighbouring slots repeated for each slot; a shared query as it is."""
    if target.ndim == 2:
        return target
    return jnp.repeat(target, length // target.shape[1], axis=1, total_repeat_length=length)


def age_bucket(time: Float[Array, "B T"], mask: Bool[Array, "B T"], ages: Sequence[float]) -> Int[Array, "B T"]:
    """The bucket, 0 .. len(ages), of each behaviour's age in seconds; an age at a bound is in the older bucket."""
    cuts = jnp.asarray(ages, jnp.float32)
    age = jnp.where(mask, jnp.asarray(time), 0).astype(jnp.float32)
    return jnp.searchsorted(cuts, age, side="right", method="scan_unrolled")  # no loop for a few cuts


def check_shapes(target: Array, sequence: Array, mask: Array, time: Array | None) -> None:
    """ValueError naming array, shape and rule. The width of the target is the member's own to check."""
    if sequence.ndim != 3:
        raise ValueError(f"sequence has shape {sequence.shape}, must be [B, T, d]")
    size, length = sequence.shape[:2]
    for name, array in (("mask", mask), ("time", time)):
        if array is not None and array.shape != (size, length):
            raise ValueError(f"{name} has shape {array.shape}, must be {(size, length)} to go with the sequence")
    shared = target.ndim == 2 and len(target) == size
    grouped = target.ndim == 3 and len(target) == size and target.shape[1] > 0 and length % target.shape[1] == 0
    if not (shared or grouped):
        raise ValueError(
            f"target has shape {target.shape}, must be ({size}, d), or ({size}, {length}, d) for one query per item, "
            f"or ({size}, G, d), G a divisor of {length}, for one per {length} / G neighbouring items; for many "
            "candidates of one sequence use rec_core.interest.candidates"
        )


def check_positive(module: nn.Module, *names: str) -> None:
    """ValueError unless these fields of the module, or each of their entries, are at least 1."""
    for name in names:
        value = getattr(module, name)
        entries = value if isinstance(value, tuple | list) else (value,)
        if not entries or min(entries) < 1:
            raise ValueError(f"{type(module).__name__}: {name} is {value}, must be at least 1")

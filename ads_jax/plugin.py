"""ADS as a plug-in: sequence and candidate made personal per domain, in front of any target attention (arXiv
2502.05523). The attention itself is not changed."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float

from ads_jax.order import newest_last
from ads_jax.pcrg import PCRG
from ads_jax.psrg import PSRG
from rec_core.chunks import map_chunks
from rec_core.interest import Interest
from rec_core.interest.base import Behaviors, per_item


@struct.dataclass
class Encoded:
    """A sequence as the unit encoded it, and the mask that was given, before it was filled up to whole chunks."""

    unit: Any
    mask: Bool[Array, "B T"]  # read for its shape alone


class ADS(nn.Module):
    """A member of the interest family, or any module of its face, around which PSRG and PCRG stand (arXiv 2502.05523,
    equations 2-7, in front of any of the attentions 8-12).

    Called as the member is, with the domain input E_D beside. What is shared by a request's candidates is `encode`;
    `read` is once a candidate, and `candidates` both. Values must be finite, but for padding's, and are not looked at
    (under jit they cannot be); `ads_jax.check` does so, for batches of the model.

    Attributes:
      unit: such as `rec_core.interest.DIN()`. One that offers `encode_mapped`, `project` and `attend`, as
        `rec_core.interest.MultiHead` does, is given PSRG's linear map and not its result, and takes its queries
        projected; the numbers are the same but for rounding, and the personal sequence is never made.
      length: the longest sequence, T; `items` behaviours share a query, the oldest chunk may be short (1: unchunked).
      hidden, eta: of the generators.
      sequence, candidate: whether PSRG and PCRG are there (the paper's ablation).
      constant: the generators read ones in the place of E_D, whoever asks: a control that has the plug-in's capacity
        and knows no domain.
      arranged: what is given has its padding first already, and no look is taken at that.

    Raises:
      ValueError: a setting, or the shape of an array, is not what it must be; when called, as nothing is made before.
    """

    unit: Interest
    length: int
    items: int = 1
    hidden: int = 32
    eta: float = 2.0
    sequence: bool = True
    candidate: bool = True
    constant: bool = False
    dtype: str = "float32"
    arranged: bool = False

    def setup(self) -> None:
        if self.length < 1 or self.items < 1:
            raise ValueError(f"ADS: length is {self.length} and items {self.items}; both must be at least 1")
        if not (isinstance(self.unit, nn.Module) and hasattr(self.unit, "encode") and hasattr(self.unit, "read")):
            raise ValueError(
                f"ADS: unit is {self.unit!r}, must be a member of rec_core.interest, or ads_jax.Around an attention"
            )
        if self.sequence:
            self.psrg = PSRG(self.hidden, self.eta, self.dtype)
        if self.candidate:
            self.pcrg = PCRG(-(-self.length // self.items), self.hidden, self.dtype)

    def __call__(
        self,
        target: Float[Array, "B d_Q"],
        sequence: Float[Array, "B T d_S"],
        mask: Bool[Array, "B T"],
        domain: Float[Array, "B d_D"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Float[Array, "B d_out"]:
        """The interest in one target an example. A row without any behaviour gives zeros, where the unit's does."""
        return self.read(self.encode(sequence, mask, domain, time=time), target, domain)

    def encode(
        self,
        sequence: Float[Array, "B T d_S"],
        mask: Bool[Array, "B T"],
        domain: Float[Array, "B d_D"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Encoded:
        """What no candidate changes: the personal sequence, its newest behaviour last, as the unit encodes it.

        At least one slot: a user without behaviours has a mask that is False everywhere.
        """
        _check("sequence", sequence, ("B", "T", "d_S"))
        size, length = sequence.shape[:2]
        _check("mask", mask, (size, length))
        _check("domain", domain, (size, "d_D"))
        if time is not None:
            _check("time", time, (size, length))
        if length > self.length:
            raise ValueError(f"ADS: the sequence has {length} slots, length is {self.length}; raise it")
        given_mask = mask.astype(bool)
        given = (sequence, given_mask, time)
        if not self.arranged:
            given = newest_last(given_mask, given)

        def whole_chunks(x: Array) -> Array:
            return jnp.pad(x, [(0, 0), (-length % self.items, 0)] + [(0, 0)] * (x.ndim - 2))

        sequence, mask, time = jax.tree.map(whole_chunks, given)
        if self.sequence and self._folds:
            linear = self.psrg.generate(self._read(domain), sequence.shape[-1])
            return Encoded(self.unit.encode_mapped(sequence, mask, *linear, time=time), given_mask)
        if self.sequence:
            sequence = self.psrg(self._read(domain), jnp.where(mask[..., None], sequence, 0))
        return Encoded(self.unit.encode(sequence, mask, time=time), given_mask)

    def read(
        self, encoded: Encoded, target: Float[Array, "B d_Q"], domain: Float[Array, "B d_D"]
    ) -> Float[Array, "B d_out"]:
        """The interest in one candidate an example, from what `encode` gave."""
        size, length = encoded.mask.shape
        _check("target", target, (size, "d_Q"))
        _check("domain", domain, (size, "d_D"))
        if not (self.candidate and self._folds):
            return self.unit.read(encoded.unit, self.queries(target, domain, length))
        chunks = -(-length // self.items)
        project = partial(self.unit.project, encoded=encoded.unit, groups=chunks)
        return self.unit.attend(encoded.unit, self.pcrg(self._read(domain), target, oldest_of=chunks, project=project))

    def queries(
        self, target: Float[Array, "B d_Q"], domain: Float[Array, "B d_D"], length: int
    ) -> Float[Array, "B d_Q"] | Float[Array, "B G d_Q"]:
        """The candidate's queries of a sequence of `length` slots, the newest chunk's last, as the slots are."""
        if not self.candidate:
            return target
        return self.pcrg(self._read(domain), target, oldest_of=-(-length // self.items))

    @property
    def at_a_time(self) -> int:
        """Candidates that `candidates` reads at a time if not told: 32, and fewer where each has many queries: together
        they have about as many as 4 would have unchunked."""
        return min(32, 4 * self.items) if self.candidate else 32

    @property
    def _folds(self) -> bool:
        return hasattr(self.unit, "encode_mapped")

    def _read(self, domain: Float[Array, "B d_D"]) -> Float[Array, "B d_D"]:
        return jnp.ones_like(domain) if self.constant else domain


class Around(Interest):
    """An attention of somebody else's as a member of the interest family, so that `ADS` can stand around it.

    It is given the slots as `ADS` arranges them: padding first, the newest behaviour last, their number a multiple of
    `ADS.items`. One that reads a slot's index, or divides by the number of slots, sees that; one that weighs the
    unmasked behaviours does not.

    Attributes:
      attention: a Flax module, called with the queries `[B, T, d_Q]`, one for each behaviour (`[B, d_Q]`, one for all,
        where `ADS` makes none), the sequence `[B, T, d]`, zeros at padding, and the mask `[B, T]`; gives `[B, d_out]`.
    """

    attention: nn.Module

    def read(self, encoded: Behaviors, target: Float[Array, "B d"] | Float[Array, "B G d"]) -> Float[Array, "B d_out"]:
        sequence, mask = encoded
        read: Array = self.attention(per_item(target, mask.shape[1]), sequence, mask)
        return read


def candidates(
    module: ADS,
    params: Any,
    targets: Float[Array, "B C d_Q"],
    sequence: Float[Array, "B T d_S"],
    mask: Bool[Array, "B T"],
    domain: Float[Array, "B d_D"],
    *,
    time: Float[Array, "B T"] | None = None,
    chunk: int | None = None,
) -> Float[Array, "B C d_out"]:
    """The interest in each of a request's C candidates. What `ADS.encode` gives is made once a request.

    That is PSRG's part, and what the unit's `encode` does (see `ads_jax.score` for multi-head attention). The rest is
    made `chunk` candidates at a time, and what of it no candidate changes once a chunk.

    Args:
      module, params: the plug-in and its variables, as for `module.apply(params, ...)`.
      targets: a vector a candidate. sequence, mask, domain, time: one of each a request, as for `ADS`; values finite.
      chunk: candidates at a time, `module.at_a_time` if None; memory grows with it. Where C is well above it, no
        `[B, C, T, d_Q]` array is made: for one request of 500 candidates, 1,000 behaviours and DIN, multi-head
        attention or CAN, 16 wide, the peak of temporaries (XLA's, for a CPU) is .10 to .66 of such an array, with
        chunks of 10 behaviours and unchunked. The .66, multi-head attention unchunked, are matrices of PCRG's, as large
        for any C.

    Raises:
      ValueError: as for `ADS`, or `chunk` is below 1.
    """
    chunk = module.at_a_time if chunk is None else chunk
    encoded: Any = module.apply(params, sequence, mask, domain, time=time, method="encode")
    _check("targets", targets, (len(encoded.mask), "C", "d_Q"))

    def one(target: Array) -> Any:
        return module.apply(params, encoded, target, domain, method="read")

    return map_chunks(one, targets.swapaxes(0, 1), chunk).swapaxes(0, 1)


def _check(name: str, array: Array, shape: tuple[int | str, ...]) -> None:
    """ValueError naming array, shape and rule, unless its shape is this one; axes by name are at least 1."""
    given = jnp.shape(array)
    fits = len(given) == len(shape) and all(n >= 1 if isinstance(m, str) else n == m for n, m in zip(given, shape))
    if not fits:
        names = ", ".join(m for m in shape if isinstance(m, str))
        rule = f"[{', '.join(map(str, shape))}]" + (f", {names} at least 1" if names else " to go with the sequence")
        raise ValueError(f"ADS: {name} has shape {given}, must be {rule}")

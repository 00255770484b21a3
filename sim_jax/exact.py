"""SIM's exact search unit: attention of the candidate over what the search found, with time (Pi et al., CIKM 2020,
arXiv 2006.05639)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from rec_core.interest import INTEREST
from rec_core.interest.base import AGES, age_bucket

ORDERED = ("mimn",)  # reads the order of its behaviours
_OWN_TIME = ("twin",)  # embeds a behaviour's age itself
_ANY_WIDTH = ("multi_head",)  # its target may be narrower than its behaviours


class ExactSearch(nn.Module):
    """`z_j = [e_j ; e_j^t]`, and the interest in the target over the z_j.

    `e_j^t` embeds the bucket, between the `ages` in seconds, of the time from behaviour j to the request. With
    "multi_head" this is the paper's unit: `att_j = softmax_j((W_b z_j) . (W_a e_a))`, `head = sum_j att_j z_j`, with a
    matrix of its own for the values and scores divided by sqrt(width). Any other member of the interest family may
    stand in its place; those that need a target of the behaviours' width are given `[e_a ; e^t of age 0]`.

    Split in two as the members are: `encode` what does not depend on the target, `read` for each target.
    """

    interest: str
    options: tuple[tuple[str, Any], ...] = ()
    ages: tuple[float, ...] = AGES
    age_width: int = 8  # 0 for no time
    dtype: str = "float32"

    def setup(self) -> None:
        self.unit = INTEREST[self.interest](**dict(self.options), dtype=self.dtype)
        if self._concatenates:
            self.age = nn.Embed(len(self.ages) + 1, self.age_width, dtype=self.dtype)

    @property
    def _concatenates(self) -> bool:
        return self.age_width > 0 and self.interest not in _OWN_TIME

    def __call__(
        self,
        target: Float[Array, "B d"],
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        time: Float[Array, "B T"] | None = None,
    ) -> Float[Array, "B d_out"]:
        return self.read(self.encode(sequence, mask, time), target)

    def encode(
        self, sequence: Float[Array, "B T d"], mask: Bool[Array, "B T"], time: Float[Array, "B T"] | None = None
    ) -> Any:
        """`time`: age of each behaviour, seconds; needed unless `age_width` is 0."""
        if self.age_width == 0:
            return self.unit.encode(sequence, mask)
        if time is None:
            raise ValueError("the exact search unit needs the behaviours' time; or set age_width to 0")
        if not self._concatenates:
            return self.unit.encode(sequence, mask, time=time)
        bucket = age_bucket(time, mask, self.ages)
        return self.unit.encode(jnp.concatenate([sequence, self.age(bucket)], axis=-1), mask)

    def read(self, encoded: Any, target: Float[Array, "B d"]) -> Float[Array, "B d_out"]:
        if self._concatenates and self.interest not in _ANY_WIDTH:
            now = jnp.broadcast_to(self.age(np.zeros((), np.int32)), (*target.shape[:-1], self.age_width))
            target = jnp.concatenate([target, now], axis=-1)
        return self.unit.read(encoded, target)

    def auxiliary(self, encoded: Any) -> Any:
        """The unit's own losses; see `rec_core.interest.base.Interest.auxiliary`."""
        return self.unit.auxiliary(encoded)

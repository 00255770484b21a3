"""Interest modules: what one sequence of behaviours says about one target.

All members are Flax linen modules with one face and a `dtype` (of the computation) among their fields:

    module(target, sequence, mask, *, time=None) -> [B, d_out]

- `target`: `[B, d]`, one query for the whole sequence, or `[B, T, d]`, one query per item (as ADS generates them).
- `sequence`: `[B, T, d]`, the behaviours' vectors, in the same space as the target.
- `mask`: `[B, T]`, true where there is a behaviour. What stands at padding does not matter; rows of padding only
  give zeros.
- `time`: `[B, T]`, each behaviour's age at the moment of the request, in seconds; read by the members that say so.

`INTEREST` maps names, as they stand in configs, to modules.
"""

from collections.abc import Callable

from flax import linen as nn

from rec_core.interest.average import Average
from rec_core.interest.din import DIN, Dice

INTEREST: dict[str, Callable[..., nn.Module]] = {"average": Average, "din": DIN}

__all__ = ["DIN", "INTEREST", "Average", "Dice"]

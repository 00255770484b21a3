"""Interest modules: what one sequence of behaviours says about one target.

All members are Flax linen modules with one face and a `dtype` (of the computation) among their fields:

    module(target, sequence, mask, *, time=None) -> [B, d_out]

- `target`: `[B, d]`, one query for the whole sequence, or `[B, T, d]`, one query per item (as ADS generates them), or
  `[B, G, d]`, one per T / G neighbouring items. DIN, multi-head and CAN do not repeat it; the others do.
- `sequence`: `[B, T, d]`, the behaviours' vectors, in the same space as the target, oldest first.
- `mask`: `[B, T]`, true where there is a behaviour, padding anywhere. What stands at padding does not matter; rows of
  padding only give zeros.
- `time`: `[B, T]`, each behaviour's age at the moment of the request, in seconds; read by the members that say so.

The same in two steps, for many candidates of one request: `encode(sequence, mask, time=time)` once, then
`read(encoded, target)` for each; `candidates` does both. Members with a loss of their own give it as
`auxiliary(encoded, negatives)`, a mergeable sum by name.

`INTEREST` maps names, as they stand in configs, to modules.
"""

from rec_core.interest.average import Average
from rec_core.interest.base import Interest, candidates
from rec_core.interest.can import CAN
from rec_core.interest.dien import DIEN
from rec_core.interest.din import DIN, Dice
from rec_core.interest.eta import ETA
from rec_core.interest.mimn import MIMN
from rec_core.interest.multi_head import MultiHead
from rec_core.interest.sdim import SDIM
from rec_core.interest.twin import TWIN

INTEREST: dict[str, type[Interest]] = {
    "average": Average,
    "din": DIN,
    "dien": DIEN,
    "mimn": MIMN,
    "multi_head": MultiHead,
    "can": CAN,
    "twin": TWIN,
    "eta": ETA,
    "sdim": SDIM,
}

__all__ = [
    "CAN",
    "DIEN",
    "DIN",
    "ETA",
    "INTEREST",
    "MIMN",
    "SDIM",
    "TWIN",
    "Average",
    "Dice",
    "Interest",
    "MultiHead",
    "candidates",
]

"""Settings of ADS's ranking model."""

import math
from dataclasses import dataclass

from ads_jax.plugin import ADS
from rec_core.ranking import ctr


@dataclass(frozen=True)
class Config(ctr.Config):
    """The settings of `rec_core.ranking.ctr.Config`, whose `interest` names the attention, and the plug-in's.

    Domain features are E_D. For CAN as the paper has it, `query_features` is the candidate's co-action table, as wide
    as a micro-MLP has parameters (`rec_core.interest.can.parameters`), with the interest option `generate` False.

    Attributes:
      length: the longest sequence, T.
      items: neighbouring behaviours that share a query (1: unchunked; the paper measures 1, 2, 5 and 10).
      generator: hidden units of the generators. eta: widens the sigmoid of PSRG's weights.
      psrg, pcrg: whether the sequence's and the candidate's generator are there (the paper's ablation).
      constant: the generators read ones for E_D (a control for capacity alone). The dense network still reads E_D.
      arranged: every batch has its padding first, the newest behaviour last (`check` asks it); otherwise a step looks,
        and moves the ids where it is not so.
    """

    length: int = 50
    items: int = 10
    generator: int = 32
    eta: float = 2.0
    psrg: bool = True
    pcrg: bool = True
    constant: bool = False
    arranged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "items", "generator"):
            if getattr(self, name) < 1:
                raise ValueError(f"ads_jax.Config: {name} is {getattr(self, name)}, must be at least 1")
        if not 0 < self.eta < math.inf:
            raise ValueError(
                f"ads_jax.Config: eta is {self.eta}, must be above 0 and finite (2 leaves a new sequence as it is)"
            )
        if not self.domain_features:
            raise ValueError("ads_jax.Config: domain_features is empty; the plug-in generates from at least one (E_D)")

    @property
    def personal(self) -> bool:
        return True

    def make_interest(self) -> ADS:
        return ADS(
            super().make_interest(),
            length=self.length,
            items=self.items,
            hidden=self.generator,
            eta=self.eta,
            sequence=self.psrg,
            candidate=self.pcrg,
            constant=self.constant,
            dtype=self.dtype,
            arranged=self.arranged,
        )

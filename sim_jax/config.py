"""Settings of the SIM model."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rec_core import embedding
from rec_core.embedding import Feature
from rec_core.interest import INTEREST
from rec_core.interest.base import AGES

_SEARCH = ("none", "hard", "soft")
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are the paper's soft search with time, with DIEN over the recent behaviours.

    Attributes:
      item_features, user_features, context_features: as in `rec_core.ranking.ctr.Config`.
      search: "hard", "soft" or "none"; see the module's text.
      top: K, behaviours that a search keeps.
      category: hard search: the item field that target and behaviour must share; its value 0 is no category.
      search_width: soft: width of W_a e_a and W_b e_i.
      search_hidden: soft: hidden layers of the auxiliary task.
      sample: soft: behaviours, drawn anew each step, that the auxiliary task reads; 0 for all. The search is always
        over all behaviours.
      recall: soft: 1 for the exact top K, else what `approx_max_k` aims at.
      exact: a name in `rec_core.interest.INTEREST`, "search", or "" for a model of the recent behaviours alone.
      exact_options: its fields, such as (("heads", 2),).
      ages: boundaries, in seconds, of the buckets of a behaviour's age.
      age_width: width of their embedding, 0 for no time.
      short: a name in INTEREST for the recent behaviours, or "" for none. short_options: its fields.
      search_weight: alpha of soft search; hard search has no loss (the paper's alpha is 1 and 0).
      auxiliary_weight: weight of the interest modules' own losses (DIEN's next behaviour, MIMN's utilisation).
    """

    item_features: tuple[Feature, ...]
    user_features: tuple[Feature, ...] = ()
    context_features: tuple[Feature, ...] = ()
    search: str = "soft"
    top: int = 200
    category: str = "category"
    search_width: int = 16
    search_hidden: tuple[int, ...] = (64,)
    sample: int = 1000
    recall: float = 1.0
    exact: str = "multi_head"
    exact_options: tuple[tuple[str, Any], ...] = ()
    ages: tuple[float, ...] = AGES
    age_width: int = 8
    short: str = "dien"
    short_options: tuple[tuple[str, Any], ...] = ()
    hidden: tuple[int, ...] = (200, 80)
    dense: int = 0  # number of float features
    dense_width: int = 32  # width of their linear layer
    tasks: int = 1
    search_weight: float = 1.0
    auxiliary_weight: float = 1.0
    dropout: float = 0.0
    embedding_scale: float = 0.05  # standard deviation of new tables
    dtype: str = "float32"  # of the computation; parameters, relevance and logits are float32

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"sim_jax.Config: {name} is {getattr(self, name)!r}, {rule}")

        need(bool(self.item_features), "item_features", "the target needs at least one feature")
        need(self.search in _SEARCH, "search", f"must be one of {_SEARCH}")
        need(self.exact in ("", "search", *INTEREST), "exact", f'must be "", "search" or one of {sorted(INTEREST)}')
        need(self.exact != "dien", "exact", "has an auxiliary loss that needs negatives: it serves as `short`")
        need(self.short in ("", *INTEREST), "short", f'must be "" or one of {sorted(INTEREST)}')
        need(bool(self.exact or self.short), "exact", "must name a module where `short` is empty")
        need(self.exact != "search" or self.search == "soft", "exact", 'pools by relevance: set search to "soft"')
        need(bool(self.exact) or self.search == "none", "search", 'finds what no exact unit reads: set it to "none"')
        fields = embedding.fields(self.item_features)
        need(self.search != "hard" or self.category in fields, "category", f"must be an item field, one of {fields}")
        for name in ("top", "search_width", "dense_width", "tasks"):
            need(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("sample", "age_width", "dense", "search_weight", "auxiliary_weight"):
            need(getattr(self, name) >= 0, name, "must be at least 0")
        for name in ("hidden", "search_hidden"):
            need(bool(getattr(self, name)) and min(getattr(self, name)) >= 1, name, "must be widths of some layers")
        need(0 < self.recall <= 1, "recall", "must be above 0 and at most 1 (exact)")
        need(0 <= self.dropout < 1, "dropout", "must be in [0, 1)")
        need(self.dtype in _DTYPES, "dtype", f"must be one of {_DTYPES}")
        ages = np.asarray(self.ages, np.float64)
        need(len(ages) > 0 and bool((np.diff(ages) > 0).all()), "ages", "must be increasing numbers of seconds")
        embedding.tables(self.features)

    @property
    def features(self) -> tuple[Feature, ...]:
        return self.user_features + self.item_features + self.context_features

    @property
    def uses_negatives(self) -> bool:
        """Whether the loss needs `Batch.negatives`."""
        return self.short == "dien" and self.auxiliary_weight > 0

    @property
    def samples(self) -> bool:
        """Whether training draws which behaviours the auxiliary task reads."""
        return self.search == "soft" and self.sample > 0

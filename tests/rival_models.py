"""The click model with each network and each gate in turn, as models for the contract's tests."""

import dataclasses
import types
from functools import partial
from typing import Any

import numpy as np

from rec_core.embedding import Categorical, Continuous
from rec_core.ranking import ctr
from rec_core.ranking.network_head import GATES
from rec_core.ranking.networks import NETWORKS

CHANGES = {name: {"network": name} for name in NETWORKS} | {name: {"gate": name} for name in GATES if name}


def example(changes: dict[str, Any], batch_size: int = 8, seed: int = 0) -> tuple[ctr.Config, ctr.Batch]:
    """`ctr.example` with three domains, which are explicit and implicit features too, and pooled behaviours."""
    config, batch = ctr.example(batch_size, seed)
    config = dataclasses.replace(
        config,
        interest="average",  # the cheapest: it is not what is held here
        interest_options=(),
        hidden=(8, 8),
        domain_features=(Categorical("scenario", 3, 4), Continuous("active_days", (1.0, 7.0), 4)),
        domain_field="scenario",
        domains=3,
        **changes,
    )
    draw = np.random.default_rng(seed)
    context = {
        "scenario": draw.integers(0, 3, batch_size).astype(np.int32),
        "active_days": draw.exponential(5, batch_size).astype(np.float32),
    }
    return config, dataclasses.replace(batch, context={**batch.context, **context})


def rival(name: str, changes: dict[str, Any]) -> types.ModuleType:
    """A module of the contract's face."""
    module = types.ModuleType(name)
    module.__dict__.update({**vars(ctr), "__name__": name, "example": partial(example, changes)})
    return module


RIVALS = [rival(name, changes) for name, changes in CHANGES.items()]

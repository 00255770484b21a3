"""One dataset as LUM's three steps see it: sequences, labelled samples, a global split by time."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rec_core.data.records import Dataset
from rec_core.data.samples import Behaviors, Samples, add_negatives, behaviors, item_category, samples

ANY = 0  # a condition that is not given: padding's id, since padding has no condition either
CONDITIONS = ("category", "gap", "domain", "feedback")


@dataclass(frozen=True, eq=False)
class Problem:
    """A dataset, split by time.

    Attributes:
      name: of the dataset.
      behaviors: the users' sequences.
      samples: labelled events; training before `train_end`, validation up to `valid_end`, test from there.
      category: of each item.
      user_features: side information, int32 [users] each; `user_feature_sizes` is one above the largest id of each.
      sampled_negatives: whether the source has none, so that they were sampled (see `samples.add_negatives`).
      reachable: whether the true probability is known and a function of the observed history (a world with latent = 0).
    """

    name: str
    behaviors: Behaviors
    samples: Samples
    category: np.ndarray
    train_end: int
    valid_end: int
    user_features: dict[str, np.ndarray]
    user_feature_sizes: dict[str, int]
    sampled_negatives: bool
    reachable: bool

    @property
    def splits(self) -> dict[str, np.ndarray]:
        """Indices of the samples of "train", "valid" and "test"."""
        part = np.searchsorted([self.train_end, self.valid_end], self.samples.time, side="right")
        return {name: np.flatnonzero(part == number) for number, name in enumerate(("train", "valid", "test"))}

    @property
    def conditions(self) -> tuple[str, ...]:
        """Condition features that this dataset has."""
        return tuple(name for name in CONDITIONS if self.behaviors.sizes.get(name, 0) > 1)


def make_problem(dataset: Dataset, *, seed: int = 0, log: Callable[[str], None] = print) -> Problem:
    """The views of a dataset that the steps need; negatives are sampled where it has none."""
    train_end, valid_end = dataset.split()
    category = item_category(dataset, until=train_end)
    sequences = behaviors(dataset, category)
    labelled = samples(dataset, sequences, category)
    sampled = bool(labelled.label.all())
    if sampled:
        labelled = add_negatives(labelled, category, seed=seed, log=log)
    return Problem(
        name=str(dataset.meta.get("name", dataset.path.name)),
        behaviors=sequences,
        samples=labelled,
        category=category,
        train_end=train_end,
        valid_end=valid_end,
        user_features=dataset.user_features or {},
        user_feature_sizes=dict(dataset.meta.get("user_feature_sizes", {})),
        sampled_negatives=sampled,
        reachable=dataset.meta.get("source", {}).get("config", {}).get("latent") == 0,
    )

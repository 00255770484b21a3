"""The models of `ads_multidomain.py`: settings, the table of rivals, and how each is tuned and trained."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

import ads_jax
from experiments.settings import check_joined
from experiments.steps import multidomain
from experiments.steps.multidomain import Impressions, Tuned
from experiments.steps.runs import Run, run_file, saved_run, side_by_side
from rec_core import metrics
from rec_core.data.world import World
from rec_core.embedding import Categorical
from rec_core.interest.can import parameters
from rec_core.ranking import cost, ctr

_LEAST = dict.fromkeys(
    ("items", "train_samples", "test_samples", "seeds", "length", "items_per_chunk", "width", "batch_size"), 1
) | {"users": 2, "resamples": 20}  # the bootstrap's


@dataclass(frozen=True)
class AdsMultidomain:
    """Settings; the defaults are for one accelerator.

    Attributes:
      out: folder for report.html, result.json, the prepared data, and what is done already.
      quick: a run of a minute or two that only shows that everything works.
      only: names of models (`MODELS`); none for all.
      report: whether there is one; without it, models are trained and kept.
      joined: results of other machines, each on some of the data: nothing is trained, the first one gets the rows of
        the others (`results.join`).
      dials: settings of the world's domain dial; none for real data alone. main: the one that the figures are about.
      ml_1m, taobao: where MovieLens-1M and Taobao's UserBehavior lie; without them the world alone.
      users, items, mean_length: of the world (`rec_core.data.world`).
      train_samples, test_samples: impressions learned from, and each of validation and test.
      epochs: over the training samples, of which a model takes the best number; trials are as long as the first.
      length: behaviours that every model reads. items_per_chunk: of ADS, that share a query.
      width: of every feature's vector.
      rates: learning rates of the net. table_factors: of the tables, as multiples of that. Every pair is a trial, the
        same for every model. seeds: final runs at the best of them.
      batch_size: of Adam, with linear decay.
      resamples: of the bootstrap.
    """

    out: Path = Path("runs/ads-multidomain")
    quick: bool = False
    only: tuple[str, ...] = ()
    report: bool = True
    joined: tuple[Path, ...] | None = None
    dials: tuple[float, ...] = (0.0, 0.4, 1.0)
    main: float = 0.4
    ml_1m: Path | None = None
    taobao: Path | None = None
    users: int = 3000
    items: int = 2000
    mean_length: float = 120.0
    train_samples: int = 800_000
    test_samples: int = 100_000
    epochs: tuple[float, ...] = (1.0, 3.0)
    length: int = 50
    items_per_chunk: int = 10
    width: int = 16
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    table_factors: tuple[float, ...] = (1.0, 4.0)
    seeds: int = 6
    batch_size: int = 512
    resamples: int = 300

    def __post_init__(self) -> None:
        unknown = [name for name in self.only if name not in MODELS]
        if unknown:
            raise ValueError(f"only={unknown}: there is no such model; there are {', '.join(map(repr, MODELS))}")
        for name in ("epochs", "rates", "table_factors"):
            given = getattr(self, name)
            if not given or not all(0 < value < math.inf for value in given):
                raise ValueError(f"{name}={given}: must be at least one number above 0, and finite")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 1 <= self.mean_length < math.inf:
            raise ValueError(f"mean_length={self.mean_length} must be at least 1, and finite")
        check_joined(self.joined)
        for name in ("ml_1m", "taobao"):
            folder = getattr(self, name)
            if folder is not None and not folder.exists():
                raise ValueError(f"{name}={folder}: there is no such file or folder")
        if not self.dials and self.ml_1m is None and self.taobao is None and not self.joined:
            raise ValueError("dials=(): there are no data; give settings of the dial, ml_1m or taobao")
        if self.dials and self.main not in self.dials:
            raise ValueError(f"main={self.main} must be one of dials={self.dials}")
        if len({f"{dial:g}" for dial in self.dials}) < len(self.dials):
            raise ValueError(f"dials={self.dials}: must differ from each other in six digits; give each once")
        for dial in self.dials:
            self.world(dial)  # which says what is wrong with a dial or a size

    @property
    def trials(self) -> tuple[tuple[float, float], ...]:
        """Learning rates of net and tables of every trial."""
        return tuple((rate, rate * factor) for rate in self.rates for factor in self.table_factors)

    def world(self, dial: float) -> World:
        small: dict[str, Any] = {"categories": 8, "departments": 2, "days": 40.0} if self.quick else {}
        return World(
            users=self.users, items=self.items, mean_length=self.mean_length, domain=dial,
            max_length=round(max(512, 4 * self.mean_length)) if not self.quick else 120, **small,
        )  # fmt: skip


QUICK: dict[str, Any] = {
    "users": 60, "items": 100, "mean_length": 20.0, "train_samples": 2048, "test_samples": 400, "epochs": (2.0, 4.0),
    "length": 8, "items_per_chunk": 3, "width": 4, "dials": (0.0, 0.4), "rates": (2e-3, 8e-3),
    "table_factors": (1.0,), "seeds": 2, "batch_size": 64, "resamples": 40,
    "only": ("DNN", "STAR", "DIN", "DIN + PEPNet", "DIN + ADS"),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A row of the table: what differs from the common configuration. `personal`: whether it is ADS's model."""

    changes: Mapping[str, Any]
    personal: bool = False


ATTENTIONS: dict[str, dict[str, Any]] = {
    "DIN": {"interest": "din", "interest_options": (("hidden", (32,)),)},
    "MHA": {"interest": "multi_head", "interest_options": (("heads", 4), ("width", 8))},
    "CAN": {"interest": "can", "interest_options": (("hidden", (4, 2)), ("generate", False)), "pooled": True},
}
_POOLED = {"interest": "average"}
_ADS = {"ADS": {}, "ADS without PCRG": {"pcrg": False}, "ADS, E_D constant": {"constant": True}}
MODELS: dict[str, Model] = {
    "MLR": Model({**_POOLED, "network": "mlr"}),
    "DNN": Model({**_POOLED}),
    "DeepFM": Model({**_POOLED, "network": "deepfm"}),
    "xDeepFM": Model({**_POOLED, "network": "xdeepfm"}),
    "DCNv2": Model({**_POOLED, "network": "dcnv2"}),
    "MaskNet": Model({**_POOLED, "network": "masknet"}),
    "DFFM": Model({**_POOLED, "network": "dffm"}),
    "APG": Model({**_POOLED, "network": "apg"}),
    "AdaSparse": Model({**_POOLED, "network": "adasparse"}),
    "STAR": Model({**_POOLED, "network": "star"}),
    "PLE": Model({**_POOLED, "network": "ple"}),
}
for _name, _attention in ATTENTIONS.items():
    MODELS[_name] = Model(_attention)  # also ADS without both generators
    MODELS |= {f"{_name} + {gate}": Model({**_attention, "gate": gate.lower()}) for gate in ("FRNet", "PEPNet")}
    MODELS |= {f"{_name} + {variant}": Model({**_attention, **changes}, True) for variant, changes in _ADS.items()}


def rivals(attention: str) -> tuple[str, ...]:
    """What ADS on this attention is compared with: the attention alone, and behind each gate."""
    return attention, f"{attention} + FRNet", f"{attention} + PEPNet"


def model_config(data: Impressions, name: str, settings: AdsMultidomain) -> tuple[ModuleType, ctr.Config]:
    """The model's module under the contract, and its configuration."""
    model = MODELS[name]
    values: dict[str, Any] = data.settings | dict(model.changes)
    if values["interest"] == "can":  # the candidate is looked up as the weights of a micro-MLP over the item's vector
        item = values["item_features"]
        size = parameters(sum(spec.width for spec in item), dict(values["interest_options"])["hidden"])
        values["query_features"] = (Categorical("item", item[0].size, size, table="co_action"),)
    if not model.personal:
        return ctr, ctr.Config(**values)
    # Histories have their padding first.
    return ads_jax, ads_jax.Config(**values, length=settings.length, items=settings.items_per_chunk, arranged=True)


@dataclass
class Outcome:
    """What one data set gave: every model's trials and logits, its validation AUC, mean over seeds, and its parameters
    beside the tables."""

    data: Impressions
    tuned: dict[str, Tuned] = field(default_factory=dict)
    valid_auc: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    trained_on: dict[str, str] = field(default_factory=dict)


def train_all(data: Impressions, config: AdsMultidomain) -> Outcome:
    """Every model on one data set, side by side, since compiling takes longer than training. What is done is kept under
    `out`/models: a run that was stopped goes on from there at the same commit."""
    done = Outcome(data)
    size = min(config.batch_size, len(data.train))
    names = config.only or tuple(MODELS)
    arrays = [data.batch.label, data.batch.target["item"], data.batch.mask, data.domain]
    identity = zlib.crc32(b"".join(np.asarray(x).tobytes() for x in arrays))

    def one(name: str) -> Run:
        model, own = model_config(data, name, config)
        point = (identity, model.__name__, own, config.epochs, config.trials, config.seeds, size)

        def run() -> Run:
            found = multidomain.tune_and_train(
                data, model, own, epochs=config.epochs, rates=config.trials, seeds=config.seeds, batch_size=size
            )
            tried = {name: value for name, value in vars(found).items() if name not in ("losses", "test")}
            return Run(tried, found.losses, found.test)

        return saved_run(run_file(config.out / "models", data.name, point), run)

    runs = side_by_side(
        {name: partial(one, name) for name in names}, data.name, lambda found: float(found.losses[-1].mean())
    )
    valid = data.label[data.valid]
    for name in names:
        found, (model, own) = runs[name], model_config(data, name, config)
        done.tuned[name] = Tuned(losses=found.losses, test=found.logits, **found.params)
        done.valid_auc[name] = float(np.mean([metrics.auc(valid, logits) for logits in done.tuned[name].valid]))
        done.trained_on[name] = found.device
        shapes = jax.eval_shape(lambda model=model, own=own: model.init(jax.random.key(0), own))
        done.parameters[name] = cost.parameters(shapes)["rest"]
    return done

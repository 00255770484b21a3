"""Ranking models on impressions that lie on the device: learning rates and seeds side by side in each operation.

All models see the same impressions in the same orders. What differs between the data sets of one size is an argument
of what is compiled, so a model is compiled once for all settings of a dial.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.steps.problem import Problem
from experiments.steps.rank import rank_batch
from experiments.steps.runs import order, settings_for
from rec_core import metrics, optimizers, training
from rec_core.embedding import Categorical, Continuous
from rec_core.ranking import ctr

CALL = 50  # steps of one call
TUNING_SEED = 10_000  # of the trials; no final run has it
# Of a user's behaviours so far; the same for all data, since what a model is compiled for must not follow the data.
ACTIVITY = tuple(2.0**i for i in range(13))
GROUPS = 33  # domains with layers of their own, where a network has such: the 32 commonest, and the rest as one
_ROWS = 4096  # scored at a time


@dataclass(frozen=True, eq=False)
class Impressions:
    """All impressions of a comparison, and the features that every model has.

    Attributes:
      name: of the data. domain_name: what a domain is there.
      batch: every impression, as one batch on the device.
      train, valid, test: indices; each period is later than the one before.
      user, domain, label: of the impressions, on the host.
      probability: the true click probability, where the source knows it.
      settings: fields of `rec_core.ranking.ctr.Config`.
    """

    name: str
    domain_name: str
    batch: ctr.Batch
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    user: np.ndarray
    domain: np.ndarray
    label: np.ndarray
    probability: np.ndarray | None
    settings: dict[str, Any]


def make_impressions(
    problem: Problem, *, name: str, train: int, test: int, length: int, width: int = 16
) -> Impressions:
    """The newest `train` training samples, and up to `test` of the validation and of the test period, evenly taken.

    The explicit domain is the source's; where it has none, the candidate's category, as the paper has it on Taobao's
    data. The implicit one is how many behaviours the user has by then, cut at powers of two. Networks with layers for
    each domain (STAR, PLE) have them for the commonest (`GROUPS`). Where the source has domains, each behaviour and the
    candidate carry theirs ("place"), for every model. So does each behaviour its position, the newest's 1 (the
    candidate's is 0): the chunks of ADS know theirs, and what that gains is not the domain's. All features have one
    width, which the networks over fields need.

    Args:
      length: behaviours that every model reads, the newest.
    """
    if min(train, test) < 1:
        raise ValueError(f"train is {train} and test {test}; both need at least 1 sample")
    splits, samples, sizes = problem.splits, problem.samples, problem.behaviors.sizes
    newest = np.sort(splits["train"][np.argsort(samples.time[splits["train"]], kind="stable")[-train:]])
    parts = {"train": newest} | {part: _evenly(splits[part], test) for part in ("valid", "test")}
    for part, index in parts.items():
        if not len(index):
            raise ValueError(f"{name}: no samples in the {part} period; give more events or another source")
    index = np.concatenate(list(parts.values()))
    own = sizes.get("domain", 0) > 1
    domain = (samples.domain if own else samples.category)[index].astype(np.int32)
    domains = sizes["domain" if own else "category"]
    activity = (samples.end - samples.start)[index].astype(np.float32)
    group, groups = group_domains(domain, domains, len(newest))
    read = rank_batch(problem, index, np.ones(len(index), np.float32), None, length)
    position = (np.arange(length, 0, -1) * np.asarray(read.mask)).astype(np.int32)
    read = replace(
        read,
        sequence={**read.sequence, "position": position},
        target={**read.target, "position": np.zeros_like(domain)},
    )
    if own:  # where each behaviour happened, and where the candidate is shown
        place, mask = problem.behaviors.history(samples.start[index], samples.end[index], length)
        where = (problem.behaviors.columns["domain"][place] * mask).astype(np.int32)
        read = replace(read, sequence={**read.sequence, "place": where}, target={**read.target, "place": domain})
    batch = replace(
        read,
        user={**read.user, "user": samples.user[index].astype(np.int32)},
        context={"domain": domain, "activity": activity, "group": group},
    )
    fields = {name: sizes[name] for name in ("item", "category", "feedback") if name in read.target}
    fields |= {"position": length + 1, **({"place": domains} if own else {})}
    settings: dict[str, Any] = {
        "item_features": tuple(Categorical(name, size, width) for name, size in fields.items()),
        "user_features": (
            Categorical("user", problem.behaviors.users, width),
            *(Categorical(field, size, width) for field, size in sorted(problem.user_feature_sizes.items())),
        ),
        "domain_features": (Categorical("domain", domains, width), Continuous("activity", ACTIVITY, width)),
        "domain_field": "group",
        "domains": groups,
        "hidden": (64, 32),
    }
    ctr.check(batch, ctr.Config(**settings))
    first, last = np.cumsum([0, *map(len, parts.values())])[:-1], np.cumsum([*map(len, parts.values())])
    train_index, valid_index, test_index = (np.arange(a, b) for a, b in zip(first, last, strict=True))
    return Impressions(
        name=name,
        domain_name="domain" if own else "category of the candidate",
        batch=jax.tree.map(jnp.asarray, batch),
        train=train_index,
        valid=valid_index,
        test=test_index,
        user=samples.user[index],
        domain=domain,
        label=samples.label[index],
        probability=None if samples.probability is None else samples.probability[index],
        settings=settings,
    )


def group_domains(domain: Int[np.ndarray, " n"], domains: int, train: int) -> tuple[Int[np.ndarray, " n"], int]:
    """A group for each impression, and how many there are: its domain, where these are few; else 1 ... for those that
    are commonest among the first `train` impressions, and 0 for the rest."""
    if domains <= GROUPS:
        return domain, domains
    common = np.argsort(-np.bincount(domain[:train], minlength=domains), kind="stable")[: GROUPS - 1]
    number = np.zeros(domains, np.int32)
    number[common] = np.arange(1, GROUPS, dtype=np.int32)
    return number[domain], GROUPS


@dataclass(frozen=True)
class Tuned:
    """A model as tuned: learning rates of net and tables of each trial and its validation AUC, numbers of epochs of the
    final runs and their mean validation AUC (-1: diverged); and of the final runs of the best number the losses, and
    logits of the validation and test impressions."""

    rates: Float[np.ndarray, "trials 2"]
    trials: Float[np.ndarray, " trials"]
    epochs: Float[np.ndarray, " lengths"]
    lengths: Float[np.ndarray, " lengths"]
    losses: Float[np.ndarray, "steps seeds"]
    valid: Float[np.ndarray, "seeds n"]
    test: Float[np.ndarray, "seeds m"]

    @property
    def best(self) -> dict[str, float]:
        """What was chosen for the final runs, as columns of a row."""
        net, tables = self.rates[np.argmax(self.trials)]
        epochs = self.epochs[np.argmax(self.lengths)]
        return {"learning_rate": float(net), "table_rate": float(tables), "epochs": float(epochs)}


def tune_and_train(
    data: Impressions,
    model: ModuleType,
    config: Any,
    *,
    epochs: Sequence[float],
    rates: Sequence[tuple[float, float]],
    seeds: int,
    batch_size: int,
) -> Tuned:
    """A trial for each pair of learning rates, and at the best, for each number of epochs, as many final runs as there
    are seeds. The best are those of the highest validation AUC, the final runs' its mean over seeds.

    Args:
      epochs: of the final runs; the trials have the first. A model that overfits wants few, a slow one many.
      rates: of the net and of the tables.

    Raises:
      DivergedError: no trial, or a final run of every number of epochs, stayed finite.
    """
    share: dict[str, Any] = {"model": model, "config": config, "batch_size": batch_size}
    settings = [settings_for(len(data.train), batch_size, number, CALL) for number in epochs]
    label = data.label[data.valid]

    def run(settings: training.TrainConfig, seeds: np.ndarray, rates: np.ndarray) -> tuple[Any, ...]:
        """Parameters, losses, logits of the validation impressions and their AUC, and the last step that diverged."""
        params, losses, diverged = train(data, seeds, rates, settings=settings, **share)
        valid = scores(data, params, data.valid, model=model, config=config)
        auc = [metrics.auc(label, x) if bad < 0 else -1.0 for x, bad in zip(valid, diverged, strict=True)]
        return params, losses, valid, np.asarray(auc), int(diverged.max())

    *_, tried, step = run(settings[0], np.full(len(rates), TUNING_SEED), np.asarray(rates))
    if tried.max() < 0:
        raise training.DivergedError(step, float("nan"), float("nan"), None)
    best = np.tile(rates[int(np.argmax(tried))], (seeds, 1))
    found = [run(length, np.arange(seeds), best) for length in settings]
    lengths = np.array([auc.mean() if auc.min() >= 0 else -1.0 for *_, auc, _ in found])
    if lengths.max() < 0:
        raise training.DivergedError(found[0][-1], float("nan"), float("nan"), None)
    params, losses, valid, *_ = found[int(np.argmax(lengths))]
    test = scores(data, params, data.test, model=model, config=config)
    return Tuned(np.asarray(rates), tried, np.asarray(epochs), lengths, losses, valid, test)


def train(
    data: Impressions,
    seeds: Int[np.ndarray, " runs"],
    rates: Float[np.ndarray, "runs 2"],
    *,
    model: ModuleType,
    config: Any,
    settings: training.TrainConfig,
    batch_size: int,
) -> tuple[Any, Float[np.ndarray, "steps runs"], Int[np.ndarray, " runs"]]:
    """Runs side by side: parameters, stacked, losses, and the step at which each diverged, or -1.

    Args:
      seeds: of initial values and orders: each seed takes the training impressions in an order of its own.
      rates: learning rates of net and tables; `settings.learning_rate` is not read, its schedule is.
    """
    orders = np.stack([order(data.train, settings.steps, batch_size, int(seed)) for seed in seeds])
    decay = np.asarray(jax.vmap(optimizers.schedule(replace(settings, learning_rate=1.0)))(jnp.arange(settings.steps)))
    # Rates and their decay are arguments, so that trials and final runs, of other lengths, are one compiled program.
    share: dict[str, Any] = {"model": model, "config": config}
    share["settings"] = replace(settings, learning_rate=1.0, steps=1, warmup=0, decay="constant")
    states, losses = _begin(jnp.asarray(seeds, jnp.uint32), **share), []
    for first in range(0, settings.steps, CALL):
        now = slice(first, first + CALL)
        rate = {part: rates[:, [i]] * decay[now] for i, part in enumerate(("net", "tables"))}
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rate)
        states, found = _advance(states, data.batch, jnp.asarray(orders[:, now]), given, **share)
        losses.append(np.asarray(found).T)
    return states.params, np.concatenate(losses), np.asarray(states.diverged)


def scores(
    data: Impressions, params: Any, index: Int[np.ndarray, " n"], *, model: ModuleType, config: Any
) -> Float[np.ndarray, "runs n"]:
    """Logits of the impressions at `index` under each run's parameters."""
    size = min(_ROWS, len(index))
    rows = np.resize(index, -(-len(index) // size) * size).reshape(-1, size)  # the last part is filled up
    found = np.asarray(_scores(params, data.batch, jnp.asarray(rows, jnp.int32), model=model, config=config))
    return found.swapaxes(0, 1).reshape(found.shape[1], -1)[:, : len(index)]


@partial(jax.jit, static_argnames=("model", "config", "settings"))
def _begin(seeds: Array, *, model: Any, config: Any, settings: training.TrainConfig) -> Any:
    return jax.lax.map(lambda seed: training.init_state(model, config, settings, seed=seed), seeds)


@partial(jax.jit, static_argnames=("model", "config", "settings"), donate_argnums=0)
def _advance(
    states: Any, batch: Any, rows: Array, rates: Any, *, model: Any, config: Any, settings: training.TrainConfig
) -> Any:
    def one(state: Any, rows: Array, rates: dict[str, Array]) -> Any:
        def step(state: Any, given: Any) -> Any:
            rows, rate = given
            new, found = training.advance(model, config, settings, state, jax.tree.map(lambda x: x[rows], batch))
            # Adam's step is linear in its rate, and what is compiled has the rate 1.
            params = {
                part: jax.tree.map(lambda old, new, part=part: old + rate[part] * (new - old), old, new.params[part])
                for part, old in state.params.items()
            }
            return replace(new, params=params), found["loss"]

        return jax.lax.scan(step, state, (rows, rates))

    return jax.vmap(one)(states, rows, rates)


@partial(jax.jit, static_argnames=("model", "config"))
def _scores(params: Any, batch: Any, rows: Array, *, model: Any, config: Any) -> Array:
    def some(rows: Array) -> Array:
        part = jax.tree.map(lambda x: x[rows], batch)
        return jax.vmap(lambda params: model.apply(params, part, config))(params)

    logits: Array = jax.lax.map(some, rows)
    return logits


def _evenly(index: np.ndarray, count: int) -> np.ndarray:
    return index[np.unique(np.linspace(0, len(index) - 1, min(count, len(index))).astype(int))] if len(index) else index

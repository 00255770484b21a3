"""Training and scoring on lifelong sequences that lie on the device, several seeds at once.

A batch is made on the device from users and moments: recent behaviours, and of the long sequence what a model asks for:
the behaviour tree's answer, or the newest so many. Whole stretches of steps are one call, so that the host adds
nothing to the time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

import sim_jax
from experiments.steps.problem import Problem
from experiments.steps.runs import order, saved_arrays
from rec_core import training
from rec_core.data.schema import EventLog
from rec_core.data.world import World, blocks, items_of
from sim_jax.resident import Found, Resident, history, resident, search

CALL = 25  # steps of one call


@dataclass(frozen=True)
class Feed:
    """What a model reads of the long sequence: the newest `length`, of the target's category ("tree") or of all."""

    kind: Literal["tree", "newest", "none"] = "none"
    length: int = 1


@dataclass(frozen=True, eq=False)
class Lifelong:
    """Behaviours and labelled samples as flat arrays.

    Attributes:
      name: of the data. reachable: whether `probability` is a function of the observed history.
      offsets, time, fields: the behaviours, user after user: int64[u + 1], int64[n], name -> int32[n].
      user, moment, label, probability, target: the samples; `target` has the fields of the behaviours.
      train, test: indices of samples; the test period is later than all of training.
      category: of each item. sizes: of each field, one above its largest id.
    """

    name: str
    reachable: bool
    offsets: np.ndarray
    time: np.ndarray
    fields: dict[str, np.ndarray]
    user: np.ndarray
    moment: np.ndarray
    label: np.ndarray
    probability: np.ndarray | None
    target: dict[str, np.ndarray]
    train: np.ndarray
    test: np.ndarray
    category: np.ndarray
    sizes: dict[str, int]

    def history_lengths(self) -> Int[np.ndarray, " users"]:
        return np.diff(self.offsets)


def of_world(world: World, *, train: int, test: int, seed: int = 0) -> Lifelong:
    """A world with its true probabilities: samples drawn at random from the last tenth of the time (test), and from the
    four tenths before that (train), when histories are long."""
    parts = list(blocks(world, block_users=world.users))
    log = EventLog(**{name: np.concatenate([part.columns()[name] for part in parts]) for name in parts[0].columns()})
    assert log.label is not None and log.category is not None and log.domain is not None
    cuts = np.quantile(log.time, [0.5, 0.9])
    period = np.searchsorted(cuts, log.time, side="right")
    rng = np.random.default_rng(seed)
    chosen = [np.sort(rng.permutation(np.flatnonzero(period == which))[:n]) for which, n in ((1, train), (2, test))]
    index = np.concatenate(chosen)
    clicked = log.take(log.label == 1)
    items = items_of(world)
    assert items.category is not None and clicked.category is not None and clicked.domain is not None
    category = np.zeros(world.items + 2, np.int32)
    category[items.item] = items.category
    return Lifelong(
        name="world",
        reachable=world.latent == 0,
        offsets=np.searchsorted(clicked.user, np.arange(world.users + 1)),
        time=clicked.time,
        fields=_int32(item=clicked.item, category=clicked.category, domain=clicked.domain),
        user=log.user[index],
        moment=log.time[index],
        label=log.label[index],
        probability=None if log.probability is None else log.probability[index],
        target=_int32(item=log.item[index], category=log.category[index], domain=log.domain[index]),
        train=np.arange(len(chosen[0])),
        test=np.arange(len(chosen[0]), len(index)),
        category=category,
        sizes={"item": world.items + 2, "category": world.categories + 1, "domain": world.domains + 1},
    )


def of_problem(problem: Problem, *, train: int, test: int) -> Lifelong:
    """A public set with the problem's split by time: the newest training samples, and test samples evenly taken."""
    splits = problem.splits
    newest = np.sort(splits["train"][np.argsort(problem.samples.time[splits["train"]], kind="stable")[-train:]])
    asked = splits["test"]
    asked = asked[np.unique(np.linspace(0, len(asked) - 1, min(test, len(asked))).astype(int))]
    index = np.concatenate([newest, asked])
    samples, columns = problem.samples.take(index), problem.behaviors.columns
    names = [name for name in ("item", "category", "domain", "feedback") if problem.behaviors.sizes.get(name, 0) > 1]
    target = {"item": samples.item, "category": samples.category, "domain": samples.domain}
    target["feedback"] = np.zeros(len(index), np.int32)  # the target's is what is to be found
    return Lifelong(
        name=problem.name,
        reachable=problem.reachable,
        offsets=problem.behaviors.offsets,
        time=columns["time"],
        fields=_int32(**{name: columns[name] for name in names}),
        user=samples.user,
        moment=samples.time,
        label=samples.label,
        probability=samples.probability,
        target=_int32(**{name: target[name] for name in names}),
        train=np.arange(len(newest)),
        test=np.arange(len(newest), len(index)),
        category=problem.category,
        sizes={name: problem.behaviors.sizes[name] for name in names},
    )


def saved(path: Path, make: Callable[[], Lifelong]) -> Lifelong:
    """What `make` gives, kept in a file: a world of long histories takes minutes."""
    flat = saved_arrays(path, lambda: flatten_dict(vars(make()), sep="."))
    nested = unflatten_dict({name: x if x.ndim else x.item() for name, x in flat.items()}, sep=".")
    return Lifelong(**{"probability": None, **nested})


# ---- on the device ---------------------------------------------------------------------------------------------------


@struct.dataclass
class Samples:
    user: Int[Array, " n"]
    moment: Int[Array, " n"]  # from `Resident.seconds`
    label: Float[Array, " n"]
    target: dict[str, Int[Array, " n"]]


@struct.dataclass
class OnDevice:
    data: Resident
    samples: Samples
    category: Int[Array, " items"]


def put(problem: Lifelong) -> OnDevice:
    """The problem's arrays on the device; the second key is the category."""
    data = resident(problem.offsets, problem.time, problem.fields, key=problem.fields["category"])
    samples = Samples(
        jnp.asarray(problem.user, jnp.int32),
        jnp.asarray(data.seconds(problem.moment)),
        jnp.asarray(problem.label, jnp.float32),
        {name: jnp.asarray(x) for name, x in problem.target.items()},
    )
    return OnDevice(data, samples, jnp.asarray(problem.category, jnp.int32))


def make_batch(
    device: OnDevice, index: Int[Array, " B"], config: sim_jax.Config, feed: Feed, recent: int, key: Array | None = None
) -> sim_jax.Batch:
    """The samples at `index` with what they may read. `key`: for the negatives of DIEN's auxiliary loss."""
    samples, data = jax.tree.map(lambda x: x[index], device.samples), device.data
    short = history(data, samples.user, samples.moment, recent)
    if feed.kind == "tree":
        long = search(data, samples.user, samples.target["category"], samples.moment, feed.length)
    else:  # "none" reads one slot of padding
        long = history(data, samples.user, samples.moment, feed.length)
        if feed.kind == "none":
            long = Found({name: x * 0 for name, x in long.fields.items()}, long.mask & False, long.age * 0)
    negatives = None
    if config.uses_negatives and key is not None:
        item = jax.random.randint(key, short.mask.shape, 2, len(device.category))
        negatives = {**short.fields, "item": item, "category": device.category[item]}
    return sim_jax.Batch(
        target=samples.target,
        sequence=short.fields,
        mask=short.mask,
        long=long.fields,
        long_mask=long.mask,
        label=samples.label,
        weight=jnp.ones(index.shape, jnp.float32),
        long_time=long.age,
        negatives=negatives,
    )


def train(
    device: OnDevice,
    index: Int[np.ndarray, " n"],
    config: sim_jax.Config,
    feed: Feed,
    settings: training.TrainConfig,
    *,
    recent: int,
    batch_size: int,
    seeds: int,
    together: bool,
    on_call: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> tuple[Any, Float[np.ndarray, "steps seeds"]]:
    """Parameters of all seeds, stacked, and the losses of every step.

    Args:
      index: the training samples; each seed takes them in an order of its own, again and again.
      together: seeds side by side in each operation (small models, whose time is that of launching), or one after the
        other (long sequences, which fill the device and its memory).
      on_call: is told the step, how many steps were made since the last call, and their mean loss.

    Raises:
      DivergedError: a loss or gradient was not finite.
    """
    over = jax.vmap if together else lambda f: lambda *args: jax.lax.map(lambda a: f(*a), args)
    states = jax.jit(jax.vmap(lambda seed: training.init_state(sim_jax, config, settings, seed=seed)))(
        jnp.arange(seeds, dtype=jnp.uint32)
    )

    @partial(jax.jit, donate_argnums=0)
    def run(states: Any, device: OnDevice, rows: Array) -> Any:
        def one(state: Any, rows: Array) -> Any:
            def step(state: Any, rows: Array) -> Any:
                key = jax.random.fold_in(training.step_key(state.seed, state.step), 1)
                batch = make_batch(device, rows, config, feed, recent, key)
                state, metrics = training.advance(sim_jax, config, settings, state, batch)
                return state, metrics["loss"]

            return jax.lax.scan(step, state, rows)

        return over(one)(states, rows)

    orders = np.stack([order(index, settings.steps, batch_size, seed) for seed in range(seeds)])
    losses = []
    for first in range(0, settings.steps, CALL):
        states, found = run(states, device, jnp.asarray(orders[:, first : first + CALL]))
        losses.append(np.asarray(found).T)
        wrong = np.asarray(states.diverged)
        if (wrong >= 0).any():
            step = int(wrong[wrong >= 0].min())
            raise training.DivergedError(step, float(losses[-1][-1].max()), float("nan"), None)
        made = len(losses[-1])
        on_call(first + made, made, float(losses[-1].mean()))
    return states.params, np.concatenate(losses)


def scores(
    device: OnDevice,
    params: Any,
    index: Int[np.ndarray, " n"],
    config: sim_jax.Config,
    feed: Feed,
    *,
    recent: int,
    batch_size: int,
    target: dict[str, np.ndarray] | None = None,
) -> Float[np.ndarray, "seeds n"]:
    """Logits of the samples at `index` under every seed's parameters.

    Args:
      target: item fields `[n]` to score in the place of the samples' own: other candidates at the same moment.
    """

    @jax.jit
    def some(params: Any, device: OnDevice, index: Array, target: Any) -> Array:
        def one(params: Any) -> Array:
            chosen = device
            if target is not None:  # rows of their own, in the order of the batch
                own = replace(jax.tree.map(lambda x: x[index], device.samples), target=target)
                chosen = replace(device, samples=own)
            rows = index if target is None else jnp.arange(len(index))
            return sim_jax.apply(params, make_batch(chosen, rows, config, feed, recent), config).logit

        return jax.lax.map(one, params)

    size = min(batch_size, len(index))
    parts = []
    for first in range(0, len(index), size):
        place = np.minimum(np.arange(first, first + size), len(index) - 1)  # the last part is filled up
        own = None if target is None else {name: jnp.asarray(x[place]) for name, x in target.items()}
        found = some(params, device, jnp.asarray(index[place], jnp.int32), own)
        parts.append(np.asarray(found)[:, : len(index) - first])
    return np.concatenate(parts, axis=1)


def days_since_category(device: OnDevice, index: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """`d_category`: days from the user's last behaviour in the target's category, strictly before, to the sample.

    Infinite where there was none. The paper calls clicks beyond 14 days long-term.
    """
    rows = jnp.asarray(index, jnp.int32)
    samples = jax.tree.map(lambda x: x[rows], device.samples)
    found = search(device.data, samples.user, samples.target["category"], samples.moment, 1)
    return np.where(found.mask[:, 0], np.asarray(found.age)[:, 0] / 86_400, np.inf)


def _int32(**columns: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.asarray(column, np.int32) for name, column in columns.items()}

"""The part of `sim_serving.py` that wants an accelerator: ranking latency, and training by search against full length.

Users of random behaviours: what is measured is time, which their content does not change. Each figure is a ratio or a
percentile of one run on one device, after everything was compiled, Python's collector standing still.
"""

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sim_jax
from experiments import results
from experiments.steps import lifelong
from experiments.steps.lifelong import Feed, Lifelong
from experiments.steps.timing import uncollected
from rec_core import training
from rec_core.data.schema import EventLog
from rec_core.embedding import Categorical
from rec_core.store import open_store
from sim_jax.serving import Ask, Buckets, ItemFields, Ranker
from sim_jax.tree import BehaviorTree
from sim_jax.tree_keys import ItemKeys

ITEMS, CATEGORIES = 100_000, 200
DAY = 86_400


@dataclass(frozen=True)
class Sizes:
    """What is measured; `quick` sizes are for a test."""

    histories: tuple[int, ...] = (1000, 10_000, 54_000)
    candidates: int = 100
    categories: int = 20
    requests: int = 1000
    batches: tuple[int, ...] = (1024, 256)  # the first gives the figures
    users: int = 256
    length: int = 10_000
    longest: int = 54_000
    steps: int = 10
    repeats: int = 3
    recent: int = 50
    top: int = 200
    short: str = "dien"


QUICK = Sizes((50, 100), 10, 4, 5, (8, 4), 4, 64, 96, 2, 2, 8, 8, "din")


def device_part(quick: bool = False) -> tuple[list[results.Row], dict[str, float]]:
    """Rows and figures: `rank_p99_ms_10k`, `rank_p99_ms_1k`, `train_speedup_10k` and what they rest on."""
    sizes = QUICK if quick else Sizes()
    ranked, rank_figures = rank_latency(sizes)
    trained, train_figures = training_speed(sizes)
    return [*ranked, *trained], rank_figures | train_figures


def model(**changes: Any) -> sim_jax.Config:
    """SIM of hard search with time, DIEN beside."""
    common: dict[str, Any] = {
        "item_features": (Categorical("item", ITEMS + 2, 16), Categorical("category", CATEGORIES + 2, 8)),
        "search": "none",
        "exact": "multi_head",
        "short": "dien",
        "auxiliary_weight": 0.0,
    }
    return sim_jax.Config(**(common | changes))


# ---- ranking ---------------------------------------------------------------------------------------------------------


def rank_latency(sizes: Sizes) -> tuple[list[results.Row], dict[str, float]]:
    """Percentiles of `Ranker.rank`, tree in LMDB included, one request after the other."""
    item = np.arange(2, ITEMS + 2)
    category = (2 + item % CATEGORIES).astype(np.int32)
    fields = ItemFields(item, {"item": item, "category": category})
    keys = ItemKeys.of(item, category)
    rng = np.random.default_rng(0)
    rows: list[results.Row] = []
    figures: dict[str, float] = {}
    systems = {
        "SIM hard, time, DIEN beside": (model(top=sizes.top, short=sizes.short), sizes.recent, sizes.histories),
        "DIEN": (model(exact="", short=sizes.short), sizes.histories[0], sizes.histories[:1]),
    }
    with tempfile.TemporaryDirectory() as folder, open_store(f"{folder}/tree") as store:
        tree = BehaviorTree(store, key="category")
        logs = []
        for user, length in enumerate(sizes.histories):
            # half of the behaviours are in the categories that are asked for, as a user's interests would have it
            own = rng.integers(0, ITEMS, length)
            asked = rng.random(length) < 0.5
            own[asked] = own[asked] // CATEGORIES * CATEGORIES + own[asked] % sizes.categories
            time_ = np.sort(rng.integers(0, 400 * DAY, length))
            logs.append(EventLog(np.full(length, user), item[own], time_, category[own]))
            tree.append(logs[-1])
        for name, (config, recent, histories) in systems.items():
            params = jax.jit(partial(sim_jax.init, config=config))(jax.random.key(0))
            buckets = Buckets((128,) if sizes.candidates <= 128 else (512,), (32,), recent)
            ranker = Ranker(params, config, tree, keys, fields, buckets=buckets)
            ranker.warm_up()
            for length in histories:
                log = logs[sizes.histories.index(length)]
                asks = [_ask(rng, sizes, log, recent, item) for _ in range(sizes.requests)]
                with uncollected():
                    ms = _milliseconds([partial(ranker.rank, ask) for ask in asks])
                row: dict[str, Any] = {"what": f"rank, {name}", "behaviors": length, "candidates": sizes.candidates}
                rows.append(row | {f"p{q}_ms": float(np.percentile(ms, q)) for q in (50, 90, 99)})
                lookups = _milliseconds([partial(_look_up, ranker, ask) for ask in asks])
                rows[-1]["lookup_p99_ms"] = float(np.percentile(lookups, 99))
                print(f"rank, {name}, {length:,} behaviours: p99 {rows[-1]['p99_ms']:.3g} ms", flush=True)
                if name != "DIEN":
                    figures[f"rank_p99_ms_{length // 1000}k"] = float(np.percentile(ms, 99))
                    figures[f"rank_p50_ms_{length // 1000}k"] = float(np.percentile(ms, 50))
                else:
                    figures["rank_p99_ms_dien_1k"] = float(np.percentile(ms, 99))
    return rows, figures


def _ask(rng: np.random.Generator, sizes: Sizes, log: EventLog, recent: int, item: np.ndarray) -> Ask:
    """Candidates of so many categories, at a moment near the end of the history."""
    place = rng.integers(0, ITEMS // CATEGORIES, sizes.candidates) * CATEGORIES
    candidates = item[place + rng.integers(0, sizes.categories, sizes.candidates)]
    now = int(log.time[-1]) + int(rng.integers(1, DAY))
    return Ask(int(log.user[0]), now, candidates, log.item[-recent:], log.time[-recent:])


def _look_up(ranker: Ranker, ask: Ask) -> Any:
    return ranker.tree.lookup(np.array([ask.user]), ranker.asked(ask).keys, ranker.config.top, ask.time)


def _milliseconds(calls: list[Callable[[], Any]]) -> np.ndarray:
    for call in calls[:20]:  # caches and clocks warm
        call()
    found = []
    for call in calls:
        began = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - began))
    return np.array(found)


# ---- training --------------------------------------------------------------------------------------------------------


def training_speed(sizes: Sizes) -> tuple[list[results.Row], dict[str, float]]:
    """Step times by search and over the full length; the search and the feed, from users and moments, are in them."""
    dien = {"short": "din", "short_options": (("hidden", (80, 40)),)}
    full = model(exact="din", exact_options=(("hidden", (80, 40)),), age_width=0, **dien)
    hard, soft = model(**dien, top=sizes.top), model(search="soft", **dien, top=sizes.top)
    rows: list[results.Row] = []
    data = {length: lifelong.put(_users(sizes, length)) for length in (sizes.length, sizes.longest)}
    over_all = ("DIN over the full length", full, Feed("newest", sizes.length), sizes.length)
    by_tree = ("SIM, search by the tree on the device", hard, Feed("tree", sizes.top))
    by_soft = ("SIM, soft search over all", soft)
    cases = [
        case
        for batch in sizes.batches
        for case in (
            (*over_all, batch),
            (*by_tree, sizes.length, batch),
            (*by_soft, Feed("newest", sizes.length), sizes.length, batch),
        )
    ]
    cases += [
        (*by_tree, sizes.longest, sizes.users),
        (*by_soft, Feed("newest", sizes.longest), sizes.longest, sizes.users),
    ]
    with ThreadPoolExecutor() as pool:  # all are compiled before any is timed
        made = list(pool.map(lambda case: _compiled(data[case[3]], case[1], case[2], case[4], sizes), cases))
    for (name, config, _, length, batch), compiled in zip(cases, made, strict=True):
        ms = _step_milliseconds(compiled, data[length], config, batch, sizes)
        memory = compiled.memory_analysis()
        gib = memory.temp_size_in_bytes / 2**30 if memory is not None else 0.0
        row: dict[str, Any] = {"what": f"training step, {name}", "behaviors": length, "batch": batch}
        rows.append(row | {"ms": float(np.median(ms)), "ms_low": min(ms), "ms_high": max(ms), "temporaries_gib": gib})
        print(f"{rows[-1]['what']}, {length:,} behaviours, batch {batch}: {rows[-1]['ms']:.3g} ms", flush=True)
    ms_of = [float(row["ms"]) for row in rows]  # type: ignore[arg-type]
    figures = {"train_speedup_10k": ms_of[0] / ms_of[1], "train_speedup_10k_soft": ms_of[0] / ms_of[2]}
    for i, batch in enumerate(sizes.batches[1:], start=1):
        figures[f"train_speedup_10k_batch_{batch}"] = ms_of[3 * i] / ms_of[3 * i + 1]
    return rows, figures | {"train_step_ms_54k": ms_of[-2], "train_step_ms_54k_soft": ms_of[-1]}


def _users(sizes: Sizes, length: int) -> Lifelong:
    """Users with a history of this length each."""
    rng, users = np.random.default_rng(1), sizes.users
    n = users * length
    item = rng.integers(2, ITEMS + 2, n).astype(np.int32)
    # A tenth of the categories holds half of the behaviours, so that a search finds its K.
    some = rng.random(n) < 0.5
    category = np.where(some, 2 + item % (CATEGORIES // 10), 2 + item % CATEGORIES).astype(np.int32)
    time_ = np.sort(rng.integers(0, 400 * DAY, (users, length)), axis=1).ravel()
    target = {"item": item[:users], "category": (2 + np.arange(users) % (CATEGORIES // 10)).astype(np.int32)}
    everyone = np.arange(users)
    return Lifelong(
        name="random", reachable=False, offsets=np.arange(users + 1) * length, time=time_,
        fields={"item": item, "category": category}, user=everyone, moment=np.full(users, 401 * DAY),
        label=rng.integers(0, 2, users), probability=None, target=target, train=everyone, test=everyone,
        category=np.zeros(ITEMS + 2, np.int32), sizes={},
    )  # fmt: skip


SETTINGS = training.TrainConfig(steps=10_000)


def _compiled(device: lifelong.OnDevice, config: sim_jax.Config, feed: Feed, batch_size: int, sizes: Sizes) -> Any:
    """`sizes.steps` training steps as one program: state, data and users of each step in, state and losses out."""

    def run(state: Any, device: lifelong.OnDevice, rows: Any) -> Any:
        def step(state: Any, rows: Any) -> Any:
            batch = lifelong.make_batch(device, rows, config, feed, sizes.recent)
            return training.advance(sim_jax, config, SETTINGS, state, batch)

        state, metrics = jax.lax.scan(step, state, rows)
        return state, metrics["loss"]

    state = jax.eval_shape(partial(training.init_state, sim_jax, config, SETTINGS))
    rows = jax.ShapeDtypeStruct((sizes.steps, batch_size), jnp.int32)
    return jax.jit(run, donate_argnums=0).lower(state, device, rows).compile()


def _step_milliseconds(
    compiled: Any, device: lifelong.OnDevice, config: sim_jax.Config, batch: int, sizes: Sizes
) -> list[float]:
    """Milliseconds a step, one number a repeat."""
    rng = np.random.default_rng(0)
    state = jax.jit(partial(training.init_state, sim_jax, config, SETTINGS))()
    found = []
    for repeat in range(sizes.repeats + 1):
        rows = jnp.asarray(rng.integers(0, sizes.users, (sizes.steps, batch)), jnp.int32)
        began = time.perf_counter()
        state, loss = compiled(state, device, rows)
        if not np.isfinite(np.asarray(loss)).all():
            raise RuntimeError("a timed training step gave a loss that is not finite")
        if repeat:  # the first one warms up
            found.append(1000 * (time.perf_counter() - began) / sizes.steps)
    return found

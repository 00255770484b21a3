"""How fast SIM is served on this machine: the behaviour tree is built, appended to and asked, from LMDB and Redis.

    python -m experiments sim-serving                          # a minute on two cores, 2 GB of disk
    python -m experiments sim-serving --device                 # also `rank` and the training step, on an accelerator
    python -m experiments sim-serving --device --no-tree       # these alone; --device-result joins them to the rest
    python -m experiments sim-serving --quick                  # seconds, small sizes: only shows that everything works

The build (a process of its own: wall seconds, peak memory) files `events` events of `users` users, 20 categories each
by Zipf's law of 5,000 in all. Appends to that tree follow, a batch a call, each synced to disk before the call returns:
`days` days of 5 events a user in 2 or 3 categories (the figure is their median), and batches with other numbers of
events a (user, category), which is what the speed depends on. Look-ups are requests of single users with long
histories: the distinct categories of the candidates, one batched question to the tree, the newest `k` behaviours of
each as arrays; wall milliseconds, one at a time, after a warm-up of a tenth as many.
"""

import contextlib
import multiprocessing
import resource
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from experiments import figures, progress, report, results
from experiments.results import Row
from experiments.settings import in_small
from experiments.steps.timing import uncollected
from rec_core.data.schema import EventLog, Ragged
from rec_core.store import Store, StoreError, open_store
from sim_jax.tree import BehaviorTree
from sim_jax.tree_keys import distinct

START, DAY = 1_600_000_000, 86_400
FAVOURITES, CATEGORIES = 20, 5_000  # of a user, and of all
KEY = "category"


@dataclass(frozen=True)
class SimServing:
    """Settings.

    Attributes:
      events: of the build.
      users: who have them.
      days: appended one after the other, 5 events of each user.
      long_users: users whose histories are asked for.
      history: events of each of them.
      candidates: of a request, among all 20 categories of its user.
      k: behaviours that are asked for under each category.
      requests: look-ups that are timed.
      redis: also from a local redis-server that this command starts and stops.
      tree: the behaviour tree's part.
      device: also `rank` and the training step, on the device that JAX finds.
      device_result: a result.json of a run with `device` on another machine, whose part is joined to this one.
      quick: small sizes: only shows that everything works.
      seed: of the events.
      out: folder for result.json and report.html; the stores lie there meanwhile.
    """

    events: int = 10_000_000
    users: int = 200_000
    days: int = 3
    long_users: int = 100
    history: int = 10_000
    candidates: int = 100
    k: int = 200
    requests: int = 5_000
    redis: bool = True
    tree: bool = True
    device: bool = False
    device_result: Path | None = None
    quick: bool = False
    seed: int = 0
    out: Path = Path("runs/sim_serving")

    def __post_init__(self) -> None:
        for name in ("events", "users", "days", "long_users", "history", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.candidates < FAVOURITES:
            raise ValueError(f"candidates is {self.candidates}; give {FAVOURITES} or more, one of each category")
        if self.device and self.device_result is not None:
            raise ValueError(
                f"device_result is {self.device_result}, and device asks to measure here: give one of them"
            )
        if not (self.tree or self.device):
            raise ValueError("nothing is left to measure without the tree: add --device")
        if self.requests < 100:
            raise ValueError(f"requests is {self.requests}; give 100 or more, or there is no 99th percentile")


QUICK = {"events": 20_000, "users": 400, "days": 2, "long_users": 4, "history": 600, "requests": 200}


def run(config: SimServing) -> results.Result:
    """Measures, prints the table, writes the result and the report."""
    if config.quick:
        config = in_small(config, QUICK)
    started = results.begin()
    config.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    curves: dict[str, Float[np.ndarray, "n"]] = {}
    if config.tree:
        rows, curves = tree_part(config)
    found = summarize(config, rows)
    if config.device:
        from experiments.sim_serving_device import device_part

        more_rows, more_figures = device_part(config.quick)
        rows += [row | {"device": jax.devices()[0].device_kind} for row in more_rows]
        found |= more_figures
    if config.device_result is not None:
        other = results.read(config.device_result)
        rows += [row | {"commit": other.commit} for row in other.rows if "device" in row]
        found |= {name: value for name, value in other.figures.items() if name.startswith(("rank_", "train_"))}
    outcome = results.record("sim_serving", started=started, seeds=[config.seed], rows=rows, figures=found)
    results.write(config.out / "result.json", outcome)
    report.write(config.out / "report.html", page(config, outcome, curves))
    print(progress.table(rows))
    print(f"report: {config.out / 'report.html'}   result: {config.out / 'result.json'}   {outcome.seconds:.0f} s")
    return outcome


def tree_part(config: SimServing) -> tuple[list[Row], dict[str, Float[np.ndarray, "n"]]]:
    """Rows of the build, the appends and the look-ups, and the milliseconds of the latter."""
    with tempfile.TemporaryDirectory(prefix="stores-", dir=config.out) as stores:
        folder = Path(stores)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            rows = [alone.submit(build, config, folder / "tree").result()]
        print(f"built: {rows[0]['events']:,} events in {rows[0]['seconds']:.1f} s", flush=True)
        with open_store(folder / "tree") as store:
            rows += appends(config, store)
            print("appended", flush=True)
            file_histories(config, store)
            curves = {"LMDB": lookups(config, store), "LMDB, at past times": lookups(config, store, past=True)}
        if config.redis:
            try:
                with redis_server(folder) as address, open_store(address) as store:
                    file_histories(config, store)
                    curves["Redis"] = lookups(config, store)
            except StoreError as error:
                rows.append({"what": "look-up, Redis", "reason": str(error)})
    return [*rows, *({"what": f"look-up, {place}", **percentiles(ms)} for place, ms in curves.items())], curves


# ---- what is filed ---------------------------------------------------------------------------------------------------


def category(user: Int[np.ndarray, "n"], rank: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The category that has the rank (0: most frequent) among a user's 20."""
    return (1 + (user * 7_919 + rank * 104_729) % CATEGORIES).astype(np.int32)  # 20 ranks never meet


def stream(
    rng: np.random.Generator, user: Int[np.ndarray, "n"], rank: Int[np.ndarray, "n"], first: int, seconds: int
) -> EventLog:
    """Events of the users in the categories, at random times of a period, in the order of time."""
    moment = np.sort(rng.integers(first, first + seconds, len(user)))
    order = rng.permutation(len(user))
    item = rng.integers(1, 1_000_000, len(user))
    return EventLog(user[order], item, moment, category(user[order], rank[order]))


def ranks(rng: np.random.Generator, shape: tuple[int, ...]) -> Int[np.ndarray, "*s"]:
    """Ranks by Zipf's law."""
    share = 1 / np.arange(1, FAVOURITES + 1)
    return rng.choice(FAVOURITES, shape, p=share / share.sum())


def build(config: SimServing, folder: Path) -> Row:
    """Builds the tree; run in a process of its own, whose memory is the peak."""
    rng = np.random.default_rng(config.seed)
    log = stream(rng, rng.integers(0, config.users, config.events), ranks(rng, (config.events,)), START, 90 * DAY)
    with open_store(folder) as store:
        began = time.perf_counter()
        BehaviorTree(store, key=KEY).append(log)
        seconds = time.perf_counter() - began
        blocks = store.count()
    mib = (folder / "data.mdb").stat().st_size / 2**20
    row: Row = {"what": "build", "events": config.events, "seconds": seconds, "events_per_s": config.events / seconds}
    return row | {"events_per_pair": config.events / blocks, "peak_memory_gib": peak_gib(), "disk_mib": mib}


def appends(config: SimServing, store: Store) -> list[Row]:
    """Batches appended to the built tree: days of all users, then the same number of events in fewer pairs or more."""
    rng = np.random.default_rng(config.seed + 1)
    tree = BehaviorTree(store, key=KEY)
    rows: list[Row] = []
    everyone, n = np.arange(config.users), 5 * config.users
    batches = [("a day", everyone, np.take_along_axis(ranks(rng, (config.users, 3)), day, axis=1)) for day in (
        rng.integers(0, 3, (config.users, 5)) for _ in range(config.days)
    )]  # fmt: skip
    for each, pairs in ((1, 3), (2, 3), (5, 3), (10, 2), (20, 2)):
        few = rng.choice(everyone, min(max(n // (each * pairs), 1), config.users), replace=False)
        first = rng.integers(0, FAVOURITES, (len(few), 1))  # consecutive ranks: exactly `pairs` categories a user
        batches.append((f"{each} a pair", few, (first + np.arange(each * pairs) % pairs) % FAVOURITES))
    for i, (what, users, rank) in enumerate(batches):
        log = stream(rng, np.repeat(users, rank.shape[1]), rank.ravel(), START + (90 + i) * DAY, DAY)
        pairs = len(np.unique(log.user * (CATEGORIES + 1) + log.category))
        began = time.perf_counter()
        tree.append(log)
        seconds = time.perf_counter() - began
        row: Row = {"what": what, "events": len(log), "seconds": seconds, "events_per_s": len(log) / seconds}
        rows.append(row | {"events_per_pair": len(log) / pairs})
    return rows


def file_histories(config: SimServing, store: Store) -> None:
    """Files the long histories that `lookups` asks for."""
    rng = np.random.default_rng(config.seed + 2)
    user = np.repeat(config.users + np.arange(config.long_users), config.history)
    BehaviorTree(store, key=KEY).append(stream(rng, user, ranks(rng, user.shape), START, 90 * DAY))


# ---- what is asked ---------------------------------------------------------------------------------------------------


def lookups(config: SimServing, store: Store, *, past: bool = False) -> Float[np.ndarray, "n"]:
    """Milliseconds of each request, from the candidates' categories to the arrays of their behaviours.

    Args:
      past: as of random times within the history, which older blocks must answer; else as of now.
    """
    rng = np.random.default_rng(config.seed + 3)
    tree, warm = BehaviorTree(store, key=KEY), config.requests // 10
    rank = np.append(np.arange(FAVOURITES), ranks(rng, (config.candidates - FAVOURITES,)))
    offsets = np.arange(config.candidates + 1)
    taken = []
    with uncollected():
        for _ in range(warm + config.requests):
            user = config.users + rng.integers(0, config.long_users, 1)
            keys = category(user, rng.permutation(rank))
            before = START + int(rng.integers(10, 90)) * DAY if past else START + 365 * DAY
            began = time.perf_counter_ns()
            asked = distinct(Ragged(offsets, keys))
            found = tree.lookup(user, asked.keys, config.k, before)
            taken.append(time.perf_counter_ns() - began)
            if len(found.count) != FAVOURITES or not found.count.any():
                raise RuntimeError(f"{store.name}: user {user[0]} has no behaviours where {config.history} were filed")
    return np.array(taken[warm:]) / 1e6


def percentiles(milliseconds: Float[np.ndarray, "n"]) -> Row:
    """The row's columns of a distribution of times."""
    return {"requests": len(milliseconds)} | {
        f"p{level}_ms": float(np.percentile(milliseconds, level)) for level in (50, 90, 99)
    }


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The address of a store on a redis-server of its own on this machine, which ends with the block.

    Raises:
      StoreError: it is not installed, or did not start.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise StoreError("redis-server is not installed: install it, or give --no-redis")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    password = secrets.token_hex()
    settings = f'bind 127.0.0.1\nport {port}\ndir "{folder.absolute()}"\nsave ""\nrequirepass {password}\n'
    process = subprocess.Popen([program, "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert process.stdin is not None
        with process.stdin as said:  # not on the command line, which every user of the machine can read
            said.write(settings)
        address = f"redis://:{password}@127.0.0.1:{port}/0/tree"
        patience = time.monotonic() + 10
        while True:
            try:
                open_store(address).close()
                break
            except StoreError as error:
                no_client = isinstance(error.__cause__, ImportError)
                if no_client or process.poll() is not None or time.monotonic() > patience:
                    raise
                time.sleep(0.02)
        yield address
    finally:
        process.kill()
        process.wait()


def peak_gib() -> float:
    """The most memory that this process has held."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20  # ru_maxrss counts the parent's at the fork as well
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


# ---- what is said ----------------------------------------------------------------------------------------------------


def summarize(config: SimServing, rows: list[Row]) -> dict[str, float]:
    """The figures that README and CI quote; of smaller sizes they are named small_..."""

    def column(what: str, name: str) -> list[float]:
        return [float(row[name] or 0) for row in rows if row["what"] == what and name in row]

    found = {
        "build_10m_s": column("build", "seconds"),
        "append_events_per_s": column("a day", "events_per_s"),
        "lookup_p99_ms_lmdb": column("look-up, LMDB", "p99_ms"),
        "lookup_p99_ms_redis": column("look-up, Redis", "p99_ms"),
    }
    full = (config.events, config.history) == (SimServing.events, SimServing.history)
    return {name if full else f"small_{name}": statistics.median(values) for name, values in found.items() if values}


def page(config: SimServing, outcome: results.Result, curves: dict[str, Float[np.ndarray, "n"]]) -> str:
    """The report."""
    stores: list[Row] = []
    answers: list[Row] = []
    devices: dict[str, list[Row]] = {}
    for row in outcome.rows:
        what = str(row.get("what", ""))
        if "device" in row:
            part = "Ranking" if "p50_ms" in row else "Training steps"
            devices.setdefault(f"{part}, {row['device']}", []).append(_without(row, "device", "commit"))
        else:
            (answers if what.startswith("look-up") else stores).append(row)
    tables = {"Build and append": stores} | devices
    return report.page(
        outcome,
        "SIM's behaviour tree in serving",
        lead=f"A tree of {config.events:,} events, built, appended to and asked on this machine."
        if curves
        else "Ranking and training on this device.",
        headline=answers or next(iter(devices.values())),
        panels=[_panel(config, curves)] if curves else [],
        tables={title: table for title, table in tables.items() if table},
    )


def _without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _panel(config: SimServing, curves: dict[str, Float[np.ndarray, "n"]]) -> report.Panel:
    levels = np.append(np.arange(1, 100), [99.5, 99.9])
    shown = {place: (np.percentile(milliseconds, levels), levels) for place, milliseconds in curves.items()}
    drawn = figures.lines(
        shown, title="Time of a look-up", x_label="milliseconds a request", y_label="requests answered (%)",
        references={"99 %": 99.0}, log_x=True, markers=False,
    )  # fmt: skip
    asked = f"{config.candidates} candidates in {FAVOURITES} categories, histories of {config.history:,} events"
    caption = f"{asked}, the newest {config.k} behaviours of each category; from 1 % to 99.9 % of the requests."
    return report.Panel("Time of a look-up", drawn, caption, samples=config.requests, users=config.long_users)

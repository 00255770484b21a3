"""Training under the contract: gradients of a whole batch in parts, the step on a mesh or under pmap, and `fit`.

A model is a module with `Config`, `init`, `apply`, `objective`, `touched` and `check`; one that trains a part of its
parameters also has `trainable(params, config)`, a tree of bools: the rest has neither gradient nor optimizer state. The
objective is computed once on the outputs of the whole batch, so in-batch negatives are the same however the batch is
split (as in GradCache, arXiv 2101.06983; here over a mesh too). What must be the same everywhere is the loss and the
first gradient; dropout draws other masks for other splits.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt32

from rec_core import exchange, optimizers, partition
from rec_core.checkpoint import Checkpoints, Log, config_record
from rec_core.embedding import Rows, gather_rows
from rec_core.optimizers import EarlyStopping, TrainConfig
from rec_core.sharding import batch_sharding, constrain, make_mesh, path_name, put_batch, replicated, shardings

__all__ = [
    "DivergedError", "EarlyStopping", "Result", "State", "TrainConfig", "advance", "fit", "init_state", "make_step",
    "pmap_step", "value_and_grad",
]  # fmt: skip

RUN_AHEAD = 2  # steps that may be under way before the host looks at the oldest one's numbers


@struct.dataclass
class State:
    """What a run carries from step to step. ``diverged`` is -1, or the step whose loss or gradient was not finite:
    from there on no update is applied, so ``params`` stay those of the last finite step."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    diverged: Int[Array, ""]
    seed: UInt32[Array, ""]  # here and not in the compiled step, so that runs of several seeds share it


class DivergedError(RuntimeError):
    """The loss or the gradient norm was not finite. ``step``, ``loss``, ``gradient_norm`` say where."""

    def __init__(self, step: int, loss: float, gradient_norm: float, saved: str | None) -> None:
        where = f"the state before it is saved in {saved}" if saved else "nothing was saved (no directory was given)"
        super().__init__(
            f"training diverged at step {step}: loss {loss}, gradient norm {gradient_norm}; {where}. Lower "
            "learning_rate, set clip or warmup, and look at that step's batch; to go on from the saved state in a new "
            "directory pass params=rec_core.checkpoint.restore_params(...)"
        )
        self.step, self.loss, self.gradient_norm = step, loss, gradient_norm


@dataclass(frozen=True)
class Result:
    """``params`` of the last step, or of the best evaluation with early stopping (``best`` is its record)."""

    params: Any
    history: list[dict[str, Any]]
    steps: int
    stopped: str  # "steps", "data" (the iterator ended) or "early_stopping"
    best: dict[str, Any] | None = None


def value_and_grad(
    model: Any,
    params: Any,
    batch: Any,
    config: Any,
    *,
    key: Array | None = None,
    micro_batches: int = 1,
    axis_name: str | None = None,
) -> tuple[tuple[Float[Array, ""], dict[str, Any]], Any]:
    """``((loss, aux), gradients)`` of the whole batch; None in place of the gradient of what is not trained.

    With ``micro_batches`` n the outputs of all parts are computed first, the objective once, and the gradient is
    carried back through one part at a time: the memory of the layers is that of B / n examples. Part j takes examples
    j, j + n, ...: each part stays balanced over the data axis. Under ``axis_name`` loss, aux and gradients are the
    means over the axis (an objective that sums over the axis gives the same on each device already); only the gradients
    of `Rows`, which name other rows on each device, stay the device's part of that mean.

    Args:
      params: may hold `Rows` in place of tables. Gradients are like ``params``; leaves of integers come back as given.
      key: `apply` sees it folded with the part and the device, `objective` as it is.

    Raises:
      ValueError: the batch is not a multiple of ``micro_batches``.
    """
    leaves, tree = jax.tree.flatten(params)
    trained = jax.tree.leaves(_trainable(model, params, config))
    where = [i for i, leaf in enumerate(leaves) if trained[i] and jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def put(values: list[Array]) -> Any:
        found = dict(zip(where, values))
        return jax.tree.unflatten(tree, [found.get(i, leaf) for i, leaf in enumerate(leaves)])

    values = [leaves[i] for i in where]
    apply_key = key
    if key is not None and axis_name is not None:
        apply_key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    def forward(values: list[Array], part: Any, j: Array | None = None) -> Any:
        part_key = apply_key if apply_key is None or j is None else jax.random.fold_in(apply_key, j)
        return model.apply(put(values), part, config, key=part_key, train=True)

    def objective(values: list[Array], output: Any) -> Any:
        return model.objective(put(values), output, batch, config, key=key, axis_name=axis_name)

    if micro_batches == 1:
        (loss, aux), gradients = jax.value_and_grad(lambda v: objective(v, forward(v, batch)), has_aux=True)(values)
    else:
        parts = (_split(batch, micro_batches), jnp.arange(micro_batches))
        output = _merge(jax.lax.map(lambda part: forward(values, *part), parts))
        (loss, aux), (direct, cotangent) = jax.value_and_grad(objective, (0, 1), has_aux=True)(values, output)

        def back(total: list[Array], item: Any) -> tuple[list[Array], None]:
            part, part_cotangent = item
            _, pull = jax.vjp(lambda v: forward(v, *part), values)
            return jax.tree.map(jnp.add, total, pull(part_cotangent)[0]), None

        gradients, _ = jax.lax.scan(back, direct, (parts, _split(cotangent, micro_batches)))
    gradients = partition.split(put(gradients), jax.tree.unflatten(tree, trained))[0]
    if axis_name is None:
        return (loss, aux), gradients
    return jax.lax.pmean((loss, aux), axis_name), _mean_gradients(gradients, axis_name)


def _mean_gradients(gradients: Any, axis_name: str) -> Any:
    """Means over the axis; of `Rows` this device's part of them."""
    devices = jax.lax.axis_size(axis_name)

    def mean(leaf: Any) -> Any:
        if _is_rows(leaf):
            return jax.tree.map(lambda x: x / devices if jnp.issubdtype(x.dtype, jnp.inexact) else x, leaf)
        return jax.lax.pmean(leaf, axis_name) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(mean, gradients, is_leaf=_is_rows)


def _is_rows(x: Any) -> bool:
    return isinstance(x, Rows)


def _trainable(model: Any, params: Any, config: Any) -> Any:
    """Tree of bools: what a step moves."""
    return model.trainable(params, config) if hasattr(model, "trainable") else jax.tree.map(lambda _: True, params)


def init_state(
    model: Any, config: Any, train: TrainConfig, params: Any = None, *, seed: UInt32[Array, ""] | None = None
) -> State:
    """The state before the first step, from ``seed`` (default ``train.seed``) or from given parameters. Pure."""
    seed = jnp.uint32(train.seed) if seed is None else seed
    if params is None:
        params = model.init(step_key(seed, 2**32 - 1), config)
    zero = jnp.zeros((), jnp.int32)
    moved, _ = partition.split(params, _trainable(model, params, config))
    return State(zero, params, optimizers.init_optimizer(moved, train), zero - 1, seed)


def step_key(seed: int | UInt32[Array, ""], step: int | Int[Array, ""]) -> Array:
    """The key that a step draws with: a function of the seed and the step, so a run that resumes draws the same."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_step(model: Any, config: Any, train: TrainConfig, mesh: Mesh | AbstractMesh) -> Any:
    """The jitted ``(state, batch) -> (state, metrics)`` on a mesh; ``state`` is donated.

    Metrics: ``loss``, ``gradient_norm`` (before clipping), ``learning_rate``, ``diverged``, and ``aux`` as the model
    gave it. Parameters, optimizer state and gradients are laid out by `rec_core.sharding.RULES`, the batch by example.
    Calls that differ in nothing the step computes (seed, logging, saving) get the same function: it is compiled once.
    """
    return _jitted_step(model, config, computed(train), mesh)


def computed(train: TrainConfig) -> TrainConfig:
    """What of a configuration enters the compiled step; the rest is set to its default."""
    return replace(train, seed=0, log_every=1, evaluate_every=0, checkpoint_every=0, keep=1, early_stopping=None)


@lru_cache(maxsize=16)
def _jitted_init(model: Any, config: Any, train: TrainConfig, mesh: Mesh) -> Any:
    out = shardings(jax.eval_shape(partial(init_state, model, config, train)), mesh)
    return jax.jit(lambda seed: init_state(model, config, train, seed=seed), out_shardings=out)


@lru_cache(maxsize=16)
def _jitted_step(model: Any, config: Any, train: TrainConfig, mesh: Mesh | AbstractMesh) -> Any:
    state_shardings = shardings(jax.eval_shape(partial(init_state, model, config, train)), mesh)

    def step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        with jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh):
            return advance(model, config, train, state, batch, mesh=mesh)

    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )


def pmap_step(model: Any, config: Any, train: TrainConfig) -> Any:
    """The same per-device step under `jax.pmap`: ``(state, batch [devices, B / devices, ...]) -> (state, metrics)``.

    The state goes in and comes out whole (every device holds all of it).
    """
    step = partial(advance, model, config, train, axis_name="data")
    return jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None)


def advance(
    model: Any,
    config: Any,
    train: TrainConfig,
    state: State,
    batch: Any,
    *,
    axis_name: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[State, dict[str, Any]]:
    """One step, pure: what `make_step` and `pmap_step` compile, for loops of one's own (a scan over steps, a vmap over
    seeds). Metrics as in `make_step`; ``mesh`` lays the gradients out.

    With ``sparse_tables``, on a mesh that splits the examples alone, each device works for its own: rows travel from
    their owners and gradients to them (`rec_core.exchange`). Else the compiler is left to split the whole.
    """
    if mesh is not None and axis_name is None and _apart(model, config, train, state, batch, mesh):
        return _advance_apart(model, config, train, state, batch, mesh)
    return _advance(model, config, train, state, batch, axis_name=axis_name, mesh=mesh)


def _apart(model: Any, config: Any, train: TrainConfig, state: State, batch: Any, mesh: Mesh | AbstractMesh) -> bool:
    """Whether each device can do the step for its own examples: they divide, and no split table is read whole."""
    data = mesh.shape["data"]
    if not train.sparse_tables or data == 1 or data != mesh.size:
        return False
    if any(leaf.shape[0] % (data * train.micro_batches) for leaf in jax.tree.leaves(batch)):
        return False
    return _split_tables(state, mesh) <= jax.eval_shape(lambda batch: model.touched(batch, config), batch).keys()


def _split_tables(state: State, mesh: Mesh | AbstractMesh) -> frozenset[str]:
    """Names of the tables whose rows are split over the mesh."""
    where = shardings({"tables": state.params["tables"]}, mesh)["tables"]
    return frozenset(name for name, sharding in where.items() if not sharding.is_fully_replicated)


def _advance_apart(
    model: Any, config: Any, train: TrainConfig, state: State, batch: Any, mesh: Mesh | AbstractMesh
) -> tuple[State, dict[str, Any]]:
    step = partial(_advance, model, config, train, axis_name="data", split=_split_tables(state, mesh))
    where = jax.tree.map(lambda sharding: sharding.spec, shardings(state, mesh))
    given, made = (where, batch_sharding(mesh).spec), (where, P())
    # Replication is not checked: as under pmap, the transpose of a sum over the axis is then a sum, on which the means
    # of `value_and_grad` rest.
    return jax.shard_map(step, mesh=mesh, in_specs=given, out_specs=made, check_vma=False)(state, batch)


def _advance(
    model: Any,
    config: Any,
    train: TrainConfig,
    state: State,
    batch: Any,
    *,
    axis_name: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    split: frozenset[str] = frozenset(),
) -> tuple[State, dict[str, Any]]:
    """`advance`, under ``axis_name`` on one device's examples; the tables named by ``split`` are its part of them."""
    key = step_key(state.seed, state.step)
    params = state.params
    moved, rest = partition.split(params, _trainable(model, params, config))
    everyones = {}
    if train.sparse_tables:
        rows: dict[str, Any] = {}
        for name, ids in model.touched(batch, config).items():
            table = params["tables"][name]
            if moved["tables"][name] is None and name not in split:
                continue  # frozen and all here: read as it is
            if axis_name is None:
                rows[name] = gather_rows(table, constrain(ids, P()))
            else:
                rows[name], everyones[name] = exchange.read(table, ids, axis_name, split=name in split)
        params = {**params, "tables": {**params["tables"], **rows}}
    (loss, aux), gradients = value_and_grad(
        model, params, batch, config, key=key, micro_batches=train.micro_batches, axis_name=axis_name
    )
    if mesh is not None:
        gradients = _lay_out(gradients, mesh)
    if axis_name is None:
        norm = optimizers.gradient_norm(gradients)
    else:
        combined = {
            name: exchange.combine(gradients["tables"][name], ids, table, axis_name, split=name in split)
            for name, ids in everyones.items()
            if (table := moved["tables"][name]) is not None
        }
        gradients = {**gradients, "tables": {**gradients["tables"], **combined}}
        norm = exchange.global_norm(gradients, axis_name, split)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    go = finite & (state.diverged < 0)
    moved, opt_state = optimizers.update(
        moved,
        optimizers.clip(gradients, norm, train.clip),
        state.opt_state,
        train,
        step=state.step,
        go=go,
    )
    diverged = jnp.where((state.diverged < 0) & ~finite, state.step, state.diverged)
    metrics = {
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": optimizers.schedule(train)(state.step),
        "diverged": diverged,
        "aux": aux,
    }
    params = partition.join(moved, rest)
    return State(state.step + go.astype(jnp.int32), params, opt_state, diverged, state.seed), metrics


def _lay_out(gradients: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Gradients where their parameters are; the few `Rows` of a sparse table on every device."""

    def place(sharding: Any, leaf: Any) -> Any:
        return leaf if _is_rows(leaf) else jax.lax.with_sharding_constraint(leaf, sharding)

    flat, tree = jax.tree.flatten(gradients, is_leaf=_is_rows)
    whole = jax.tree.map(lambda x: x.ids if _is_rows(x) else x, gradients, is_leaf=_is_rows)
    return jax.tree.unflatten(tree, map(place, jax.tree.leaves(shardings(whole, mesh)), flat))


def _split(tree: Any, n: int) -> Any:
    """[B, ...] -> [n, B / n, ...]; part j is examples j, j + n, ..."""

    def split(x: Array) -> Array:
        if x.shape[0] % n:
            raise ValueError(f"batch of {x.shape[0]} examples cannot be cut into {n} micro_batches: make it a multiple")
        return constrain(x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), P(None, "data"))

    return jax.tree.map(split, tree)


def _merge(tree: Any) -> Any:
    """[n, B / n, ...] -> [B, ...], the inverse of `_split`."""
    return jax.tree.map(lambda x: constrain(x.swapaxes(0, 1).reshape(-1, *x.shape[2:])), tree)


def fit(
    model: Any,
    config: Any,
    train: TrainConfig,
    batches: Iterable[Any],
    *,
    mesh: Mesh | None = None,
    directory: str | Path | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    resume: bool = True,
    check: bool = True,
    params: Any = None,
    tensorboard: bool = False,
) -> Result:
    """Trains for ``train.steps`` steps, or until the data or the patience ends.

    Args:
      batches: host batches of the model's type, all of one size. An iterator with ``get_state`` / ``set_state`` (such
        as Grain's; the state must be JSON, and the same on every process) is saved with each checkpoint; any other is
        drawn forward to the step that a run resumes from. Each process gives its own slice of the global batch.
      mesh: default one device. With several processes a mesh over all devices must be given.
      directory: checkpoints, ``metrics.jsonl`` and the configuration. A run found there is continued: the records
        after its last checkpoint are taken again. None keeps nothing.
      evaluate: parameters -> named numbers; called every ``evaluate_every`` steps and at the end. It must not keep the
        parameters (they are donated to the next step).
      on_log: called with each record: ``step``, ``loss``, ``gradient_norm``, ``learning_rate``, each ``aux`` as its
        mean, ``examples_per_second`` (and ``events_per_second`` if the model's aux has ``events``); or ``step`` and
        ``evaluation``. Records come ``RUN_AHEAD`` steps late: the loop does not wait for the step it has just begun.
      check: hold every host batch to ``model.check``.
      params: start from these rather than from ``model.init``.
      tensorboard: also write TensorBoard events under ``directory`` (needs the extra ``tensorboard``).

    Raises:
      DivergedError: a loss or gradient was not finite; the last finite state is saved first.
      ValueError: from ``model.check``, with the step noted.
      CheckpointError: a run of another configuration is in ``directory``, nothing there can be read, or a save failed.
    """
    stopping = train.early_stopping
    if (train.evaluate_every or stopping) and evaluate is None:
        raise ValueError("evaluate_every or early_stopping is set: pass evaluate, a function of the parameters")
    if stopping and not train.evaluate_every:
        raise ValueError("early_stopping needs evaluate_every of at least 1 step")
    if tensorboard and directory is None:
        raise ValueError("tensorboard=True needs a directory to write to")
    if mesh is None and jax.process_count() > 1:
        raise ValueError(f"there are {jax.process_count()} processes: pass a mesh over all their devices")
    mesh = mesh or make_mesh()
    source = iter(batches)
    with ExitStack() as stack:
        record = config_record(model, config, train)
        saves = stack.enter_context(Checkpoints(directory, record, keep=train.keep))
        best_saves = stack.enter_context(
            Checkpoints(Path(directory, "best") if directory and stopping else None, record, keep=2)
        )
        state, done = _start(model, config, train, mesh, params, saves, source, resume)
        best_saves.clear(after=done)  # evaluations after the checkpoint are made again
        log = stack.enter_context(Log(directory, done, on_log, tensorboard))
        best, waited = _patience(log.records, stopping)
        best_params = best_saves.restore_step(_abstract(state.params, mesh), best["step"]) if best else None
        run = _Run(log, saves, source)
        step, stopped = make_step(model, config, train, mesh), ""
        while not stopped and done < train.steps:
            if stopping and waited >= stopping.patience:
                stopped = "early_stopping"
                continue
            try:
                run.mark(done)
                batch = next(source)
                if check:
                    _check(model, batch, config, done)
                batch = put_batch(batch, mesh)
            except StopIteration:
                stopped = "data"
                continue
            except Exception:
                run.drain(state)
                run.save(done, state)  # once the data is mended the run goes on from here
                raise
            state, metrics = step(state, batch)
            done += 1
            last = done == train.steps
            run.push(done, metrics, batch, logged=last or done % train.log_every == 0)
            run.drain(state, RUN_AHEAD)
            if train.evaluate_every and (last or done % train.evaluate_every == 0):
                run.evaluate(done, state, evaluate, stopping)
                best, waited = _patience(log.records, stopping)
                if best and best["step"] == done:
                    best_params = jax.tree.map(jnp.copy, state.params)
                    best_saves.save(done, best_params)
            if train.checkpoint_every and done % train.checkpoint_every == 0:
                run.drain(state)
                run.save(done, state)
        run.drain(state)
        if evaluate and not any(entry["step"] == done and "evaluation" in entry for entry in log.records):
            run.evaluate(done, state, evaluate, stopping)
        run.save(done, state)
    return Result(state.params if best_params is None else best_params, log.records, done, stopped or "steps", best)


class _Run:
    """What is under way: metrics not yet looked at, and the data's state before each of their steps."""

    def __init__(self, log: Log, saves: Checkpoints, source: Iterator[Any]) -> None:
        self.log, self.saves, self.source = log, saves, source
        self.pending: deque[tuple[int, Any, int, bool]] = deque()
        self.data: dict[int, Any] = {}
        self.clock: float | None = None
        self.examples = self.events = 0.0

    def mark(self, done: int) -> None:
        """Notes the data's state after ``done`` steps."""
        self.data[done] = _data_state(self.source) if self.saves.directory else None
        self.data.pop(done - RUN_AHEAD - 2, None)

    def push(self, done: int, metrics: Any, batch: Any, logged: bool) -> None:
        for leaf in jax.tree.leaves(metrics):
            leaf.copy_to_host_async()
        self.pending.append((done, metrics, jax.tree.leaves(batch)[0].shape[0], logged))

    def drain(self, state: State, leave: int = 0) -> None:
        """Looks at all but the last ``leave`` steps: writes the records, raises where one was not finite."""
        while len(self.pending) > leave:
            done, metrics, size, logged = self.pending.popleft()
            metrics = jax.tree.map(lambda leaf: np.asarray(leaf).item(), metrics)
            if metrics["diverged"] >= 0:
                self._diverged(state, metrics)
            aux = metrics["aux"]
            self.examples += size
            self.events += aux["events"][0] if "events" in aux else 0.0
            if not logged:
                continue
            record = {"step": done, **{name: metrics[name] for name in ("loss", "gradient_norm", "learning_rate")}}
            record |= {name: total / weight if weight else 0.0 for name, (total, weight) in aux.items()}
            now = time.perf_counter()
            if self.clock is not None:  # the first record's time would be the compiler's
                record["examples_per_second"] = self.examples / (now - self.clock)
                if "events" in aux:
                    record["events_per_second"] = self.events / (now - self.clock)
            self.clock, self.examples, self.events = now, 0.0, 0.0
            self.log.write(record)

    def evaluate(self, done: int, state: State, evaluate: Any, stopping: EarlyStopping | None) -> None:
        self.drain(state)
        numbers = {name: float(value) for name, value in evaluate(state.params).items()}
        if stopping and not np.isfinite(numbers.get(stopping.metric, np.nan)):
            raise ValueError(
                f"early_stopping watches {stopping.metric!r}, but evaluate at step {done} gave {numbers}: "
                "name one of these, and let it be finite"
            )
        self.log.write({"step": done, "evaluation": numbers})
        self.clock = None  # an evaluation's time is not the steps'

    def save(self, done: int, state: State) -> None:
        if self.saves.directory and self.saves.latest != done:
            self.log.flush()  # records up to a checkpoint are on disk before it is
            self.saves.save(done, state, self.data[done] if done in self.data else _data_state(self.source))

    def _diverged(self, state: State, metrics: Mapping[str, Any]) -> None:
        step = metrics["diverged"]
        self.pending.clear()
        if self.saves.directory:
            self.save(step, replace(state, diverged=jnp.full_like(state.diverged, -1)))
            self.saves.wait()
        where = f"{self.saves.directory} (step {step})" if self.saves.directory else None
        raise DivergedError(step, metrics["loss"], metrics["gradient_norm"], where)


def _start(
    model: Any,
    config: Any,
    train: TrainConfig,
    mesh: Mesh,
    params: Any,
    saves: Checkpoints,
    source: Iterator[Any],
    resume: bool,
) -> tuple[State, int]:
    """The state to begin with, the steps it has behind it, and the data brought to that point."""
    make = partial(init_state, model, config, train)
    if not resume:
        saves.clear()
    found = saves.restore(_abstract(jax.eval_shape(make), mesh))
    if found is not None:
        state, data, done = found
        if done < train.steps:
            _forward(source, data, done)
        return state, done
    if params is None:
        return _jitted_init(model, config, computed(train), mesh)(np.uint32(train.seed)), 0
    abstract = jax.eval_shape(make)
    _same_structure(abstract.params, params)
    # A copy: the step donates its state, and the caller keeps what was passed.
    return jax.jit(lambda p: make(jax.tree.map(jnp.copy, p)), out_shardings=shardings(abstract, mesh))(params), 0


def _abstract(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def _same_structure(wanted: Any, given: Any) -> None:
    want, have = (
        {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (wanted, given)
    )
    wrong = [f"{name}: {have.get(name)}, the model has {want.get(name)}" for name in sorted(want.keys() | have.keys())
             if want.get(name) != have.get(name)]  # fmt: skip
    if wrong:
        raise ValueError("params do not fit the model: " + "; ".join(wrong[:5]))


def _forward(source: Iterator[Any], data: Any, done: int) -> None:
    if data is not None and hasattr(source, "set_state"):
        source.set_state(data)
        return
    if done:
        print(f"drawing {done} batches to come to step {done}: the iterator has no state", flush=True)
    for i in range(done):
        if next(source, None) is None:
            raise ValueError(f"the data ended after {i} batches, the checkpoint is at step {done}: give the same data")


def _data_state(source: Iterator[Any]) -> Any:
    return source.get_state() if hasattr(source, "get_state") else None


def _check(model: Any, batch: Any, config: Any, done: int) -> None:
    try:
        model.check(batch, config)
    except ValueError as error:
        error.add_note(f"in the batch of step {done}")
        raise


def _patience(records: list[dict[str, Any]], stopping: EarlyStopping | None) -> tuple[dict[str, Any] | None, int]:
    """The best evaluation so far, and how many came after it."""
    if stopping is None:
        return None, 0
    found = [entry for entry in records if stopping.metric in entry.get("evaluation", {})]
    sign = 1 if stopping.mode == "max" else -1
    best = max(
        found, key=lambda entry: sign * entry["evaluation"][stopping.metric], default=None
    )  # the first of equals
    return best, len(found) - 1 - found.index(best) if best else 0

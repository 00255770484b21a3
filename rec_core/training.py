"""Training under the contract: a run over batches, resumable, that stops where a number is not finite."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rec_core.checkpoint import Checkpoints, Log, config_record
from rec_core.optimizers import EarlyStopping, TrainConfig
from rec_core.sharding import make_mesh, path_name, put_batch, shardings
from rec_core.step import (
    State,
    advance,
    computed,
    init_state,
    jitted_init,
    make_step,
    pmap_step,
    step_key,
    value_and_grad,
)

__all__ = [
    "DivergedError", "EarlyStopping", "Result", "State", "TrainConfig", "advance", "fit", "init_state", "make_step",
    "pmap_step", "step_key", "value_and_grad",
]  # fmt: skip

_NO_GENERAL_EXCHANGE = (
    "With general_exchange=False a batch gives no number either where a device has more distinct ids than "
    "distinct_share, or a tenth more of one owner than of another: raise distinct_share, or allow the general form. "
)
RUN_AHEAD = 2  # steps that may be under way before the host looks at the oldest one's numbers


class DivergedError(RuntimeError):
    """The loss or the gradient norm was not finite. ``step``, ``loss``, ``gradient_norm`` say where."""

    def __init__(self, step: int, loss: float, gradient_norm: float, saved: str | None, hint: str = "") -> None:
        where = f"the state before it is saved in {saved}" if saved else "nothing was saved (no directory was given)"
        super().__init__(
            f"training diverged at step {step}: loss {loss}, gradient norm {gradient_norm}; {where}. {hint}Lower "
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
        run = _Run(log, saves, source, "" if train.general_exchange else _NO_GENERAL_EXCHANGE)
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

    def __init__(self, log: Log, saves: Checkpoints, source: Iterator[Any], hint: str) -> None:
        self.log, self.saves, self.source, self.hint = log, saves, source, hint
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
        raise DivergedError(step, metrics["loss"], metrics["gradient_norm"], where, self.hint)


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
        return jitted_init(model, config, computed(train), mesh)(np.uint32(train.seed)), 0
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

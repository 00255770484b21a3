"""What a run leaves on disk: checkpoints (Orbax, asynchronous), and its records as JSON lines.

A checkpoint holds the state, the data iterator's state, the configuration and a fingerprint of every array. The
configuration is compared first, since Orbax can see neither heads nor temperatures; shapes and dtypes next, since it
casts silently; the fingerprint last, since a flipped bit in an array file is read without a word. The iterator's state
is stored once for all processes (one global order), so a run of two processes continues on one.
"""

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rec_core.sharding import path_name

# Fields that change no number of the run (or only its rounding): a run may be continued with others.
FREE = frozenset(
    f"train.{name}"
    for name in ("log_every", "evaluate_every", "checkpoint_every", "keep", "early_stopping", "micro_batches")
)
RECORDS = "metrics.jsonl"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, cannot be read, or is of another run."""


class Found(NamedTuple):
    state: Any
    data: Any
    step: int


def config_record(model: Any, config: Any, train: Any = None) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that continues it: flat, path -> JSON value."""
    record: dict[str, Any] = {"model": model.__name__}
    _flatten("config", config, record)
    _flatten("train", train, record)
    if getattr(train, "decay", None) == "constant":
        record.pop("train.steps")  # then a longer run is the same run, longer
    return {name: value for name, value in record.items() if not name.startswith(tuple(FREE))}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each field that differs: its name, the saved value, the value now."""
    missing = "(absent)"
    return [
        f"{name}: {saved.get(name, missing)!r} in the checkpoint, {now.get(name, missing)!r} now"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name, missing) != now.get(name, missing)
    ]


class Checkpoints:
    """The checkpoints of one directory. Without a directory nothing is saved and nothing is found."""

    def __init__(self, directory: str | Path | None, record: Mapping[str, Any], *, keep: int = 2) -> None:
        self.directory = Path(directory).absolute() if directory else None
        self.record = json.loads(json.dumps(record))
        self.latest: int | None = None  # step of the last save or restore of this object
        self._pending: tuple[int, int] | None = None  # step and bytes of the save under way
        if self.directory is None:
            return
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handlers = {"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be used for checkpoints: {error}") from error

    def _path(self, step: int | str = "") -> Path:
        assert self.directory is not None
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps()) if self.directory else []

    def save(self, step: int, state: Any, data: Any = None) -> None:
        """Begins to save; the arrays are copied before it returns, so ``state`` may be donated at once.

        Args:
          data: the iterator's state, JSON, the same on every process.

        Raises:
          CheckpointError: this save cannot begin, or the one before it failed.
        """
        if self.directory is None:
            return
        self.wait()
        record = {"config": self.record, "data": data, "fingerprint": fingerprint(state)}
        try:
            record["crc"] = _crc(record)
        except TypeError as error:
            raise CheckpointError(f"the data iterator's state is not JSON ({error}): {data!r}") from error
        if step in self.steps() or (self._path(step)).exists():  # a damaged one, or of a run now cut back
            self._remove(step)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        self._pending = (step, size)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._failed(error) from error
        self.latest = step

    def wait(self) -> None:
        """Until the save under way is complete.

        Raises:
          CheckpointError: it failed; names the directory, the bytes needed and those free, and the last good step.
        """
        if self.directory is None or self._pending is None:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error
        self._pending = None

    def restore(self, like: Any) -> Found | None:
        """The newest checkpoint that is whole, laid out as ``like`` (ShapeDtypeStructs with shardings) says.

        A damaged one is passed over with a printed line. None where there is no checkpoint.

        Raises:
          CheckpointError: another configuration, shape or dtype (each field named), or every checkpoint is damaged.
        """
        damage = []
        for step in reversed(self.steps()):
            try:
                state, data = self.read(step, like)
            except _Damaged as error:
                damage.append(f"{self._path(step)} is damaged: {error}")
                print(f"{damage[-1]}; trying the checkpoint before it", flush=True)
                continue
            self.latest = step
            return Found(state, data, step)
        if damage:
            raise CheckpointError("no checkpoint can be read; start in a new directory. " + "; ".join(damage))
        return None

    def restore_step(self, like: Any, step: int) -> Any | None:
        """The state of one checkpoint, or None if it is missing or damaged."""
        try:
            return self.read(step, like)[0] if step in self.steps() else None
        except _Damaged as error:
            print(f"{self._path(step)} is damaged: {error}", flush=True)
            return None

    def clear(self, after: int = -1) -> None:
        """Removes the checkpoints of later steps than ``after``."""
        for step in self.steps():
            if step > after:
                self._remove(step)

    def close(self) -> None:
        if self.directory is not None:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait()
            self.close()
            return
        try:  # the first error is the one to tell; a save under way is still let finish
            self.wait()
            self.close()
        except Exception as second:
            error.add_note(f"and then: {second}")

    def read(self, step: int, like: Any = None) -> tuple[Any, Any]:
        """State and data of one checkpoint; without ``like`` whatever is there, unchecked against the configuration."""
        try:
            record = self._restore(step, record=ocp.args.JsonRestore())
            crc = record.pop("crc", None)
            if crc != _crc(record):
                raise ValueError("its record does not have the checksum it was written with")
            metadata = self._manager.item_metadata(step)["state"]
            saved = _arrays(metadata)
        except Exception as error:
            raise _Damaged(_line(error)) from error
        if like is None:
            like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)
        else:
            self._same(differences(record["config"], self.record), step)
            self._same(differences(saved, _arrays(like)), step)
        try:
            state = self._restore(step, state=ocp.args.StandardRestore(like))
        except Exception as error:
            raise _Damaged(_line(error)) from error
        found = fingerprint(state)
        wrong = [name for name, value in record["fingerprint"].items() if found.get(name) != value]
        if wrong:
            raise _Damaged(f"the values of {', '.join(wrong[:3])} are not those that were saved")
        return state, record["data"]

    def _restore(self, step: int, **item: Any) -> Any:
        (name,) = item
        return self._manager.restore(step, args=ocp.args.Composite(**item))[name]

    def _same(self, differing: list[str], step: int) -> None:
        if differing:
            raise CheckpointError(
                f"{self._path(step)} is of another configuration: {'; '.join(differing[:8])}"
                f"{f' and {len(differing) - 8} more' if len(differing) > 8 else ''}. "
                "Give the values it was made with, or another directory"
            )

    def _remove(self, step: int) -> None:
        if step in self.steps():
            self._manager.delete(step)
        elif jax.process_index() == 0:
            shutil.rmtree(self._path(step), ignore_errors=True)
        self._manager.reload()

    def _failed(self, error: Exception) -> CheckpointError:
        (step, size), self._pending = self._pending or (-1, 0), None
        free = shutil.disk_usage(self._path()).free
        if jax.process_index() == 0:
            for part in self._path().glob(f"{step}.orbax-checkpoint-tmp*"):  # the disk may be full: leave no remains
                shutil.rmtree(part, ignore_errors=True)
        self._manager.reload()
        good = [s for s in self.steps() if s != step]
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.directory}: {_line(error)}. It needs about "
            f"{size:,} bytes, {free:,} are free; "
            + (
                f"the last good one is step {good[-1]}, the run can go on from it"
                if good
                else "there is no earlier one"
            )
        )


class _Damaged(Exception):
    pass


def restore_params(directory: str | Path, step: int | None = None) -> Any:
    """The parameters in a run's checkpoint (the newest whole one), as numpy arrays, whatever the configuration was."""
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: give the one that the run was saved in")
    with Checkpoints(directory, {}) as saves:
        steps = saves.steps()[::-1]
        if (step is not None and step not in steps) or not steps:
            raise CheckpointError(f"{directory} holds no checkpoint{'' if step is None else f' of step {step}'}; "
                                  f"steps there: {sorted(steps)}")  # fmt: skip
        for one in steps if step is None else [step]:
            try:
                state, _ = saves.read(one)
            except _Damaged as error:
                print(f"{directory / str(one)} is damaged: {error}", flush=True)
                continue
            return jax.tree.map(np.asarray, state.get("params", state))
    raise CheckpointError(f"no checkpoint of {directory} can be read")


def fingerprint(tree: Any) -> dict[str, int]:
    """Path -> a sum over each array's bits, every element with its own odd weight (mod 2^32): the same on any mesh, and
    another one whenever one element changes."""
    values = _fingerprints([leaf for leaf in jax.tree.leaves(tree)])
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return {name: int(value) for name, value in zip(names, np.asarray(values))}


@jax.jit
def _fingerprints(leaves: list[Any]) -> jax.Array:
    def one(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        width = x.dtype.itemsize * 8
        kind = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}[width]
        bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, kind)
        place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
        for axis in reversed(range(bits.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
            stride *= bits.shape[axis]
        place = (place ^ (place >> 15)) * np.uint32(0x9E3779B1)
        return jnp.sum(bits.astype(jnp.uint32) * (place | np.uint32(1)), dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in leaves])


class Log:
    """A run's records: appended to ``metrics.jsonl``, given to ``on_log``, kept in ``records``.

    Opening it cuts back to the records up to step ``done`` (those after are made again) and drops a torn last line.
    Only the first process writes; all read.
    """

    def __init__(
        self,
        directory: str | Path | None,
        done: int,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.records: list[dict[str, Any]] = []
        self._first = jax.process_index() == 0
        self._on_log, self._file, self._events = on_log if self._first else None, None, None
        if directory is None:
            return
        path = Path(directory) / RECORDS
        if path.exists() and done:
            self.records = [record for record in read_records(path) if record["step"] <= done]
        if not self._first:
            return
        part = path.with_suffix(".part")
        with self._writing(str(path)):
            part.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            os.replace(part, path)
            self._file = path.open("a")
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard=True needs tensorboardX: install userscale[tensorboard]") from error
            self._events = SummaryWriter(str(Path(directory) / "tensorboard"), purge_step=done + 1)

    def write(self, record: dict[str, Any]) -> dict[str, Any]:
        self.records.append(record)
        if self._file:
            with self._writing(self._file.name):
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
        if self._events:
            for name, value in (record | record.get("evaluation", {})).items():
                if name not in ("step", "evaluation"):
                    self._events.add_scalar(name, value, record["step"])
        if self._on_log:
            self._on_log(record)
        return record

    def flush(self) -> None:
        """Records are on the disk, not in the system's memory, when this returns."""
        if self._file:
            with self._writing(self._file.name):
                os.fsync(self._file.fileno())

    @contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        """A disk without room is a CheckpointError that names the file; whole records before it stay."""
        try:
            yield
        except OSError as error:
            if self._file:
                with suppress(OSError):  # closing tries to write what is left, once more
                    self._file.close()
                self._file = None
            free = shutil.disk_usage(Path(path).parent).free
            raise CheckpointError(
                f"{path} cannot be written: {error}; {free:,} bytes are free on its disk. Make room and start again: "
                "the run goes on from its last checkpoint"
            ) from error

    def close(self) -> None:
        if self._events:
            self._events.close()
        if self._file:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``. A last line without its end (a kill) is left out.

    Raises:
      ValueError: another line is not JSON; names file and line.
    """
    text = Path(path).read_text()
    records = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON record ({error}): {line[:80]!r}") from error
    return records


def _flatten(name: str, value: Any, out: dict[str, Any]) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out[f"{name}.(type)"] = type(value).__qualname__
        for part in dataclasses.fields(value):
            _flatten(f"{name}.{part.name}", getattr(value, part.name), out)
    elif isinstance(value, (tuple, list)) and any(dataclasses.is_dataclass(item) for item in value):
        for i, item in enumerate(value):
            _flatten(f"{name}[{i}]", item, out)
    elif isinstance(value, (tuple, list)):
        out[name] = [item if isinstance(item, (int, float, str, bool, type(None))) else repr(item) for item in value]
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{name}.{key}", item, out)
    else:
        out[name] = value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)


def _arrays(tree: Any) -> dict[str, str]:
    """Path -> "float32[3,4]". The paths leave out what a restored tree cannot know (attribute, key or index)."""
    return {
        path_name(path): f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _crc(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _line(error: BaseException) -> str:
    """The first line of an error's text, with its kind."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:600]}"

"""The one form for everything that the project measures: a JSON file that is enough to repeat the run.

An experiment calls `record` when it has finished and `write` with what it got; README, reports and CI read the file
back with `read` and take numbers from `figures` alone. Nothing here is filled in by hand: commit, device and versions
are looked up, and the command is the one that the process was started with.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("userscale", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "polars", "lmdb")
OPTIONAL_PACKAGES = ("jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu")  # recorded where installed
UNKNOWN = "unknown"

type Cell = str | int | float | bool | None
type Row = dict[str, Cell]


@dataclass(frozen=True)
class Result:
    """What one run of one experiment measured, and where.

    Fields: `experiment` its name; `command` as typed; `commit` the git hash, "+dirty" where the tree differed from it,
    "unknown" outside git; `device` kind, count, processor, memory; `versions` name -> version; `seeds`; `started` UTC,
    ISO 8601; `seconds` wall clock; `rows` flat dictionaries, everything measured; `figures` name -> number, what
    README and CI quote.

    Raises ValueError where a field breaks the form (a NaN names its figure or its row and column).
    """

    experiment: str
    command: str
    commit: str
    device: dict[str, Cell]
    versions: dict[str, str]
    seeds: tuple[int, ...]
    started: str
    seconds: float
    rows: tuple[Row, ...]
    figures: dict[str, float]

    def __post_init__(self) -> None:
        for name in ("experiment", "command", "commit", "started"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} is {value!r}; a result needs a non-empty text there")
        try:
            datetime.fromisoformat(self.started)
        except ValueError:
            raise ValueError(f"started is {self.started!r}; write ISO 8601, as 2025-01-31T12:00:00+00:00") from None

        def set_(name: str, value: Any) -> None:  # the dataclass is frozen
            object.__setattr__(self, name, value)

        set_("seconds", _number("seconds", self.seconds))
        if self.seconds < 0:
            raise ValueError(f"seconds is {self.seconds}; a run cannot take less than 0 s")
        for seed in _sequence("seeds", self.seeds):
            if isinstance(seed, bool) or not isinstance(_plain(seed), int):
                raise ValueError(f"seeds holds {seed!r}; seeds are whole numbers")
        set_("seeds", tuple(_plain(seed) for seed in self.seeds))
        set_("device", _flat("device", self.device))
        set_("versions", {k: str(v) for k, v in _mapping("versions", self.versions).items()})
        set_("rows", tuple(_flat(f"rows[{i}]", row) for i, row in enumerate(_sequence("rows", self.rows))))
        figures = _mapping("figures", self.figures)
        set_("figures", {name: _number(f"figure {name!r}", value) for name, value in figures.items()})


def record(
    experiment: str,
    *,
    started: datetime,
    seeds: Iterable[int],
    rows: Iterable[Mapping[str, Any]],
    figures: Mapping[str, Any],
    command: str | None = None,
    seconds: float | None = None,
) -> Result:
    """The result of the run that began at `started` (an aware datetime, `begin()`): looks up commit, device, versions.

    `command` is what to type for the same run (default: how this process was started); `seconds` its wall-clock time
    (default: from `started` to now). NumPy and JAX scalars in `rows` and `figures` become plain numbers.
    """
    if started.tzinfo is None:
        raise ValueError(f"started is {started!r}, without a time zone; take it from results.begin()")
    return Result(
        experiment=experiment,
        command=command or started_command(),
        commit=commit(),
        device=device(),
        versions=versions(),
        seeds=tuple(seeds),
        started=started.astimezone(UTC).isoformat(timespec="seconds"),
        seconds=round((datetime.now(UTC) - started).total_seconds(), 3) if seconds is None else seconds,
        rows=tuple(dict(row) for row in rows),
        figures=dict(figures),
    )


def begin() -> datetime:
    """The time now, in UTC: what `record` takes as `started`."""
    return datetime.now(UTC)


def write(path: str | os.PathLike[str], result: Result) -> Path:
    """Writes `result` as JSON. A reader finds the old file or the new one, never a part of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _text(result))
    return path


def make_folder(path: Path) -> None:
    """Makes the folder of a result, if need be, and a file in it for a moment, before anything is measured for it.

    Raises OSError naming it where it is a file, or cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path):
        pass


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` beside `path`, forces it to disk, then renames it over `path`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private; a result is to be read by others
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read(path: str | os.PathLike[str]) -> Result:
    """The result in the file. Raises ValueError that names the file and what is wrong in it."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; an experiment writes it when it finishes") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}); run the experiment again") from None
    except ValueError as error:  # a byte that is not UTF-8, or NaN
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected an object with the fields of a result")
    names = {field.name for field in dataclasses.fields(Result)}
    if missing := sorted(names - set(content)):
        raise ValueError(f"{path}: lacks {', '.join(missing)}; a result has {', '.join(sorted(names))}")
    if unknown := sorted(set(content) - names):
        raise ValueError(f"{path}: has unknown fields {', '.join(unknown)}; a result has {', '.join(sorted(names))}")
    try:
        return Result(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def join(paths: Sequence[str | os.PathLike[str]], experiment: str, apart: Sequence[str] = ()) -> Result:
    """The first result with the rows of the others, which say their device (measured_on), commit and command, unless
    they were joined before and say so already; and the figures of theirs that it lacks.

    Args:
      apart: columns in which what was measured for one file differs from what was for any other; none: all is taken.

    Raises:
      ValueError: a file holds no result, one of another experiment, one of a quick run beside one of a full run, or
        what another one has.
    """
    first, *others = map(read, paths)
    known: dict[tuple[tuple[str, Cell], ...], Any] = {}
    for path, other in zip(paths, (first, *others), strict=True):
        if other.experiment != experiment:
            raise ValueError(f"{path} is a result of {other.experiment}; give results of {experiment}")
        if is_quick(other) != is_quick(first):
            raise ValueError(f"of {paths[0]} and {path}, one is of a quick run; give results of the same sizes")
        measured = [row for row in other.rows if apart and "reason" not in row]
        for case in dict.fromkeys(tuple((name, row[name]) for name in apart if name in row) for row in measured):
            if case in known:
                said = ", ".join(f"{name} {value!r}" for name, value in case)
                raise ValueError(f"joined: {said} is in {known[case]} and in {path}; give one of them")
            known[case] = path
    rows, found = list(first.rows), dict(first.figures)
    for other in others:
        kind = f"{other.device['count']} x {other.device['kind']}"
        origin: Row = {"measured_on": kind, "commit": other.commit, "command": other.command}
        rows += [dict(row) | (origin if "measured_on" not in row else {}) for row in other.rows]
        found = dict(other.figures) | found
    return dataclasses.replace(first, rows=tuple(rows), figures=found)


def is_quick(result: Result) -> bool:
    """Whether it is of the sizes of a test: by its command, or by its figures, small_..."""
    return "--quick" in result.command.split() or any(name.startswith("small_") for name in result.figures)


def compare(a: Result | str | os.PathLike[str], b: Result | str | os.PathLike[str]) -> list[Row]:
    """The figures of two results side by side: rows {figure, a, b, difference, ratio} for `progress.table`.

    `ratio` is b / a. A figure that one side lacks has None there, as has the ratio where a is 0.
    """
    left = (a if isinstance(a, Result) else read(a)).figures
    right = (b if isinstance(b, Result) else read(b)).figures
    rows: list[Row] = []
    for name in [*left, *(name for name in right if name not in left)]:
        x, y = left.get(name), right.get(name)
        row: Row = {"figure": name, "a": x, "b": y, "difference": None, "ratio": None}
        if x is not None and y is not None:
            row |= {"difference": y - x, "ratio": y / x if x else None}
        rows.append(row)
    return rows


def started_command() -> str:
    """How this process was started, with `python` for the interpreter's own path."""
    arguments = list(sys.orig_argv)
    return shlex.join(["python" if Path(arguments[0]).name.startswith("python") else arguments[0], *arguments[1:]])


def commit() -> str:
    """The git commit of this source tree: its hash, "+dirty" where sources differ from it, "unknown" where not in git.

    Where the sources were copied without their repository (a container, a cluster), $USERSCALE_COMMIT names it.

    An installed copy that happens to lie inside somebody else's repository is not taken for that repository's. Result
    files (`experiments/results/`) do not make a tree dirty, or no two results could carry one clean commit.
    """
    here = Path(__file__).resolve()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # set inside git hooks

    def git(*arguments: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environment)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:
        return os.environ.get("USERSCALE_COMMIT") or UNKNOWN
    revision = git("rev-parse", "--verify", "HEAD")
    changes = git("status", "--porcelain", "--", ":/", ":(top,exclude)experiments/results")
    if revision is None or changes is None:
        return UNKNOWN
    return revision + ("+dirty" if changes else "")


def device() -> dict[str, Cell]:
    """The accelerator (kind as JAX names it, platform, count over all processes), processor name, memory in GiB."""
    first = jax.local_devices()[0]
    try:
        limit = (first.memory_stats() or {}).get("bytes_limit")
    except (jax.errors.JaxRuntimeError, NotImplementedError, AttributeError):
        limit = None  # not every backend counts its memory
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "count": jax.device_count(),
        "processes": jax.process_count(),
        "device_memory_gib": round(limit / 2**30, 1) if limit else None,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that a number can depend on."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *OPTIONAL_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in PACKAGES:
                found[name] = UNKNOWN
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or UNKNOWN


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _text(result: Result) -> str:
    """JSON with a line for each row and each figure, so that a diff shows which number changed."""

    def dump(value: Any) -> str:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)

    parts = []
    for name, value in dataclasses.asdict(result).items():
        if name == "rows" and value:
            dumped = "[\n  " + ",\n  ".join(dump(row) for row in value) + "\n ]"
        elif isinstance(value, dict) and value:
            dumped = "{\n  " + ",\n  ".join(f"{dump(k)}: {dump(v)}" for k, v in value.items()) + "\n }"
        else:
            dumped = dump(value)
        parts.append(f" {dump(name)}: {dumped}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"holds {name}, which JSON does not have; run the experiment again")


def _plain(value: Any) -> Any:
    """NumPy and JAX scalars as Python's."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value


def _number(what: str, value: Any) -> float:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is {value!r}; it must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}; leave out what could not be measured, NaN and infinity are not results")
    return value


def _flat(what: str, row: Any) -> Row:
    flat: Row = {}
    for name, value in _mapping(what, row).items():
        value = _plain(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{what}, column {name!r} is {value}; write None for what could not be measured")
        if value is not None and not isinstance(value, bool | int | float | str):
            kind = type(value).__name__
            raise ValueError(f"{what}, column {name!r} is a {kind}; rows are flat: text, numbers, booleans or None")
        flat[name] = value
    return flat


def _mapping(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is a {type(value).__name__}; expected a mapping of names")
    for name in value:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{what} has the name {name!r}; names are non-empty texts")
    return value


def _sequence(what: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what} is a {type(value).__name__}; expected a list")
    return value

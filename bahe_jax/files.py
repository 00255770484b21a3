"""What all readers of a language model's files share: errors, paths that stay inside, JSON, one tensor's face."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MOST_JSON = 256 << 20  # bytes; tokenizers of 250k tokens take 30 MB


class ModelError(ValueError):
    """A language model's files cannot be used; the message names the file, the field or tensor, and the remedy."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not yet read.

    `read(index)` takes a slice (step 1) of each dimension and gives that part in a floating dtype.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]

    @property
    def place(self) -> str:
        return f"{self.file}: tensor {self.name}"


def inside(folder: Path, name: Any, said_by: str) -> Path:
    """The regular file `name` of `folder`.

    Raises:
      ModelError: a name with a path in it, a link that leads out of the folder, or no such file.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ModelError(f"{said_by}: names the file {name!r}: it must be a plain file name in {folder}")
    path = folder / name
    if path.exists() and not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{path}: is a link to {path.resolve()}, outside of {folder}: put the file itself there")
    if not path.is_file():
        raise ModelError(f"{said_by}: {path} is not there (or is no regular file): complete the folder")
    return path


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """The whole file; more than `most` bytes are an error."""
    if not path.is_file():
        raise ModelError(f"{path}: is not there, or is no regular file")
    try:
        size = path.stat().st_size
        if size > most:
            raise ModelError(f"{path}: has {size:,} bytes, more than {most:,}: this is no such file")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def parse_json(data: bytes, place: str) -> dict[str, Any]:
    """A JSON object; a key given twice, NaN or infinity are errors."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) < len(items):
            names = [name for name, _ in items]
            raise ModelError(f"{place}: {next(n for n in names if names.count(n) > 1)!r} is given twice")
        return made

    def constant(text: str) -> Any:
        raise ModelError(f"{place}: holds {text}, which is no JSON number")

    try:
        made = json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except ModelError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{place}: is no JSON text (damaged or cut short?): {error}") from error
    if not isinstance(made, dict):
        raise ModelError(f"{place}: is a JSON {type(made).__name__}, expected an object")
    return made


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class Fields:
    """Reads named fields of one type each, with errors that name file, field and value."""

    def __init__(self, place: str, values: dict[str, Any], prefix: str = "") -> None:
        self.place, self.values, self.prefix = place, values, prefix

    def error(self, name: str, rule: str) -> ModelError:
        if name in self.values:
            return ModelError(f"{self.place}: {self.prefix}{name} is {self.values[name]!r}: {rule}")
        return ModelError(f"{self.place}: {self.prefix}{name} is missing: {rule}")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer from `least` to 2**31 - 1; absent or null takes the default, and without one is an error."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int or not least <= value < 2**31:
            raise self.error(name, f"it must be an integer from {least} to {2**31 - 1}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value: Any = self.values.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.error(name, "it must be a finite number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.error(name, "it must be true or false")
        return value

    def fixed(self, name: str, *allowed: Any) -> None:
        """Only these values are supported (absent or null always is)."""
        value = self.values.get(name)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            raise self.error(name, f"supported is {' or '.join(repr(a) for a in allowed)}")

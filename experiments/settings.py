"""What the settings of several experiments share: sizes of a quick run, and results that are to be joined."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any


def in_small[T](config: T, sizes: Mapping[str, Any], *, together: Sequence[str] = ()) -> T:
    """The settings with these values in the fields that are at their default, as `--quick` has them; what was given
    stays. A field that was given its default's value cannot be told from one left out, and is changed.

    Args:
      together: fields that must fit each other: one of them given, none of them is changed.
    """
    given: Any = config
    default = type(given)()
    own = {name for name in {*sizes, *together} if getattr(given, name) != getattr(default, name)}
    kept = own | (set(together) if own & set(together) else set())
    small: T = replace(given, **{name: value for name, value in sizes.items() if name not in kept})
    return small


def check_joined(joined: Sequence[Path] | None) -> None:
    """Raises ValueError where `--joined` names no file: without it everything would be measured."""
    if joined is not None and not joined:
        raise ValueError("joined names no file; give results of the experiment: --joined A.json B.json")

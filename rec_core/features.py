"""Host side of the features: vocabularies, stable hashes of raw values, bucket boundaries, and checks.

NumPy only. What is checked here cannot be checked on a device, where an id out of range or a NaN would pass.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from rec_core.embedding import PAD, UNKNOWN, Categorical, Continuous, Cross, Feature, Hashed, fields

_FIRST = UNKNOWN + 1


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Raw values to ids: 0 is padding, 1 unknown or rare, and 2, 3, ... the kept values, most frequent first.

    `values` are the kept raw values (integers or strings) in id order, `counts` their frequencies.
    """

    values: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or self.values.shape != self.counts.shape:
            raise ValueError(
                f"vocabulary: values {self.values.shape} and counts {self.counts.shape} must be one row each"
            )
        order = np.argsort(self.values, kind="stable")
        ordered = self.values[order]
        repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
        if repeated.size:
            raise ValueError(f"vocabulary: value {ordered[repeated[0]]!r} occurs twice; merge its counts first")
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_ordered", ordered)

    @property
    def size(self) -> int:
        """Rows that a table needs, padding and unknown included."""
        return len(self.values) + _FIRST

    def encode(self, raw: Any) -> np.ndarray:
        """int32 ids of any shape. Values that were not kept give 1; padding is never given."""
        raw = _plain(raw, "encode")
        if not len(self.values):
            return np.full(raw.shape, UNKNOWN, np.int32)
        if raw.dtype.kind != self.values.dtype.kind and {raw.dtype.kind, self.values.dtype.kind} != {"i", "u"}:
            raise ValueError(
                f"vocabulary of {self.values.dtype} values cannot encode {raw.dtype} values: no value would be found; "
                "read the column with the type it had when the vocabulary was made"
            )
        ordered: np.ndarray = self._ordered  # type: ignore[attr-defined]
        order: np.ndarray = self._order  # type: ignore[attr-defined]
        position = np.minimum(np.searchsorted(ordered, raw), len(ordered) - 1)
        return np.where(ordered[position] == raw, order[position] + _FIRST, UNKNOWN).astype(np.int32)

    def decode(self, ids: Any) -> np.ndarray:
        """Raw values of ids from 2 on; padding and unknown have none."""
        ids = np.asarray(ids)
        wrong = (ids < _FIRST) | (ids >= self.size)
        if wrong.any():
            raise ValueError(
                f"vocabulary: id {ids[wrong].flat[0]} has no raw value; ids {_FIRST} to {self.size - 1} have"
            )
        return self.values[ids - _FIRST]

    def save(self, path: str | PathLike[str]) -> None:
        with open(path, "wb") as file:
            np.savez(file, values=self.values, counts=self.counts)


def vocabulary_from_counts(values: Any, counts: Any, *, min_count: int = 1) -> Vocabulary:
    """Keep values seen at least `min_count` times, by falling count, ties by value. The rest becomes unknown."""
    values, counts = _plain(values, "values"), np.asarray(counts, np.int64)
    if min_count < 1:
        raise ValueError(f"min_count is {min_count}, must be at least 1")
    if values.ndim != 1 or values.shape != counts.shape:
        raise ValueError(f"vocabulary: values {values.shape} and counts {counts.shape} must be one row each")
    kept = counts >= min_count
    values, counts = values[kept], counts[kept]
    order = np.lexsort((values, -counts))
    return Vocabulary(values[order], counts[order])


def vocabulary_from_values(values: Any, *, min_count: int = 1) -> Vocabulary:
    """The same, counting the occurrences in a column."""
    distinct, counts = np.unique(_plain(values, "values"), return_counts=True)
    return vocabulary_from_counts(distinct, counts, min_count=min_count)


def load_vocabulary(path: str | PathLike[str]) -> Vocabulary:
    try:
        with np.load(path, allow_pickle=False) as file:
            return Vocabulary(file["values"], file["counts"])
    except (KeyError, ValueError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: not a vocabulary written by Vocabulary.save ({error}); write it again") from error


def stable_ids(values: Any) -> np.ndarray:
    """int32 hashes of strings or 64-bit integers, for `Hashed` and `Cross`; the same in every process and release.

    FNV-1a over 8-byte words (integers) or 4-byte code points (strings, trailing zeros left out), folded to 31 bits.
    """
    values = _plain(values, "values")
    if values.dtype.kind in "iu":
        words = values.astype(np.int64).view(np.uint64)[..., None]
    else:
        length = values.dtype.itemsize // 4
        words = np.ascontiguousarray(values).view(np.uint32).reshape(*values.shape, length).astype(np.uint64)
    hashed = np.full(values.shape, 0xCBF29CE484222325, np.uint64)
    for i in range(words.shape[-1]):
        step = (hashed ^ words[..., i]) * np.uint64(0x100000001B3)
        hashed = step if values.dtype.kind in "iu" else np.where(words[..., i] > 0, step, hashed)
    hashed ^= hashed >> np.uint64(33)
    hashed *= np.uint64(0xFF51AFD7ED558CCD)
    return (hashed >> np.uint64(33)).astype(np.int32)


def quantile_boundaries(values: Any, buckets: int) -> tuple[float, ...]:
    """Cuts for `Continuous` that put about equally many of the finite values in each of at most `buckets` buckets."""
    values = np.asarray(values, np.float32)
    check_not_nan("values", values)
    values = values[np.isfinite(values)]
    if buckets < 2 or not values.size:
        raise ValueError(
            f"quantile_boundaries needs at least 2 buckets and a finite value, got {buckets}, {values.size}"
        )
    cuts = np.unique(np.quantile(values, np.arange(1, buckets) / buckets).astype(np.float32))
    return tuple(float(cut) for cut in cuts)


def check_ids(name: str, ids: Any, size: int) -> None:
    """ValueError naming row and value unless every id is a whole number in `[0, size)`."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: ids must be integers, got {ids.dtype}")
    wrong = np.argwhere((ids < PAD) | (ids >= size))
    if len(wrong):
        raise ValueError(
            f"{name}: id {ids[tuple(wrong[0])]} at {_where(wrong[0])} is outside [0, {size}) "
            f"({len(wrong)} such of {ids.size}); encode with the vocabulary that the table was sized for"
        )


def check_not_nan(name: str, values: Any, *, finite: bool = False) -> None:
    """ValueError naming the row of the first NaN (or, with `finite`, the first NaN or infinity)."""
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{name}: must be numbers, got {values.dtype}")
    if values.dtype.kind == "f":
        wrong = np.argwhere(~np.isfinite(values) if finite else np.isnan(values))
        if len(wrong):
            raise ValueError(
                f"{name}: {values[tuple(wrong[0])]} at {_where(wrong[0])} ({len(wrong)} such of {values.size}); "
                "fill missing values before, with a value of their own"
            )


def check_shape(name: str, values: Any, shape: tuple[int, ...]) -> None:
    if np.shape(values) != shape:
        raise ValueError(f"{name}: shape {np.shape(values)}, must be {shape}")


def check_fields(where: str, specs: Iterable[Feature], raw: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Presence and shape of the fields that `specs` read; no value is looked at, so it serves under jit as well."""
    for name in fields(specs):
        if name not in raw:
            raise ValueError(f"{where}: field {name!r} is missing; present: {sorted(raw)}")
        check_shape(f"{where}[{name!r}]", raw[name], shape)


def check_features(where: str, specs: Iterable[Feature], raw: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """All host checks of the fields that `specs` read: presence, shape, type, range, NaN. `where` opens the message."""
    specs = tuple(specs)
    check_fields(where, specs, raw, shape)
    for spec in specs:
        for part in spec.of if isinstance(spec, Cross) else (spec,):
            name = part if isinstance(part, str) else part.name
            label, values = f"{where}[{name!r}]", np.asarray(raw[name])
            if isinstance(part, Continuous):
                check_not_nan(label, values)
            elif isinstance(part, Categorical):
                check_ids(label, values, part.size)
            elif isinstance(part, Hashed | str):
                _check_int32(label, values)


def check_mask(name: str, mask: Any) -> tuple[int, int]:
    """The shape of a bool mask `[B, T]` with at least one example and one slot, or a ValueError."""
    shape = mask_shape(name, mask)
    if np.asarray(mask).dtype != bool:
        raise ValueError(f"{name}: must be bool, got {np.asarray(mask).dtype}")
    return shape


def mask_shape(name: str, mask: Any) -> tuple[int, int]:
    """`check_mask` of the shape alone, which is known under jit as well."""
    shape = np.shape(mask)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name}: shape {shape}, must be [B, T] with at least one example and one slot")
    return shape


def check_labels(label: Any, weight: Any, size: int, tasks: int = 1) -> None:
    """Labels `[size]` (`[size, tasks]` for several tasks) in [0, 1] and weights `[size]` of at least 0, all finite."""
    label, weight = np.asarray(label), np.asarray(weight)
    check_shape("label", label, (size,) if tasks == 1 else (size, tasks))
    check_shape("weight", weight, (size,))
    for name, values, wrong, rule in (
        ("label", label, (label < 0) | (label > 1), "in [0, 1]"),
        ("weight", weight, weight < 0, "at least 0"),
    ):
        check_not_nan(name, values, finite=True)
        if wrong.any():
            row = np.argwhere(wrong)[0]
            raise ValueError(f"{name}: {values[tuple(row)]} at row {row[0]} must be {rule}")


def _check_int32(name: str, values: np.ndarray) -> None:
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name}: hashed fields are integers, got {values.dtype}; see rec_core.features.stable_ids")
    wrong = np.argwhere((values < -(2**31)) | (values >= 2**31))
    if len(wrong):
        raise ValueError(
            f"{name}: {values[tuple(wrong[0])]} at {_where(wrong[0])} does not fit 32 bits; "
            "see rec_core.features.stable_ids"
        )


def _where(index: np.ndarray) -> str:
    row, *rest = (int(i) for i in index) if len(index) else (0,)
    return f"row {row}" + (f", position {', '.join(map(str, rest))}" if rest else "")


def _plain(values: Any, name: str) -> np.ndarray:
    """Integers or fixed-width strings; never objects, so that files need no pickle."""
    values = np.asarray(values)
    if values.dtype.kind == "O":
        missing = np.argwhere(np.vectorize(lambda v: not isinstance(v, str | int | np.integer), otypes=[bool])(values))
        if len(missing):
            raise ValueError(
                f"{name}: {values[tuple(missing[0])]!r} at {_where(missing[0])} is neither string nor integer"
            )
        strings = {isinstance(v, str) for v in values.flat}
        if len(strings) > 1:
            raise ValueError(f"{name}: strings and integers are mixed; convert the column to one type")
        values = values.astype(np.str_ if strings == {True} else np.int64)
    if values.dtype.kind not in "iuU":
        raise ValueError(f"{name}: must be integers or strings, got {values.dtype}")
    return values

"""From raw feature values to vectors: feature specs, tables, look-up, and rows for sparse updates.

A feature is described by a frozen spec. `indices` turns its raw value into table rows with integer arithmetic
only, and `embed` reads the rows; both are the same pure functions at training and at serving, so a feature cannot
mean two things. Raw values come as a mapping from field name to array; all arrays of one call share their shape
`[...]` (or broadcast to one). Out-of-range ids cannot raise on a device and are clipped there: call
`rec_core.features.check_features` on the host first.

Tables are plain `[rows, width]` float32 arrays, split over devices by the rules in `rec_core.sharding`. `lookup`
takes a table or `Rows`, the few rows of it that a batch touches, so that a gradient can be taken with respect to
these rows alone.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

PAD = 0
UNKNOWN = 1
MISSING_ROW = jnp.nan  # a row that `Rows` lacks is a mistake in `touched`; it must not pass for a vector of zeros
FEW = 64  # rows of a table of which a batch reads each many times: compared with all, not sorted or scattered
MAPPED = 256  # look-ups among `Rows` go by a map of the table where it has at most so many rows for each of them
_COMBINE = ("sum", "concat")


@dataclass(frozen=True)
class Categorical:
    """An encoded id in `[0, size)`, one row each (0 padding, 1 unknown). Specs that name one `table` share it."""

    name: str
    size: int
    width: int
    table: str | None = None

    def __post_init__(self) -> None:
        _positive(self, size=self.size, width=self.width)


@dataclass(frozen=True)
class Hashed:
    """Any int32, read at `hashes` rows chosen by as many hash functions and summed or concatenated.

    Two values are confused only where all their hashes agree: one pair in `buckets ** hashes`
    (Bloom embeddings, arXiv 1706.03993). `width` is the width of the result in both forms.
    """

    name: str
    buckets: int
    width: int
    hashes: int = 2
    combine: str = "sum"
    table: str | None = None

    def __post_init__(self) -> None:
        _positive(self, buckets=self.buckets, width=self.width, hashes=self.hashes)
        _check_combine(self)


@dataclass(frozen=True)
class Continuous:
    """A float, cut at the increasing `boundaries` into `len(boundaries) + 1` buckets, one row each.

    Bucket i holds `boundaries[i - 1] <= x < boundaries[i]`; -inf and +inf fall in the end buckets.
    """

    name: str
    boundaries: tuple[float, ...]
    width: int
    table: str | None = None

    def __post_init__(self) -> None:
        _positive(self, width=self.width)
        cuts = np.asarray(self.boundaries, np.float32)
        if not isinstance(self.boundaries, tuple) or cuts.ndim != 1 or not cuts.size:
            raise ValueError(f"feature {self.name!r}: boundaries must be a tuple of at least one number")
        if not np.isfinite(cuts).all() or (np.diff(cuts) <= 0).any():
            raise ValueError(
                f"feature {self.name!r}: boundaries {self.boundaries} must be finite and strictly increasing "
                "in float32; drop repeated quantiles"
            )


@dataclass(frozen=True)
class Cross:
    """The combination of several fields, hashed as `Hashed` is. `of` holds names of integer fields, or `Continuous`
    specs, whose bucket is taken."""

    name: str
    of: tuple[str | Continuous, ...]
    buckets: int
    width: int
    hashes: int = 2
    combine: str = "sum"
    table: str | None = None

    def __post_init__(self) -> None:
        _positive(self, buckets=self.buckets, width=self.width, hashes=self.hashes)
        _check_combine(self)
        if not isinstance(self.of, tuple) or len(self.of) < 2:
            raise ValueError(f"feature {self.name!r}: `of` is {self.of!r}, a cross needs a tuple of two fields or more")


Feature = Categorical | Hashed | Continuous | Cross
Raw = Mapping[str, Any]


@struct.dataclass
class Rows:
    """Some rows of a table. Rows that fill up the fixed size carry ids past the table's end."""

    ids: Int[Array, " n"]  # distinct within the table; increasing if `ordered`
    values: Float[Array, "n width"]
    size: int | None = struct.field(pytree_node=False, default=None)  # rows of the table, where it is known
    ordered: bool = struct.field(pytree_node=False, default=True)


def table_name(spec: Feature) -> str:
    return spec.table or spec.name


def table_shape(spec: Feature) -> tuple[int, int]:
    """Rows and width of the table that the spec reads."""
    if isinstance(spec, Categorical):
        return spec.size, spec.width
    if isinstance(spec, Continuous):
        return len(spec.boundaries) + 1, spec.width
    return spec.buckets, spec.width // spec.hashes if spec.combine == "concat" else spec.width


def width(specs: Iterable[Feature]) -> int:
    """The last axis of `embed`."""
    return sum(spec.width for spec in specs)


def fields(specs: Iterable[Feature]) -> tuple[str, ...]:
    """Names of the raw fields that the specs read, each once, in order."""
    names: dict[str, None] = {}
    for spec in specs:
        parts = spec.of if isinstance(spec, Cross) else (spec,)
        names.update((part if isinstance(part, str) else part.name, None) for part in parts)
    return tuple(names)


def tables(specs: Iterable[Feature]) -> dict[str, tuple[int, int]]:
    """Shape of each table that the specs read. Specs that share a table must agree on its shape."""
    shapes: dict[str, tuple[int, int]] = {}
    for spec in specs:
        name, shape = table_name(spec), table_shape(spec)
        if shapes.setdefault(name, shape) != shape:
            raise ValueError(
                f"table {name!r}: feature {spec.name!r} wants shape {shape}, another feature {shapes[name]}; "
                "give both one size and width, or name another table"
            )
    return shapes


def init_tables(key: Array, specs: Iterable[Feature], *, scale: float = 0.05) -> dict[str, Float[Array, "rows width"]]:
    """Normal entries with standard deviation `scale`. A table's numbers depend on the key and its own name only."""
    return {
        name: scale * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), shape, jnp.float32)
        for name, shape in tables(specs).items()
    }


def indices(spec: Feature, raw: Raw) -> Int[Array, "..."]:
    """Table rows of a feature: int32 `[...]`, or `[..., hashes]` for hashed and crossed features."""
    if isinstance(spec, Categorical):
        return jnp.asarray(_field(raw, spec.name, spec.name), jnp.int32)
    if isinstance(spec, Continuous):
        return _bucket(spec, _field(raw, spec.name, spec.name))
    if isinstance(spec, Hashed):
        mixed = _mix(_bits(_field(raw, spec.name, spec.name)))
    else:
        mixed = jnp.uint32(0)
        for part in spec.of:
            value = _field(raw, part if isinstance(part, str) else part.name, spec.name)
            bits = _bits(value if isinstance(part, str) else _bucket(part, value))
            mixed = _mix(mixed * jnp.uint32(0x01000193) + _mix(bits))
    seeds = jnp.asarray([(0x9E3779B9 * (i + 1)) % 2**32 for i in range(spec.hashes)], jnp.uint32)
    return (_mix(mixed[..., None] ^ seeds) % jnp.uint32(spec.buckets)).astype(jnp.int32)


def lookup(
    table: Float[Array, "rows width"] | Rows, ids: Int[Array, "..."], *, where: Bool[Array, "..."] | None = None
) -> Float[Array, "... width"]:
    """Rows of a table by id. From `Rows`, an id that was not gathered gives NaN.

    Args:
      where: elsewhere the result is zeros, and no row has a gradient from there. Padding is best left out so: a
        gradient would be added to its one row time and again, one after the other, on an accelerator.
    """
    position, present = ids, None
    values = table.values if isinstance(table, Rows) else table
    if isinstance(table, Rows):
        position = _position(table, ids)
        present = jnp.take(table.ids, position, mode="clip") == ids
    size = values.shape[0]
    position = jnp.clip(position, 0, size - 1)
    if where is not None:
        position = jnp.where(where, position, size)
        present = None if present is None else present | ~where
    vectors: Array = (_take_few if size <= FEW else take_rows)(values, position)
    return vectors if present is None else jnp.where(present[..., None], vectors, MISSING_ROW)


def embed(
    tables: Mapping[str, Any], specs: Iterable[Feature], raw: Raw, *, where: Bool[Array, "..."] | None = None
) -> Float[Array, "... width"]:
    """The features' vectors, concatenated in the order of `specs` (at least one); zeros but `where` (see `lookup`)."""
    parts = []
    for spec in specs:
        rows = indices(spec, raw)
        there = None if where is None else jnp.broadcast_to(_at_end(where, rows.ndim), rows.shape)
        vectors = lookup(tables[table_name(spec)], rows, where=there)
        if isinstance(spec, Hashed | Cross):  # [..., hashes, table width]
            flat = (*vectors.shape[:-2], spec.width)
            vectors = vectors.reshape(flat) if spec.combine == "concat" else vectors.sum(axis=-2)
        parts.append(vectors)
    if not parts:
        raise ValueError("embed needs at least one feature")
    leading = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return jnp.concatenate([jnp.broadcast_to(part, (*leading, part.shape[-1])) for part in parts], axis=-1)


def touched(*groups: tuple[Iterable[Feature], Raw]) -> dict[str, Int[Array, " n"]]:
    """Rows that `embed(tables, specs, raw)` reads, for each `(specs, raw)`: ids by table, with repetitions."""
    found: dict[str, list[Array]] = {}
    for specs, raw in groups:
        for spec in specs:
            found.setdefault(table_name(spec), []).append(indices(spec, raw).reshape(-1))
    return {name: jnp.concatenate(ids) for name, ids in found.items()}


def distinct(ids: Int[Array, "..."], rows: int) -> Int[Array, " n"]:
    """The distinct ids in increasing order, in a fixed size that always suffices: `min(ids.size, rows)`.

    What fills up the size is `rows`, past the table's end.
    """
    # Clipped as in `lookup`, so that an id out of range cannot push a valid one out of the fixed size.
    clipped = jnp.clip(ids.reshape(-1), 0, rows - 1).astype(jnp.int32)
    size = min(ids.size, rows)
    if rows <= FEW:
        there = jnp.any(clipped[:, None] == jnp.arange(rows), axis=0)
        return jnp.nonzero(there, size=size, fill_value=rows)[0].astype(jnp.int32)
    ordered = jnp.sort(clipped)
    first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    # Only the first of equal ids is written. `jnp.unique` counts them, which adds to one address for each.
    place = apart(jnp.where(first, jnp.cumsum(first, dtype=jnp.int32) - 1, size), size)
    return jnp.full(size, rows, jnp.int32).at[place].set(ordered, mode="drop", unique_indices=True)


def take_rows(table: Float[Array, "rows width"], ids: Int[Array, "..."]) -> Float[Array, "... width"]:
    """Rows of a table; zeros for ids past its end."""
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=0)


def gather_rows(table: Float[Array, "rows width"], ids: Int[Array, "..."]) -> Rows:
    """The distinct rows among `ids`, in the size of `distinct`."""
    unique = distinct(ids, table.shape[0])
    return Rows(unique, take_rows(table, unique), table.shape[0])


def scatter_rows(table: Float[Array, "rows width"], rows: Rows) -> Float[Array, "rows width"]:
    """The table with these rows replaced; ids past its end are left out."""
    ids = apart(rows.ids, table.shape[0])
    return table.at[ids].set(rows.values, mode="drop", unique_indices=True, indices_are_sorted=rows.ordered)


def apart(ids: Int[Array, " n"], end: int) -> Int[Array, " n"]:
    """The ids with those past the end spread out, where a scatter is promised distinct ones: it then writes without
    waiting for other writes to the place."""
    return jnp.where(ids >= end, end + jnp.arange(ids.size, dtype=ids.dtype), ids)


def _position(rows: Rows, ids: Int[Array, "..."]) -> Int[Array, "..."]:
    """Where among ``rows`` an id is; anywhere if it is not there.

    A search takes some twenty dependent reads, each a kernel of its own on an accelerator; a map of all the table's
    rows takes one, and four bytes a row.
    """
    if rows.size is None or rows.size > MAPPED * rows.ids.size:
        if rows.ordered:
            return jnp.searchsorted(rows.ids, ids)
        order = jnp.argsort(rows.ids)
        return jnp.take(order, jnp.searchsorted(rows.ids[order], ids), mode="clip")
    places = jnp.arange(rows.ids.size, dtype=jnp.int32)
    empty, at = jnp.zeros(rows.size, jnp.int32), apart(rows.ids, rows.size)
    where = empty.at[at].set(places, mode="drop", unique_indices=True, indices_are_sorted=rows.ordered)
    return jnp.take(where, ids, mode="clip")


def _at_end(x: Array, ndim: int) -> Array:
    return x.reshape(*x.shape, *[1] * (ndim - x.ndim))


@jax.custom_jvp
def _take_few(values: Float[Array, "n width"], position: Int[Array, "..."]) -> Float[Array, "... width"]:
    """`take_rows` of a few rows, many times each. Its gradient is a sum for each row, a product with ones where it was
    taken: a scatter would add to the same few addresses over and over, one after the other."""
    return take_rows(values, position)


@_take_few.defjvp
def _take_few_tangent(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    values, position = primals
    there = (position[..., None] == jnp.arange(len(values))).astype(values.dtype)
    return _take_few(values, position), jnp.einsum("...r,rw->...w", there, tangents[0], precision="highest")


def _positive(spec: Any, **values: int) -> None:
    for field, value in values.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"feature {spec.name!r}: {field} is {value!r}, must be a whole number of at least 1")


def _check_combine(spec: Hashed | Cross) -> None:
    if spec.combine not in _COMBINE:
        raise ValueError(f"feature {spec.name!r}: combine is {spec.combine!r}, must be one of {_COMBINE}")
    if spec.combine == "concat" and spec.width % spec.hashes:
        raise ValueError(
            f"feature {spec.name!r}: width {spec.width} is no multiple of {spec.hashes} hashes; "
            "change one of them, or combine='sum'"
        )


def _field(raw: Raw, name: str, feature: str) -> Any:
    if name not in raw:
        raise ValueError(f"feature {feature!r} reads field {name!r}, which is missing; present: {sorted(raw)}")
    return raw[name]


def _bucket(spec: Continuous, value: Any) -> Int[Array, "..."]:
    cuts = jnp.asarray(spec.boundaries, jnp.float32)
    value = jnp.asarray(value, jnp.float32)
    return jnp.searchsorted(cuts, value, side="right", method="scan_unrolled").astype(jnp.int32)  # no loop of kernels


def _bits(value: Any) -> Array:
    if not jnp.issubdtype(jnp.asarray(value).dtype, jnp.integer):
        raise ValueError(
            f"hashed and crossed fields are integers, got {jnp.asarray(value).dtype}; encode it on the host with "
            "rec_core.features.stable_ids, or name a Continuous spec in `of`"
        )
    return jax.lax.bitcast_convert_type(jnp.asarray(value, jnp.int32), jnp.uint32)


def _mix(x: Array) -> Array:
    """MurmurHash3's 32-bit finaliser (public domain, A. Appleby): a bijection in which every bit moves every bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

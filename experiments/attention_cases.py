"""What the attention benchmark and the tuner measure: shapes, inputs, masks, counts of work, and the check of answers.

A row of a batch holds `segments` (users, causal inside each), then `queries` tokens that see the whole prefix and
themselves only. A cached case computes the query rows alone, against keys and values that are already there.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rec_core.attention import range_attention, ranges_from_lengths, ranges_from_segments
from rec_core.attention.reference import range_attention_reference

type Direction = Literal["forward", "backward"]

SMALLER = 16  # lengths and query counts of the small shapes are this much shorter


@dataclass(frozen=True)
class Case:
    """One shape. `backward`: whether the backward pass is measured too."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    width: int
    segments: tuple[int, ...]  # prefix tokens of each user of a row
    queries: int = 0
    cached: bool = False
    backward: bool = False

    def __post_init__(self) -> None:
        sizes = (self.batch, self.heads, self.kv_heads, self.width, *self.segments)
        if not self.segments or min(sizes) < 1 or self.queries < 0 or self.heads % self.kv_heads:
            raise ValueError(f"{self}: sizes are 1 or more, queries 0 or more, and kv_heads divides heads")
        if self.queries and len(self.segments) > 1:
            raise ValueError(f"{self}: query tokens need rows of one segment, these have {len(self.segments)}")
        if self.cached and (self.backward or not self.queries):
            raise ValueError(f"{self}: a cached case has queries and no backward pass")

    @property
    def kind(self) -> str:
        """causal, packed, grouped or cached."""
        if self.cached:
            return "cached"
        return "grouped" if self.queries else "packed" if len(self.segments) > 1 else "causal"

    @property
    def prefix(self) -> int:
        return sum(self.segments)

    @property
    def rows(self) -> int:
        """Rows of q and of the output."""
        return self.queries if self.cached else self.prefix + self.queries

    @property
    def keys(self) -> int:
        """Rows of k and v, the rows' own keys of a cached case not counted."""
        return self.prefix if self.cached else self.rows

    @property
    def pairs(self) -> int:
        """Unmasked (query, key) pairs of one head of one batch row, the row itself included."""
        causal = 0 if self.cached else sum(n * (n + 1) // 2 for n in self.segments)
        return causal + self.queries * (self.prefix + 1)

    @property
    def directions(self) -> tuple[Direction, ...]:
        return ("forward", "backward") if self.backward else ("forward",)

    def flops(self, direction: Direction) -> float:
        """Operations of the matrix products: two forward and five backward, 2 D each for every unmasked pair."""
        return {"forward": 4.0, "backward": 10.0}[direction] * self.width * self.pairs * self.batch * self.heads

    def bytes(self, itemsize: int) -> int:
        """Of one forward pass: every input read once and the output written once."""
        own = 2 * self.rows * self.kv_heads if self.cached else 0
        elements = 2 * self.rows * self.heads + 2 * self.keys * self.kv_heads + own
        return self.batch * self.width * elements * itemsize

    def describe(self) -> str:
        text = f"B{self.batch} H{self.heads}/{self.kv_heads} D{self.width}, "
        text += "users of " + ", ".join(map(str, self.segments)) + " tokens"
        if not self.queries:
            return text
        return f"{text}{' cached' if self.cached else ''}, {self.queries} query tokens"

    def small(self) -> "Case":
        """The same mask at a size for a CPU."""
        group = self.heads // self.kv_heads
        queries = self.queries if self.queries <= SMALLER else self.queries // SMALLER
        segments = tuple(max(1, n // SMALLER) for n in self.segments)
        kv_heads = 2 if group == 1 else 1
        return replace(self, batch=1, heads=kv_heads * group, kv_heads=kv_heads, segments=segments, queries=queries)


def _cases() -> tuple[Case, ...]:
    a = Case("causal_a", 4, 16, 16, 64, (4096,), backward=True)
    b = Case("causal_b", 2, 16, 16, 128, (8192,), backward=True)
    found = [a, b]
    for letter, base in (("a", a), ("b", b)):
        for queries in (128, 512):
            backward = (letter, queries) == ("b", 128)
            found.append(replace(base, name=f"grouped_{letter}_q{queries}", queries=queries, backward=backward))
    found.append(replace(a, name="packed_a", segments=(1536, 512, 1280, 768)))
    found.append(replace(b, name="packed_b", segments=(3072, 1024, 2560, 1536)))
    cached = functools.partial(replace, cached=True, backward=False)
    for letter, base in (("a", a), ("b", b)):
        found += [cached(base, name=f"cached_{letter}_q{queries}", queries=queries) for queries in (128, 512)]
    found += [cached(b, name=f"decode_q{queries}", queries=queries) for queries in (1, 16)]
    found.append(replace(b, name="causal_gqa", kv_heads=4))
    found.append(Case("causal_d256", 2, 8, 8, 256, (4096,), backward=True))
    return tuple(found)


CASES = _cases()


def select(only: Sequence[str], *, small: bool) -> list[Case]:
    """The cases whose names begin with one of `only`, all where it is empty; at their small shapes if asked for."""
    for prefix in only:
        if not any(case.name.startswith(prefix) for case in CASES):
            raise ValueError(f"only={prefix!r} names no case; the cases are {', '.join(c.name for c in CASES)}")
    chosen = [case for case in CASES if not only or case.name.startswith(tuple(only))]
    return [case.small() for case in chosen] if small else chosen


class Inputs(NamedTuple):
    """Arguments of `range_attention`; k_self and v_self only where the keys are cached."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B S K D"]
    v: Float[Array, "B S K D"]
    k_start: Int[Array, "B T"]
    k_end: Int[Array, "B T"]
    k_self: Float[Array, "B T K D"] | None
    v_self: Float[Array, "B T K D"] | None


type Draw = tuple[Inputs, Float[Array, "B T H D"]]  # inputs of a case, and a cotangent of its output


@functools.partial(jax.jit, static_argnums=(0, 2))
def make(case: Case, seed: Int[Array, ""] | int, dtype: str) -> Draw:
    """Normal random inputs and cotangent of a case."""
    random = iter(jax.random.split(jax.random.key(seed), 6))

    def normal(rows: int, heads: int) -> Array:
        shape = (case.batch, rows, heads, case.width)
        return jax.random.normal(next(random), shape, jnp.float32).astype(dtype)

    q, d_out = normal(case.rows, case.heads), normal(case.rows, case.heads)
    k, v = normal(case.keys, case.kv_heads), normal(case.keys, case.kv_heads)
    own = (normal(case.rows, case.kv_heads), normal(case.rows, case.kv_heads)) if case.cached else (None, None)
    return Inputs(q, k, v, *_ranges(case), *own), d_out


def _ranges(case: Case) -> tuple[Array, Array]:
    if case.cached:
        return ranges_from_lengths(jnp.full(case.batch, case.prefix, jnp.int32), case.rows)
    segments = np.repeat(np.arange(1, len(case.segments) + 1), case.segments)
    segments = np.concatenate([segments, np.ones(case.queries, segments.dtype)]).astype(np.int32)
    ids = jnp.broadcast_to(jnp.asarray(segments), (case.batch, case.rows))
    is_query = jnp.broadcast_to(jnp.arange(case.rows) >= case.prefix, ids.shape)
    return ranges_from_segments(ids, is_query=is_query)


def visible(case: Case) -> Bool[np.ndarray, "T S"]:
    """The dense mask, the row's own key included; a cached case's own keys stand behind the cache."""
    row = np.arange(case.rows)[:, None] + (case.prefix if case.cached else 0)
    key = np.arange(case.prefix + case.queries)[None]
    user = np.repeat(np.arange(len(case.segments) + 1), (*case.segments, case.queries))
    prefix = (key < case.prefix) & (key <= row) & ((user[key] == user[row]) | (row >= case.prefix))
    return prefix | (key == row)


def attend(inputs: Inputs, implementation: str | None) -> Float[Array, "B T H D"]:
    """This project's attention on the inputs of a case."""
    q, k, v, k_start, k_end, k_self, v_self = inputs
    out = range_attention(q, k, v, k_start, k_end, k_self=k_self, v_self=v_self, implementation=implementation)
    assert not isinstance(out, tuple)  # the log-sum-exp comes only where it is asked for
    return out


class Errors(NamedTuple):
    """Against the float32 reference: `error` = |x - ref| / |ref| over the array; `worst_row` the largest |x_i - ref_i|
    of a row over the larger of |ref_i| and the root mean square of all rows: one wrong row of thousands shows there."""

    error: float
    worst_row: float


# What rounding explains, forward and backward: half precision's operands, and matrix units' float32 modes.
LIMITS: dict[str, dict[Direction, Errors]] = {
    "float32": {"forward": Errors(2e-3, 2e-2), "backward": Errors(5e-3, 5e-2)},
    "half": {"forward": Errors(1e-2, 1e-1), "backward": Errors(2e-2, 2e-1)},
}


def wrong(errors: Errors, dtype: str, direction: Direction) -> str | None:
    """None, or what is wrong with an answer; NaN never passes."""
    limit = LIMITS["float32" if dtype == "float32" else "half"][direction]
    if errors.error <= limit.error and errors.worst_row <= limit.worst_row:
        return None
    return (
        f"wrong: error {errors.error:.2g} (at most {limit.error:g}), worst row {errors.worst_row:.2g} (at most "
        f"{limit.worst_row:g}) against the float32 reference"
    )


def errors(found: np.ndarray, expected: np.ndarray) -> Errors:
    """Errors of an array whose last axis is a row. An array that should be zero has absolute errors."""
    difference = np.linalg.norm(np.asarray(found, np.float64) - expected, axis=-1)
    norm = np.linalg.norm(np.asarray(expected, np.float64), axis=-1)
    mean = np.sqrt(np.mean(norm**2))
    total = np.sqrt(np.mean(difference**2))
    if not mean:
        return Errors(float(total), float(difference.max()))
    return Errors(float(total / mean), float(np.max(difference / np.maximum(norm, mean))))


@functools.cache
def oracle(case: Case, dtype: str, direction: Direction) -> Callable[..., Any]:
    """The compiled reference for one key head of one batch row, and its query heads: (inputs, d_out) -> out or grads.

    One head at a time, so that the reference's T x S logits fit on the device that holds the full case.
    """

    def reference(inputs: Inputs, d_out: Array) -> Any:
        exact = jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, inputs)
        k_self, v_self = (exact.k_self, exact.v_self) if case.cached else (None, None)

        def out(q: Array, k: Array, v: Array) -> Array:
            own = (k_self, v_self) if case.cached else (k, v)
            scale = case.width**-0.5
            return range_attention_reference(q, k, v, exact.k_start, exact.k_end, *own, scale=scale)[0]

        if direction == "forward":
            return out(exact.q, exact.k, exact.v)
        return jax.vjp(out, exact.q, exact.k, exact.v)[1](d_out.astype(jnp.float32))

    shapes = jax.eval_shape(lambda: _head(case, make(case, 0, dtype), 0, 0))
    # Trying out matrix products costs far more than it could save here.
    options: Any = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
    return jax.jit(reference).lower(*shapes).compile(compiler_options=options)


def check(case: Case, dtype: str, direction: Direction, draw: Draw, found: Sequence[Array]) -> Errors:
    """The larger errors of `found` ([out], or [dq, dk, dv]) over the first and the last key head and batch row."""
    draw, arrays = jax.device_get((draw, list(found)))
    worst = Errors(0.0, 0.0)
    for batch, head in {(0, 0), (case.batch - 1, case.kv_heads - 1)}:
        expected = jax.device_get(oracle(case, dtype, direction)(*_head(case, draw, batch, head)))
        for x, y in zip(arrays, [expected] if direction == "forward" else expected, strict=True):
            own = errors(_heads(x, batch, head, y.shape[2]), y)
            worst = Errors(*(float(np.maximum(a, b)) for a, b in zip(worst, own)))  # np.maximum keeps a NaN
    return worst


def _head(case: Case, draw: Draw, batch: int, head: int) -> Draw:
    """What one key head of one batch row needs: its query heads, its keys and values, the row's ranges."""

    def keys(x: Any) -> Any:
        return None if x is None else _heads(x, batch, head, 1)

    (q, k, v, k_start, k_end, k_self, v_self), d_out = draw
    row = slice(batch, batch + 1)
    group = case.heads // case.kv_heads
    one = Inputs(_heads(q, batch, head, group), keys(k), keys(v), k_start[row], k_end[row], keys(k_self), keys(v_self))
    return one, _heads(d_out, batch, head, group)


def _heads(x: Any, batch: int, head: int, group: int) -> Any:
    return x[batch : batch + 1, :, head * group : (head + 1) * group]

"""What the kernels for a GPU share (Pallas, lowered by Triton): where they run, a call, its examples over a mesh.

A program reads one example; every array's first axis is that of the examples.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX 0.11 announces that it will be gone
    triton = None  # type: ignore[assignment]

CAPABILITY = 8.0  # from which on tensor cores take bfloat16
EXAMPLES = 512  # below, programs are too few to fill a device: not timed, and not taken
WIDEST = 64  # of behaviours: above, a program has too few registers; not timed


class Shape(NamedTuple):
    """Behaviours in a block, a power of 2 from 16, warps, and stages of software pipelining; NOTES.md has the times."""

    block: int = 64
    warps: int = 4
    stages: int = 1


class Tuning(NamedTuple):
    """Shapes of an attention's two kernels."""

    forward: Shape = Shape()
    backward: Shape = Shape()
    interpret: bool = False


@dataclass(frozen=True)
class Blocks:
    """How T behaviours in groups are cut: `steps` blocks of `groups` whole groups, each of `parts` pieces of `rows`."""

    length: int
    size: int  # behaviours of a group
    groups: int
    rows: int

    @property
    def steps(self) -> int:
        return -(-self.length // (self.size * self.groups))

    @property
    def parts(self) -> int:
        return -(-self.size * self.groups // self.rows)


def cut(block: int, length: int, groups: int, most: int) -> tuple[int, int, int, int]:
    """The fields of `Blocks` for `length` behaviours in `groups` groups, at most so many of which are a block."""
    size = length // groups
    return length, size, min(max(block // size, 1), groups, most), block


def serves(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether the default device, and JAX, run kernels for a computation's dtype and a sequence's shape."""
    given = jax.config.jax_default_device  # a device, or a platform's name
    device = given if given is not None and not isinstance(given, str) else jax.devices(given)[0]
    if triton is None or device.platform != "gpu" or dtype != "bfloat16" or len(shape) != 3:
        return False
    capability = str(getattr(device, "compute_capability", ""))
    if not capability.replace(".", "").isdigit() or float(capability) < CAPABILITY:
        return False
    size, length, d = shape
    fits = power_of_2(d) and 16 <= d <= WIDEST and length > 0
    return fits and size >= EXAMPLES and math.prod(shape) < 2**31  # offsets are of 32 bits


def power_of_2(x: int) -> bool:
    """Tiles have such sides."""
    return x == pl.next_power_of_2(x)


def on_each_device(function: Callable[..., Array], *arrays: Any) -> Array:
    """`function` for the examples of each device of the mesh that is set: the compiler cannot split a kernel.

    Where axis "data" does not divide the examples, every device does the work of all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    if all(mesh.shape[name] == 1 for name in axes):
        return function(*_vary_alike(arrays))
    spec = P("data") if "data" in axes and len(arrays[0]) % mesh.shape["data"] == 0 else P()
    out: Array = jax.shard_map(function, axis_names=axes, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)
    return out


def _vary_alike(arrays: Any) -> Any:
    """Inside shard_map all arrays of a kernel's call vary over the same axes."""
    axes = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))

    def vary(x: Array) -> Array:
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, arrays)


def call(
    kernel: Callable[..., None],
    given: Sequence[Array],
    made: Sequence[tuple[tuple[int, ...], Any]],
    tuned: Shape,
    interpret: bool,
) -> list[Array]:
    """The arrays that `kernel` makes, of these shapes and dtypes; it is given references to one example of each."""

    def one(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape[1:]), lambda i: (i, *[0] * (len(shape) - 1)))

    if not interpret:
        # Said at every compilation, to users who can do nothing about it; `serves` is ready for the release without it.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    varying = jax.typeof(given[0]).manual_axis_type  # as that of all of them
    out: list[Array] = pl.pallas_call(
        kernel,
        grid=(len(given[0]),),
        in_specs=[one(x.shape) for x in given],
        out_specs=[one(shape) for shape, _ in made],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype in made],
        compiler_params=triton.CompilerParams(num_warps=tuned.warps, num_stages=tuned.stages),
        interpret=interpret,
    )(*given)
    return out


def rows_of(ref: Any, row: Any) -> Any:
    """These rows, which with a mask may lie beyond the array, as a slice may not (JAX 0.12)."""
    return ref.at[row[:, None], jnp.arange(ref.shape[1])[None]]


def load_rows(blocks: Blocks, sequence: Any, mask: Any, i: Any, j: Any) -> tuple[Any, Any, Any, Any]:
    """Of part j of block i: where its rows are and which lie inside of the block, which are no padding, themselves as
    they are given, and the slots of their groups in the block."""
    within = j * blocks.rows + jnp.arange(blocks.rows)
    place = i * (blocks.groups * blocks.size) + within
    inside = (within < blocks.groups * blocks.size) & (place < blocks.length)
    there = triton.load(mask.at[place], mask=inside, other=False)
    # Behaviours are not asked for by what the mask says: that would wait for it.
    rows = triton.load(rows_of(sequence, place), mask=inside[:, None], other=0)
    return (place, inside[:, None]), there, rows, jax.lax.div(within, blocks.size)


def loop(count: int, body: Callable[[Any, Any], Any], state: Any) -> Any:
    """`fori_loop` from 0; a single turn is no loop."""
    return body(0, state) if count == 1 else jax.lax.fori_loop(0, count, body, state)


def dot(a: Any, b: Any, of_a: int, of_b: int) -> Any:
    """The product over these axes, float32; of float32 not of rounded operands."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), precision, preferred_element_type=jnp.float32)

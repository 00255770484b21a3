"""Times on a device, the same way for everything that JAX runs.

A program holds several calls one after another, each on arguments of its own (few distinct sets in rotation, so that
neither caches nor the compiler can use a call twice), and the host's clock runs around a few such programs. A function
of several kernels so pays the gaps between them, and starting a program is hidden behind the one before.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SECONDS = 0.02  # that a program should last
MOST_CALLS = 16
# Without CUDA graphs the kernels of a program run strictly one after another; in a graph independent calls overlap.
GPU_OPTIONS = {"xla_gpu_graph_min_graph_size": 2**31 - 1}


class Times(NamedTuple):
    """Milliseconds a call: the median of the repeats, the shortest and the longest."""

    ms: float
    ms_low: float
    ms_high: float
    repeats: int


class Ceilings(NamedTuple):
    """What the device does at best, measured: a large matrix product, and a copy (bytes read and written)."""

    tflops: float
    gb_per_s: float


@dataclass(frozen=True)
class Program:
    """`run` takes a list of `calls` argument tuples and returns the list of what the calls gave."""

    run: Callable[[list[Any]], list[Any]]
    calls: int


def calls_for(seconds: float) -> int:
    """How many calls that take some `seconds` each make a program. One on a CPU, which runs independent calls of one
    program side by side and has no start to hide."""
    if jax.default_backend() == "cpu":
        return 1
    return max(1, min(MOST_CALLS, round(SECONDS / seconds)))


def compile_calls(function: Callable[..., Any], shapes: tuple[Any, ...], calls: int) -> Program:
    """Compiles `calls` calls of `function` on arguments of `shapes` (arrays or their shapes) as one program.

    Every call has arrays of its own, or the compiler would merge equal calls: an optimization barrier alone did not
    stop it. All results are returned, or it would drop them. The barrier keeps neighbouring calls from being fused.
    Integers, which say who sees what, are those of the first call for all: so it is for the layers of a model, and what
    is made of them is made once a program.
    """
    once = jax.jit(function)

    def program(sets: list[Any]) -> list[Any]:
        results: list[Any] = []
        common = [x for x in jax.tree.leaves(sets[0]) if jnp.issubdtype(x.dtype, jnp.integer)]
        for arguments in sets:
            leaves, structure = jax.tree.flatten(arguments)
            own = [x for x in leaves if not jnp.issubdtype(x.dtype, jnp.integer)]
            if results:
                own, results[-1] = jax.lax.optimization_barrier((own, results[-1]))
            shared, mine = iter(common), iter(own)
            leaves = [next(shared if jnp.issubdtype(x.dtype, jnp.integer) else mine) for x in leaves]
            results.append(once(*jax.tree.unflatten(structure, leaves)))
        return results

    options: Any = GPU_OPTIONS if jax.default_backend() == "gpu" else None
    return Program(jax.jit(program).lower([shapes] * calls).compile(compiler_options=options), calls)


@dataclass(frozen=True)
class Pass:
    """A compiled forward pass, or a backward pass alone: then `forward(*arguments)` gives (out, vjp) before it."""

    program: Program
    forward: Callable[..., Any] | None = None

    def sets(self, arguments: Sequence[tuple[Any, ...]], d_outs: Sequence[Any]) -> list[tuple[Any, ...]]:
        """What the program runs on: the arguments, or (vjp, d_out) of each. The forward passes run here, untimed."""
        if self.forward is None:
            return list(arguments)
        return [(self.forward(*own)[1], d_out) for own, d_out in zip(arguments, d_outs, strict=True)]


def compile_pass(function: Callable[..., Any], shapes: tuple[Any, ...], calls: int, *, backward: bool) -> Pass:
    """`calls` calls of `function`, or of its backward pass alone with gradients in the first three arguments."""
    if not backward:
        return Pass(compile_calls(function, shapes, calls))

    def forward(*arguments: Any) -> Any:
        return jax.vjp(lambda *qkv: function(*qkv, *arguments[3:]), *arguments[:3])

    lowered = jax.jit(forward).lower(*shapes)
    out, vjp = lowered.out_info
    return Pass(compile_calls(lambda vjp, d_out: vjp(d_out), (vjp, out), calls), lowered.compile())


def measure(program: Program, sets: Sequence[Any], repeats: int) -> Times:
    """Times `program` on `sets` of arguments in rotation; the first round is not counted."""
    on_cpu = jax.default_backend() == "cpu"
    rotations = [
        [sets[(first + i) % len(sets)] for i in range(program.calls)]
        for first in range(0, program.calls * len(sets), program.calls)
    ]

    def seconds(launches: int) -> float:
        result: Any = None
        began = time.perf_counter()
        for i in range(launches):
            result = program.run(rotations[i % len(rotations)])
            if on_cpu:  # programs in flight together would share the cores
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return time.perf_counter() - began

    seconds(1)
    launches = max(1 if on_cpu else 3, min(50, math.ceil(SECONDS / seconds(1))))
    seconds(launches)  # memory for all programs in flight is taken here
    found = sorted(1e3 * seconds(launches) / (launches * program.calls) for _ in range(repeats))
    return Times(float(np.median(found)), found[0], found[-1], repeats)


def ceilings(dtype: str, repeats: int, *, small: bool) -> Ceilings:
    """The matrix product of two 8,192 x 8,192 matrices and the negation of 512 MiB (small: 1,024, 32 MiB)."""
    n, elements = (2**10, 2**25) if small else (2**13, 2**29)
    itemsize = jnp.dtype(dtype).itemsize

    def sets(*shape: int) -> list[tuple[Any, ...]]:
        make = jax.jit(lambda i: jax.random.normal(jax.random.key(i), shape, dtype))
        return [(make(i),) for i in range(3)]

    squares = sets(n, n)
    pairs = [(a, b) for (a,), (b,) in zip(squares, squares[1:] + squares[:1])]
    product = measure(compile_calls(jnp.matmul, pairs[0], calls_for(2 * n**3 / 6e14)), pairs, repeats)
    blocks = sets(elements // itemsize)
    copy = measure(compile_calls(jnp.negative, blocks[0], calls_for(2 * elements / 2.5e12)), blocks, repeats)
    return Ceilings(2 * n**3 / product.ms / 1e9, 2 * elements / copy.ms / 1e6)

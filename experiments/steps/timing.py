"""Programs compiled side by side before anything is timed, and contenders timed in turn."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.results import Row

GIB = 2**30


@dataclass(frozen=True)
class Program:
    """A compiled function and the seconds that took, or the reason why there is none."""

    call: Any = None
    reason: str = ""
    seconds: float = 0.0

    def counts(self) -> Row:
        """GiB of memory while it runs, by the compiler: arguments, results that do not take an argument's place,
        temporaries; what the backend does not report is left out."""
        found: Row = {"compile_s": self.seconds}
        memory = self.call.memory_analysis()
        if memory is not None:
            more = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
            whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes + more
            found |= {"temporaries_gib": memory.temp_size_in_bytes / GIB, "memory_gib": whole / GIB}
        return found


def compiled(lower: Callable[[], Any]) -> Program:
    """What the function lowers, compiled."""
    began = time.perf_counter()
    try:
        call = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return Program(None, why(error), time.perf_counter() - began)
    return Program(call, "", time.perf_counter() - began)


def why(error: jax.errors.JaxRuntimeError) -> str:
    """A device's error as a row says it."""
    if "RESOURCE_EXHAUSTED" in str(error):
        return "out of the device's memory: give a smaller batch"
    return "the device refused it: " + " ".join(str(error).split())[:200]


def compile_all(lower: Mapping[Any, Callable[[], Any]], *, log: Callable[[str], None] = print) -> dict[Any, Program]:
    """Compiles what each function lowers, as many at a time as there are processors (at most 16).

    What ran out of memory beside others (compilers try their kernels on the device) is compiled once more alone.
    """
    began, programs = time.perf_counter(), {}

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        futures = {pool.submit(compiled, make): key for key, make in lower.items()}
        for done, future in enumerate(as_completed(futures), start=1):
            programs[futures[future]] = future.result()
            if done == len(futures) or done % max(1, len(futures) // 10) == 0:
                log(f"compiled {done} of {len(futures)}, {time.perf_counter() - began:.0f} s")
    for key, program in programs.items():
        if program.reason.startswith("out of"):
            programs[key] = compiled(lower[key])
    return programs


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's collector of cycles stands still, as it should in a process that serves: its pauses are longer than a
    request."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def in_turn(
    contenders: Mapping[str, Callable[[], float]], repeats: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Milliseconds of each contender in each repeat, and the reasons of those that failed.

    Within a repeat all are measured one after the other, each repeat beginning with the next of them, so that a device
    that slows down slows all. Each contender's first call is not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    for repeat in range(-1, repeats):
        names = list(contenders)
        shift = max(repeat, 0) % len(names)
        for name in names[shift:] + names[:shift]:
            if name in failed:
                continue
            try:
                ms = contenders[name]()
            except jax.errors.JaxRuntimeError as error:
                failed[name] = why(error)
                continue
            if repeat >= 0:
                found[name].append(ms)
    return {name: np.array(ms) for name, ms in found.items() if name not in failed}, failed


def summary(ms: np.ndarray, base: np.ndarray | None) -> Row:
    """Median, shortest and longest; and what it takes more than `base`, in %, repeat by repeat."""
    row: Row = {"ms": float(np.median(ms)), "ms_low": float(ms.min()), "ms_high": float(ms.max())}
    if base is not None:
        more = 100 * (ms / base - 1)
        row |= {"overhead_pct": float(np.median(more))}
        row |= {"overhead_pct_low": float(more.min()), "overhead_pct_high": float(more.max())}
    return row

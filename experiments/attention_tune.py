"""Which block sizes are fastest on this device: times every candidate and prints the table to review and keep.

    python -m experiments attention-tune                              # some minutes on a CPU: tunes "xla"
    python -m experiments attention-tune --head-width 128 --lengths 2048 8192 32768

Every candidate is compiled, compared with the float32 reference and timed on causal rows of each length (the same
number of tokens a batch); the best few are timed again with all repeats. One that does not compile, fails or is wrong
is listed with its reason and never chosen. What is printed last is Python, for `TABLE` in rec_core/attention/blocks.py;
for "xla", whose sizes are a function, it is the evidence for that function.
"""

import functools
import importlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from experiments import attention_cases as cases
from experiments import progress, results
from experiments.attention_cases import Case, Direction, Inputs
from experiments.attention_report import Row
from experiments.attention_rivals import line
from experiments.attention_timing import Pass, Times, calls_for, compile_pass, measure
from rec_core.attention.api import IMPLEMENTATIONS

DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    "forward": ("forward",),
    "backward": ("backward",),
    "both": ("forward", "backward"),
}
ROUNDS = 3  # of every candidate
FINALISTS = 4  # candidates that are timed again, with all repeats
FLOPS = {"cpu": 2e10, "gpu": 2e14, "tpu": 5e13}  # reached, roughly: for how many calls a program holds


class Blocks(NamedTuple):
    """Rows and keys of a block."""

    block_q: int
    block_k: int


@dataclass(frozen=True)
class Tunable:
    """An implementation with block sizes.

    `passes` have sizes of their own ("both": one choice for forward and backward together); `candidates(pass, head
    width, length)` are the sizes to try; `call(inputs, pass, sizes)` is the output with them.
    """

    name: str
    passes: tuple[str, ...]
    candidates: Callable[[str, int, int], Sequence[Any]]
    call: Callable[[Inputs, str, Any], Any]


def tunable(name: str) -> Tunable:
    """The tunable implementation of that name. Raises ValueError where it has no candidates."""
    if name == "xla":
        return Tunable(name, ("both",), _xla_candidates, _with_keywords(name, lambda which, sizes: sizes._asdict()))
    if name == "mosaic_gpu" and name in IMPLEMENTATIONS:
        blocks: Any = importlib.import_module("rec_core.attention.blocks")
        tables = {"forward": blocks.FORWARD_CANDIDATES, "backward": blocks.BACKWARD_CANDIDATES}
        call = _with_keywords(name, lambda which, sizes: {which: sizes})
        return Tunable(name, tuple(tables), lambda which, width, length: tables[which].get(width, ()), call)
    raise ValueError(
        f"implementation {name!r} has no block sizes to tune; choose xla or, where it is there, mosaic_gpu"
    )


def _xla_candidates(which: str, width: int, length: int) -> list[Blocks]:
    """Powers of two from 32 to 1,024; a block longer than the row is the row."""
    sizes = [size for size in (32, 64, 128, 256, 512, 1024) if size <= max(32, length)]
    return [Blocks(*pair) for pair in itertools.product(sizes, repeat=2)]


def _with_keywords(name: str, keywords: Callable[[str, Any], dict[str, Any]]) -> Callable[[Inputs, str, Any], Any]:
    """Calls the implementation's function, its self term the rows' own keys, with sizes as keyword arguments."""

    def call(inputs: Inputs, which: str, sizes: Any) -> Any:
        q, k, v, k_start, k_end, _, _ = inputs
        function = IMPLEMENTATIONS[name].function
        return function(q, k, v, k_start, k_end, k, v, scale=q.shape[-1] ** -0.5, **keywords(which, sizes))[0]

    return call


@dataclass(frozen=True)
class AttentionTune:
    """Settings.

    Attributes:
      implementation: "auto" is the kernel of this device where there is one, and else "xla".
      head_width: of queries and keys.
      lengths: tokens a row; the table gets an entry for each. The check holds a length x length array of one head.
      tokens: tokens a batch at every length (a row at least). Default: 16,384 on an accelerator, 2,048 on a CPU.
      heads: query heads, as many key heads.
      dtype: bfloat16 on an accelerator and float32 on a CPU by default.
      repeats: rounds of the best few, 3 or more; the others have 3.
      out: file of the result.
    """

    implementation: str = "auto"
    head_width: int = 64
    lengths: tuple[int, ...] = ()
    tokens: int | None = None
    heads: int | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    repeats: int = 5
    out: Path = Path("runs/attention_tune/result.json")

    def __post_init__(self) -> None:
        if self.repeats < 3:
            raise ValueError(f"repeats is {self.repeats}; give 3 or more, or the spread of a time is unknown")
        if min((*self.lengths, self.head_width, self.tokens or 1, self.heads or 1)) < 1:
            raise ValueError(f"{self}: lengths, head_width, tokens and heads are 1 or more")


def run(config: AttentionTune) -> results.Result:
    """Tunes, prints all times and the table, writes the result."""
    started = results.begin()
    platform = jax.default_backend()
    on_cpu = platform == "cpu"
    name = config.implementation
    if name == "auto":
        name = "mosaic_gpu" if platform == "gpu" and "mosaic_gpu" in IMPLEMENTATIONS else "xla"
    subject = tunable(name)
    dtype = ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
    tokens = config.tokens or (2048 if on_cpu else 16384)
    heads = config.heads or (4 if on_cpu else 16)
    rows: list[Row] = []
    best: dict[str, dict[int, Any]] = {}
    for length in sorted(set(config.lengths or ((256, 1024) if on_cpu else (1024, 4096, 16384)))):
        batch = max(1, tokens // length)
        case = Case(f"causal_{length}", batch, heads, heads, config.head_width, (length,), backward=True)
        for which in subject.passes:
            found = tune(subject, which, case, dtype, config.repeats)
            rows += found
            print(progress.table(found), flush=True)
            winner = next((row for row in found if row["chosen"]), None)
            if winner is not None:
                sizes = {repr(c): c for c in subject.candidates(which, config.head_width, length)}
                best.setdefault(which, {})[length] = sizes[winner["blocks"]]
    figures = {f"{row['pass']}_{row['length']}_ms": row["ms"] for row in rows if row["chosen"]}
    outcome = results.record("attention_tune", started=started, seeds=[0], rows=rows, figures=figures)
    results.write(config.out, outcome)
    print("\n" + table(jax.devices()[0].device_kind, config.head_width, best))
    print(f"\nresult: {config.out}   {outcome.seconds:.0f} s")
    return outcome


@dataclass(frozen=True)
class Tried:
    """A candidate: its first times and how to time it again with more rounds, or the reason why it is out."""

    sizes: Any
    times: Times | None = None
    again: Callable[[int], Times] | None = None
    reason: str | None = None


def tune(subject: Tunable, which: str, case: Case, dtype: str, repeats: int) -> list[Row]:
    """A row for each candidate: the fastest first and `chosen`, those that failed last with their reason.

    Raises ValueError where there is no candidate for the case.
    """
    candidates = subject.candidates(which, case.width, case.rows)
    if not candidates:
        raise ValueError(f"{subject.name} has no {which} candidates for head width {case.width}")
    draws = [cases.make(case, seed, dtype) for seed in range(2)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for direction in DIRECTIONS[which]:
            pool.submit(cases.oracle, case, dtype, direction)
        compiled = [pool.submit(_compile, subject, which, sizes, case, dtype) for sizes in candidates]
    tried = [_try(sizes, own, which, case, dtype, draws) for sizes, own in zip(candidates, compiled)]
    timed = [(one.times, one) for one in tried if one.times is not None]
    timed.sort(key=lambda pair: pair[0].ms)
    final = [(one.again(repeats), one) for _, one in timed[:FINALISTS] if one.again is not None]
    final.sort(key=lambda pair: pair[0].ms)
    found = [_row(case, which, one.sizes, times._asdict()) for times, one in final + timed[FINALISTS:]]
    if found:
        found[0]["chosen"] = True
    return found + [_row(case, which, one.sizes, {"reason": one.reason}) for one in tried if one.reason is not None]


def _row(case: Case, which: str, sizes: Any, values: Row) -> Row:
    where = {"length": case.rows, "batch": case.batch, "heads": case.heads, "head_width": case.width, "pass": which}
    return where | {"blocks": repr(sizes), "chosen": False} | values


def _compile(subject: Tunable, which: str, sizes: Any, case: Case, dtype: str) -> Pass:
    """One program for the pass; "both" computes the output and the gradients in one call."""

    def function(*arguments: Any) -> Any:
        return subject.call(Inputs(*arguments), which, sizes)

    def both(d_out: Any, *arguments: Any) -> Any:
        out, vjp = jax.vjp(lambda *qkv: function(*qkv, *arguments[3:]), *arguments[:3])
        return out, *vjp(d_out)

    inputs, d_out = jax.eval_shape(lambda: cases.make(case, 0, dtype))
    flops = sum(case.flops(direction) for direction in DIRECTIONS[which])
    calls = calls_for(flops / FLOPS.get(jax.default_backend(), FLOPS["cpu"]))
    if which == "both":
        return compile_pass(both, (d_out, *inputs), calls, backward=False)
    return compile_pass(function, tuple(inputs), calls, backward=which == "backward")


def _try(sizes: Any, compiled: Future[Pass], which: str, case: Case, dtype: str, draws: Sequence[cases.Draw]) -> Tried:
    """Checks a candidate and times it."""
    try:
        own = compiled.result()
        arguments: list[Any] = [((d_out, *inputs) if which == "both" else tuple(inputs)) for inputs, d_out in draws]
        sets = own.sets(arguments, [d_out for _, d_out in draws])
        first = own.program.run([sets[i % len(sets)] for i in range(own.program.calls)])[0]
        answers = {"forward": [first], "backward": list(first[:3])}
        if which == "both":
            answers = {"forward": [first[0]], "backward": list(first[1:])}
        for direction in DIRECTIONS[which]:
            errors = cases.check(case, dtype, direction, draws[0], answers[direction])
            if reason := cases.wrong(errors, dtype, direction):
                return Tried(sizes, reason=reason)
        again = functools.partial(measure, own.program, sets)
        return Tried(sizes, again(ROUNDS), again)
    except Exception as error:  # whatever a kernel's compiler or launch raises: the row says it, the others go on
        return Tried(sizes, reason=line(error))


def table(device: str, head_width: int, best: Mapping[str, Mapping[int, Any]]) -> str:
    """`TABLE` as Python: (device, pass, head width) -> ((longest length, sizes), ...), equal neighbours joined."""
    lines = []
    for which, by_length in best.items():
        lengths = sorted(by_length)
        kept = [
            n for n, after in zip(lengths, [*lengths[1:], None]) if after is None or by_length[n] != by_length[after]
        ]
        entries = "".join(f"        ({n}, {by_length[n]!r}),\n" for n in kept)
        lines.append(f"    ({device!r}, {which!r}, {head_width}): (\n{entries}    ),\n".replace("'", '"'))
    return "TABLE = {\n" + "".join(lines) + "}"

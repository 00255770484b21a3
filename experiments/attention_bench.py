"""How fast range attention is on this device, beside the rivals that are installed, in one run.

    python -m experiments attention-bench                          # a minute or two on a CPU (small shapes)
    python -m experiments attention-bench --out runs/h100          # about five minutes on one GPU, rivals included
    python -m experiments attention-bench --only packed --no-rivals
    python -m experiments compare A/result.json B/result.json

Per case: milliseconds a call, TFLOP/s on unmasked pairs (forward 4 D a pair, backward 10 D) beside a matrix product of
the same run, and for cached queries GB/s (inputs read once, outputs written once) beside a copy. Every answer is
compared with the float32 reference first; a wrong one is not timed. What could not be measured has a row with the
reason. "*" marks what `range_attention` chooses by itself; `figures` quote it and the best rival. Small shapes have
figures named small_...
"""

import math
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from experiments import attention_cases as cases
from experiments import attention_report, report, results
from experiments.attention_cases import Case, Direction
from experiments.attention_report import Row, missing_row, passes, row
from experiments.attention_rivals import Child, Contender, Missing, children, jax_rivals, line, torch_specs
from experiments.attention_timing import Ceilings, Pass, calls_for, ceilings, compile_pass, measure
from rec_core.attention.api import IMPLEMENTATIONS, Call, choose

DENSE_LIMIT = 2**31  # bytes of the reference's logits, above which it is not run
MAX_SET_BYTES = 256e6  # that the input sets of a case hold together: several times a cache


@dataclass(frozen=True)
class AttentionBench:
    """Settings.

    Attributes:
      only: names of cases, or how they begin (causal, grouped_b, packed_a ...). Default: all.
      implementations: ours to measure. Default: all that can serve; the one chosen by itself is always measured.
      rivals: also measure cuDNN, tokamax and PyTorch where they are installed.
      torch: PyTorch among them; its compiler takes a minute or two.
      small: small shapes; always so without an accelerator.
      dtype: bfloat16 on an accelerator and float32 on a CPU by default.
      repeats: rounds of each measurement, 3 or more.
      seed: of the inputs.
      limit: seconds that each PyTorch rival may take to compile, and again to run.
      out: folder for result.json and report.html.
    """

    only: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ()
    rivals: bool = True
    torch: bool = True
    small: bool = False
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    repeats: int = 5
    seed: int = 0
    limit: float = 150.0
    out: Path = Path("runs/attention_bench")

    def __post_init__(self) -> None:
        if self.repeats < 3:
            raise ValueError(f"repeats is {self.repeats}; give 3 or more, or the spread of a time is unknown")
        if self.limit <= 0:
            raise ValueError(f"limit is {self.limit}; a rival needs more than 0 seconds")
        if unknown := [name for name in self.implementations if name not in IMPLEMENTATIONS]:
            raise ValueError(f"implementations names {unknown[0]!r}; there are {', '.join(IMPLEMENTATIONS)}")


class Job(NamedTuple):
    case: Case
    direction: Direction
    contender: Contender


def run(config: AttentionBench) -> results.Result:
    """Measures, prints the table, writes the result and the report."""
    # Rivals in other processes need memory too. Read when JAX first looks for devices, which it has not done yet.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    started = results.begin()
    on_cpu = jax.default_backend() == "cpu"
    small = config.small or on_cpu
    dtype = ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
    chosen = cases.select(config.only, small=small)
    top = ceilings(dtype, config.repeats, small=small)
    print(f"{dtype}: matrix product {top.tflops:.4g} TFLOP/s, copy {top.gb_per_s:.4g} GB/s", flush=True)
    rows: list[Row] = []
    order = {(case.name, direction): i for i, (case, direction) in enumerate(passes(chosen))}
    ceiling_rows: list[Row] = [
        {"case": "ceiling", "implementation": "matrix product", "tflops": top.tflops, "dtype": dtype},
        {"case": "ceiling", "implementation": "copy", "gb_per_s": top.gb_per_s, "dtype": dtype},
    ]

    def publish() -> results.Result:
        """Writes what is known so far: a run that is cut short keeps what it has measured."""
        rows.sort(key=lambda row: order[row["case"], row["direction"]])
        found = attention_report.summarize(rows, small=small)
        outcome = results.record(
            "attention_bench", started=started, seeds=[config.seed], rows=ceiling_rows + rows, figures=found
        )
        results.write(config.out / "result.json", outcome)
        return outcome

    with ExitStack() as stack:
        others: list[Child] = []
        if config.rivals and config.torch:
            specs = torch_specs(chosen, dtype, config.repeats, config.seed, config.limit)
            if isinstance(specs, Missing):
                rows += [missing_row(case, direction, specs, dtype) for case, direction in passes(chosen)]
            else:
                others = stack.enter_context(children(specs, config.limit))
        jobs, missing = plan(chosen, dtype, config)
        rows += [missing_row(*where, what, dtype) for where, what in missing]
        print(f"compiling {len(jobs)} passes", flush=True)
        compiled = _compile_all(jobs, dtype, top)
        for child in others:
            child.ready()  # nothing is timed while another compiles
        for case in chosen:
            own = [(job, future) for job, future in compiled if job.case == case]
            rows += _shown(_measure_case(case, own, dtype, config, top))
            publish()
        for child in others:
            rows += _shown(_from_child(child, chosen, dtype, top))
    outcome = publish()
    report.write(config.out / "report.html", attention_report.page(outcome, rows, chosen, top))
    attention_report.show(rows, outcome.figures)
    print(f"report: {config.out / 'report.html'}   result: {config.out / 'result.json'}   {outcome.seconds:.0f} s")
    return outcome


def plan(
    chosen: Iterable[Case], dtype: str, config: AttentionBench
) -> tuple[list[Job], list[tuple[tuple[Case, Direction], Missing]]]:
    """What to measure with JAX, and what cannot be, with reasons."""
    jobs, missing = [], []
    for case, direction in passes(chosen):
        for entry in [*_ours(case, dtype, config), *(jax_rivals(case, direction) if config.rivals else ())]:
            if isinstance(entry, Missing):
                missing.append(((case, direction), entry))
            else:
                jobs.append(Job(case, direction, entry))
    return jobs, missing


def _ours(case: Case, dtype: str, config: AttentionBench) -> list[Contender | Missing]:
    """Every implementation of range attention that can serve the case."""
    call = Call(
        batch=case.batch,
        rows=case.rows,
        keys=case.keys,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_width=case.width,
        dtype=dtype,
        self_term=True,
        platform=jax.default_backend(),
    )
    by_itself = choose(call)
    found: list[Contender | Missing] = []
    for name, implementation in IMPLEMENTATIONS.items():
        if config.implementations and name not in (*config.implementations, by_itself):
            continue
        reason = implementation.supports(call)
        if name == "reference" and 4 * case.batch * case.heads * case.rows * case.keys > DENSE_LIMIT:
            reason = "its logits would take more than 2 GiB"
        if reason is not None:
            found.append(Missing(name, reason, "ours"))
            continue

        def function(*arguments: Any, name: str = name) -> Any:
            return cases.attend(cases.Inputs(*arguments), name)

        found.append(Contender(name, function, side="ours", chosen=name == by_itself))
    return found


def _compile_all(jobs: list[Job], dtype: str, top: Ceilings) -> list[tuple[Job, Future[Pass]]]:
    """Compiles everything, some at a time, and returns when all is done: nothing is timed while others compile."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for case, direction in dict.fromkeys((job.case, job.direction) for job in jobs):
            pool.submit(cases.oracle, case, dtype, direction)
        return [(job, pool.submit(_compile, job, dtype, top)) for job in jobs]


def _compile(job: Job, dtype: str, top: Ceilings) -> Pass:
    case, direction, contender = job
    inputs, _ = jax.eval_shape(lambda: cases.make(case, 0, dtype))
    shapes = jax.eval_shape(contender.prepare, inputs)
    calls = calls_for(_expected_seconds(job, dtype, top))
    return compile_pass(contender.function, shapes, calls, backward=direction == "backward")


def _expected_seconds(job: Job, dtype: str, top: Ceilings) -> float:
    """A rough time of one call, from the ceilings; the plain implementations reach a tenth of what kernels do."""
    share = 0.05 if job.contender.name in ("xla", "reference", "jax.nn xla") else 0.5
    arithmetic = job.case.flops(job.direction) / (1e12 * top.tflops)
    memory = job.case.bytes(jax.numpy.dtype(dtype).itemsize) / (1e9 * top.gb_per_s)
    return max(arithmetic, memory) / share


def _measure_case(
    case: Case, jobs: list[tuple[Job, Future[Pass]]], dtype: str, config: AttentionBench, top: Ceilings
) -> Iterable[Row]:
    """Rows of one case. Its input sets are shared, and freed before the next case."""
    count = min(8, max(2, math.ceil(MAX_SET_BYTES / case.bytes(jax.numpy.dtype(dtype).itemsize))))
    sets = [cases.make(case, config.seed + i, dtype) for i in range(count)]
    for job, future in jobs:
        try:
            values = _measure(job, future.result(), sets, dtype, config.repeats)
            values["version"] = job.contender.version
        except Exception as error:  # whatever a kernel's compiler or launch raises: the row says it, the others go on
            values = {"reason": line(error)}
        contender = job.contender
        yield row(case, job.direction, contender.name, contender.side, values, dtype, top, chosen=contender.chosen)


def _measure(job: Job, compiled: Pass, sets: list[Any], dtype: str, repeats: int) -> dict[str, Any]:
    """Checks the first answer and times the program."""
    case, direction, contender = job
    arguments = compiled.sets([contender.prepare(inputs) for inputs, _ in sets], [d_out for _, d_out in sets])
    calls = compiled.program.calls
    first = compiled.program.run([arguments[i % len(arguments)] for i in range(calls)])[0]
    found = list(first[:3]) if direction == "backward" else [contender.join(first)]
    errors = cases.check(case, dtype, direction, sets[0], found)
    del first, found
    if reason := cases.wrong(errors, dtype, direction):
        return {"reason": reason}
    return errors._asdict() | measure(compiled.program, arguments, repeats)._asdict()


def _from_child(child: Child, chosen: list[Case], dtype: str, top: Ceilings) -> Iterable[Row]:
    """Rows of a PyTorch rival, and a row with the reason for what it did not come to."""
    got, trouble = child.results()
    where = {(case.name, direction): (case, direction) for case, direction in passes(chosen)}
    seen = set()
    for found in got:
        if (found.get("case"), found.get("direction")) not in where:
            continue  # a library's own talk
        case, direction = where[found["case"], found["direction"]]
        seen.add((case, direction))
        values = {name: found.get(name) for name in ("reason", "ms", "ms_low", "ms_high", "repeats", "version")}
        if values["reason"] is None:
            errors = cases.Errors(float(found["error"]), float(found["worst_row"]))
            wrong = cases.wrong(errors, dtype, direction)
            values = {"reason": wrong} if wrong else values | errors._asdict()
        yield row(case, direction, found["implementation"], "rival", values, dtype, top)
    for case, direction in where.values():
        if (case, direction) not in seen:
            yield missing_row(case, direction, Missing(child.name, trouble or "gave no result"), dtype)


def _shown(rows: Iterable[Row]) -> Iterable[Row]:
    """Says each row as it comes."""
    for one in rows:
        said = f"{one['ms']:.4f} ms" if one.get("ms") is not None else one["reason"]
        print(f"{one['case']} {one['direction']}, {one['implementation']}: {said}", flush=True)
        yield one

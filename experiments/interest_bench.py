"""Target attentions in one pass on a GPU, beside what XLA makes of them: the times behind their kernels' shapes.

    python -m experiments interest-bench            # for an NVIDIA GPU
    python -m experiments interest-bench --quick    # interpreted, on any machine: only shows that everything works

Multi-head attention (MHA) and the co-action network (CAN). Cases: at each length a query (a micro-MLP) for all
behaviours, one for each chunk, for MHA with ADS's linear map of the behaviours left to the attention, and of CAN one
for each behaviour. Contenders: XLA, the kernels as `rec_core.interest` takes them ("as taken"), and both kernels in one
shape each (behaviours in a block / warps / stages). Behaviours are bfloat16, half to all of their slots filled. Each
answer and gradient is first compared with XLA's; a contender that is off is not timed. Times are of the forward pass,
and of forward and backward together, in turn within a repeat.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import figures, progress, report, results
from experiments.results import Row
from experiments.settings import in_small
from experiments.steps import timing
from rec_core.interest import MultiHead, can_gpu, can_gpu_each, multi_head_gpu
from rec_core.interest.can import by_xla, parameters
from rec_core.interest.multi_head import Mapped
from rec_core.interest.triton_gpu import serves

KERNELS: dict[str, Any] = {"MHA": multi_head_gpu, "CAN": can_gpu}
WIDTH = 16  # of a head
MICRO, ORDERS = (4, 2), 3  # CAN's layers and powers, as in `ads-cost`
OFF = 0.02  # of the largest number, by which a bfloat16 answer or gradient may differ from XLA's


@dataclass(frozen=True)
class InterestBench:
    """Settings.

    Attributes:
      attentions: of "MHA", "CAN".
      shapes: of both kernels, as block/warps/stages.
      lengths: behaviours. items: of a chunk, which share a query.
      batch: examples. width: of a behaviour. heads: of so many units each, 16.
      steps: calls of a measurement. repeats: measurements.
      quick: sizes of a test, interpreted.
      out: folder for result.json and report.html.
    """

    attentions: tuple[str, ...] = tuple(KERNELS)
    shapes: tuple[str, ...] = ("64/4/1", "64/2/1", "32/2/1", "32/2/2", "32/1/1", "32/1/2", "16/2/1", "16/1/1")
    lengths: tuple[int, ...] = (200, 1000)
    items: int = 10
    batch: int = 4096
    width: int = 64
    heads: int = 4
    steps: int = 10
    repeats: int = 5
    quick: bool = False
    out: Path = Path("runs/interest_bench")

    def __post_init__(self) -> None:
        unknown = set(self.attentions) - set(KERNELS)
        if unknown or not self.attentions:
            raise ValueError(f"attentions is {self.attentions}; give some of {tuple(KERNELS)}")
        for given in self.shapes:
            parts = given.split("/")
            if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
                raise ValueError(f"shapes has {given!r}; give block/warps/stages, such as 64/4/1")
        for name in ("items", "batch", "width", "heads", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not self.lengths or any(length < 1 or length % self.items for length in self.lengths):
            raise ValueError(f"lengths is {self.lengths}; give at least one, of whole chunks of {self.items}")
        if "MHA" in self.attentions and self.items * WIDTH < 2 * self.width:
            raise ValueError(
                f"items is {self.items}: below {2 * self.width // WIDTH}, queries ask keys, not behaviours"
            )


QUICK: dict[str, Any] = {
    "shapes": ("16/1/1",), "lengths": (40,), "batch": 3, "width": 16, "heads": 2, "steps": 1, "repeats": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    attention: str
    length: int
    groups: int  # queries of an example

    @property
    def each(self) -> bool:
        """A micro-MLP for each behaviour."""
        return self.attention == "CAN" and self.groups == self.length

    @property
    def mapped(self) -> bool:
        """A linear map of the behaviours is left to the attention."""
        return self.attention == "MHA" and self.groups > 1

    @property
    def name(self) -> str:
        asked = "a query" if self.groups == 1 else f"{self.groups} queries"
        return f"{self.attention}, {self.length:,} behaviours, {asked}{', a map' * self.mapped}"


def run(config: InterestBench) -> results.Result:
    """Case by case: compiles, compares, times; prints the tables, writes result and report."""
    if config.quick:
        config = in_small(config, QUICK, together=("lengths", "items"))
    shapes = [(config.batch, length, config.width) for length in config.lengths]
    if not (config.quick or all(serves("bfloat16", shape) for shape in shapes)):
        raise ValueError("the kernels do not run here: they want an NVIDIA GPU and such sizes (`triton_gpu.serves`)")
    results.make_folder(config.out)
    started, rows = results.begin(), list[Row]()
    for attention, length in itertools.product(config.attentions, config.lengths):
        for groups in (length // config.items, 1, *([length] if attention == "CAN" else [])):
            found = measure(config, case := Case(attention, length, groups))
            print(f"{case.name}\n{progress.table(found)}\n", flush=True)
            rows += found
    outcome = results.record("interest_bench", started=started, seeds=[0], rows=rows, figures=summarize(rows, config))
    results.write(config.out / "result.json", outcome)
    report.write(config.out / "report.html", page(outcome))
    print(f"report: {config.out / 'report.html'}   result: {config.out / 'result.json'}   {outcome.seconds:.0f} s")
    return outcome


def measure(config: InterestBench, case: Case) -> list[Row]:
    """A row a contender: milliseconds of both kinds of pass, and how far its numbers are from XLA's."""
    mask, given = inputs(config, case)
    passes = {"forward": forward, "both": gradients}
    lower: dict[tuple[str, str], Callable[[], Any]] = {}
    names = contenders(config, case)
    for name, tuning in names.items():
        for what, make in passes.items():
            lower[name, what] = partial(jax.jit(partial(make, config, tuning)).lower, mask, given)
    programs = timing.compile_all(lower, log=lambda _: None)
    reasons = {name: programs[name, what].reason for name, what in lower if programs[name, what].reason}
    off: dict[str, float] = {}
    if "XLA" not in reasons:
        exact = {what: programs["XLA", what].call(mask, given) for what in passes}
        for name in names.keys() - reasons.keys():
            off[name] = max(distance(programs[name, what].call(mask, given), exact[what]) for what in passes)
            if off[name] > OFF:
                reasons[name] = f"off by {off[name]:.3f} of the largest number"
    ms: dict[str, dict[str, np.ndarray]] = {}
    for what in passes:
        calls = {name: programs[name, what].call for name in names if name in off and name not in reasons}
        timed = {name: partial(_time, call, (mask, given), config.steps) for name, call in calls.items()}
        ms[what], failed = timing.in_turn(timed, config.repeats)
        reasons |= failed
    rows: list[Row] = []
    for name in names:
        row: Row = {"case": case.name, "attention": case.attention, "length": case.length, "queries": case.groups}
        row["contender"] = name
        if name in off and name not in reasons:
            row |= {"forward_ms": float(np.median(ms["forward"][name])), **timing.summary(ms["both"][name], None)}
            row |= {"speedup": float(np.median(ms["both"]["XLA"] / ms["both"][name])), "off": off[name]}
        else:
            row["reason"] = reasons.get(name, "XLA's numbers, to compare with, are not there")
        rows.append(row)
    return rows


def contenders(config: InterestBench, case: Case) -> dict[str, Any]:
    """XLA (None), and the tuning of the kernels as taken, and in each shape."""
    kernels = can_gpu_each if case.each else KERNELS[case.attention]
    chunks = {"MHA": multi_head_gpu.MAPPED, "CAN": can_gpu.GROUPED}
    taken = kernels.DEFAULT if case.groups == 1 or case.each else chunks[case.attention]
    found = {"XLA": None, "as taken": taken._replace(interpret=config.quick)}
    for given in config.shapes:
        shape = kernels.Shape(*map(int, given.split("/")))
        found[given] = kernels.Tuning(shape, shape, config.quick)
    return found


def inputs(config: InterestBench, case: Case) -> tuple[Array, tuple[Any, ...]]:
    """The mask; and behaviours, zeros at padding, and: of MHA their map, queries, and the values' matrix; of CAN the
    micro-MLPs."""
    draw = np.random.default_rng(0)
    size, d = config.batch, config.width

    def some(*shape: int, scale: float = 1.0) -> Array:
        key = jax.random.key(int(draw.integers(2**31)))
        return scale * jax.random.normal(key, shape, jnp.bfloat16)

    mask = jnp.asarray(np.arange(case.length) >= draw.integers(0, case.length // 2 + 1, (size, 1)))
    sequence = jnp.where(mask[..., None], some(size, case.length, d), 0)
    if case.attention == "CAN":
        return mask, (sequence, some(size, case.groups, parameters(d, MICRO), scale=0.1))
    linear = (jnp.eye(d, dtype=jnp.bfloat16) + some(size, d, d, scale=0.1), some(size, d)) if case.mapped else None
    queries = some(size, case.groups, config.heads, d, scale=0.2)
    return mask, (sequence, linear, queries, some(d, config.heads, WIDTH, scale=0.2))


def forward(config: InterestBench, tuning: Any, mask: Array, given: tuple[Any, ...]) -> Array:
    """The answer, of what `inputs` gives."""
    if len(given) == 2:
        sequence, induction = given
        kernels = can_gpu_each if induction.shape[1] == sequence.shape[1] else can_gpu
        read: Any = by_xla if tuning is None else partial(kernels.summed, tuning=tuning)
        return read(sequence, mask, induction, MICRO, ORDERS).astype(sequence.dtype)
    sequence, linear, queries, value = given
    if tuning is not None:
        return multi_head_gpu.attend(sequence, mask, linear, queries, value, tuning)
    module = MultiHead(config.heads, WIDTH, dtype="bfloat16")
    params = {"params": {"value": {"kernel": value.astype(jnp.float32)}}}
    read = module.apply(params, Mapped(sequence, mask, linear), queries, method="attend")
    return read


def gradients(config: InterestBench, tuning: Any, mask: Array, given: tuple[Any, ...]) -> tuple[Array, Any]:
    """The answer, and the gradients of all that is given, for a slope that is the same for all."""
    answer, pull = jax.vjp(partial(forward, config, tuning, mask), given)
    slope = jnp.cos(jnp.arange(answer.size, dtype=jnp.float32)).reshape(answer.shape).astype(answer.dtype)
    return answer, pull(slope)


def distance(got: Any, wanted: Any) -> float:
    """The largest difference in any array, in parts of its largest number; infinite where one is not finite."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        apart = float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        worst = max(worst, apart if np.isfinite(apart) else np.inf)
    return worst


def _time(call: Any, given: tuple[Any, ...], steps: int) -> float:
    """Milliseconds a call."""
    began = time.perf_counter()
    for _ in range(steps):
        made = call(*given)
    jax.block_until_ready(made)
    return 1000 * (time.perf_counter() - began) / steps


def summarize(rows: list[Row], config: InterestBench) -> dict[str, float]:
    """What the kernels as taken gain over XLA, forward and backward; of the sizes of a test named small_..."""
    start, found = "small_" * config.quick, {}
    for row in rows:
        if row["contender"] == "as taken" and "speedup" in row:
            case = {1: "", row["length"]: "_each"}.get(row["queries"], "_chunks")
            found[f"{start}{str(row['attention']).lower()}_speedup_{row['length']}{case}"] = float(row["speedup"] or 0)
    return found


def page(outcome: results.Result) -> str:
    """The report."""
    panels = []
    for case in dict.fromkeys(str(row["case"]) for row in outcome.rows):
        values = {
            str(row["contender"]): float(row["ms"] or 0) for row in outcome.rows if row["case"] == case and "ms" in row
        }
        drawn = figures.bars(values, title=case, x_label="milliseconds, forward and backward", digits=3)
        panels.append(report.Panel(case, drawn, "Medians; contenders in turn within each repeat."))
    return report.page(
        outcome,
        "Target attentions in one pass",
        lead="Kernels beside XLA on the same behaviours; each answer and gradient was compared with XLA's first.",
        headline=outcome.rows,
        panels=panels,
    )

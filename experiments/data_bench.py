"""How fast sequences are packed on one core, and MovieLens-1M prepared.

    python -m experiments data-bench                                     # synthetic lengths, a minute
    python -m experiments data-bench --ml-1m PATH/ml-1m                  # also the preparation of MovieLens-1M

Packing is planned (windows, first-fit-decreasing) and gathered (rows of 512, three columns, random order, 64 a call);
CPU seconds of one core, the best of `repeats`. Preparation is a process of its own: wall seconds and peak memory.
Result: `results/data_bench.json`.
"""

import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import progress, results
from rec_core.data import packing

ROW = 512
SHAPES = {
    "long histories": (20_000, 165.0),  # users, mean events: MovieLens-like
    "short histories": (1_000_000, 8.0),
}


@dataclass(frozen=True)
class DataBench:
    """Settings: where MovieLens-1M lies (optional), how often each thing is measured, where the result goes."""

    ml_1m: Path | None = None
    repeats: int = 3
    out: Path = Path("runs/data_bench/result.json")


def run(config: DataBench) -> results.Result:
    """Measures, prints the table, writes the result."""
    started = results.begin()
    rows: list[results.Row] = []
    figures: dict[str, float] = {}
    for name, (users, mean) in SHAPES.items():
        row = min((_pack_once(users, mean) for _ in range(config.repeats)), key=lambda row: row["seconds"])
        rows.append({"what": f"packing, {name}", **row})
        figures[f"pack_{name.split()[0]}_m_events_per_s"] = row["m_events_per_s"]
    if config.ml_1m is not None:
        row = min((_prepare_once(config.ml_1m) for _ in range(config.repeats)), key=lambda row: row["seconds"])
        rows.append({"what": "prepare MovieLens-1M", **row})
        figures |= {"prepare_ml1m_seconds": row["seconds"], "prepare_ml1m_gib": row["gib"]}
    outcome = results.record("data_bench", started=started, seeds=[0], rows=rows, figures=figures)
    results.write(config.out, outcome)
    print(progress.table(rows))
    return outcome


def _pack_once(users: int, mean: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.exponential(mean, users)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    columns = {name: rng.integers(0, 1000, offsets[-1]).astype(np.int32) for name in ("item", "category", "gap")}
    began = time.process_time()
    windows = packing.plan_windows(offsets, ROW)
    plan = packing.pack(windows.length, ROW)
    planned = time.process_time()
    order = rng.permutation(plan.rows)
    for first in range(0, plan.rows, 64):
        packing.gather(plan, windows, columns, order[first : first + 64])
    seconds = time.process_time() - began
    return {
        "events": int(offsets[-1]),
        "seconds": seconds,
        "planning_seconds": planned - began,
        "m_events_per_s": offsets[-1] / seconds / 1e6,
        "waste": plan.waste,
    }


def _prepare_once(folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "experiments", "prepare", "--data", "ml-1m", "--data-dir", str(folder)]
        began = time.perf_counter()
        done = subprocess.run([*command, "--prepared", out], capture_output=True, text=True)
        seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"preparing {folder} failed: {done.stderr.strip()}")
    # ru_maxrss of the children is the largest one's so far, in KiB.
    return {"seconds": seconds, "gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20}

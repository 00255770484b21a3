"""A training killed at random steps and started again is, bit for bit, the training that was not killed."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from rec_core.checkpoint import read_records

TESTS = Path(__file__).parent
STEPS = 24


def start(directory: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
    }
    command = [sys.executable, str(TESTS / "survival_worker.py"), str(directory), str(STEPS), "1", "1"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def records(directory: Path) -> list[tuple[int, float, float]]:
    """What a run computed: everything but its speed."""
    found = read_records(directory / "metrics.jsonl")
    return [(record["step"], record["loss"], record["gradient_norm"]) for record in found]


def test_killed_and_started_again_gives_the_same_losses(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    wanted = records(tmp_path / "whole")
    assert [step for step, *_ in wanted] == list(range(1, STEPS + 1))

    chance, begun = random.Random(0), []
    for _ in range(3):
        run, after = start(tmp_path / "killed"), chance.randint(4, 7)
        seen = 0
        for line in run.stdout:
            if line.startswith("STEP"):
                if not seen:
                    begun.append(int(line.split()[1]))
                seen += 1
            if seen == after:
                run.send_signal(signal.SIGKILL)
                break
        errors = run.communicate(timeout=300)[1]
        assert run.returncode == -signal.SIGKILL, errors
    assert begun[0] == 1 and begun[-1] > 1, f"no run went on from a checkpoint: they began at {begun}"
    last = start(tmp_path / "killed")
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert records(tmp_path / "killed") == wanted

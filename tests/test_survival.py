"""A training killed at random steps and started again is, bit for bit, the training that was not killed."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import survival_worker

from rec_core.checkpoint import read_records

STEPS = 24


def start(directory: Path) -> subprocess.Popen[str]:
    command = [sys.executable, survival_worker.__file__, str(directory), str(STEPS), "1", "1"]
    environment = survival_worker.environment(8)  # as in this process, for the same numbers to the last bit
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def records(directory: Path) -> list[tuple[int, float, float]]:
    """What a run computed: everything but its speed."""
    found = read_records(directory / "metrics.jsonl")
    return [(record["step"], record["loss"], record["gradient_norm"]) for record in found]


def test_killed_and_started_again_gives_the_same_losses(tmp_path: Path) -> None:
    survival_worker.main(str(tmp_path / "whole"), STEPS, 1, 1)
    wanted = records(tmp_path / "whole")
    assert [step for step, *_ in wanted] == list(range(1, STEPS + 1))

    chance, begun = random.Random(0), []
    for _ in range(2):
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

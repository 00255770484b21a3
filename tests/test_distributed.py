"""Two real processes under jax.distributed give the numbers of one, and one goes on from their checkpoint."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import survival_worker

from rec_core.checkpoint import read_records

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(directory: Path, steps: int, devices: int, *distributed: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(TESTS / "survival_worker.py"), str(directory), str(steps), "2", "2"]
    command += [str(number) for number in distributed]
    environment = survival_worker.environment(devices)
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(*runs: subprocess.Popen[str]) -> None:
    try:
        for run in runs:
            _, errors = run.communicate(timeout=300)
            assert run.returncode == 0, errors[-3000:]
    finally:
        for run in runs:
            run.kill()


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in read_records(directory / "metrics.jsonl")]


def test_two_processes_are_one_and_their_checkpoint_continues_on_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    port = free_port()
    runs = start(two, 6, 2, port, 0, 2), start(two, 6, 2, port, 1, 2)
    survival_worker.main(str(one), 9, 2, 2)  # one process, this one; a mesh of 2x2 in both
    finish(*runs)
    assert len(losses(two)) == 6
    np.testing.assert_allclose(losses(two), losses(one)[:6], rtol=1e-5)
    finish(start(two, 9, 4))
    assert len(losses(two)) == 9
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)

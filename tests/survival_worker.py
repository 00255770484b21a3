"""A training run as a process of its own, for the tests that kill it and those that run two of it.

survival_worker.py DIRECTORY STEPS DATA MODEL [PORT PROCESS PROCESSES]
"""

import os
import sys
from pathlib import Path


def environment(devices: int) -> dict[str, str]:
    """What a worker process runs in: this process's own settings, with so many simulated devices."""
    here = Path(__file__).parent
    count = "--xla_force_host_platform_device_count="
    return os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(f"{count}8", f"{count}{devices}"),
        "PYTHONPATH": os.pathsep.join((str(here.parent), str(here))),
    }


def main(
    directory: str, steps: int, data: int, model: int, port: int = 0, process: int = 0, processes: int = 1
) -> None:
    import jax
    import numpy as np
    import toy_model

    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    from rec_core.data.pipeline import Samples, iterator
    from rec_core.sharding import make_mesh
    from rec_core.training import TrainConfig, fit

    config = toy_model.Config(dropout=0.1 if processes == 1 and data == 1 else 0.0)
    samples = toy_model.make_batch(np.random.default_rng(0), 100, config)
    source = Samples(100, lambda ids: jax.tree.map(lambda column: column[ids], samples))
    batches = iterator(source, batch_size=16, seed=3, process_index=process, process_count=processes)
    train = TrainConfig(steps=steps, log_every=1, checkpoint_every=3, sparse_tables=True, decay="constant")

    def report(record: dict) -> None:
        print("STEP", record["step"], flush=True)

    fit(toy_model, config, train, batches, mesh=make_mesh(data, model), directory=directory, on_log=report)


if __name__ == "__main__":
    assert "XLA_FLAGS" in os.environ and os.environ["JAX_PLATFORMS"] == "cpu"
    main(sys.argv[1], *map(int, sys.argv[2:]))

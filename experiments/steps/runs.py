"""What the experiments that train on the device share: whole calls of steps, orders of samples, runs kept in files."""

import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int

from experiments import results
from experiments.progress import Progress
from rec_core.training import TrainConfig


def settings_for(samples: int, batch_size: int, epochs: float, call: int, **options: Any) -> TrainConfig:
    """Adam with linear decay over so many epochs, in whole calls of `call` steps: one shape is compiled."""
    steps = max(2, round(epochs * samples / batch_size))
    steps -= steps % call if steps > call else 0
    return TrainConfig(steps=steps, decay="linear", warmup=max(1, steps // 20), b2=0.99, **options)


def order(index: Int[np.ndarray, " n"], steps: int, batch_size: int, seed: int) -> Int[np.ndarray, "steps B"]:
    """The samples of each step: all of `index` in an order of the seed's own, and again in another."""
    rng, need = np.random.default_rng([seed, 7]), steps * batch_size
    drawn = np.concatenate([rng.permutation(index) for _ in range(-(-need // len(index)))])[:need]
    return drawn.reshape(steps, batch_size).astype(np.int32)


@dataclass(frozen=True)
class Run:
    """A trained model: parameters of all seeds, stacked; losses of its steps and logits of the test samples.

    `device`: what trained it; another machine may report it.
    """

    params: Any
    losses: Float[np.ndarray, "steps seeds"]
    logits: Float[np.ndarray, "seeds n"]
    device: str = field(default_factory=lambda: jax.local_devices()[0].device_kind)


def side_by_side[T](jobs: Mapping[str, Callable[[], T]], label: str, loss: Callable[[T], float]) -> dict[str, T]:
    """The models that the jobs train, by name and in their order: a thread each for as many as there are processors,
    since compiling takes longer than training. One that fails keeps those that have not begun from beginning."""
    found: dict[str, T] = {}
    with (
        ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool,
        Progress(len(jobs), label, unit="models") as progress,
    ):
        begun = {pool.submit(job): name for name, job in jobs.items()}
        try:
            for done, future in enumerate(as_completed(begun), start=1):
                found[begun[future]] = future.result()
                progress.update(done, loss=loss(future.result()), count=1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: found[name] for name in jobs}


def run_file(folder: Path, name: str, identity: Any) -> Path:
    """Where `saved_run` keeps a run: the file's name has a checksum of what its numbers depend on, the sources' commit
    (`results.commit`) and JAX's version with it. At the same commit a run goes on; at another one it begins anew."""
    said = repr((identity, _commit(), jax.__version__))
    return folder / f"{name}-{zlib.crc32(said.encode()):08x}.npz"


@cache  # asked for each model; and what is trained is what was imported, whatever changes meanwhile
def _commit() -> str:
    return results.commit()


def saved_run(path: Path, make: Callable[[], Run]) -> Run:
    """What `make` gives, kept in a file (`run_file`)."""
    flat: dict[str, Any] = saved_arrays(path, lambda: flatten_dict(vars(make()), sep="/"))
    device = str(flat.pop("device"))
    return Run(**unflatten_dict(flat, sep="/"), device=device)


def saved_arrays(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
    """Named arrays in a file that is whole or not there; made if it is not."""
    if not path.exists():
        made: dict[str, Any] = {name: np.asarray(value) for name, value in make().items() if value is not None}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(".partial.npz")
        np.savez_compressed(partial_file, **made)
        partial_file.replace(path)
    with np.load(path) as found:
        return {name: found[name] for name in found.files}

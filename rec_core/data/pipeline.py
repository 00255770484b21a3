"""Batches in one global order, whatever the number of processes; the only module that imports Grain.

A source is anything with a length that answers an array of indices with one batch: `PackedRows` (packed sequences) or
`Samples` (any function of indices). The order of training is a function of (seed, epoch, size) alone: batch number t
is made of the indices at t * batch_size ... of the epoch's permutation, each process takes its slice of them, and only
then is anything read. So two processes see together exactly what one would see, whole batches are collated at once,
and the position is one integer that any number of processes can continue from.

Saving the position with Orbax: `ocp.args.JsonSave(iterator.get_state())` and, later, `iterator.set_state(...)` work
across process counts. `grain.checkpoint.CheckpointSave(iterator)` works too, but names its file after the process, so
what it wrote can be restored by the same number of processes only.

A last batch that is not full is left out in training (`batches_per_epoch` counts it; another epoch leaves out other
samples) and filled up with weight 0 in evaluation (`evaluation_batches`).
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Float, Int, Integer, Shaped, UInt64

from rec_core.data.packing import Plan, Windows, gather, mix


class Source(Protocol):
    """What `iterator` reads from: a number of samples, and one batch for an int64 array of sample indices.

    `__getitem__` is called from several threads at a time and must depend on the indices only.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Int[np.ndarray, " b"], /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Samples:
    """A source of `size` samples whose batches are made by `collate(indices int64[b])`, vectorised over the batch.

    Raises:
        ValueError: no samples.
    """

    size: int
    collate: Callable[[Int[np.ndarray, " b"]], Any]

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}: a source needs at least one sample")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, indices: Int[np.ndarray, " b"], /) -> Any:
        return self.collate(indices)


@dataclass(frozen=True, eq=False)
class PackedRows:
    """A source of packed rows: `rows[indices]` is `packing.gather(plan, windows, columns, indices)`.

    Raises:
        ValueError: a plan made for other windows, or a column that ends before the last window does.
    """

    plan: Plan
    windows: Windows
    columns: Mapping[str, Shaped[np.ndarray, "events *feature"]]

    def __post_init__(self) -> None:
        planned, given = self.plan.length, self.windows.length
        if len(planned) != len(given) or not np.array_equal(planned, given[self.plan.order]):
            raise ValueError(
                f"the plan ({len(planned)} windows) was not made for these windows ({len(given)}): "
                "make it with pack(windows.length, row_length)"
            )
        end = self.windows.start + self.windows.length
        last = int(np.argmax(end))
        for name, column in self.columns.items():
            if len(column) < end[last]:
                raise ValueError(
                    f"column {name!r} has {len(column)} events, but window {last} of user {self.windows.user[last]} "
                    f"ends at event {end[last]}: columns and windows belong to different data"
                )

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, indices: Integer[np.ndarray, " b"], /) -> dict[str, np.ndarray]:
        return gather(self.plan, self.windows, self.columns, indices)


def permuted(indices: Integer[np.ndarray, " b"], size: int, *, seed: int, epoch: int) -> Int[np.ndarray, " b"]:
    """Looks up places of a random permutation of range(size), without making the permutation.

    A Feistel network over mixed digits i = left + right * width with modular addition as its round (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"), walked again where it leaves the range. It needs no memory, starts
    anywhere at once, and does not depend on NumPy's version, as NumPy's own shuffles do: a saved position keeps its
    meaning. Grain's shuffle has these properties too, but serves one index at a time (10 microseconds each).

    Args:
        indices: places in the permutation, 0 to size - 1.
        size: at least 1.
        seed, epoch: each pair gives another permutation.

    Returns:
        int64[b]; over all places, each of range(size) exactly once.
    """
    width = max(1, math.isqrt(size - 1) + 1) if size > 1 else 1
    height = -(-size // width)
    rounds = 6 if size >= 64 else 12  # six are fair for all but a handful of samples (chi-square of places and pairs)
    key = int(mix(np.array([epoch], np.uint64), seed)[0])
    result = np.asarray(indices).astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        right, left = np.divmod(result[walking], np.uint64(width))
        for r in range(0, rounds, 2):
            left = _add(left, mix(right, key + r), width)
            right = _add(right, mix(left, key + r + 1), height)
        result[walking] = left + right * np.uint64(width)
        walking = walking[result[walking] >= size]
    return result.astype(np.int64)


def _add(digit: UInt64[np.ndarray, " b"], random: UInt64[np.ndarray, " b"], base: int) -> UInt64[np.ndarray, " b"]:
    """digit + random, modulo base < 2^32, without a division: that would take most of the time."""
    digit = digit + ((random >> np.uint64(32)) * np.uint64(base) >> np.uint64(32))
    digit -= (digit >= base) * np.uint64(base)
    return digit


def batches_per_epoch(size: int, batch_size: int) -> tuple[int, int]:
    """Number of full batches in an epoch, and the number of samples that an epoch leaves out.

    Raises:
        ValueError: not one full batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: a batch has at least 1 sample")
    if size < batch_size:
        raise ValueError(
            f"the source has {size} samples, too few for one batch of batch_size = {batch_size}: "
            "lower batch_size, or use more data"
        )
    return size // batch_size, size % batch_size


def iterator(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    transform: Callable[[Any], Any] | None = None,
    repeat: bool = True,
    threads: int = 2,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Iterates over a source in a shuffled order that is the same for any number of processes.

    Args:
        source: `PackedRows`, `Samples`, or anything else with their two methods.
        batch_size: samples of the global batch; each process gets batch_size / process_count of them.
        seed: with the epoch, gives the order.
        process_index, process_count: which slice of each batch this process takes.
        transform: turns what the source returned into the batch, in the worker thread.
        repeat: endless, each epoch in an order of its own; otherwise one epoch.
        threads: worker threads; 0 makes each batch when it is asked for.
        prefetch: batches made ahead.

    Returns:
        An iterator with `get_state`, `set_state` (a small dict that JSON can hold: `next_index`, the number of batches
        handed out, and the order it counts in) and `close`. An error in a worker is raised by `next` as it was, with a
        note that says which batch; the position stays before that batch, so that nothing is skipped by asking again.

    Raises:
        ValueError: sizes that do not fit; from `set_state`, a state of another order, naming the field that differs.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}, outside of 0 to process_count - 1 = {process_count - 1}")
    if threads < 0 or prefetch < 0:
        raise ValueError(f"threads is {threads} and prefetch is {prefetch}: neither can be negative")
    per_epoch, _ = batches_per_epoch(len(source), batch_size)
    if batch_size % process_count:
        raise ValueError(
            f"batch_size is {batch_size}, not a multiple of process_count = {process_count}: processes take equal parts"
        )
    batches = _Batches(source, batch_size, seed, process_index, process_count, transform, per_epoch, repeat)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
    order = {"size": len(source), "batch_size": batch_size, "seed": seed, "repeat": repeat}
    return _Iterator(iter(grain.MapDataset.source(batches).to_iter_dataset(options)), order, len(batches))


@dataclass(frozen=True, eq=False)
class _Batches:
    """Random access to the batches of this process, by batch number: what Grain's threads read."""

    source: Source
    batch_size: int
    seed: int
    process_index: int
    process_count: int
    transform: Callable[[Any], Any] | None
    per_epoch: int
    repeat: bool

    def __len__(self) -> int:
        return sys.maxsize if self.repeat else self.per_epoch

    def __getitem__(self, number: int) -> Any:
        epoch, nth = divmod(int(number), self.per_epoch)
        begin = nth * self.batch_size + self.process_index * self.batch_size // self.process_count
        end = nth * self.batch_size + (self.process_index + 1) * self.batch_size // self.process_count
        try:
            indices = permuted(np.arange(begin, end), len(self.source), seed=self.seed, epoch=epoch)
            batch = self.source[indices]
            if self.transform is not None:
                batch = self.transform(batch)
            if batch is None:  # Grain takes None for an element to leave out
                raise ValueError("the source or its transform returned None instead of a batch")
        except StopIteration as error:  # would end the training as if the data had ended
            raise RuntimeError(f"StopIteration({error}) while making batch {number} (epoch {epoch})") from error
        except Exception as error:
            error.add_note(f"while making batch {number} (batch {nth} of epoch {epoch})")
            raise
        return batch


class _Iterator(grain.DatasetIterator):
    """Grain's iterator, with the order in its state and a position that an error does not move."""

    def __init__(self, batches: grain.DatasetIterator, order: dict[str, int | bool], length: int) -> None:
        super().__init__(batches)
        self._batches, self._order, self._length = batches, order, length

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            raise
        except BaseException:  # an interrupt while waiting, too
            # Grain has taken the failed batch out of its queue without counting it: the next one would be handed out
            # under its number. Setting the position anew empties the queue.
            self._batches.set_state(self._batches.get_state())
            raise

    def get_state(self) -> dict[str, Any]:
        return {"next_index": int(self._batches.get_state()["next_index"]), "order": dict(self._order)}

    def set_state(self, state: dict[str, Any]) -> None:
        if not isinstance(state, Mapping) or set(state) != {"next_index", "order"}:
            raise ValueError(f"state is {state!r}: expected next_index and order, as get_state returns them")
        saved, position = state["order"], state["next_index"]
        differs = [
            f"{name} is {self._order.get(name)!r} here and {saved.get(name)!r} in the state"
            for name in sorted(self._order.keys() | saved.keys())
            if self._order.get(name) != saved.get(name)
        ]
        if differs:
            raise ValueError(
                f"the state belongs to another order of batches: {'; '.join(differs)}. "
                "Resume with the same data, batch size and seed, or begin a new run"
            )
        if not 0 <= position <= self._length:
            raise ValueError(f"next_index is {position}, outside of 0 to {self._length} batches")
        self._batches.set_state({"next_index": int(position)})

    def __str__(self) -> str:
        return f"iterator({self._order})"


def evaluation_batches(
    size: int, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, " b"]]]:
    """Every sample once, in order, in batches of one size: the last one is filled up with copies that weigh nothing.

    Args:
        size: number of samples.
        batch_size: samples of the global batch, a multiple of process_count.
        process_index, process_count: which slice of each batch to return; all processes get equally many batches.

    Returns:
        Pairs of indices int64[b] and weight float32[b], b = batch_size / process_count. Weight is 1, or 0 for filling:
        there the index is the last sample's, so that whatever reads it finds valid values.

    Raises:
        ValueError: no samples, or sizes that do not fit.
    """
    if size < 1:
        raise ValueError(f"size is {size}: there is nothing to evaluate")
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size is {batch_size}, process_index {process_index}, process_count {process_count}: "
            "batch_size must be a positive multiple of process_count, process_index below it"
        )

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        part = batch_size // process_count
        for begin in range(process_index * part, -(-size // batch_size) * batch_size, batch_size):
            indices = np.arange(begin, begin + part)
            yield np.minimum(indices, size - 1), (indices < size).astype(np.float32)

    return batches()

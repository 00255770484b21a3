"""One global order for any number of processes, exact resume, errors that arrive as they were raised."""

import itertools
import threading

import flax.struct
import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_core.data import packing, pipeline


class BrokenShardError(Exception):
    """Stands for any error of a reader."""


@flax.struct.dataclass
class Batch:
    item: np.ndarray
    segment_ids: np.ndarray


def packed_rows(users=60, row_length=16):
    counts = np.random.default_rng(1).integers(1, 30, users)
    windows = packing.plan_windows(np.concatenate([[0], np.cumsum(counts)]), row_length)
    events = np.arange(1, counts.sum() + 1)
    columns = {"item": events, "rating": (events / 7).astype(np.float32)}
    return pipeline.PackedRows(packing.pack(windows.length, row_length), windows, columns)


def indices_of(size):
    """A source whose batches are the indices asked for."""
    return pipeline.Samples(size, lambda indices: indices)


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    assert len(batches) == count
    return batches


def assert_same(batches, expected):
    assert len(batches) == len(expected) > 0
    jax.tree.map(np.testing.assert_array_equal, batches, expected)


def within(seconds, function):
    """The function's result or its error; fails instead of hanging."""
    outcome = []

    def run():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"still waiting after {seconds} s"
    return outcome[0]


# ---------------------------------------------------------------- the order


@given(st.integers(1, 400), st.integers(0, 2**40), st.integers(0, 1000))
@settings(max_examples=200)
def test_permuted_is_a_permutation(size, seed, epoch):
    everything = pipeline.permuted(np.arange(size), size, seed=seed, epoch=epoch)
    np.testing.assert_array_equal(np.sort(everything), np.arange(size))
    some = np.arange(size)[:: max(1, size // 7)][::-1]
    np.testing.assert_array_equal(pipeline.permuted(some, size, seed=seed, epoch=epoch), everything[some])


@pytest.mark.parametrize("size", [3, 5, 12, 64])
def test_permuted_is_fair(size):
    """Over many epochs each index comes to each place equally often, and so does each ordered pair of neighbours."""
    trials = 2500
    orders = np.stack([pipeline.permuted(np.arange(size), size, seed=11, epoch=e) for e in range(trials)])
    places = np.stack([np.bincount(orders[:, p], minlength=size) for p in range(size)])
    pairs = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size * size).reshape(size, size)
    pairs = pairs[~np.eye(size, dtype=bool)]
    for counts, independent in ((places, (size - 1) ** 2), (pairs, len(pairs) - 1)):
        expected = counts.sum() / counts.size
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - independent) < 5 * np.sqrt(2 * independent)


def test_permuted_leaves_no_trend_in_a_large_range():
    size = 1_000_000
    order = pipeline.permuted(np.arange(size), size, seed=0, epoch=0)
    np.testing.assert_array_equal(np.bincount(order), np.ones(size))
    x = order / size
    for other in (np.arange(size) / size, np.roll(x, 1), np.roll(x, 1000)):  # 1000 is the width of the network
        assert abs(np.corrcoef(x, other)[0, 1]) < 0.005
    following = pipeline.permuted(np.arange(size), size, seed=0, epoch=1)
    assert (following == order).mean() < 1e-4
    assert abs(np.corrcoef(order, following)[0, 1]) < 0.005


def test_permuted_is_pinned():
    """A saved position means the same batches later: these numbers must not change with versions or machines."""
    assert pipeline.permuted(np.arange(10), 10, seed=1, epoch=2).tolist() == [1, 8, 0, 2, 4, 7, 6, 5, 3, 9]
    assert pipeline.permuted(np.arange(5), 1000, seed=1, epoch=2).tolist() == [549, 678, 507, 460, 593]


def test_epochs_hold_every_sample_once_in_new_orders():
    with_rest = take(pipeline.iterator(indices_of(50), batch_size=8, seed=3), 18)  # 6 batches an epoch, 2 left out
    epochs = np.array(with_rest).reshape(3, 48)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 48
    left_out = [set(range(50)) - set(epoch.tolist()) for epoch in epochs]
    assert left_out[0] != left_out[1] or left_out[1] != left_out[2]
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
    assert pipeline.batches_per_epoch(50, 8) == (6, 2)


def test_order_follows_the_seed_and_not_the_threads():
    source = packed_rows()
    expected = take(pipeline.iterator(source, batch_size=4, seed=5, threads=0), 25)
    for threads, prefetch in ((1, 1), (2, 4), (5, 16)):
        assert_same(
            take(pipeline.iterator(source, batch_size=4, seed=5, threads=threads, prefetch=prefetch), 25), expected
        )
    other = take(pipeline.iterator(source, batch_size=4, seed=6), 25)
    assert any((a["item"] != b["item"]).any() for a, b in zip(other, expected))


def test_one_epoch_ends():
    iterator = pipeline.iterator(indices_of(50), batch_size=8, seed=3, repeat=False)
    assert len(list(iterator)) == 6
    assert next(iterator, None) is None
    iterator.set_state({**iterator.get_state(), "next_index": 4})
    assert len(list(iterator)) == 2


@pytest.mark.parametrize("process_count", [2, 4])
def test_many_processes_see_together_what_one_sees(process_count):
    source = packed_rows()
    assert 60 % (len(source) // 8), "the batches compared should not end with an epoch"
    one = take(pipeline.iterator(source, batch_size=8, seed=9), 60)
    parts = [
        take(
            pipeline.iterator(source, batch_size=8, seed=9, process_index=p, process_count=process_count, threads=1), 60
        )
        for p in range(process_count)
    ]
    together = [jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches) for batches in zip(*parts)]
    assert_same(together, one)
    assert len({batch["item"].tobytes() for batch in one}) > 50


def test_transform_makes_typed_batches():
    def transform(columns):
        return Batch(item=columns["item"].astype(np.int32), segment_ids=columns["segment_ids"])

    source = packed_rows()
    typed = take(pipeline.iterator(source, batch_size=4, seed=0, transform=transform), 3)
    plain = take(pipeline.iterator(source, batch_size=4, seed=0), 3)
    for batch, columns in zip(typed, plain):
        assert isinstance(batch, Batch) and batch.item.dtype == np.int32
        np.testing.assert_array_equal(batch.item, columns["item"])
    assert isinstance(pipeline.iterator(source, batch_size=4, seed=0), grain.DatasetIterator)


# ---------------------------------------------------------------- resume


@given(st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=15)
def test_resume_is_exact_at_any_point(first, second):
    """7 batches an epoch: points on both sides of the epochs' ends are among them."""
    source = packed_rows(users=40)
    size = len(source) // 7

    def make():
        return pipeline.iterator(source, batch_size=size, seed=2)

    assert pipeline.batches_per_epoch(len(source), size)[0] == 7
    expected = take(make(), first + second + 8)
    iterator = make()
    for _ in range(first):
        next(iterator)
    continued = make()
    continued.set_state(iterator.get_state())
    for _ in range(second):
        next(continued)
    again = make()
    next(again), next(again)  # set_state must also throw away what was made ahead
    again.set_state(continued.get_state())
    assert again.get_state()["next_index"] == first + second
    assert_same(take(again, 8), expected[first + second :])


def test_one_of_two_processes_continues_alone():
    source = packed_rows()
    expected = take(pipeline.iterator(source, batch_size=8, seed=4), 30)
    pair = [pipeline.iterator(source, batch_size=8, seed=4, process_index=p, process_count=2) for p in (0, 1)]
    for iterator in pair:
        take(iterator, 11)
    assert pair[0].get_state() == pair[1].get_state()
    alone = pipeline.iterator(source, batch_size=8, seed=4)
    alone.set_state(pair[0].get_state())
    assert_same(take(alone, 19), expected[11:])


def test_orbax_saves_and_restores_the_position(tmp_path):
    source = packed_rows()
    expected = take(pipeline.iterator(source, batch_size=8, seed=4), 20)
    state = {"weights": np.arange(3.0)}
    iterator = pipeline.iterator(source, batch_size=8, seed=4)
    take(iterator, 5)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(
            5,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(iterator),
                position=ocp.args.JsonSave(iterator.get_state()),
            ),
        )
        assert_same(take(iterator, 15), expected[5:])  # saving moved nothing
        manager.wait_until_finished()

    restored, by_json = (pipeline.iterator(source, batch_size=8, seed=4) for _ in range(2))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        found = manager.restore(
            5,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state),
                data=grain.checkpoint.CheckpointRestore(restored),
                position=ocp.args.JsonRestore(),
            ),
        )
    np.testing.assert_array_equal(found["state"]["weights"], state["weights"])
    assert_same(take(restored, 15), expected[5:])
    by_json.set_state(found["position"])
    assert_same(take(by_json, 15), expected[5:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5}, r"batch_size is 5 here and 4 in the state"),
        ({"seed": 1}, r"seed is 1 here and 0 in the state"),
        ({"size": 41}, r"size is 41 here and 40 in the state"),
        ({"repeat": False}, r"repeat is False here and True in the state"),
    ],
)
def test_a_position_in_another_order_is_refused(options, message):
    common = {"size": 40, "batch_size": 4, "seed": 0}
    size = common.pop("size")
    state = pipeline.iterator(indices_of(size), **common).get_state()
    changed = {"size": size, **common, **options}
    iterator = pipeline.iterator(indices_of(changed.pop("size")), **changed)
    with pytest.raises(ValueError, match=message):
        iterator.set_state(state)


def test_an_impossible_position_is_refused():
    iterator = pipeline.iterator(indices_of(40), batch_size=4, seed=0, repeat=False)
    for position in (-1, 11):
        with pytest.raises(ValueError, match=rf"next_index is {position}, outside of 0 to 10"):
            iterator.set_state({**iterator.get_state(), "next_index": position})
    with pytest.raises(ValueError, match="expected next_index and order"):
        iterator.set_state({"next_index": 3})


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_error_in_a_worker_arrives_as_it_was_and_loses_nothing(threads):
    broken = threading.Event()
    broken.set()
    made = take(pipeline.iterator(indices_of(40), batch_size=4, seed=0), 12)
    bad = int(made[3][0])

    def collate(indices):
        if broken.is_set() and bad in indices:
            raise BrokenShardError("shard-00002: record 17 is damaged")
        return indices

    iterator = pipeline.iterator(pipeline.Samples(40, collate), batch_size=4, seed=0, threads=threads)
    assert_same(take(iterator, 3), made[:3])
    for _ in range(2):  # and again: not a hang, not the next batch
        _, error = within(30, lambda: next(iterator))
        assert type(error) is BrokenShardError
        assert str(error) == "shard-00002: record 17 is damaged"
        assert any("batch 3 of epoch 0" in note for note in error.__notes__)
        assert iterator.get_state()["next_index"] == 3
    broken.clear()
    assert_same(take(iterator, 9), made[3:])


def test_a_bad_id_found_by_the_transform_arrives_with_its_message():
    def check(columns):
        if (columns["item"] > 500).any():
            row = int(np.argwhere(columns["item"] > 500)[0, 0])
            raise ValueError(f"item[{row}] is {columns['item'][row].max()}, outside of 0 to 500")
        return columns

    iterator = pipeline.iterator(packed_rows(), batch_size=8, seed=0, transform=check)
    _, error = within(30, lambda: take(iterator, 100))
    assert type(error) is ValueError and "outside of 0 to 500" in str(error)


def test_stop_iteration_in_a_worker_does_not_end_the_data():
    def collate(indices):
        return next(iter(()))

    for threads in (0, 2):
        iterator = pipeline.iterator(pipeline.Samples(40, collate), batch_size=4, seed=0, threads=threads)
        _, error = within(30, lambda iterator=iterator: next(iterator))
        assert type(error) is RuntimeError and "StopIteration" in str(error)


def test_none_is_not_a_batch():
    iterator = pipeline.iterator(indices_of(40), batch_size=4, seed=0, transform=lambda batch: None)
    _, error = within(30, lambda: next(iterator))
    assert type(error) is ValueError and "returned None" in str(error)


def test_a_closed_iterator_says_so_and_its_threads_end():
    before = set(threading.enumerate())
    iterator = pipeline.iterator(indices_of(40), batch_size=4, seed=0)
    next(iterator)
    workers = set(threading.enumerate()) - before
    assert workers
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 41}, r"the source has 40 samples, too few for one batch of batch_size = 41"),
        ({"batch_size": 0}, r"batch_size is 0"),
        ({"batch_size": 9, "process_count": 2}, r"batch_size is 9, not a multiple of process_count = 2"),
        ({"process_index": 2, "process_count": 2}, r"process_index is 2, outside of 0 to process_count - 1 = 1"),
        ({"threads": -1}, r"threads is -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.iterator(indices_of(40), **{"batch_size": 4, "seed": 0, **options})


def test_sources_refuse_what_they_cannot_serve():
    with pytest.raises(ValueError, match="size is 0"):
        indices_of(0)
    rows = packed_rows()
    with pytest.raises(ValueError, match="was not made for these windows"):
        pipeline.PackedRows(packing.pack(rows.windows.length[1:], 16), rows.windows, rows.columns)
    changed = packing.pack(np.where(rows.windows.length == 16, 15, rows.windows.length), 16)
    with pytest.raises(ValueError, match="was not made for these windows"):
        pipeline.PackedRows(changed, rows.windows, rows.columns)
    with pytest.raises(ValueError, match=r"column 'item' has \d+ events, but window \d+ of user 59 ends at event \d+"):
        pipeline.PackedRows(rows.plan, rows.windows, {"item": rows.columns["item"][:-1]})


# ---------------------------------------------------------------- evaluation


@given(st.integers(1, 50), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=60)
def test_evaluation_sees_every_sample_once_with_weight(size, per_process, process_count):
    batch_size = per_process * process_count
    parts = [
        list(pipeline.evaluation_batches(size, batch_size, process_index=p, process_count=process_count))
        for p in range(process_count)
    ]
    assert {len(part) for part in parts} == {-(-size // batch_size)}
    seen = []
    for batches in zip(*parts):
        for indices, weight in batches:
            assert indices.shape == weight.shape == (per_process,) and weight.dtype == np.float32
            assert indices.max() < size
            seen.extend(indices[weight == 1].tolist())
            assert set(weight.tolist()) <= {0.0, 1.0}
    assert seen == list(range(size))


def test_evaluation_refuses_at_once_what_does_not_fit():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        pipeline.evaluation_batches(0, 4)
    with pytest.raises(ValueError, match="positive multiple of process_count"):
        pipeline.evaluation_batches(10, 3, process_count=2)

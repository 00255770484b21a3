"""The behaviour tree loses no acknowledged event: killed writers, writers at once, a server that goes and comes."""

import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from redis_server import start_redis

from rec_core.data import EventLog
from rec_core.data.schema import LAST_TIME
from rec_core.store import StoreError, open_store
from sim_jax.tree import Appended, BehaviorTree
from sim_jax.tree_table import TreeTable


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(params=["lmdb", "redis"])
def lasting(request, tmp_path):
    """The address of one store that outlives its opening."""
    return str(tmp_path / "tree") if request.param == "lmdb" else request.getfixturevalue("redis_server").address()


# Batches of one stream over a few users and keys: blocks are filled, sealed and cut; a tenth of the events are late.
_EVENTS = """
import numpy as np
from rec_core.data import EventLog

def batch(number):
    rng = np.random.default_rng(number)
    n = 400
    late = rng.integers(0, 100 * number + 1, n)
    time = np.where(rng.random(n) < 0.1, late, 100 * number + rng.integers(0, 100, n))
    item = 1000 * number + np.arange(n)  # no event occurs twice
    return EventLog(rng.integers(0, 4, n), item, time, rng.integers(1, 4, n).astype(np.int32))
"""
_WRITER = (
    _EVENTS
    + """
import sys
from rec_core.store import StoreError, open_store
from sim_jax.tree import BehaviorTree
tree = BehaviorTree(open_store(sys.argv[1], map_size=1 << 16), key="category", block=16)
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    print("start", number, flush=True)
    assert tree.append(batch(number)).filed == 400
    print("done", number, flush=True)
"""
)
_space: dict = {}
exec(_EVENTS, _space)
batch = _space["batch"]


def writer(address: str, first: int, end: int = 1 << 20) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", _WRITER, address, str(first), str(end)], stdout=-1, text=True)


def items(tree: BehaviorTree) -> set[int]:
    """All items of the tree, each of which is filed once, in blocks of the sizes that look-ups count on."""
    found = tree.snapshot().event["item"].tolist()
    assert len(set(found)) == len(found) == sum(len(value) // 12 for _, value in tree.store.scan())
    heads = {key[1:]: len(value) // 12 for key, value in tree.store.scan(b"h")}
    for key, value in tree.store.scan(b"s"):
        assert heads[key[1:17]] >= tree.block
        assert len(value) // 12 >= tree.block or not any(key[17:])
    return set(found)


def answers_of(tree: BehaviorTree | TreeTable) -> np.ndarray:
    keys = np.tile([1, 2, 3], (4, 1))
    return np.stack([tree.lookup(np.arange(4), keys, 40, before).item for before in (0, 500, 1500, LAST_TIME)])


def test_a_killed_writer_loses_no_acknowledged_event_and_tears_no_record(lasting):
    rng = random.Random(5)
    first, inside = 0, 0
    for _ in range(4):
        process = writer(lasting, first)
        wait, lines = first + rng.randrange(2, 8), []
        for line in process.stdout:
            lines.append(line)
            if line == f"start {wait}\n":
                time.sleep(rng.random() * 0.006)
                process.send_signal(signal.SIGKILL)
                lines += process.stdout.readlines()
                break
        process.wait()
        lines = [x for x in lines if x.endswith("\n")]  # the last one may have been cut
        started, done = ([int(x.split()[1]) for x in lines if x.startswith(what)] for what in ("start", "done"))
        inside += started[-1] != done[-1]
        with open_store(lasting) as store:
            tree = BehaviorTree(store, key="category", block=16)
            held = items(tree)
            for number in range(started[-1] + 1):  # each whole; the one that was not acknowledged whole or absent
                found = held & set(batch(number).item.tolist())
                held -= found
                assert len(found) == 400 or (number == started[-1] and number not in done and not found)
            assert not held
            tree.append(batch(started[-1]))  # what was not acknowledged is appended again, stored before or not
            whole = [batch(number) for number in range(started[-1] + 1)]
            columns = {name: np.concatenate([log.columns()[name] for log in whole]) for name in whole[0].columns()}
            np.testing.assert_array_equal(answers_of(tree), answers_of(TreeTable.build(EventLog(**columns))))
        first = started[-1] + 1
    assert inside > 0, "no kill fell inside a batch"


def test_two_writers_of_the_same_users_lose_nothing(lasting):
    writers = [writer(lasting, first, first + 12) for first in (0, 12)]
    said = [process.communicate(timeout=60)[0] for process in writers]
    assert [text.count("done") for text in said] == [12, 12]
    with open_store(lasting) as store:
        tree = BehaviorTree(store, key="category", block=16)
        assert items(tree) == {item for number in range(24) for item in batch(number).item.tolist()}


@pytest.mark.parametrize("address", ["memory:", "lmdb"])
def test_what_another_writer_appends_between_reading_and_writing_stays(address, tmp_path, monkeypatch):
    """The other one seals the head and cuts the very blocks that this one has just read, late events among them."""
    with open_store(tmp_path / "tree" if address == "lmdb" else address) as store:
        tree = BehaviorTree(store, key="category", block=2)
        for number in (2, 3):
            tree.append(batch(number))
        put_if, between = store.put_if, [batch(0), batch(4), batch(1)]
        refused = []

        def late_put_if(writes, expected, since):
            if between:
                with monkeypatch.context() as real:
                    real.setattr(store, "put_if", put_if)
                    tree.append(between.pop())
            refused.append(not put_if(writes, expected, since=since))
            return not refused[-1]

        monkeypatch.setattr(store, "put_if", late_put_if)
        assert tree.append(batch(5)).filed == 400
        assert refused == [True, True, True, False]
        assert items(tree) == {item for number in range(6) for item in batch(number).item.tolist()}


@pytest.mark.parametrize("address", ["memory:", "lmdb"])
def test_another_writer_between_the_parts_of_a_large_batch(address, tmp_path, monkeypatch):
    """It changes blocks of the part that is about to be written, of parts that are, and of parts still to come."""
    monkeypatch.setattr("sim_jax.tree._PART", 300)
    with open_store(tmp_path / "tree" if address == "lmdb" else address) as store:
        tree = BehaviorTree(store, key="category", block=4)
        put_if, others, said = store.put_if, [3, 4, 5], []

        def late_put_if(writes, expected, since):
            if len(said) % 2 and others:
                with monkeypatch.context() as real:
                    real.setattr(store, "put_if", put_if)
                    tree.append(batch(others.pop()))
            said.append(put_if(writes, expected, since=since))
            return said[-1]

        tree.append(batch(2))
        monkeypatch.setattr(store, "put_if", late_put_if)
        assert tree.append(batch(1)).filed == 400
        assert said.count(False) == 3 and said.count(True) > 3
        assert items(tree) == {item for number in range(1, 6) for item in batch(number).item.tolist()}


def test_a_batch_is_one_transaction_up_to_the_size_that_is_promised(monkeypatch):
    store = open_store("memory:")
    tree = BehaviorTree(store, key="category")
    put_if, written = store.put_if, []

    def watched(writes, expected, since):
        written.append(len(writes))
        return put_if(writes, expected, since=since)

    monkeypatch.setattr(store, "put_if", watched)
    for n, transactions in ((32_000, 1), (34_000, 2)):
        user = np.arange(n)
        assert tree.append(EventLog(user, user, user, np.full(n, n, np.int32))).filed == n
        assert (len(written), sum(written)) == (transactions, n)
        written.clear()


def test_more_late_events_than_a_transaction_takes(monkeypatch):
    store = open_store("memory:")
    tree = BehaviorTree(store, key="category", block=16)
    logs = [batch(number) for number in range(8)]
    late = EventLog(**{name: np.concatenate([log.columns()[name] for log in logs[:7]]) for name in logs[0].columns()})
    tree.append(logs[7])
    monkeypatch.setattr("sim_jax.tree._LATE", 100)
    assert tree.append(late).filed == 2800
    assert tree.append(late).repeated == 2800
    assert items(tree) == {item for log in logs for item in log.item.tolist()}


def test_an_acknowledgement_that_was_lost_stores_nothing_twice(monkeypatch):
    """What a client that tries again after a lost connection sees: its own values are there already."""
    store = open_store("memory:")
    tree = BehaviorTree(store, key="category", block=16)
    put_if = store.put_if
    monkeypatch.setattr(store, "put_if", lambda writes, expected, since: put_if(writes, expected) and False)
    tree.append(batch(0))
    assert items(tree) == set(batch(0).item.tolist())
    assert tree.append(batch(0)) == Appended(filed=0, repeated=400, left_out=0)


def test_a_redis_server_that_is_killed_and_started_again_in_mid_run(tmp_path):
    server = start_redis(tmp_path)
    try:
        with open_store(server.address("tree")) as store:
            assert store.durable
            tree = BehaviorTree(store, key="category", block=16)
            for number in range(3):
                tree.append(batch(number))
            before = answers_of(tree)
            server.kill()
            with pytest.raises(StoreError, match=r"0/tree: .*connection"):
                tree.append(batch(3))
            with pytest.raises(StoreError, match="cannot be read, the connection failed"):
                answers_of(tree)
            server.start()
            np.testing.assert_array_equal(answers_of(tree), before)  # the same tree object goes on
            assert tree.append(batch(3)).filed == 400
            assert items(tree) == {item for number in range(4) for item in batch(number).item.tolist()}
    finally:
        server.kill()

"""What was acknowledged survives a killed writer, writers at once, a lost server."""

import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from redis_server import start_redis

from rec_core.store import StoreError, open_store


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(params=["lmdb", "redis"])
def lasting(request, tmp_path):
    """The address of one store that outlives its opening."""
    return str(tmp_path / "store") if request.param == "lmdb" else request.getfixturevalue("redis_server").address()


_ENTRIES = """
import random
def entries(batch):  # spread over the tree, of several sizes, the same every time
    rng = random.Random(batch)
    return [(b"%04d/%06d" % (i, batch), rng.randbytes(rng.choice([0, 10, 300, 5000]))) for i in range(200)]
"""
_WRITER = (
    _ENTRIES
    + """
import sys
from rec_core.store import StoreError, open_store
store = open_store(sys.argv[1], map_size=1 << 16)
for batch in range(int(sys.argv[2]), int(sys.argv[3])):
    print("start", batch, flush=True)
    try:
        store.put(entries(batch))
    except StoreError as error:
        print("error", error, flush=True)
        sys.exit(1)
    print("done", batch, flush=True)
"""
)
_space: dict = {}
exec(_ENTRIES, _space)


def _writer(address: str, first: int, end: int = 1 << 30) -> subprocess.Popen:
    command = [sys.executable, "-c", _WRITER, address, str(first), str(end)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _check_batches(address: str, done: set[int], started: set[int]) -> None:
    """Every acknowledged batch is whole; one that was only started is whole or absent; nothing else is there."""
    with open_store(address, readonly=True) as store:
        held = dict(store.scan())
    for batch in started:
        wanted = dict(_space["entries"](batch))
        found = {key: held.pop(key) for key in wanted if key in held}
        assert found == wanted or (batch not in done and not found), f"batch {batch}: {len(found)} of {len(wanted)}"
    assert not held


def _until_killed(address: str, first: int, kill, rng: random.Random) -> tuple[list[int], list[int], str]:
    """Runs a writer, kills something inside a batch, and returns what it started, what it was told done, the rest."""
    process = _writer(address, first)
    wait = rng.randrange(2, 12)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == f"start {first + wait}\n":
            time.sleep(rng.random() * 0.006)
            kill(process)
            lines += process.stdout.readlines()
            break
    process.wait()
    lines = [x for x in lines if x.endswith("\n")]  # the last one may have been cut
    numbers = {what: [int(x.split()[1]) for x in lines if x.startswith(what)] for what in ("start", "done")}
    return numbers["start"], numbers["done"], "".join(x for x in lines if x.startswith("error"))


def test_a_killed_writer_loses_no_acknowledged_entry_and_leaves_no_torn_one(lasting):
    rng = random.Random(7)
    started, done, inside = set(), set(), 0
    for _ in range(8 if lasting.startswith("/") else 4):
        first = max(started, default=-1) + 1
        new, acknowledged, _ = _until_killed(lasting, first, lambda process: process.send_signal(signal.SIGKILL), rng)
        assert acknowledged
        started |= set(new)
        done |= set(acknowledged)
        inside += new[-1] != acknowledged[-1]
        _check_batches(lasting, done, started)
    assert inside > 0, "no kill fell inside a batch"


_COUNTER = """
import sys
from rec_core.store import open_store
store, left = open_store(sys.argv[1]), 200
while left:
    moment = store.moment() if left % 2 else None
    held = store.get([b"counter", b"other"])
    value = str(int(held[0] or b"0") + 1).encode()
    pairs = {b"counter": value, b"log/" + value: sys.argv[2].encode()}
    left -= store.put_if(pairs, {b"counter": held[0]}, since=moment)
"""


def test_writers_that_put_if_nothing_has_changed_lose_no_step(lasting):
    command = [sys.executable, "-c", _COUNTER, lasting]
    writers = [subprocess.Popen([*command, name]) for name in ("a", "b")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    with open_store(lasting, readonly=True) as store:
        assert store.get([b"counter"]) == [b"400"]
        assert sorted(value for _, value in store.scan(b"log/")) == [b"a"] * 200 + [b"b"] * 200


def test_two_writer_processes_at_once_lose_nothing(lasting):
    writers = [_writer(lasting, first, first + 10) for first in (0, 10)]
    said = [writer.communicate(timeout=60)[0] for writer in writers]
    assert [text.count("done") for text in said] == [10, 10]
    _check_batches(lasting, set(range(20)), set(range(20)))


# ---- Redis -----------------------------------------------------------------------------------------------------------


def test_a_killed_redis_server_keeps_what_it_acknowledged(tmp_path):
    server = start_redis(tmp_path)
    try:
        address = server.address("survivor")
        with open_store(address) as store:
            assert store.durable
        rng = random.Random(3)
        started, done = set(), set()
        for _ in range(2):
            new, acknowledged, error = _until_killed(
                address, max(started, default=-1) + 1, lambda _: server.kill(), rng
            )
            started |= set(new)
            done |= set(acknowledged)
            assert f"127.0.0.1:{server.port}/0/survivor: this batch was not acknowledged" in error
            assert "connection" in error and "s3cret" not in error
            server.start()
            _check_batches(address, done, started)
    finally:
        server.kill()


def test_a_server_that_is_not_there_is_named_without_the_password():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        port = probe.getsockname()[1]
        with pytest.raises(StoreError, match=f"redis://127.0.0.1:{port}/0/x: .*connection") as caught:
            open_store(f"redis://user:s3cret@127.0.0.1:{port}/0/x")
    assert "s3cret" not in str(caught.value)


def test_a_server_that_drops_keys_or_has_dropped_one_is_refused(redis_server):
    address = redis_server.address()
    with open_store(address) as store:
        store.put([(b"a", b"1"), (b"b", b"2")])
        client = store._backend._redis
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(StoreError, match="allkeys-lru"):
                open_store(address)
        finally:
            client.config_set("maxmemory", "0")
            client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendfsync", "everysec")
        assert not store.durable
        client.config_set("appendfsync", "always")
        assert store.durable
        client.hdel(store._backend._values, b"b")
        with pytest.raises(StoreError, match="b'b' has lost its value"):
            store.floor([b"c"], 0)
        with pytest.raises(StoreError, match="b'b' has lost its value"):
            list(store.scan())


def test_two_redis_stores_on_one_database_do_not_meet(redis_server):
    with open_store(redis_server.address("one"), version="1") as one, open_store(redis_server.address("two")) as two:
        one.put([(b"a", b"1")])
        assert two.count() == 0 and two.version is None and two.floor([b"b"], 0) == [None]

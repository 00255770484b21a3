"""The three stores answer alike; what was acknowledged survives a kill, a full disk, a lost server."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis_server import start_redis

from rec_core import store as store_module
from rec_core.store import MAX_KEY, StoreError, open_store


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(params=["memory", "lmdb", "redis"])
def new_address(request, tmp_path):
    """A function that gives the address of another empty store at each call."""
    if request.param == "memory":
        return lambda: "memory:"
    if request.param == "lmdb":
        return lambda: str(tmp_path / uuid.uuid4().hex)
    return request.getfixturevalue("redis_server").address


@pytest.fixture(params=["lmdb", "redis"])
def lasting(request, tmp_path):
    """The address of one store that outlives its opening."""
    return str(tmp_path / "store") if request.param == "lmdb" else request.getfixturevalue("redis_server").address()


# ---- the same answers everywhere -------------------------------------------------------------------------------------

# Few letters, the extreme ones among them, so that keys share prefixes and are each other's prefixes.
_keys = st.lists(st.sampled_from([0x00, 0x61, 0xFE, 0xFF]), min_size=1, max_size=4).map(bytes)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.lists(st.tuples(_keys, st.binary(max_size=5)), max_size=12)),
        st.tuples(st.just("delete"), st.lists(_keys, max_size=4)),
        st.tuples(
            st.just("put_if"),
            st.tuples(
                st.lists(st.tuples(_keys, st.binary(max_size=5)), max_size=4),
                st.lists(_keys, max_size=3),
                st.none() | st.tuples(_keys, st.none() | st.binary(max_size=5)),
            ),
        ),
    ),
    min_size=1,
    max_size=6,
)


def expected_floors(held: dict, key: bytes, prefix_length: int):
    near = [k for k in held if k <= key and k[:prefix_length] == key[:prefix_length]]
    return [(k, held[k]) for k in sorted(near, reverse=True)]


def _same_answers(address: str, steps, asked, prefix_length: int):
    held: dict[bytes, bytes] = {}
    asked = [key for key in asked if len(key) >= prefix_length]
    with open_store(address) as store:
        for what, values in steps:
            if what == "put":
                held.update(values)
                assert store.put(values) == len(dict(values))
            elif what == "put_if":
                values, same, other = values  # of `other` anything is expected
                expected = {key: held.get(key) for key in same} | ({other[0]: other[1]} if other else {})
                fits = all(held.get(key) == value for key, value in expected.items())
                assert store.put_if(values, expected) is fits
                held.update(values if fits else [])
            else:
                assert store.delete(values) == len(held.keys() & set(values))
                held = {key: value for key, value in held.items() if key not in values}
            assert store.count() == len(held)
            assert store.get(asked) == [held.get(key) for key in asked]
            floors = [expected_floors(held, key, prefix_length) for key in asked]
            assert store.floor(asked, prefix_length) == [found[0] if found else None for found in floors]
            for limit in (1, 2, 100):
                assert store.floors(asked, prefix_length, limit) == [found[:limit] for found in floors]
            for prefix in [b"", *(key[:prefix_length] for key in asked)]:
                wanted = sorted((key, value) for key, value in held.items() if key.startswith(prefix))
                assert list(store.scan(prefix)) == wanted
                assert list(store.scan(prefix, limit=2)) == wanted[:2]


_questions = given(steps=_steps, asked=st.lists(_keys, max_size=8), prefix_length=st.integers(0, 3))


@_questions
def test_memory_answers_as_a_sorted_dictionary_does(steps, asked, prefix_length):
    _same_answers("memory:", steps, asked, prefix_length)


@_questions
def test_lmdb_answers_as_a_sorted_dictionary_does(tmp_path_factory, steps, asked, prefix_length):
    _same_answers(str(tmp_path_factory.mktemp("lmdb") / "store"), steps, asked, prefix_length)


@_questions
def test_redis_answers_as_a_sorted_dictionary_does(redis_server, steps, asked, prefix_length):
    _same_answers(redis_server.address(), steps, asked, prefix_length)


def test_floor_finds_the_newest_entry_before_a_time(new_address):
    with open_store(new_address()) as store:
        store.put([(b"ann" + t.to_bytes(8, "big"), str(t).encode()) for t in (10, 20, 30)])
        store.put([(b"bob" + (5).to_bytes(8, "big"), b"other")])
        asked = [b"ann" + t.to_bytes(8, "big") for t in (9, 10, 29, 300)]
        values = [hit and hit[1] for hit in store.floor([*asked, b"cat" + bytes(8)], 3)]
        assert values == [None, b"10", b"20", b"30", None]


def test_batches_and_scans_longer_than_a_page(new_address):
    entries = [(b"%05d" % i, b"%d" % i) for i in range(3000)]
    with open_store(new_address()) as store:
        assert store.put(reversed(entries)) == 3000
        assert list(store.scan()) == entries
        assert list(store.scan(b"01")) == entries[1000:2000]
        assert list(store.scan(limit=1500)) == entries[:1500]
        keys = [key for key, _ in entries]
        assert store.get(keys) == [value for _, value in entries]
        assert store.floor([key + b"x" for key in keys], 5) == entries
        assert store.delete(keys[:2500]) == 2500 and list(store.scan()) == entries[2500:]


def test_a_scan_may_write_to_its_own_store(new_address):
    with open_store(new_address()) as store:
        store.put((b"a%04d" % i, b"old") for i in range(1500))
        for n, (key, _) in enumerate(store.scan(b"a")):
            if n % 100 == 0:
                store.put([(key, b"new")])
        assert [value for _, value in store.scan()].count(b"new") == 15


def test_a_reader_sees_a_batch_whole_or_not_at_all(new_address):
    size, seen, errors, stop = 5000, set(), [], threading.Event()
    with open_store(new_address()) as store:

        def read():
            try:
                while not stop.is_set():
                    seen.add(store.count())
            except BaseException as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        for batch in range(50):
            store.put((b"%05d/%d" % (i, batch), bytes(100)) for i in range(size))
            if batch > 4 and len(seen) > 2:
                break
        store.delete([b"%05d/%d" % (i, batch) for i in range(size) for batch in (0, 1)])
        stop.set()
        reader.join()
    assert not errors and len(seen) > 2 and all(count % size == 0 for count in seen), (errors, seen)


def test_a_batch_that_cannot_be_stored_leaves_nothing(new_address):
    with open_store(new_address()) as store:
        store.put([(b"kept", b"1")])

        def broken():
            yield b"a", b"1"
            raise KeyError("source")

        with pytest.raises(KeyError):
            store.put(broken())
        for bad in ("text", bytearray(b"b"), b"", b"k" * (MAX_KEY + 1), None):
            with pytest.raises(ValueError, match="bytes"):
                store.put([(b"a", b"1"), (bad, b"2")])
        with pytest.raises(ValueError, match=r"value of key b'b' is str"):
            store.put([(b"a", b"1"), (b"b", "text")])
        with pytest.raises(ValueError, match="pairs"):
            store.put([b"abc"])
        assert list(store.scan()) == [(b"kept", b"1")]
        assert store.put([]) == 0 and store.put([(b"k" * MAX_KEY, b"")]) == 1
        assert store.get([b"k" * MAX_KEY, b"kept"]) == [b"", b"1"]


def test_questions_that_cannot_be_answered_are_refused(new_address):
    with open_store(new_address()) as store:
        with pytest.raises(ValueError, match=r"prefix_length is 3: it must lie in 0\.\.2"):
            store.floor([b"abc", b"ab"], 3)
        with pytest.raises(ValueError, match="limit is 0"):
            store.floors([b"abc"], 1, 0)
        with pytest.raises(ValueError, match="key 'a' is str"):
            store.get(["a"])
        with pytest.raises(ValueError, match="expected value of key b'a' is str"):
            store.put_if([], {b"a": "text"})
        with pytest.raises(ValueError, match=r"value of key b'b' is str"):
            store.put_if([(b"b", "text")], {})
        with pytest.raises(ValueError, match="prefix"):
            store.scan("a")
        assert store.get([]) == [] and store.floor([], 2) == [] and store.delete([]) == 0
    for question in (store.count, lambda: store.get([b"a"]), lambda: store.put([(b"a", b"")]), lambda: store.scan()):
        with pytest.raises(StoreError, match="closed"):
            question()
    store.close()


# ---- opening, versions, read-only ------------------------------------------------------------------------------------


def test_an_empty_store_takes_a_version_and_refuses_another(lasting):
    with open_store(lasting, version="model-7") as store:
        assert store.version == "model-7"
        store.put([(b"a", b"1")])
    for options in ({}, {"version": "model-7"}, {"readonly": True}, {"readonly": True, "version": "model-7"}):
        with open_store(lasting, **options) as store:
            assert store.version == "model-7" and store.get([b"a"]) == [b"1"]
    for readonly in (False, True):
        with pytest.raises(StoreError, match="'model-7' and opened for 'model-8'"):
            open_store(lasting, version="model-8", readonly=readonly)
    with open_store(lasting) as store:
        assert store.version == "model-7" and store.count() == 1


def test_entries_of_no_stated_version_are_not_adopted(new_address):
    with open_store(new_address()) as store:
        store.put([(b"a", b"1")])
        with pytest.raises(StoreError, match="no stated version, not of 'model-7'"):
            store.claim("model-7")
        assert store.version is None
    with pytest.raises(ValueError, match="version is ''"):
        open_store(new_address(), version="")


def test_readonly_reads_and_never_writes(lasting):
    with pytest.raises(StoreError, match="no store to read"):
        open_store(lasting, readonly=True)
    with open_store(lasting) as store:
        store.put([(b"a", b"1")])
    with open_store(lasting, readonly=True) as store:
        assert store.get([b"a"]) == [b"1"] and store.count() == 1 and list(store.scan()) == [(b"a", b"1")]
        with pytest.raises(StoreError, match="readonly"):
            store.put([(b"b", b"2")])
        with pytest.raises(StoreError, match="readonly"):
            store.put_if([(b"b", b"2")], {b"b": None})
        with pytest.raises(StoreError, match="readonly"):
            store.delete([b"a"])
    with pytest.raises(StoreError, match="nothing to read"):
        open_store("memory:", readonly=True)


@pytest.mark.parametrize(
    "address", ["", "memory:x", "postgres://host/db", "redis://host:6379", "redis://host:6379/name", "redis://h:x/0/n"]
)
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ValueError, match="address"):
        open_store(address)


# ---- LMDB ------------------------------------------------------------------------------------------------------------


def test_every_lmdb_write_is_synced_to_disk(tmp_path):
    with open_store(tmp_path / "store") as store:
        flags = store._backend._held.env.flags()
        assert flags["sync"] and flags["metasync"] and not flags["writemap"] and store.durable
    with open_store("memory:") as store:
        assert not store.durable


def test_a_folder_opened_twice_in_a_process_is_one_environment(tmp_path):
    path = tmp_path / "store"
    with (
        open_store(path) as one,
        open_store(tmp_path / "." / "store") as two,
        open_store(path, readonly=True) as reader,
    ):
        one.put([(b"a", b"1")])
        two.put([(b"b", b"2")])
        one.close()
        assert reader.count() == two.count() == 2
        with pytest.raises(StoreError, match="readonly"):
            reader.put([(b"c", b"3")])
    with open_store(path, readonly=True), pytest.raises(StoreError, match="open for reading in this process"):
        open_store(path)
    shutil.rmtree(path)
    with open_store(path) as again:
        assert again.count() == 0


def test_a_removed_folder_is_not_answered_from_its_ghost(tmp_path):
    with open_store(tmp_path / "store") as ghost:
        ghost.put([(b"a", b"1")])
        shutil.rmtree(tmp_path / "store")
        with open_store(tmp_path / "store") as store:
            assert store.count() == 0
            store.put([(b"b", b"2")])
    with open_store(tmp_path / "store") as store:
        assert list(store.scan()) == [(b"b", b"2")]


def test_the_map_grows_while_threads_read(tmp_path):
    errors, stop = [], threading.Event()
    with open_store(tmp_path / "store", map_size=1 << 16) as store:
        store.put([(b"first", b"1")])

        def read():
            while not stop.is_set():
                try:
                    assert store.get([b"first"]) == [b"1"]
                except BaseException as error:
                    errors.append(error)
                    return

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for batch in range(8):
            store.put((b"%d/%d" % (batch, i), bytes(1000)) for i in range(300))
        store.put([(b"large", bytes(8 << 20))])  # one value of many times the map
        stop.set()
        for thread in threads:
            thread.join()
        assert not errors
        assert store.count() == 8 * 300 + 2 and store.get([b"large"]) == [bytes(8 << 20)]
        assert store._backend._held.env.info()["map_size"] > 8 << 20


def test_a_map_that_another_process_has_grown_is_followed(tmp_path):
    with open_store(tmp_path / "store", map_size=1 << 16) as store:
        store.put([(b"a", b"1")])
        _python("import sys; from rec_core.store import open_store; open_store(sys.argv[1]).put("
                "(b'%05d' % i, bytes(1000)) for i in range(2000))", str(tmp_path / "store"))  # fmt: skip
        assert store.count() == 2001 and store.get([b"01999"]) == [bytes(1000)]
        store.put([(b"b", b"2")])
        assert store.get([b"a", b"b"]) == [b"1", b"2"]


@pytest.mark.parametrize("readonly", [False, True])
def test_a_map_that_grows_while_the_store_is_being_opened_is_followed(tmp_path, monkeypatch, readonly):
    folder = tmp_path / "store"
    open_store(folder, map_size=1 << 16).close()
    grown = []

    def grow(env, data):
        """Between the look at the file's size and the first transaction another process writes."""
        before = env.info()["map_size"]
        _python("import sys; from rec_core.store import open_store; open_store(sys.argv[1]).put("
                "(b'%05d' % i, bytes(1000)) for i in range(2000))", str(folder))  # fmt: skip
        grown.append(data.stat().st_size > before)

    monkeypatch.setattr(store_module, "_refuse_cut_file", grow)
    with open_store(folder, map_size=1 << 16, readonly=readonly) as store:
        assert grown == [True] and store.count() == 2000 and store.get([b"01999"]) == [bytes(1000)]


def test_what_is_no_store_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"photos: holds other files \('cat.jpg'"):
        open_store(folder)
    assert os.listdir(folder) == ["cat.jpg"]
    with pytest.raises(StoreError, match=r"cat\.jpg"):
        open_store(folder / "cat.jpg")
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "data.mdb").write_bytes(random.Random(0).randbytes(1 << 16))
    with pytest.raises(StoreError, match="garbage"):
        open_store(garbage)


def test_a_cut_off_file_is_refused_and_a_sound_short_one_is_not(tmp_path, monkeypatch):
    path, data = tmp_path / "store", tmp_path / "store" / "data.mdb"
    opened = lmdb.open
    with monkeypatch.context() as fast:
        fast.setattr(lmdb, "open", lambda *args, **options: opened(*args, **{**options, "sync": False}))
        # a delete now and then leaves a sound file some pages short of what its header says
        for step in range(600):
            rng = random.Random(step)
            if step % 12 == 0:
                shutil.rmtree(path, ignore_errors=True)
            with open_store(path) as store:
                held = dict(store.scan())
                if held and rng.random() < 0.4:
                    store.delete(rng.sample(sorted(held), max(1, int(len(held) * rng.random()))))
                else:
                    many = rng.choice([1, 10, 1000])
                    store.put((b"%04d" % rng.randrange(3000), bytes(rng.choice([10, 1500, 9000]))) for _ in range(many))
                held, env = dict(store.scan()), store._backend._held.env
                missing = (env.info()["last_pgno"] + 1) * env.stat()["psize"] - data.stat().st_size
            if missing > 0:
                break
        assert missing > 0
        with open_store(path, readonly=True) as store:
            assert dict(store.scan()) == held
        with open_store(path) as store:
            assert dict(store.scan()) == held
            store.put((b"%08d" % i, bytes(1500)) for i in range(3000))
    os.truncate(data, data.stat().st_size // 2)
    for readonly in (False, True):
        with pytest.raises(StoreError, match=r"data\.mdb: is cut off"):
            open_store(path, readonly=readonly)


def test_a_store_is_not_used_across_a_fork(tmp_path):
    with open_store(tmp_path / "store") as store:
        store.put([(b"a", b"1")])
        store._backend._held.pid += 1  # what a child sees
        try:
            with pytest.raises(StoreError, match="does not survive a fork"):
                store.get([b"a"])
        finally:
            store._backend._held.pid -= 1


_FULL = """
import resource, sys
from rec_core.store import StoreError, open_store
store = open_store(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # the file cannot grow past 1 MiB
for batch in range(100):
    try:
        store.put((b"%03d/%d" % (batch, i), bytes([batch]) * 3000) for i in range(20))
    except StoreError as error:
        print(batch, error)
        break
store.put([(b"000/0", b"small")])  # what needs no room can still be written
"""


def test_a_disk_without_room_is_named_and_loses_no_acknowledged_batch(tmp_path):
    said = _python(_FULL, str(tmp_path / "store"))
    batches = int(said.split()[0])
    assert 0 < batches < 100
    assert str(tmp_path / "store") in said and "nothing of this batch was stored" in said and "free" in said
    with open_store(tmp_path / "store") as store:
        held = dict(store.scan())
        assert held.pop(b"000/0") == b"small"
        wanted = {b"%03d/%d" % (batch, i): bytes([batch]) * 3000 for batch in range(batches) for i in range(20)}
        del wanted[b"000/0"]
        assert held == wanted
        store.put([(b"more", bytes(2 << 20))])  # there is room again


# ---- killed writers --------------------------------------------------------------------------------------------------

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


def _python(script: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True).stdout


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
    held = store.get([b"counter", b"other"])
    value = str(int(held[0] or b"0") + 1).encode()
    left -= store.put_if([(b"counter", value), (b"log/" + value, sys.argv[2].encode())], {b"counter": held[0]})
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

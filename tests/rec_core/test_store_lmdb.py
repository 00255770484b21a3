"""The LMDB store: one environment a process, a map that grows, damaged files, a disk without room."""

import os
import random
import shutil
import subprocess
import sys
import threading

import lmdb
import pytest

from rec_core.store import StoreError, lmdb_environment, open_store


def _python(script: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True).stdout


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

    monkeypatch.setattr(lmdb_environment, "_refuse_cut_file", grow)
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

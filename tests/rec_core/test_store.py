"""The three stores answer alike, as a sorted dictionary does; versions and what is refused."""

import threading
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis_server import start_redis

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


def test_what_was_written_since_a_moment_is_noticed(new_address):
    with open_store(new_address()) as store:
        store.put({b"a": b"1", b"b": b"2"})
        moment = store.moment()
        assert store.put_if({b"c": b"3"}, {b"a": b"1", b"x": None}, since=moment)  # nothing was written since
        assert store.put_if({b"c": b"4"}, {b"a": b"1"}, since=moment)  # something was, and not to what is expected
        store.put({b"a": b"9"})
        assert not store.put_if({b"c": b"5"}, {b"a": b"1"}, since=moment)
        assert not store.put_if({b"c": b"5"}, {b"a": b"9", b"b": None}, since=moment)
        assert not store.put_if({b"c": b"5"}, lambda: {b"a": b"1"}, since=moment)  # made where it is to be compared
        assert store.put_if({b"d": b"6"}, lambda: {b"a": b"9"}, since=moment)
        assert store.put_if({b"d": b"6"}, {b"a": b"9"}, since=store.moment())
        assert dict(store.scan()) == {b"a": b"9", b"b": b"2", b"c": b"4", b"d": b"6"}


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
        with pytest.raises(ValueError, match="expected value of key b'a' is str"):
            store.put_if([], lambda: {b"a": "text"})
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

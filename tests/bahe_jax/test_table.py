"""The table of behaviour vectors, in every place that holds one: what was written comes back, versions never mix."""

import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from redis_server import start_redis

from bahe_jax.table import open_table
from rec_core.data.schema import DataError
from rec_core.store import StoreError, open_store

TEXTS = ["a film", "", "Ж🎬", "broken \ud800 half", "a film (2)", "x" * 10_000]
LENGTHS = np.array([2, 1, 3, 3, 1, 2])
STORED = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def vectors(*shape):
    return np.random.default_rng(len(shape)).normal(size=(len(TEXTS), *shape)).astype(np.float32)


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(params=["array", "lmdb", "memory", "redis"])
def address(request, tmp_path):
    if request.param == "redis":
        return request.getfixturevalue("redis").address()
    return {"array": f"array:{tmp_path}/table", "lmdb": f"{tmp_path}/table", "memory": "memory:"}[request.param]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("tokens", [0, 3])
def test_what_was_written_comes_back(address, dtype, tokens):
    made = vectors(tokens, 4) if tokens else vectors(4)
    settings = {"version": "v1", "width": 4, "tokens": tokens, "dtype": dtype}
    with open_table(address, **settings) as table:
        assert table.missing([*TEXTS, *TEXTS]) == list(range(6)) and table.missing([]) == []
        assert table.write(TEXTS[:3], LENGTHS[:3], made[:3]) == 3
        assert table.write(TEXTS, LENGTHS, made) == 3  # the other three
        assert table.write([TEXTS[0]] * 2, LENGTHS[:2], made[4:]) == 0  # what is there stays
        assert table.write([], LENGTHS[:0], made[:0]) == 0 and len(table) == 6
        found, lengths = table.rows(TEXTS[::-1] + TEXTS)
        assert found.dtype == jnp.dtype(dtype) and table.missing(["new", *TEXTS, "new"]) == [0]
        np.testing.assert_array_equal(lengths, [*LENGTHS[::-1], *LENGTHS])
        np.testing.assert_allclose(found[6:].astype(np.float32), made, rtol=STORED[dtype])
        np.testing.assert_array_equal(found[:6], found[:5:-1])
        some, lengths = table.read(["new", TEXTS[2]])
        assert lengths.tolist() == [0, 3] and not some[0].any()
        np.testing.assert_array_equal(some[1], found[8])
        with pytest.raises(StoreError, match=r"text 1 \('new'\) was not encoded \(2 such of 3\)"):
            table.rows([TEXTS[0], "new", "newer"])
    if address == "memory:":
        return
    with open_table(address, **settings, readonly=True) as table:
        np.testing.assert_array_equal(table.read(TEXTS)[0], found[6:])
        with pytest.raises(StoreError, match="readonly=True"):
            table.write(["new"], np.array([1]), made[:1])
    for change in ({"version": "v2"}, {"width": 5}, {"tokens": 7}, {"dtype": "float16", "width": 9}):
        with pytest.raises(StoreError, match="do not mix"):
            open_table(address, **{**settings, **change})


def test_wrong_vectors_are_refused_and_nothing_is_stored(address):
    with open_table(address, version="v", width=4, dtype="float16") as table:
        made = vectors(4)
        for place, value in ((2, np.nan), (1, 1e5)):
            bad = made.copy()
            bad[place, 1] = value
            with pytest.raises(ValueError, match=rf"the vector of text {place} \(.*not finite in float16"):
                table.write(TEXTS, LENGTHS, bad)
        with pytest.raises(ValueError, match=r"vectors \(6, 4\) and lengths \(5,\)"):
            table.write(TEXTS, LENGTHS[:5], made)
        with pytest.raises(ValueError, match="lengths are 0 to 2: must be 1 to any number"):
            table.write(TEXTS, LENGTHS - 1, made)
        assert len(table) == 0 and table.missing(TEXTS) == list(range(6))


def test_keys_are_of_text_and_version():
    with open_table("memory:", version="a", width=1) as one, open_table("memory:", version="b", width=1) as two:
        keys = [table.key(text) for table in (one, two) for text in [*TEXTS, "\ufffd"]]
        assert len(set(keys)) == 14 and {len(key) for key in keys} == {16}


def test_bad_settings_are_refused():
    for change in ({"dtype": "int8"}, {"width": 0}, {"tokens": -1}, {"version": ""}):
        with pytest.raises(ValueError, match="|".join(change)):
            open_table("memory:", **{"version": "v", "width": 1, **change})


def test_a_store_of_something_else_is_refused(tmp_path):
    with open_store(tmp_path / "other", version="v") as store:
        store.put({b"k": b"v"})
    with pytest.raises(StoreError, match="holds no table of behaviours"):
        open_table(str(tmp_path / "other"), version="v", width=1)
    with pytest.raises(StoreError, match="is not there, or holds no table"):
        open_table(f"array:{tmp_path}/none", version="v", width=1, readonly=True)
    assert not (tmp_path / "none").exists()


# ---- the mapped array ------------------------------------------------------------------------------------------------


def array(tmp_path, part=0, **more):
    return open_table(f"array:{tmp_path}", version="v", width=4, part=part, **more)


def test_parts_are_written_apart_and_read_together(tmp_path):
    made = vectors(4)
    with array(tmp_path) as one, array(tmp_path, part=1) as two:
        one.write(TEXTS[:4], LENGTHS[:4], made[:4])
        two.write(TEXTS[3:], LENGTHS[3:], made[3:])
        with pytest.raises(StoreError, match="another process writes this part"):
            array(tmp_path, part=1)
    with array(tmp_path, part=2) as both:
        np.testing.assert_array_equal(both.rows(TEXTS)[0], made)
        assert both.write(TEXTS, LENGTHS, made) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "part-00000" / "vectors.npy", mmap_mode="r"), made[:4])


def test_what_was_not_committed_is_written_over(tmp_path):
    """As a process leaves it that dies while it writes: bytes behind the rows that the manifest counts."""
    made = vectors(4)
    with array(tmp_path) as table:
        table.write(TEXTS[:2], LENGTHS[:2], made[:2])
    part = tmp_path / "part-00000"
    for name, torn in (("vectors.npy", b"\xff" * 37), ("index.npy", b"\xff" * 11)):
        with (part / name).open("ab") as file:
            file.write(torn)
    (part / ".manifest.json").write_text("{")
    with array(tmp_path) as table:
        assert table.missing(TEXTS) == [2, 3, 4, 5]
        table.write(TEXTS, LENGTHS, made)
        np.testing.assert_array_equal(table.rows(TEXTS)[0], made)
    assert np.load(part / "index.npy").shape == (6,)
    with array(tmp_path, readonly=True) as table:
        np.testing.assert_array_equal(table.rows(TEXTS)[0], made)


def test_a_damaged_array_is_an_error(tmp_path):
    with array(tmp_path) as table:
        table.write(TEXTS, LENGTHS, vectors(4))
    part = tmp_path / "part-00000"
    whole = (part / "vectors.npy").read_bytes()
    (part / "vectors.npy").write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=r"vectors\.npy: has \d+ bytes, too few for the 6 rows"):
        array(tmp_path)
    (part / "vectors.npy").write_bytes(whole)
    held = json.loads((part / "manifest.json").read_text())
    for manifest in ("{", json.dumps({"format": 1}), "[]", json.dumps(held | {"rows": -1})):
        (part / "manifest.json").write_text(manifest)
        with pytest.raises(StoreError, match=r"manifest\.json: cannot be read|do not mix"):
            array(tmp_path)


def test_keys_that_share_their_first_half_are_told_apart(tmp_path):
    with array(tmp_path) as table:
        keys = {text: bytes(8) + bytes([0, n] * 4) for n, text in enumerate(TEXTS)}
        table.key = keys.__getitem__
        table.write(TEXTS[3:], LENGTHS[3:], vectors(4)[3:])  # some are there, and the next go between them
        table.write(TEXTS, LENGTHS, vectors(4))
        np.testing.assert_array_equal(table.rows(TEXTS)[0], vectors(4))
        keys["new"] = bytes(8) + b"\xff" * 8
        assert table.missing(["new"]) == [0]


@pytest.mark.parametrize("after", range(4))
def test_a_full_disk_leaves_what_was_committed(tmp_path, monkeypatch, after):
    with array(tmp_path) as table:
        table.write(TEXTS[:1], LENGTHS[:1], vectors(4)[:1])
        synced, sync = [], os.fsync

        def full(handle):
            synced.append(handle)
            if len(synced) > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        with monkeypatch.context() as patch, pytest.raises(DataError, match="the disk is full"):
            patch.setattr(os, "fsync", full)
            table.write(TEXTS, LENGTHS, vectors(4))
    with array(tmp_path) as table:
        kept = [0] if after < 3 else range(6)  # the folder's own sync comes behind the manifest's
        assert table.missing(TEXTS) == [place for place in range(6) if place not in kept]
        table.write(TEXTS, LENGTHS, vectors(4))
        np.testing.assert_array_equal(table.rows(TEXTS)[0], vectors(4))

"""Filling the table: as recomputed, as one by one, only what is new, and what a kill leaves."""

import dataclasses
import functools
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import survival_worker
from bahe_examples import BASE, K, case, params_of, same, settings, vectors

from bahe_jax import catalogue, encode, model, read_tokenizer
from bahe_jax.table import open_table
from rec_core.sharding import make_mesh
from rec_core.store import StoreError

SHAPE = {"rows": 2, "row_length": 9}
WIDTH = BASE.language_model.width


class Words:
    """A tokenizer of the examples' catalogue: text "n" is its n-th entry."""

    def __init__(self, name="words"):
        self.name, self.seen = name, []

    def encode(self, texts, limit):
        self.seen += texts
        return [case().texts[int(text)][:limit] for text in texts]

    def identity(self):
        return self.name


TEXTS = [str(n) for n in range(12)]


@functools.cache
def version(setting="ba", **changes):
    config = settings(setting, **changes)
    return encode.version(params_of(config), config, Words(), K)


def table(setting="ba", place="memory:", **changes):
    return open_table(
        place, version=version(setting), width=WIDTH, tokens=K if setting == "abe" else 0, **changes
    )  # fmt: skip


def fill(into, setting="ba", texts=TEXTS, words=None, **changes):
    config = settings(setting)
    return encode.encode(
        texts, words or Words(), params_of(config), config, into, limit=K, **{**SHAPE, "group": 5} | changes
    )


@pytest.mark.parametrize("setting", ["ba", "abe"])
def test_the_model_reads_from_the_table_what_it_computes_itself(setting):
    """Frozen lower layers in the step, and their table: the same numbers."""
    config = settings(setting)
    with table(setting) as into:
        assert fill(into, setting).done == 12
        states, lengths = into.rows(TEXTS)
    np.testing.assert_array_equal(lengths, [len(text) for text in case().texts])
    batch, row = case().batch, np.maximum(case().sequences, 0)
    stored = catalogue(case().texts).batch(case().sequences, case().item, batch.label, states=states)
    assert stored.tokens is None and stored.states.shape[:3] == row.shape
    from_table = dataclasses.replace(config, lower="table")
    params = model.without_lower(params_of(config))
    assert "lower" not in params["net"] and not params["tables"]
    for ours, theirs in zip(vectors(from_table, stored, params), vectors(config, batch)):
        same(ours, theirs)
    broken = stored.replace(states=np.where(states[row] == states[row].max(), np.nan, states[row]))
    with pytest.raises(ValueError, match="states: nan"):
        model.check(broken, from_table)
    with pytest.raises(ValueError, match="states, item_states: missing"):
        model.check(batch, from_table)


@pytest.mark.parametrize("setting", ["ba", "abe"])
def test_packed_is_one_by_one_and_the_same_again_bit_for_bit(setting):
    config, kept = settings(setting), K if setting == "abe" else 0
    run = functools.partial(
        encode.encode_tokens, params=params_of(config), config=config, **SHAPE, tokens=kept
    )  # fmt: skip
    packed = run(case().texts)
    np.testing.assert_array_equal(packed, run(case().texts))
    for number, text in enumerate(case().texts):
        same(packed[number], run([text])[0])
        assert not kept or not packed[number, len(text) :].any()
    if not kept:  # rows split over two devices
        same(run(case().texts, mesh=make_mesh(2, 1)), packed)


def test_a_vector_is_the_mean_behind_the_first_token():
    """Without lower layers, where nothing is a sink yet, it is the mean of all."""
    for split, first in ((1, 1), (0, 0)):
        one, each = (dataclasses.replace(settings(name), split=split) for name in ("ba", "abe"))
        run = functools.partial(encode.encode_tokens, case().texts, params_of(one), **SHAPE)
        vectors, states = run(config=one), run(config=each, tokens=K)
        for text, vector, own in zip(case().texts, vectors, states):
            same(vector, own[min(first, len(text) - 1) : len(text)].mean(axis=0))


def test_only_what_is_new_is_encoded():
    words, seen = Words(), []
    with table() as into:
        assert fill(into, texts=["3", "3", "5"], words=words).encoded == 2
        now = fill(into, texts=[*TEXTS, *TEXTS[::-1]], words=words, on_progress=seen.append)
        assert fill(into, words=words) == dataclasses.replace(
            now, encoded=0, tokens=0, seconds=pytest.approx(0, abs=60)
        )
    assert sorted(words.seen) == sorted(TEXTS)
    assert [p.encoded for p in seen] == [5, 10] and [p.done for p in seen] == [7, 12] and now == seen[-1]
    assert now.total == 12 and now.tokens == sum(len(case().texts[n]) for n in range(12) if n not in (3, 5))
    assert now.tokens_per_s == now.tokens / now.seconds > 0


def test_processes_share_the_work(tmp_path):
    place, words = f"array:{tmp_path}", Words()
    for process in range(3):
        with table(place=place, part=process) as into:
            order = TEXTS if process else TEXTS[::-1]
            now = fill(into, texts=order, words=words, process_index=process, process_count=3)
            assert now.done == now.total == now.encoded < 12
    with table(place=place, readonly=True) as all_parts, table() as one:
        fill(one)
        same(all_parts.rows(TEXTS)[0], one.rows(TEXTS)[0])
    assert sorted(words.seen) == sorted(TEXTS)


def test_a_version_is_of_all_that_the_vectors_depend_on():
    config, params = settings("ba"), params_of(BASE)
    other = {**params, "tables": {"token": params["tables"]["token"].at[3, 1].add(1e-3)}}
    upper = {**params, "net": {**params["net"], "upper": jax.tree.map(lambda x: x + 1, params["net"]["upper"])}}
    name = functools.partial(encode.version, params, config)
    assert len(version()) == 32 and name(Words(), K) == version() == encode.version(upper, config, Words(), K)
    attention = dataclasses.replace(config, language_model=config.language_model.running(attention="reference"))
    assert encode.version(params, attention, Words(), K) == version()
    half = dataclasses.replace(config, language_model=config.language_model.running(dtype="bfloat16"))
    found = {
        version(), version("abe"), version(split=0), version(pooling="last"), version(lower="lora"),
        name(Words("others"), K), name(Words(), K - 1), encode.version(other, config, Words(), K),
        encode.version(params, half, Words(), K),
    }  # fmt: skip
    assert len(found) == 9


def test_a_table_of_another_model_is_refused():
    old = open_table("memory:", version="old", width=WIDTH)
    with pytest.raises(StoreError, match=r"version 'old', and this model.*do not mix"):
        fill(old)
    with pytest.raises(StoreError, match="width 16 and tokens 0, this model needs 16 and 3"), table() as into:
        fill(into, "abe")
    with table() as into:
        with pytest.raises(ValueError, match="setting \"abe\" or \"ba\", not lower='frozen', setting='fp'"):
            fill(into, "fp")
        with pytest.raises(ValueError, match="limit=3, row_length=2, process 0 of 1"):
            fill(into, row_length=2)
        with pytest.raises(ValueError, match="process 1 of 1"):
            fill(into, process_index=1)


def test_any_text_has_a_vector(golden):
    """Empty, huge and broken texts, by a real tokenizer and its language model."""
    known = golden("gguf")
    words = read_tokenizer(known.path, known.config)
    config = dataclasses.replace(BASE, language_model=known.config)
    params = model.from_language_model(jax.random.key(0), known.params, config)
    texts = ["", " ", "\ud800", "\ufffd", "long " * 100_000, "a\0b", "Ж🎬", "long " * 100]
    name = encode.version(params, config, words, 6)
    with open_table("memory:", version=name, width=known.config.width, dtype="float16") as into:
        now = encode.encode(texts, words, params, config, into, limit=6, rows=2, row_length=12)
        states, lengths = into.rows(texts)
    assert now.encoded == 8 and np.isfinite(states).all() and lengths.max() == 6 and lengths.min() == 1
    np.testing.assert_array_equal(states[4], states[7])  # cut behind the same six tokens
    np.testing.assert_array_equal(states[2], states[3])  # half of a pair is read as U+FFFD


# ---- a kill ----------------------------------------------------------------------------------------------------------


def main(folder: str) -> None:
    """Encodes one text a transaction and says so; run as a process that is killed."""
    with table(place=f"array:{folder}") as into:
        fill(into, group=1, on_progress=lambda now: print("DONE", now.done, flush=True))


def test_killed_and_started_again_loses_nothing_and_stores_nothing_twice(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=survival_worker.environment(8), text=True, **pipes) as run:
        for line in run.stdout:
            if line == "DONE 4\n":
                run.send_signal(signal.SIGKILL)
                break
        errors = run.communicate(timeout=300)[1]
        assert run.returncode == -signal.SIGKILL, errors
    words = Words()
    with table(place=f"array:{tmp_path}") as into:
        kept = len(into)
        before = into.read(TEXTS)[0]
        assert 4 <= kept < 12
        now = fill(into, words=words)
        assert now.encoded == len(words.seen) == 12 - kept and now.done == len(into) == 12
        after, _ = into.rows(TEXTS)
    np.testing.assert_array_equal(after[:kept], before[:kept])
    with table() as whole:
        fill(whole)
        same(after, whole.rows(TEXTS)[0])


if __name__ == "__main__":
    main(sys.argv[1])

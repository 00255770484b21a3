"""Tokenizers: ids as the package gives them, and a defined answer to any text."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest

from bahe_jax import ModelError, read, read_tokenizer
from bahe_jax.gguf_file import open_gguf
from bahe_jax.tokenizer import _CUTS


@pytest.fixture(scope="module")
def tokenizer(golden):
    case = golden("gguf")
    return read_tokenizer(case.path.parent, case.config)


@pytest.fixture
def golden_ids(golden):
    stored = golden("gguf").stored
    return [str(text) for text in stored["texts"]], np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1])


@pytest.mark.parametrize("form", [".", "tokenizer.json", "llama.gguf"])
def test_ids_are_those_of_the_package(golden, golden_ids, form):
    case = golden("gguf")
    tokenizer = read_tokenizer(case.path.parent / form, case.config)
    texts, expected = golden_ids
    for text, ids, wanted in zip(texts, tokenizer.encode(texts, 1000), expected):
        assert ids.dtype == np.int32
        if text:
            np.testing.assert_array_equal(ids, wanted)
            assert tokenizer.decode(ids) == text


def test_a_text_is_never_empty_and_never_longer_than_the_limit(golden, tokenizer, golden_ids):
    texts, expected = golden_ids
    end = golden("gguf").config.eos[0]
    for limit in (1, 2, 5):
        for ids, wanted in zip(tokenizer.encode(texts, limit), expected):
            np.testing.assert_array_equal(ids, wanted[:limit] if len(wanted) else [end])
    for ids, wanted in zip(tokenizer.encode(texts, 5, end=True), expected):
        np.testing.assert_array_equal(ids, [*wanted[:4], end])
    assert tokenizer.encode([], 5) == []
    with pytest.raises(ValueError, match="limit is 1: 1 tokens are added to each text, so at least 2"):
        tokenizer.encode(texts, 1, end=True)
    with pytest.raises(ValueError, match="limit is 0"):
        tokenizer.encode(texts, 0)


def test_a_huge_text_is_its_beginning(tokenizer):
    (short,) = tokenizer.encode(["the long road home " * 1000], 50)
    (huge,) = tokenizer.encode(["the long road home " * 2_000_000], 50)
    np.testing.assert_array_equal(huge, short)
    assert tokenizer.encode(["a" * 30_000_000], 50)[0].shape == (50,)


def test_broken_unicode_is_replaced(tokenizer):
    given = ["\ud800", "a\udc80b", "\ud83c\udfac", "\x00\x01", "\ufffe"]
    back = [tokenizer.decode(ids) for ids in tokenizer.encode(given, 100)]
    assert back == ["\ufffd", "a\ufffdb", "\U0001f3ac", "\x00\x01", "\ufffe"]
    with pytest.raises(ValueError, match="text 1 is bytes: it must be a string"):
        tokenizer.encode(["a", b"b"], 5)
    with pytest.raises(ValueError, match="text 0 is NoneType"):
        tokenizer.encode([None], 5)


def test_control_tokens_in_a_text_are_characters(tokenizer):
    (ids,) = tokenizer.encode(["end<|endoftext|>"], 100)
    assert 0 not in ids and tokenizer.decode(ids) == "end<|endoftext|>"


def test_a_tokenizer_of_another_model_is_refused(golden):
    case = golden("gguf")
    for change, message in (
        ({"vocabulary": 319}, "token '.*' is number 319, the model has 319"),
        ({"vocabulary": 2000}, "1680 of the model's 2000 tokens are not in it"),
        ({"vocabulary": 400, "eos": (390,)}, "begins or ends texts with token 390, which it lacks"),
    ):
        with pytest.raises(ModelError, match=message):
            read_tokenizer(case.path.parent, dataclasses.replace(case.config, **change))
    nameless = read_tokenizer(case.path.parent, dataclasses.replace(case.config, bos=None, eos=()))
    with pytest.raises(ModelError, match="text 1 has no tokens, and the model names no end-of-text token"):
        nameless.encode(["a", ""], 5)
    with pytest.raises(ModelError, match="names no end-of-text token"):
        nameless.encode(["a"], 5, end=True)


def test_damaged_files_are_named(golden, tmp_path):
    config = golden("gguf").config
    file = shutil.copy(golden("gguf").path.parent / "tokenizer.json", tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    for damaged in ("", "{}", "null", text[: len(text) // 2], text.replace('"merges"', '"murges"'), "\udcff"):
        (tmp_path / "tokenizer.json").write_bytes(damaged.encode("utf-8", "surrogateescape"))
        with pytest.raises(ModelError, match=r"tokenizer\.json: is no whole tokenizer\.json"):
            read_tokenizer(file, config)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is not there"):
        read_tokenizer(tmp_path, config)
    (tmp_path / "tokenizer.json").symlink_to(golden("gguf").path.parent / "tokenizer.json")
    with pytest.raises(ModelError, match="is a link to"):
        read_tokenizer(tmp_path, config)


def test_stored_truncation_and_padding_are_not_obeyed(golden, golden_ids, tmp_path):
    case, (texts, expected) = golden("gguf"), golden_ids
    values = json.loads((case.path.parent / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    np.testing.assert_array_equal(read_tokenizer(tmp_path, case.config).encode(texts, 100)[0], expected[0])


def test_merges_of_other_tokens_are_named(golden, tmp_path):
    last = open_gguf(golden("gguf").path).metadata["tokenizer.ggml.tokens"][-1].encode()
    file = rewritten(golden, tmp_path, last, b"#" * len(last))
    with pytest.raises(ModelError, match=r"other\.gguf: tokenizer.ggml.merges does not fit tokens"):
        read_tokenizer(file, golden("gguf").config)


def test_a_package_that_is_not_there_is_named(golden, monkeypatch):
    case = golden("gguf")
    for package, work in (
        ("tokenizers", lambda: read_tokenizer(case.path, case.config)),
        ("gguf", lambda: read(case.path)),
        ("safetensors", lambda: read(golden("llama").path)),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ModelError, match=rf"need the package {package}: install the extra \[llm\]"):
                work()


def rewritten(golden, tmp_path, old, new):
    data = golden("gguf").path.read_bytes()
    assert len(old) == len(new) and old in data
    (tmp_path / "other.gguf").write_bytes(data.replace(old, new, 1))
    return tmp_path / "other.gguf"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            b"smollm",
            b"klingo",
            "tokenizer.ggml.pre is 'klingo': supported are gpt-2, .*give the model's tokenizer.json",
        ),
        (b"gpt2", b"spm1", "tokenizer.ggml.model is 'spm1': supported is 'gpt2'"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez", "tokenizer.ggml.merges is missing"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz", "tokenizer.ggml.tokens is missing"),
    ],
)
def test_faults_of_a_gguf_tokenizer_are_named(golden, tmp_path, old, new, message):
    file, config = rewritten(golden, tmp_path, old, new), golden("gguf").config
    with pytest.raises(ModelError, match=rf"other\.gguf: {message}"):
        read_tokenizer(file, config)


@pytest.mark.parametrize(
    ("pre", "pieces"), [("llama3", ["123", "45", "'LL"]), ("qwen2", ["1", "'LL"]), ("gpt-2", ["12345"])]
)
def test_kinds_of_cut(pre, pieces):
    """Where a word may end before merging, as the published patterns say."""
    import tokenizers

    words = _CUTS[pre][1]
    steps = tokenizers.pre_tokenizers
    cut = steps.ByteLevel(add_prefix_space=False) if words is None else steps.Split(tokenizers.Regex(words), "isolated")
    found = [piece for piece, _ in cut.pre_tokenize_str("a12345 we'LL")]
    assert set(pieces) <= set(found)

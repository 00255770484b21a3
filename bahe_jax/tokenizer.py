"""Texts to token ids; the one module that imports the package `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from bahe_jax.files import ModelError, inside, read_bytes, write_json
from bahe_jax.gguf_file import Gguf, open_gguf
from bahe_jax.language_model import Config

# How llama.cpp's `tokenizer.ggml.pre` cuts texts before merging (its unicode.cpp, as Hugging Face's files say it):
# NFC first, the pattern of words (None: GPT-2's), digits one by one, and whether a word of the vocabulary stays whole.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (False, _WORDS % "1,3", False, True)
_CUTS: dict[str, tuple[bool, str | None, bool, bool]] = {
    "gpt-2": (False, None, False, False),
    "default": (False, None, False, False),
    "smollm": (False, None, True, False),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": (True, _WORDS % "1", False, False),
}
_CONTROL, _USER = 3, 4  # kinds of token in `tokenizer.ggml.token_type`


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The tokenizer of one language model; made by `read_tokenizer`."""

    inner: Any
    end: int | None  # the end-of-text token (without one the beginning-of-text token)
    longest: int  # characters of the longest token
    bos: int | None

    def encode(
        self, texts: Iterable[str], limit: int, *, special: bool = True, end: bool = False
    ) -> list[Int[np.ndarray, " _"]]:
        """Token ids of each text, int32, at least 1 and at most `limit` of them.

        Texts are data: the name of a control token inside one is read as plain characters. A longer text is cut behind
        its first tokens (before tokenising, to so many characters as those can have: a text of any size is cheap).
        A text of no tokens is the end-of-text token alone. Halves of surrogate pairs, no Unicode, become U+FFFD.

        Args:
          texts: one string each; "" is legal.
          limit: most tokens of one text, with all that is added.
          special: add what the model's own tokenizer adds, such as Llama 3's beginning-of-text token.
          end: add the end-of-text token, unless it stands there already.

        Raises:
          ValueError: a text that is no string, naming it; a limit without room for a token of the text.
          ModelError: an end-of-text token is needed and the model names none.
        """
        added = (self.inner.num_special_tokens_to_add(False) if special else 0) + end
        if limit <= added:
            raise ValueError(
                f"limit is {limit}: {added} tokens are added to each text, so at least {added + 1} are needed"
            )
        if end and self.end is None:
            raise ModelError("end=True, but the model's configuration names no end-of-text token (eos_token_id)")
        parts = [self._clean(number, text, limit) for number, text in enumerate(texts)]
        found = []
        for number, encoding in enumerate(self.inner.encode_batch(parts, add_special_tokens=False)):
            encoding.truncate(limit - added)
            ids = self.inner.post_process(encoding, None, special).ids
            if end and ids[-1:] != [self.end]:
                ids.append(self.end)
            if not ids:
                if self.end is None:
                    raise ModelError(f"text {number} has no tokens, and the model names no end-of-text token")
                ids = [self.end]
            found.append(np.array(ids, np.int32))
        return found

    def _clean(self, number: int, text: Any, limit: int) -> str:
        if not isinstance(text, str):
            raise ValueError(f"text {number} is {type(text).__name__}: it must be a string (decode bytes first)")
        text = text[: limit * self.longest]
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> str:
        """The text of token ids, without control tokens."""
        text: str = self.inner.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    def identity(self) -> str:
        """All that its ids depend on, as text."""
        return f"{self.inner.to_str()}\n{self.end}"

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and what `transformers` wants beside it."""
        self.inner.save(str(folder / "tokenizer.json"))
        named = {"bos_token": self.bos, "eos_token": self.end}
        names = {name: self.inner.id_to_token(token) for name, token in named.items() if token is not None}
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def read_tokenizer(path: str | Path, config: Config) -> Tokenizer:
    """The tokenizer of a folder (`tokenizer.json`), of a `.gguf` file, or a `tokenizer.json` itself.

    Raises:
      ModelError: absent, damaged, of a kind that is not supported, or at odds with the model's vocabulary.
    """
    path = Path(path)
    package = _package()
    if path.suffix == ".gguf" and path.is_file():
        inner = _from_gguf(package, open_gguf(path))
    else:
        if path.is_dir():
            path = inside(path, "tokenizer.json", f"{path}")
        try:
            inner = package.Tokenizer.from_str(read_bytes(path).decode())
        except ModelError:
            raise
        except Exception as error:  # the package raises plain Exception
            raise ModelError(f"{path}: is no whole tokenizer.json: {error}") from error
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True
    vocabulary = inner.get_vocab(with_added_tokens=True)
    _check_vocabulary(path, vocabulary, config)
    longest = max(len(token) for token in vocabulary)
    return Tokenizer(inner, config.eos[0] if config.eos else config.bos, longest, config.bos)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ModelError("tokenizers need the package tokenizers: install the extra [llm]") from error
    return tokenizers


def _check_vocabulary(path: Path, vocabulary: dict[str, int], config: Config) -> None:
    if not vocabulary:
        raise ModelError(f"{path}: has no tokens")
    token, highest = max(vocabulary.items(), key=lambda item: item[1])
    remedy = "tokenizer and model are not of one kind: give the model's own tokenizer"
    if highest >= config.vocabulary:
        raise ModelError(f"{path}: token {token!r} is number {highest}, the model has {config.vocabulary}: {remedy}")
    unused = config.vocabulary - highest - 1  # models pad their tables to round sizes
    if unused > max(1024, config.vocabulary // 16):
        raise ModelError(f"{path}: {unused} of the model's {config.vocabulary} tokens are not in it: {remedy}")
    known = set(vocabulary.values())
    for number in (*(() if config.bos is None else (config.bos,)), *config.eos):
        if number not in known:
            raise ModelError(f"{path}: the model begins or ends texts with token {number}, which it lacks: {remedy}")


def _from_gguf(package: Any, source: Gguf) -> Any:
    """Byte-level BPE from a GGUF file's metadata."""
    meta = {k.removeprefix("tokenizer.ggml."): v for k, v in source.metadata.items() if k.startswith("tokenizer.ggml.")}
    remedy = "give the model's tokenizer.json instead"
    if meta.get("model") != "gpt2":
        raise ModelError(f"{source.file}: tokenizer.ggml.model is {meta.get('model')!r}: supported is 'gpt2'; {remedy}")
    pre = meta.get("pre", "default")
    if pre not in _CUTS:
        raise ModelError(f"{source.file}: tokenizer.ggml.pre is {pre!r}: supported are {', '.join(_CUTS)}; {remedy}")
    nfc, words, digits, whole = _CUTS[pre]
    tokens: Any = meta.get("tokens")
    merges: Any = meta.get("merges")
    for name, value in (("tokens", tokens), ("merges", merges)):
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ModelError(f"{source.file}: tokenizer.ggml.{name} is missing or no list of texts; {remedy}")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    kinds = meta.get("token_type", [1] * len(tokens))
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise ModelError(
            f"{source.file}: tokenizer.ggml.tokens has {len(tokens)} entries, {len(vocabulary)} different, and "
            f"token_type {len(kinds)}: the file is damaged; {remedy}"
        )
    try:
        model = package.models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges], ignore_merges=whole)
    except Exception as error:  # the package raises plain Exception
        raise ModelError(f"{source.file}: tokenizer.ggml.merges does not fit tokens: {error}; {remedy}") from error
    inner = package.Tokenizer(model)
    before = package.pre_tokenizers
    steps = [before.Digits(individual_digits=True)] if digits else []
    if words is not None:
        steps.append(before.Split(package.Regex(words), behavior="isolated"))
    steps.append(before.ByteLevel(add_prefix_space=False, use_regex=words is None))
    inner.pre_tokenizer = before.Sequence(steps)
    inner.decoder = package.decoders.ByteLevel()
    if nfc:
        inner.normalizer = package.normalizers.NFC()
    for kind, special in ((_CONTROL, True), (_USER, False)):
        named = [token for token, of in zip(tokens, kinds) if of == kind]
        inner.add_tokens([package.AddedToken(token, special=special, normalized=False) for token in named])
    _add_ends(package, source, inner, meta, whole)
    return inner


def _add_ends(package: Any, source: Gguf, inner: Any, meta: dict[str, Any], whole: bool) -> None:
    """Beginning- and end-of-text tokens, where the file has them added; llama.cpp's default is Llama 3's beginning."""
    ends = {}
    for name in ("bos", "eos"):
        if meta.get(f"add_{name}_token", whole and name == "bos"):
            number = meta.get(f"{name}_token_id")
            token = inner.id_to_token(number) if type(number) is int and 0 <= number < 2**31 else None
            if token is None:
                raise ModelError(f"{source.file}: tokenizer.ggml.{name}_token_id is {number!r}: it must be a token id")
            ends[name] = (token, number)
    if ends:
        single = [ends[name][0] if name in ends else "$A" for name in ("bos", "text", "eos") if name in {"text", *ends}]
        inner.post_processor = package.processors.TemplateProcessing(
            single=" ".join(single), special_tokens=list(ends.values())
        )

"""GGUF files (llama.cpp), quantised ones included; the one module that imports the package `gguf`.

The package knows the kinds of quantisation. The header is read here: the package's reader believes every length in it,
so that a damaged one makes it loop for years, and takes seconds for a vocabulary.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bahe_jax.files import Fields, ModelError, Tensor
from bahe_jax.hugging_face import build
from bahe_jax.language_model import ARCHITECTURES, Config
from rec_core.transformer import RopeScaling

_STRING, _ARRAY = 8, 9
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), ("B", "b", "H", "h", "I", "i", "f", "?", "Q", "q", "d")))
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, eq=False)
class Gguf:
    """An open file: metadata by key, tensors by llama.cpp's name."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ModelError("GGUF files need the package gguf: install the extra [llm]") from error
    return gguf


class _Header:
    """Walks the header; no length that it tells is believed beyond the end of the file."""

    def __init__(self, file: Path, data: np.ndarray) -> None:
        self.file, self.data, self.at = file, memoryview(data), 0

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise ModelError(
                f"{self.file}: {what} takes {count:,} bytes from {self.at:,} on, the file has {len(self.data):,}: "
                "it is damaged or cut short"
            )
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.scalar("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.file}: {what} is no UTF-8 text: {error}") from error

    def value(self, what: str) -> Any:
        kind = self.scalar("I", what)
        if kind == _STRING:
            return self.text(what)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind != _ARRAY:
            raise ModelError(f"{self.file}: {what} is of the unknown type {kind}: the file is damaged, or too new")
        kind, count = self.scalar("I", what), self.scalar("Q", what)
        if kind == _STRING:
            self.fits(count, 8, what)
            return [self.text(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise ModelError(f"{self.file}: {what} is an array of type {kind}: supported are numbers and texts")
        size = struct.calcsize(f"<{_SCALARS[kind]}")
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(self.fits(count, size, what), what)))

    def fits(self, count: int, each: int, what: str) -> int:
        """`count` times `each` bytes; an error where fewer are left."""
        if count * each > len(self.data) - self.at:
            raise ModelError(f"{self.file}: {what} counts {count:,}, more than the file holds: it is damaged")
        return count * each


def open_gguf(file: Path) -> Gguf:
    """Reads the header and maps the rest.

    Raises:
      ModelError: no GGUF file of version 2 or 3 (little-endian), damaged, cut short, with a tensor given twice or of a
        kind that cannot be read.
    """
    try:
        data = np.memmap(file, np.uint8, "r")
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ModelError(f"{file}: cannot be read: {error}") from error
    header = _Header(file, data)
    magic, version = header.take(4, "the first word"), header.scalar("I", "the version")
    if magic != b"GGUF" or version not in (2, 3):
        raise ModelError(f"{file}: begins with {magic!r}, version {version}: supported is little-endian GGUF 2 and 3")
    tensor_count, key_count = header.scalar("Q", "the number of tensors"), header.scalar("Q", "the number of keys")
    metadata: dict[str, Any] = {}
    header.fits(key_count, 13, "the header")
    for _ in range(key_count):
        key = header.text("a key")
        if key in metadata:
            raise ModelError(f"{file}: the key {key} is given twice")
        metadata[key] = header.value(f"the value of {key}")
    header.fits(tensor_count, 24, "the header")
    infos = {}
    for _ in range(tensor_count):
        name = header.text("a tensor's name")
        if name in infos:
            raise ModelError(f"{file}: tensor {name} is given twice")
        dimensions = header.scalar("I", f"tensor {name}")
        if dimensions > 4:
            raise ModelError(
                f"{file}: tensor {name} has {dimensions} dimensions, at most 4 are possible: it is damaged"
            )
        shape = tuple(header.scalar("Q", f"tensor {name}") for _ in range(dimensions))[::-1]
        infos[name] = (shape, header.scalar("I", f"tensor {name}"), header.scalar("Q", f"tensor {name}"))
    alignment = Fields(f"{file}", metadata).integer("general.alignment", 32)
    start = -(-header.at // alignment) * alignment
    return Gguf(file, metadata, _tensors(file, data, start, infos))


def _tensors(file: Path, data: np.ndarray, start: int, infos: dict[str, Any]) -> dict[str, Tensor]:
    package, tensors, end, before = _package(), {}, start, ""
    for name, (shape, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        place = f"{file}: tensor {name}"
        try:
            kind = package.GGMLQuantizationType(kind)
            block, size = package.GGML_QUANT_SIZES[kind]
            package.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ModelError(f"{place}: its type cannot be read: {error}") from error
        if not shape or shape[-1] % block or 0 in shape:
            raise ModelError(f"{place} has shape {shape}: not whole blocks of {block} ({kind.name})")
        row = shape[-1] // block * size
        begin, count = start + offset, math.prod(shape[:-1]) * row
        if begin + count > len(data):
            raise ModelError(f"{place} ends at byte {begin + count:,}, the file at {len(data):,}: it is cut short")
        if begin < end:
            raise ModelError(f"{place} begins at byte {begin:,}, inside of tensor {before}: the file is damaged")
        end, before = begin + count, name
        rows = data[begin:end].reshape(-1, row)
        tensors[name] = Tensor(file, name, shape, functools.partial(_read, rows, kind, shape))
    return tensors


def _read(rows: np.ndarray, kind: Any, shape: tuple[int, ...], index: tuple[Any, ...]) -> np.ndarray:
    """Part of a tensor of one or two dimensions; only its rows are dequantised."""
    chosen = rows[index[0]] if len(shape) > 1 else rows
    with np.errstate(all="ignore"):  # a damaged scale gives infinities, which the caller refuses
        values = _package().quants.dequantize(np.ascontiguousarray(chosen), kind)
    return values[:, index[1]] if len(shape) > 1 else values[0, index[0]]


def config(source: Gguf) -> Config:
    """The configuration that the metadata describe.

    Raises:
      ModelError: another architecture, a key that is missing or out of range, or a variant that is not supported.
    """
    kind = source.metadata.get("general.architecture")
    fields = Fields(f"{source.file}", source.metadata)
    if kind not in ARCHITECTURES:
        raise fields.error("general.architecture", f"supported are {', '.join(ARCHITECTURES)}")
    fields.fixed("split.count", 0, 1)
    own = {k.removeprefix(f"{kind}."): v for k, v in source.metadata.items() if k.startswith(f"{kind}.")}
    its = Fields(f"{source.file}", own, f"{kind}.")
    width, heads = its.integer("embedding_length"), its.integer("attention.head_count")
    head_width = its.integer("attention.key_length", width // heads)
    its.fixed("attention.value_length", head_width)
    its.fixed("rope.dimension_count", head_width)
    theta = its.number("rope.freq_base", 10000.0)
    table = source.tensors.get("token_embd.weight")
    if table is None:
        raise ModelError(f"{source.file}: tensor token_embd.weight is missing")
    tokens = {name: source.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    for name, token in tokens.items():
        if token is not None and type(token) is not int:
            raise fields.error(f"tokenizer.ggml.{name}_token_id", "it must be a token id")
    return build(
        source.file,
        architecture=kind,
        vocabulary=its.integer("vocab_size", table.shape[0]),
        tied="output.weight" not in source.tensors,
        context=its.integer("context_length", 2048),
        bos=() if tokens["bos"] is None else (tokens["bos"],),
        eos=() if tokens["eos"] is None else (tokens["eos"],),
        width=width,
        layers=its.integer("block_count"),
        heads=heads,
        kv_heads=its.integer("attention.head_count_kv", heads),
        head_width=head_width,
        hidden=its.integer("feed_forward_length"),
        norm_eps=_short(its.number("attention.layer_norm_rms_epsilon")),
        rope_theta=_short(theta),
        rope_scaling=_scaling(source, its, head_width, theta),
    )


def _short(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 is stored, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(source: Gguf, its: Fields, head_width: int, theta: float) -> RopeScaling | None:
    kind = its.values.get("rope.scaling.type")
    if kind == "linear":
        try:
            return RopeScaling("linear", its.number("rope.scaling.factor"))
        except ValueError as error:
            raise its.error("rope.scaling.factor", f"{error}") from error
    its.fixed("rope.scaling.type", "none")
    tensor = source.tensors.get(_FACTORS)
    if tensor is None:
        return None
    if tensor.shape != (head_width // 2,):
        raise ModelError(f"{tensor.place} has shape {tensor.shape}, expected {(head_width // 2,)}")
    divisors = tensor.read((slice(None),))
    scaling = RopeScaling("llama3", max(1.0, float(np.nan_to_num(divisors.max(), posinf=1.0))))
    expected = scaling.divisors(theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width))
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise ModelError(
            f"{tensor.place}: holds {divisors[:4]} ...: supported are those of Llama 3 (low 1, high 4, context 8192)"
        )
    return scaling


def tensors(source: Gguf, config: Config) -> dict[str, Tensor]:
    """The tensors under the names of Hugging Face, Llama's rows of query and key in their order again."""
    found: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        if name == _FACTORS:
            continue
        stem, _, suffix = name.rpartition(".")
        block, number, inner = [*stem.split(".", 2), "", ""][:3]
        known = _WHOLE.get(stem) if block != "blk" else _LAYER.get(inner)
        new = f"{known}.{suffix}" if block != "blk" else f"model.layers.{number}.{known}.{suffix}"
        heads = {"attn_q": config.transformer.heads, "attn_k": config.transformer.kv_heads}.get(inner)
        if known is None or new in found:
            raise ModelError(f"{tensor.place}: {config.architecture} has no such tensor")
        found[new] = _unpermuted(tensor, heads) if config.architecture == "llama" and heads else tensor
    return found


def _unpermuted(tensor: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbours (2 i, 2 i + 1), Hugging Face the halves (i, i + D / 2): rows of a head interleave."""
    if len(tensor.shape) != 2 or tensor.shape[0] % (2 * heads):
        return tensor  # of a wrong shape, which the reader will say
    order = np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        rows: Any = order[index[0]]
        return tensor.read((rows, index[1]))

    return Tensor(tensor.file, tensor.name, tensor.shape, read)

"""GGUF files: the same parameters as the folder's, quantised parts as quantised wholes, faults named."""

import dataclasses
import struct

import gguf
import jax
import numpy as np
import pytest

from bahe_jax import ModelError, gguf_file, read, read_config
from rec_core.sharding import make_mesh

KINDS = gguf.GGMLQuantizationType
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b))


def metadata(config):
    c = config.transformer
    values = {
        "block_count": c.layers,
        "context_length": config.context,
        "embedding_length": c.width,
        "feed_forward_length": c.hidden,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_width,
        "rope.freq_base": c.rope_theta,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
    }
    if c.rope_scaling and c.rope_scaling.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": c.rope_scaling.factor}
    return {f"{config.architecture}.{key}": value for key, value in values.items()}


def write(file, config, tensors, values=None):
    """A GGUF file of Hugging Face's tensors in float32, as llama.cpp's converter writes it."""
    out = gguf.GGUFWriter(file, config.architecture)
    for key, value in {**metadata(config), **(values or {})}.items():
        add = {int: out.add_uint32, float: out.add_float32, str: out.add_string, list: out.add_array}[type(value)]
        add(key, value)
    for name in ("bos", "eos"):
        token = config.bos if name == "bos" else config.eos[0] if config.eos else None
        if token is not None:
            out.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    for name, value in tensors.items():
        if name in WHOLE or not name.startswith("model."):
            out.add_tensor({**WHOLE, "lm_head.weight": "output.weight"}.get(name, name), value)
            continue
        _, _, layer, *inner, suffix = name.split(".")
        heads = {"q_proj": config.transformer.heads, "k_proj": config.transformer.kv_heads}.get(inner[-1])
        if heads and config.architecture == "llama":
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        out.add_tensor(f"blk.{layer}.{NAMES[inner[-1]]}.{suffix}", np.ascontiguousarray(value))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


def tensors_of(case):
    """Hugging Face's tensors of a golden folder, float32."""
    from safetensors.numpy import load_file

    files = case.path.glob("*.safetensors")
    return {k: v.astype(np.float32) for file in files for k, v in load_file(file).items()}


def llama3_divisors(theta, width, factor):
    """`rope_freqs` of llama.cpp's convert_hf_to_gguf.py (Llama 3.1: low 1, high 4, context 8192)."""
    divisors = []
    for frequency in 1.0 / theta ** (np.arange(0, width, 2) / width):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else between)
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_is_the_folder_it_was_made_of(golden, tmp_path, name):
    case = golden(name)
    tensors = tensors_of(case)
    if name == "llama":
        tensors["rope_freqs.weight"] = llama3_divisors(500000.0, 8, 8.0)
    file = write(tmp_path / "model.gguf", case.config, tensors)
    params, config = read(file)
    same(params, case.params)
    assert (config.transformer, config.tied) == (case.config.transformer, case.config.tied)
    assert config.eos == case.config.eos[:1]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0"])
def test_a_part_of_a_quantised_tensor_is_the_part_of_the_whole(tmp_path, kind):
    value = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
    data = gguf.quants.quantize(value, KINDS[kind])
    out = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    out.add_tensor("blk.0.attn_v.weight", data, raw_dtype=KINDS[kind])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    tensor = gguf_file.open_gguf(tmp_path / "x.gguf").tensors["blk.0.attn_v.weight"]
    assert tensor.shape == (6, 256)
    whole = gguf.quants.dequantize(data, KINDS[kind])
    np.testing.assert_array_equal(tensor.read((slice(0, 6), slice(0, 256))), whole)
    np.testing.assert_array_equal(tensor.read((slice(2, 5), slice(30, 77))), whole[2:5, 30:77])


def test_a_mesh_reads_its_parts(golden):
    case = golden("gguf")
    same(read(case.path, mesh=make_mesh(2, 4))[0], case.params)


def test_every_truncation_is_an_error(golden, tmp_path):
    whole = golden("gguf").path.read_bytes()
    draw = np.random.default_rng(0)
    for cut in [0, 3, 4, 8, 24, *draw.integers(0, 12_000, 15), *draw.integers(12_000, len(whole), 5)]:
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            read(tmp_path / "cut.gguf")


def test_any_flipped_byte_of_the_header_is_an_error_or_harmless(golden, tmp_path):
    whole, draw = golden("gguf").path.read_bytes(), np.random.default_rng(1)
    tokens = whole.index(b"tokenizer.ggml.tokens")
    tensors = whole.index(b"token_embd.weight")
    for place in [*draw.integers(0, tokens + 40, 25), *draw.integers(tensors - 40, tensors + 600, 15)]:
        data = bytearray(whole)
        data[place] ^= 1 << draw.integers(8)
        (tmp_path / "flip.gguf").write_bytes(data)
        try:
            read_config(tmp_path / "flip.gguf")
        except ModelError as error:
            assert "flip.gguf" in str(error)


def test_a_length_beyond_the_file_is_no_hang(tmp_path):
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 3) + b"a.b"
    for tail in (
        struct.pack("<IIQ", 9, 4, 1 << 60),
        struct.pack("<IIQ", 9, 8, 1 << 60),
        struct.pack("<IQ", 8, 1 << 63),
        struct.pack("<IIQ", 9, 9, 1),
        struct.pack("<I", 77),
    ):
        (tmp_path / "long.gguf").write_bytes(head + tail + bytes(64))
        with pytest.raises(ModelError, match=r"long.gguf: the value of a\.b"):
            read(tmp_path / "long.gguf")
    (tmp_path / "long.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(64))
    with pytest.raises(ModelError, match="counts 1,152,921,504,606,846,976, more than the file holds"):
        read(tmp_path / "long.gguf")


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("values", "change", "message"),
    [
        ({}, lambda t: t.pop(Q), f"tensor {Q} is missing"),
        ({}, lambda t: t.update({Q: t[Q].T.copy()}), r"blk.1.attn_q.weight has shape \(24, 32\), expected \(32"),
        ({}, lambda t: t.update({"blk.0.more.weight": t[Q]}), "tensor blk.0.more.weight: llama has no such tensor"),
        ({}, lambda t: t.update({"blk.0.attn_q.bias": t[Q][0]}), "tensor blk.0.attn_q.bias is unknown"),
        ({}, lambda t: t[Q].__setitem__((3, 4), np.inf), "tensor blk.1.attn_q.weight: holds values that are not"),
        ({}, lambda t: t.update({Q: t[Q].astype(np.int8)}), "tensor blk.1.attn_q.weight: its type cannot be read"),
        ({}, lambda t: t.pop("model.embed_tokens.weight"), "tensor token_embd.weight is missing"),
        ({}, lambda t: t.update({"rope_freqs.weight": np.ones(3, np.float32)}), r"rope_freqs.weight has shape \(3,\)"),
        ({}, lambda t: t.update({"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}), "those of Llama 3"),
        ({"llama.block_count": 0}, None, "llama.block_count is 0: it must be an integer from 1"),
        ({"llama.block_count": "three"}, None, "llama.block_count is 'three'"),
        ({"llama.rope.scaling.type": "yarn"}, None, "llama.rope.scaling.type is 'yarn': supported is 'none'"),
        ({"llama.rope.scaling.type": "linear"}, None, "llama.rope.scaling.factor is missing"),
        ({"llama.rope.dimension_count": 4}, None, "llama.rope.dimension_count is 4: supported is 8"),
        ({"llama.attention.value_length": 16}, None, "llama.attention.value_length is 16"),
        ({"split.count": 3}, None, "split.count is 3: supported is 0 or 1"),
        ({"tokenizer.ggml.eos_token_id": 40}, None, r"eos=\(40,\): must be below vocabulary=40"),
        ({"general.alignment": 0}, None, "general.alignment is 0"),
    ],
)  # fmt: skip
def test_faults_name_file_and_tensor(golden, tmp_path, values, change, message):
    case = golden("llama")
    tensors = tensors_of(case)
    if change:
        change(tensors)
    config = case.config
    if "tokenizer.ggml.eos_token_id" in values:
        config = dataclasses.replace(config, eos=())
    with pytest.raises(ModelError, match=rf"model\.gguf: .*{message}"):
        read(write(tmp_path / "model.gguf", config, tensors, values))


def test_another_architecture_is_named(golden, tmp_path):
    out = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.close()
    with pytest.raises(ModelError, match=r"general\.architecture is 'mamba': supported are llama, qwen2, qwen3"):
        read(tmp_path / "model.gguf")
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match=r"other.gguf: begins with b'PK"):
        read(tmp_path / "other.gguf")


def test_tensors_that_overlap_are_named(golden, tmp_path):
    data = bytearray(golden("gguf").path.read_bytes())
    name = b"blk.0.attn_norm.weight"
    offset = data.index(name) + len(name) + 4 + 8 + 4  # behind the number of dimensions, the one dimension, the type
    data[offset : offset + 8] = bytes(8)
    (tmp_path / "over.gguf").write_bytes(data)
    with pytest.raises(
        ModelError, match=r"tensor blk\.0\.\S+ begins at byte [\d,]+, inside of tensor token_embd\.weight"
    ):
        read(tmp_path / "over.gguf")

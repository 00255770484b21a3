"""Writes tiny random language models and their logits, from Hugging Face `transformers`.

    python tests/bahe_jax/golden/make_language_models.py

with transformers 5.23.0, torch 2.13 (CPU), gguf 0.19.0 and tokenizers 0.23.3. Neither this package nor JAX is
imported, so that any Python with them will do. Each folder is what `save_pretrained` writes; `NAME.npz` holds token
ids, positions (far apart, so that every rotary frequency tells) and logits, computed in float32. `llama.gguf` is a
quantised Llama with its tokenizer; its logits are those of `transformers` after reading that file, and its token ids
those of `tokenizers`.
"""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
POSITIONS = np.array([0, 1, 2, 7, 40, 41, 300, 301, 900, 1500, 2500, 4000])
SMALL = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TEXTS = [
    "The long road home, part 2 (1994)",
    "it's 12345 o'clock;  two  spaces\n\nnew lines\t\ttabs",
    "Amélie – naïve café, 映画, кино 🎬",
    "don't DON'T we'll",
    "",
    " leading",
]


def randomize(model, seed, scale=0.3):
    """Every parameter, norms and biases included, far enough from its start to show in the logits."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(1 + scale * noise if "norm" in name else scale * noise)
    return model.eval()


def logits(model, tokens):
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens), position_ids=torch.tensor(POSITIONS)[None].expand(tokens.shape))
    return out.logits.numpy()


def write(name, model, dtype, **options):
    """The folder, and the logits of what it holds after rounding to `dtype`."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, **options)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, len(POSITIONS)))
    np.savez_compressed(HERE / f"{name}.npz", tokens=tokens, positions=POSITIONS, logits=logits(model, tokens))
    print(name, sum(f.stat().st_size for f in folder.iterdir()), "bytes")


def tokenizer(folder):
    """Byte-level BPE as SmolLM2 has it, trained on a few sentences."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>", "<|im_start|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    made.save(str(folder / "tokenizer.json"))
    return made


def write_gguf(file, model, made):
    """As llama.cpp's converter does: rows of query and key interleaved, names and metadata its own."""
    c = model.config
    out = gguf.GGUFWriter(file, "llama")
    out.add_block_count(c.num_hidden_layers)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_key_length(c.head_dim)
    out.add_value_length(c.head_dim)
    out.add_rope_dimension_count(c.head_dim)
    out.add_rope_freq_base(c.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_vocab_size(c.vocab_size)
    vocabulary = made.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = json.loads(made.to_str())["model"]["merges"]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(tokens)
    out.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    out.add_token_merges([" ".join(merge) for merge in merges])
    out.add_bos_token_id(1)
    out.add_eos_token_id(0)
    out.add_add_bos_token(False)

    kinds = gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        value = tensor.float().numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        by_name = {"embed_tokens": kinds.BF16, "mlp": kinds.Q4_1, "v_proj": kinds.F16, "norm": kinds.F32}
        kind = next((kind for part, kind in by_name.items() if part in name), kinds.Q8_0)
        data = gguf.quants.quantize(np.ascontiguousarray(value), kind)
        out.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main():
    llama = LlamaConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=131072,
        rope_parameters={**LLAMA3, "rope_theta": 500000.0}, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=[2, 3],
    )  # fmt: skip
    write("llama", randomize(LlamaForCausalLM(llama), 1), torch.float32)
    qwen2 = Qwen2Config(
        **SMALL, num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=32768, tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, eos_token_id=2,
    )  # fmt: skip
    write("qwen2", randomize(Qwen2ForCausalLM(qwen2), 2), torch.float16)
    qwen3 = Qwen3Config(
        **SMALL, num_attention_heads=3, num_key_value_heads=3, head_dim=10, max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, tie_word_embeddings=False,
    )  # fmt: skip
    write("qwen3", randomize(Qwen3ForCausalLM(qwen3), 3), torch.bfloat16, max_shard_size="20kB")

    folder = HERE / "gguf"
    folder.mkdir(exist_ok=True)
    made = tokenizer(folder)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, rms_norm_eps=1e-5,
    )  # fmt: skip
    write_gguf(folder / "llama.gguf", randomize(LlamaForCausalLM(config), 4, 0.15), made)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="llama.gguf", dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, 320, (2, len(POSITIONS)))
    made.encode_special_tokens = True
    ids = [made.encode(text).ids for text in TEXTS]
    np.savez_compressed(
        HERE / "gguf.npz",
        tokens=tokens,
        positions=POSITIONS,
        logits=logits(model, tokens),
        texts=np.array(TEXTS),
        ids=np.array([i for text in ids for i in text]),
        lengths=np.array([len(text) for text in ids]),
    )
    print("gguf", sum(f.stat().st_size for f in folder.iterdir()), "bytes")


main()

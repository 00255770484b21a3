"""`config.json` of Hugging Face `transformers` for Llama, Qwen2 and Qwen3, and their names of parameters."""

from pathlib import Path
from typing import Any

from bahe_jax.files import Fields, ModelError
from bahe_jax.language_model import ARCHITECTURES, Config
from rec_core.transformer import RopeScaling, TransformerConfig

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Path of a parameter in the decoder's layers -> name in `model.layers.N.`; a kernel is the transpose of theirs.
_LAYER = {
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    **{
        f"attention/{ours}/{part}": f"self_attn.{theirs}_proj.{suffix}"
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))
        for part, suffix in (("kernel", "weight"), ("bias", "bias"))
    },
    **{f"mlp/{name}/kernel": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}
_WHOLE = {
    "tables/token": "model.embed_tokens.weight",
    "tables/output": "lm_head.weight",
    "decoder/final_norm/scale": "model.norm.weight",
}


def tensor_name(path: str, layer: int | None = None) -> str:
    """Their name of a parameter of ours; of one layer of it where it is stacked (`stacked(path)`)."""
    if layer is None:
        return _WHOLE[path]
    return f"model.layers.{layer}.{_LAYER[path.removeprefix('decoder/layers/')]}"


def stacked(path: str) -> bool:
    """Whether the parameter carries a leading axis of layers."""
    return path.startswith("decoder/layers/")


def is_buffer(name: str) -> bool:
    """Rotary frequencies, which old checkpoints carry and which follow from the configuration."""
    return name.endswith(".rotary_emb.inv_freq")


def parse_config(values: dict[str, Any], file: Path) -> Config:
    """The configuration that a `config.json` describes; absent fields have the defaults of `transformers`.

    Raises:
      ModelError: another architecture, a field of a wrong type or range, or a variant that is not supported.
    """
    fields = Fields(f"{file}", values)
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        raise fields.error("model_type", f"supported are {', '.join(ARCHITECTURES)}")
    named = values.get("architectures")
    if named not in (None, [CLASSES[kind]]):
        raise fields.error("architectures", f"supported is [{CLASSES[kind]!r}]")
    if values.get("quantization_config") is not None:
        raise fields.error("quantization_config", "quantised safetensors are not supported: give plain ones or GGUF")
    fields.fixed("hidden_act", "silu")
    fields.fixed("attention_bias", *((False,) if kind != "qwen2" else (False, True)))
    fields.fixed("mlp_bias", False)
    fields.fixed("use_sliding_window", False)
    if kind == "llama":
        fields.fixed("sliding_window")
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(layer != "full_attention" for layer in kinds):
        raise fields.error("layer_types", "supported is 'full_attention' for every layer")

    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if values.get("head_dim") is None and kind != "qwen3" and width % heads:
        raise fields.error("hidden_size", f"without head_dim, num_attention_heads={heads} must divide it")
    theta, scaling = _rope(fields)
    return build(
        file,
        architecture=kind,
        vocabulary=fields.integer("vocab_size"),
        tied=fields.flag("tie_word_embeddings", False),
        context=fields.integer("max_position_embeddings", 2048 if kind == "llama" else 32768),
        bos=_tokens(fields, "bos_token_id"),
        eos=_tokens(fields, "eos_token_id"),
        width=width,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads if kind == "llama" else 32),
        head_width=fields.integer("head_dim", 128 if kind == "qwen3" else width // heads),
        hidden=fields.integer("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def build(
    file: Path,
    *,
    architecture: str,
    vocabulary: int,
    tied: bool,
    context: int,
    bos: tuple[int, ...],
    eos: tuple[int, ...],
    **decoder: Any,
) -> Config:
    """A `Config` of these values; what it refuses is said with the file's name."""
    try:
        transformer = TransformerConfig(qkv_bias=architecture == "qwen2", qk_norm=architecture == "qwen3", **decoder)
        return Config(architecture, vocabulary, transformer, tied, context, bos[0] if bos else None, eos)
    except ValueError as error:
        raise ModelError(f"{file}: {error}") from error


def _tokens(fields: Fields, name: str) -> tuple[int, ...]:
    value = fields.values.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise fields.error(name, "it must be a token id, a list of them, or null")
    return tuple(ids)


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    value = fields.values.get(name)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise fields.error(name, "it must be an object or null")
    rope = Fields(fields.place, value, f"{name}.")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    for place in (fields, rope):
        place.fixed("partial_rotary_factor", 1, 1.0)
    key = "type" if "rope_type" not in value and "type" in value else "rope_type"
    rope.fixed(key, "default", "linear", "llama3")
    kind = value.get(key) or "default"
    if kind == "default":
        if set(value) - {key, "rope_theta", "partial_rotary_factor"}:
            raise fields.error(name, "it scales nothing without rope_type; supported are default, linear, llama3")
        return theta, None
    try:
        if kind == "linear":
            return theta, RopeScaling("linear", rope.number("factor"))
        return theta, RopeScaling(
            "llama3",
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.integer("original_max_position_embeddings"),
        )
    except ModelError:
        raise
    except ValueError as error:
        raise fields.error(name, f"{error}") from error


def config_json(config: Config, dtype: str) -> dict[str, Any]:
    """What `parse_config` reads and `transformers` 4 and 5 load."""
    c, rope = config.transformer, None
    if c.rope_scaling is not None:
        rope = {"rope_type": c.rope_scaling.kind, "factor": c.rope_scaling.factor}
        if c.rope_scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": c.rope_scaling.low_turns,
                "high_freq_factor": c.rope_scaling.high_turns,
                "original_max_position_embeddings": c.rope_scaling.context,
            }
    return {
        "architectures": [CLASSES[config.architecture]],
        "model_type": config.architecture,
        "vocab_size": config.vocabulary,
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos,
        "eos_token_id": config.eos[0] if len(config.eos) == 1 else list(config.eos) or None,
        "torch_dtype": dtype,
    }

"""Folders of Hugging Face: read whole, saved back bit for bit, and every fault named with its file and tensor."""

import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bahe_jax import ModelError, language_model, read, read_config, save
from bahe_jax.language_model import Config
from rec_core.sharding import make_mesh
from rec_core.transformer import RopeScaling, TransformerConfig


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b))


@pytest.fixture
def folder(golden, tmp_path):
    """`folder(name)`: a copy of a golden folder, to damage."""

    def copy(name="llama"):
        return shutil.copytree(golden(name).path, tmp_path / name)

    return copy


def rewrite(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_configuration_is_read_in_both_spellings(golden, folder):
    config = golden("llama").config
    assert config.transformer.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (config.bos, config.eos, config.context, config.transformer.rope_theta) == (1, (2, 3), 131072, 500000.0)
    assert golden("qwen2").config.transformer.rope_scaling == RopeScaling("linear", 4.0)

    def older(values):  # as transformers 4 wrote it
        rope = values.pop("rope_parameters")
        values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}

    path = folder("llama")
    rewrite(path / "config.json", older)
    assert read_config(path) == config


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_saved_and_read_back_is_the_same_bit_for_bit(golden, tmp_path, name):
    case = golden(name)
    save(tmp_path / "whole", case.params, case.config)
    save(tmp_path / "parts", case.params, case.config, file_bytes=20_000)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    for written in ("whole", "parts"):
        params, config = read(tmp_path / written)
        assert config == case.config
        same(params, case.params)
    theirs = {k: v for file in case.path.glob("*.safetensors") for k, v in load_file(file).items()}
    ours = load_file(tmp_path / "whole" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        np.testing.assert_array_equal(ours[tensor], value.astype(np.float32))


def test_a_mesh_and_bfloat16_hold_the_same_numbers(golden, tmp_path):
    case = golden("qwen3")
    params, _ = read(case.path, mesh=make_mesh(2, 4))
    kernel = params["decoder"]["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 24, 10)
    same(params, case.params)
    save(tmp_path / "half", params, case.config, dtype="bfloat16")
    half, config = read(tmp_path / "half", dtype="bfloat16")
    assert config.transformer.dtype == "bfloat16"
    same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.params))
    same(jax.tree.map(lambda x: x.astype(jnp.float32), half), case.params)  # which were written in bfloat16


def test_reading_never_holds_a_second_copy(tmp_path):
    decoder = TransformerConfig(width=128, layers=8, heads=2, kv_heads=2, head_width=64, hidden=256)
    config = Config("llama", vocabulary=512, transformer=decoder, tied=True)
    shapes = jax.eval_shape(lambda key: language_model.init(key, config), jax.random.key(0))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), shapes)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    tracemalloc.start()
    save(tmp_path / "model", params, config, file_bytes=size // 8)
    saving = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    again, _ = read(tmp_path / "model", mesh=make_mesh(2, 1))
    reading = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    same(again, params)
    # What a device holds is not traced or is (as NumPy's own memory on a CPU); so at most the model and one parameter.
    assert reading < size + 1.5 * largest and saving < size // 2


def test_buffers_of_old_checkpoints_and_a_tied_head_are_no_error(folder, golden):
    path = folder("qwen2") / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": head[0]}, path)
    same(read(path.parent)[0], golden("qwen2").params)
    save_file(tensors | {"lm_head.weight": head + 1}, path)
    with pytest.raises(ModelError, match=r"tensor lm_head.weight differs from model.embed_tokens.weight"):
        read(path.parent)


def test_damaged_and_truncated_files_are_named(folder):
    path = folder() / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    damages = [whole[:cut] for cut in (0, 4, 8, 100, header, header + 8, len(whole) // 2, len(whole) - 1)]
    damages += [whole + b"x", b"\xff" * 8 + whole[8:], whole[:8] + b"{{" + whole[10:]]
    damages += [whole.replace(b"model.norm.weight", b"model.nOrm.weight")]
    for data in damages:
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"llama/model\.safetensors|tensor model\.norm\.weight is missing"):
            read(path.parent)


def test_any_flipped_byte_of_a_header_is_an_error_or_harmless(folder):
    path = folder() / "model.safetensors"
    whole = path.read_bytes()
    header, draw = int.from_bytes(whole[:8], "little"), np.random.default_rng(0)
    for place in draw.integers(0, header + 8, 25):
        data = bytearray(whole)
        data[place] ^= 1 << draw.integers(8)
        path.write_bytes(data)
        try:
            read(path.parent)
        except ModelError as error:
            assert "llama" in str(error)


def changed_tensors(change):
    def damage(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return damage


def repeated(path):
    """One entry of the header stands there twice."""
    data = (path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    entry = b'"lm_head.weight":' + json.dumps(json.loads(header)["lm_head.weight"]).encode()
    header = header[:-1] + b"," + entry + b"}"
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed_tensors(lambda t: t.pop(Q)), f"llama: tensor {Q} is missing"),
        (changed_tensors(lambda t: t.update({Q: t[Q].T.copy()})), rf"{Q} has shape \(24, 32\), expected \(32, 24\)"),
        (changed_tensors(lambda t: t.update({Q: t[Q].astype(np.float64)})), f"tensor {Q} is F64: supported are F32"),
        (changed_tensors(lambda t: t.update({Q: t[Q].astype(np.int8)})), f"tensor {Q} is I8"),
        (changed_tensors(lambda t: t.update(extra=t[Q])), "model.safetensors: tensor extra is unknown"),
        (changed_tensors(lambda t: t[Q].__setitem__((3, 4), np.nan)), f"tensor {Q}: holds values that are not finite"),
        (repeated, "model.safetensors: header: 'lm_head.weight' is given twice"),
        (lambda p: (p / "config.json").unlink(), "config.json is not there"),
        (lambda p: (p / "model.safetensors").unlink(), "holds no safetensors file"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "pytorch_model.bin, a pickle, which"),
        (lambda p: shutil.copy(p / "model.safetensors", p / "b.safetensors"), None),
        (lambda p: (p / "model.safetensors").rename(p / "other.safetensors"), None),
    ],
)  # fmt: skip
def test_faults_name_file_and_tensor(folder, golden, damage, message):
    path = folder()
    damage(path)
    if message is None:
        same(read(path)[0], golden("llama").params)
        return
    with pytest.raises(ModelError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type is 'gpt2': supported are llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is .* supported is .'LlamaForCausalLM'"),
        ({"hidden_size": "24"}, "hidden_size is '24': it must be an integer from 1"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"vocab_size": 41}, r"weight has shape \(40, 24\), expected \(41, 24\)"),
        ({"num_hidden_layers": 4}, "tensor model.layers.3.* is missing"),
        ({"num_hidden_layers": 2}, "tensor model.layers.2.* is unknown"),
        ({"num_hidden_layers": 10**9}, "holds 30 tensors, too few for 1000000000 layers"),
        ({"num_key_value_heads": 3}, "llama/config.json: heads=4, kv_heads=3: kv_heads must divide heads"),
        ({"head_dim": None, "num_attention_heads": 5}, "num_attention_heads=5 must divide it"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0: it must be a finite number above 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': supported is 'silu'"),
        ({"attention_bias": True}, "attention_bias is True: supported is False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types is .* supported is 'full_attention'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .* quantised safetensors"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn': supported is"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope_parameters is .*factor=0.5: must"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor is missing"),
        ({"rope_parameters": {"factor": 8.0}}, "it scales nothing without rope_type"),
        ({"rope_parameters": [1]}, "rope_parameters is .1.: it must be an object"),
        ({"eos_token_id": 40}, "config.json: bos=1, eos=.40,.: must be below vocabulary=40"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1: it must be true or false"),
    ],
)  # fmt: skip
def test_faults_of_the_configuration_name_the_field(folder, change, message):
    path = folder()
    rewrite(path / "config.json", lambda values: values.update(change))
    with pytest.raises(ModelError, match=message):
        read(path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"\xff{}", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"],
    ids=range(8),
)
def test_a_damaged_configuration_is_named(folder, text):
    path = folder()
    (path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"llama/config\.json: "):
        read(path)


def moved(name):
    """The first file of the index is called `name`, and lies there."""

    def damage(path):
        def change(index):
            told = index["weight_map"]
            first = "model-00001-of-00002.safetensors"
            told |= {k: name for k, v in told.items() if v == first}

        source, target = path / "model-00001-of-00002.safetensors", path / name
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        rewrite(path / "model.safetensors.index.json", change)

    return damage


def linked(path):
    file = path / "model-00001-of-00002.safetensors"
    file.rename(path.parent / "outside.safetensors")
    file.symlink_to(path.parent / "outside.safetensors")


def index(change):
    return lambda path: rewrite(path / "model.safetensors.index.json", change)


def twice(path):
    first, second = (path / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    save_file(load_file(second) | {"model.norm.weight": np.ones(24, np.float32)}, second)
    save_file(load_file(first) | {"model.norm.weight": np.ones(24, np.float32)}, first)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (moved("../away.safetensors"), r"index.json: names the file '\.\./away.safetensors': it must be a plain"),
        (moved("sub/x.safetensors"), "names the file 'sub/x.safetensors'"),
        (index(lambda i: i["weight_map"].update({"lm_head.weight": "/etc/passwd"})), "names the file '/etc/passwd'"),
        (index(lambda i: i["weight_map"].update({"lm_head.weight": ["x"]})), "it must be a plain file name"),
        (index(lambda i: i["weight_map"].update({"lm_head.weight": "a.safetensors"})), "a.safetensors is not there"),
        (index(lambda i: i["weight_map"].update(new="model-00001-of-00002.safetensors")), "tensor new is missing"),
        (index(lambda i: i["weight_map"].pop("lm_head.weight")), "lm_head.weight is there, but .* places it in None"),
        (index(lambda i: i.pop("weight_map")), "weight_map is None: it must map tensors to files"),
        (linked, "is a link to .*outside.safetensors, outside of"),
        (twice, "tensor model.norm.weight (is given twice|is there, but)"),
        (lambda p: (p / "model.safetensors.index.json").unlink(), "holds 2 safetensors files and no"),
    ],
)  # fmt: skip
def test_an_index_leads_nowhere_else(folder, damage, message):
    path = folder("qwen3")
    damage(path)
    with pytest.raises(ModelError, match=message):
        read(path)


def test_links_inside_the_folder_are_followed(folder, golden):
    path = folder()
    (path / "model.safetensors").rename(path / "blob")
    (path / "model.safetensors").symlink_to("blob")
    same(read(path)[0], golden("llama").params)


def test_saving_replaces_nothing_and_leaves_nothing_half_done(golden, tmp_path):
    case = golden("llama")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(ModelError, match="taken: is there already and not empty"):
        save(tmp_path / "taken", case.params, case.config)
    broken = {"tables": case.params["tables"], "decoder": {**case.params["decoder"], "more": np.zeros(3)}}
    with pytest.raises(ModelError, match="params: decoder/more is unknown"):
        save(tmp_path / "new", broken, case.config)
    short = language_model.cut(case.params, 0, 2)
    with pytest.raises(ModelError, match=r"params: decoder/layers/.* is \(2, .*\), expected \(3, "):
        save(tmp_path / "new", short, case.config)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    with pytest.raises(ValueError, match="dtype='int8': choose one of float32, bfloat16"):
        read(case.path, dtype="int8")
    with pytest.raises(ModelError, match="nowhere: is neither a folder"):
        read(tmp_path / "nowhere")

"""Pre-trained language models from a folder or a GGUF file into our decoder, and back.

    params, config = read("SmolLM2-135M", dtype="bfloat16", mesh=mesh)
    save("mine", params, config)

A folder is Hugging Face's: `config.json` and safetensors. Nothing in it is run, no pickle is opened, and no file
outside of it is read. Tensors are read one at a time, and only the parts that this process's devices hold: beside the
parameters, host memory holds one parameter (of all layers) at most.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from bahe_jax import gguf_file, hugging_face, language_model, safetensors_files
from bahe_jax.files import ModelError, Tensor, inside, parse_json, read_bytes, write_json
from bahe_jax.language_model import Config
from bahe_jax.tokenizer import Tokenizer
from rec_core.data.files import creating, writing
from rec_core.sharding import path_name, shardings

DTYPES = ("float32", "bfloat16")
_CHUNK = 1 << 24  # elements of a tensor that are converted at a time


def read_config(path: str | Path) -> Config:
    """The configuration of a folder or GGUF file; see `read`."""
    return _open(Path(path))[0]


def read(path: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None) -> tuple[dict, Config]:
    """Reads a language model.

    Args:
      path: a folder with `config.json` and safetensors of `transformers`, or a `.gguf` file; Llama, Qwen2 or Qwen3.
      dtype: of the parameters, "float32" or "bfloat16". The configuration computes in it too (`Config.running`).
      mesh: where parameters go (`rec_core.sharding.RULES`); None: the default device.

    Returns:
      The parameters, as `language_model.init` makes them, and the configuration.

    Raises:
      ModelError: files that are absent, damaged, cut short, outside of the folder or of another architecture; a tensor
        that is missing, unknown, given twice, of a wrong shape or dtype, or not finite.
    """
    _check_dtype(dtype)
    config, tensors = _open(Path(path))
    if config.transformer.layers > len(tensors):  # before so many names are made
        raise ModelError(f"{path}: holds {len(tensors)} tensors, too few for {config.transformer.layers} layers")
    template = _template(config)
    places = _places(template)
    _check(Path(path), config, tensors, template, places)

    def parameter(key_path: Any, leaf: Any, sharding: Any = None) -> Array:
        path = path_name(key_path)
        held = [tensors[name] for name in places[path]]
        # Devices that hold the same part share one reading of it.
        part = functools.cache(functools.partial(_part, held, path, leaf.shape, jnp.dtype(dtype)))
        if sharding is None:
            return jax.device_put(part((slice(None),) * leaf.ndim))
        return jax.make_array_from_callback(leaf.shape, sharding, part)

    layout = () if mesh is None else (shardings(template, mesh),)
    params = jax.tree.map_with_path(parameter, template, *layout)
    return params, config.running(dtype=dtype)


def _open(path: Path) -> tuple[Config, dict[str, Tensor]]:
    if path.is_dir():
        file = inside(path, "config.json", f"{path}")
        config = hugging_face.parse_config(parse_json(read_bytes(file), f"{file}"), file)
        return config, safetensors_files.tensors(path)
    if path.suffix != ".gguf" or not path.is_file():
        raise ModelError(f"{path}: is neither a folder with config.json and safetensors nor a .gguf file")
    source = gguf_file.open_gguf(path)
    config = gguf_file.config(source)
    return config, gguf_file.tensors(source, config)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")


def _template(config: Config) -> Any:
    return jax.eval_shape(functools.partial(language_model.init, config=config), jax.random.key(0))


def _places(template: Any) -> dict[str, list[str]]:
    """Parameter path -> the names of its tensors, one a layer where it is stacked."""
    places = {}
    for key_path, leaf in jax.tree.leaves_with_path(template):
        path = path_name(key_path)
        layers = range(leaf.shape[0]) if hugging_face.stacked(path) else [None]
        places[path] = [hugging_face.tensor_name(path, layer) for layer in layers]
    return places


def _shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one tensor in the file: of one layer, and a kernel the other way round."""
    shape = shape[1:] if hugging_face.stacked(path) else shape
    return shape[::-1] if path.endswith("/kernel") else shape


def _check(
    source: Path, config: Config, tensors: dict[str, Tensor], template: Any, places: dict[str, list[str]]
) -> None:
    known = set()
    for key_path, leaf in jax.tree.leaves_with_path(template):
        path = path_name(key_path)
        expected = _shape(path, leaf.shape)
        for name in places[path]:
            if name not in tensors:
                raise ModelError(f"{source}: tensor {name} is missing; the configuration asks for it")
            if tensors[name].shape != expected:
                raise ModelError(f"{tensors[name].place} has shape {tensors[name].shape}, expected {expected}")
            known.add(name)
    for name in tensors.keys() - known:
        if config.tied and name == "lm_head.weight":
            _check_same(tensors[name], tensors["model.embed_tokens.weight"])
        elif not hugging_face.is_buffer(name):
            raise ModelError(f"{tensors[name].place} is unknown: {config.architecture} of {source} has none such")


def _check_same(head: Tensor, table: Tensor) -> None:
    """Some tied models bring their output matrix all the same; it must be the token table."""
    same = head.shape == table.shape and all(
        np.array_equal(head.read((rows, slice(0, head.shape[1]))), table.read((rows, slice(0, head.shape[1]))))
        for rows in _chunks(head.shape)
    )
    if not same:
        raise ModelError(f"{head.place} differs from {table.name}, but the configuration ties them: say which is right")


def _chunks(shape: tuple[int, ...], start: int = 0) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, shape[-1] if len(shape) > 1 else 1))
    for first in range(start, start + shape[0], step):
        yield slice(first, min(first + step, start + shape[0]))


def _part(
    tensors: list[Tensor], path: str, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of a parameter, out of the tensors that hold it."""
    bounds = [slice(*s.indices(size)[:2]) for s, size in zip(index, shape)]
    out = np.empty([s.stop - s.start for s in bounds], dtype)
    layers, inner = (bounds[0], bounds[1:]) if hugging_face.stacked(path) else (slice(0, 1), bounds)
    turned = path.endswith("/kernel")
    theirs = inner[::-1] if turned else inner
    for number, tensor in enumerate(tensors[layers]):
        own = out[number] if hugging_face.stacked(path) else out
        own = own.T if turned else own
        for rows in _chunks(own.shape):
            begin = theirs[0].start
            piece = tensor.read((slice(begin + rows.start, begin + rows.stop), *theirs[1:]))
            with np.errstate(over="ignore"):
                own[rows] = piece
            if not np.isfinite(own[rows]).all():
                raise ModelError(f"{tensor.place}: holds values that are not finite in {dtype}: the model is damaged")
    return out


def save(
    folder: str | Path,
    params: dict[str, Any],
    config: Config,
    *,
    dtype: str = "float32",
    tokenizer: Tokenizer | None = None,
    file_bytes: int = 2 << 30,
) -> None:
    """Writes a folder that `read` and `transformers` load; it appears whole or not at all.

    Args:
      folder: must not be there, or be empty.
      params, config: the model; parameters of every layer, on this process's devices or the host.
      dtype: of the tensors written.
      tokenizer: written beside them, if given.
      file_bytes: most bytes of one safetensors file, and so of what is held on the host at a time.

    Raises:
      ModelError: the folder is taken, or parameters that are not those of `config`.
      rec_core.data.DataError: the disk is full or cannot be written.
    """
    _check_dtype(dtype)
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder}: is there already and not empty: name a new folder")
    template = _template(config)
    _check_params(params, template)
    places = _places(template)
    shapes = {path_name(key_path): leaf.shape for key_path, leaf in jax.tree.leaves_with_path(template)}
    leaves = {path_name(key_path): leaf for key_path, leaf in jax.tree.leaves_with_path(params)}
    tasks = [(name, path, number) for path, names in places.items() for number, name in enumerate(names)]
    width = np.dtype(jnp.dtype(dtype)).itemsize
    files: list[list[tuple[str, str, int]]] = []
    room = 0
    for task in sorted(tasks, key=lambda task: task[2] if hugging_face.stacked(task[1]) else -1):
        size = int(np.prod(_shape(task[1], shapes[task[1]]))) * width
        if size > room or not files:
            files, room = [*files, []], file_bytes
        files[-1].append(task)
        room -= size
    total = sum(int(np.prod(shape)) for shape in shapes.values()) * width
    with creating(folder, lambda: False) as partial, writing(folder, lambda: total):
        weight_map: dict[str, str] = {}
        for number, held in enumerate(files, start=1):
            file = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            arrays = {name: _tensor(leaves[path], path, layer, dtype) for name, path, layer in held}
            safetensors_files.write(partial / file, arrays)
            weight_map |= dict.fromkeys(arrays, file)
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(partial / safetensors_files.INDEX, index)
        write_json(partial / "config.json", hugging_face.config_json(config, dtype))
        if tokenizer is not None:
            tokenizer.save(partial)


def _check_params(params: Any, template: Any) -> None:
    there = {path_name(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
    for key_path, leaf in jax.tree.leaves_with_path(template):
        shape = there.pop(path_name(key_path), "missing")
        if shape != leaf.shape:
            raise ModelError(f"params: {path_name(key_path)} is {shape}, expected {leaf.shape}")
    if there:
        raise ModelError(f"params: {next(iter(there))} is unknown: the configuration has no such parameter")


def _tensor(leaf: Array, path: str, layer: int, dtype: str) -> np.ndarray:
    value = np.asarray(leaf[layer] if hugging_face.stacked(path) else leaf)
    return np.ascontiguousarray((value.T if path.endswith("/kernel") else value).astype(jnp.dtype(dtype)))

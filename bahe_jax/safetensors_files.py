"""Safetensors, in one or several files; the one module that imports the package `safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bahe_jax.files import ModelError, Tensor, inside, parse_json, read_bytes

INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")


def _package() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ModelError("safetensors files need the package safetensors: install the extra [llm]") from error
    return safetensors


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name, none of them read yet.

    With an index the files that it names, else the one safetensors file that is there.

    Raises:
      ModelError: files absent, damaged, cut short or outside of the folder; a tensor that is in two files, or not where
        the index says.
    """
    if not (folder / INDEX).exists():
        return _open(_only_file(folder))
    index = inside(folder, INDEX, f"{folder}")
    told = parse_json(read_bytes(index), f"{index}").get("weight_map")
    if not isinstance(told, dict) or not told:
        raise ModelError(f"{index}: weight_map is {told!r}: it must map tensors to files")
    found: dict[str, Tensor] = {}
    opened = {name: _open(inside(folder, name, f"{index}")) for name in dict.fromkeys(map(_hashable, told.values()))}
    for file, held in opened.items():
        for name, tensor in held.items():
            if name in found:
                raise ModelError(f"{tensor.place} is given twice: {found[name].file} holds it too")
            if told.get(name) != file:
                raise ModelError(f"{tensor.place} is there, but {index} places it in {told.get(name)!r}")
            found[name] = tensor
    for name, file in told.items():
        if name not in found:
            raise ModelError(f"{folder / file}: tensor {name} is missing: {index} places it there")
    return found


def _hashable(name: Any) -> Any:
    return name if isinstance(name, str) else repr(name) + "/"  # which `inside` refuses


def _only_file(folder: Path) -> Path:
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".safetensors"))
    if "model.safetensors" in names or len(names) == 1:
        return inside(folder, "model.safetensors" if "model.safetensors" in names else names[0], f"{folder}")
    if names:
        raise ModelError(f"{folder}: holds {len(names)} safetensors files and no {INDEX}: add the index")
    others = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if others:
        raise ModelError(f"{folder}: holds {sorted(others)[0]}, a pickle, which is never opened: convert it")
    raise ModelError(f"{folder}: holds no safetensors file: complete it, or name a .gguf file itself")


def _open(file: Path) -> dict[str, Tensor]:
    package = _package()
    try:
        handle = package.safe_open(file, framework="numpy")
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (package.SafetensorError, OSError) as error:
        raise ModelError(f"{file}: is no whole safetensors file (damaged or cut short?): {error}") from error
    parse_json(header, f"{file}: header")  # the package lets a name that is given twice pass
    found = {}
    for name, part in slices.items():
        if part.get_dtype() not in FLOATS:
            raise ModelError(f"{file}: tensor {name} is {part.get_dtype()}: supported are {', '.join(FLOATS)}")
        found[name] = Tensor(file, name, tuple(part.get_shape()), part.__getitem__)
    return found


def write(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one file, as `transformers` marks its own."""
    package = _package()
    from safetensors.numpy import save_file

    try:
        save_file(dict(arrays), file, metadata={"format": "pt"})
    except package.SafetensorError as error:
        raise OSError(f"{error}") from error

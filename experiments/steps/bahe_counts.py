"""Floating point operations of BAHE's forward pass as the compiler counts them, beside exact counts and the paper's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np

import bahe_jax
from bahe_jax import cost, lower
from experiments.results import Row

# The paper's data: kinds of behaviour, behaviours of each that 1,024 tokens hold, tokens, distinct texts a sample.
USUAL: dict[str, float] = {"N": 6, "M": 34, "K": 5, "H": 0.2}
VARIED: dict[str, tuple[float, ...]] = {
    "N": (1, 3, 6, 12), "M": (8, 17, 34, 68, 136), "K": (2, 5, 10, 20), "H": (0.05, 0.2, 0.8, 3.2),
}  # fmt: skip


def rows(
    model: bahe_jax.Config, settings: Mapping[str, str], varied: Mapping[str, Sequence[float]] = VARIED
) -> list[Row]:
    """A row for each setting (its label by its name) and each size that is varied alone.

    The compiler's count is of the program as written, with attention over all pairs of a row, masked or not; the exact
    one has those that causal texts have. Both are of a forward pass, a sample, with the table's texts encoded once.

    Args:
      model: its layers, half of them lower. N, M and K are set here.
    """
    found = []
    for setting, label in settings.items():
        for name, values in varied.items():
            for value in values:
                sizes = USUAL | {name: value}
                kinds, most, tokens = (int(sizes[size]) for size in "NMK")
                config = replace(model, sequences=kinds, setting=setting, lower="frozen")
                share = sizes["H"] if config.by_behavior else 0.0
                counted = cost.count(config, behaviors=most, tokens=tokens, distinct=round(1000 * share), samples=1000)
                compiled = _sample(config, most, tokens) + share * _text(config, tokens)
                row: Row = {"what": "complexity", "setting": label, "varied": name, **sizes}
                row |= {"compiler_gflop": compiled / 1e9, "exact_gflop": 2 * counted.total / 1000 / 1e9}
                found.append(row | {"papers_pairs": counted.paper / 1000})
    return found


@cache
def _sample(config: bahe_jax.Config, behaviors: int, tokens: int) -> float:
    """Of one sample; of its upper layers alone where a table can have the lower ones."""
    if config.by_behavior:
        config = replace(config, lower="table")
    held = bahe_jax.Catalogue(np.zeros((1, tokens), np.int32), np.full(1, tokens, np.int32))
    inner = (config.language_model.width,) if config.setting == "ba" else (tokens, config.language_model.width)
    states = np.zeros((1, *inner), np.float32) if config.by_behavior else None
    batch = held.batch(
        np.zeros((1, config.sequences, behaviors), int), np.zeros(1, int), np.zeros(1, np.float32), states=states
    )
    params = jax.eval_shape(lambda: bahe_jax.init(jax.random.key(0), config))
    # In training, where the layers stand one by one: a loop's body is counted once.
    return _flops(lambda params, batch: bahe_jax.apply(params, batch, config, train=True), params, batch)


@cache
def _text(config: bahe_jax.Config, tokens: int) -> float:
    """Of the lower layers on one text, alone in its row."""
    config = replace(config, row=tokens)
    params = jax.eval_shape(lambda: bahe_jax.init(jax.random.key(0), config))
    texts = jax.ShapeDtypeStruct((1, tokens), np.int32), jax.ShapeDtypeStruct((1,), np.int32)
    return _flops(lambda p, tokens, lengths: lower.encode_texts(p, tokens, lengths, config, train=True), params, *texts)


def _flops(function: Callable[..., Any], *arguments: Any) -> float:
    with jax.default_device(jax.devices("cpu")[0]):  # compilers for accelerators do not count a program as written
        counted: Any = jax.jit(function).lower(*arguments).cost_analysis()
    return float(counted["flops"])

"""One training step of each setting of the BAHE model on made-up texts, compiled, with its time and memory."""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

import bahe_jax
from bahe_jax import language_model
from experiments.steps.timing import Program
from rec_core import training
from rec_core.training import TrainConfig
from rec_core.transformer import TransformerConfig

SMOLLM2 = language_model.Config(
    "llama",
    vocabulary=49_152,
    transformer=TransformerConfig(
        width=576, layers=30, heads=9, kv_heads=3, head_width=64, hidden=1536, dtype="bfloat16"
    ),
    tied=True,
)  # the shape of SmolLM2-135M; what is measured does not depend on the weights
TINY = language_model.Config(
    "llama", vocabulary=64, transformer=TransformerConfig(16, 2, 2, 1, 8, 16, dtype="bfloat16"), tied=True
)
TRAIN = TrainConfig(steps=10_000, learning_rate=1e-4, decay="constant")


@dataclass(frozen=True)
class Texts:
    """Samples: N sequences of as many behaviours of K tokens as a text of `length` tokens holds, drawn by Zipf's law.

    Attributes:
      behaviors: H, distinct texts.
    """

    batch: int
    length: int
    sequences: int
    tokens: int
    behaviors: int

    @property
    def most(self) -> int:
        """M."""
        return bahe_jax.behaviors_that_fit(self.length, self.sequences, self.tokens)


@dataclass(frozen=True)
class Measured:
    """A step: milliseconds (median, shortest, longest) and GiB at its peak as compiled."""

    ms: float
    ms_low: float
    ms_high: float
    gib: float


def draw_behaviors(texts: Texts, seed: int = 0) -> tuple[Int[np.ndarray, "B N M"], Int[np.ndarray, " B"]]:
    """Which texts a batch has, and which are its items."""
    chance = 1 / np.arange(1, texts.behaviors + 1)
    shape = (texts.batch, texts.sequences, texts.most)
    draw = np.random.default_rng(seed)
    chosen = draw.choice(texts.behaviors, (int(np.prod(shape)) + texts.batch,), p=chance / chance.sum())
    return chosen[: -texts.batch].reshape(shape), chosen[-texts.batch :]


def make_batch(texts: Texts, config: bahe_jax.Config, seed: int = 0) -> bahe_jax.Batch:
    """A batch on the host, for `config.lower` "table" with vectors in the dtype of the computation."""
    sequences, item = draw_behaviors(texts, seed)
    draw = np.random.default_rng([seed, 1])
    k, vocabulary, shape = texts.tokens, config.language_model.vocabulary, sequences.shape
    held = bahe_jax.Catalogue(
        draw.integers(0, vocabulary, (texts.behaviors, k)).astype(np.int32), np.full(texts.behaviors, k, np.int32)
    )
    batch = held.batch(sequences, item, draw.integers(0, 2, texts.batch).astype(np.float32))
    if config.lower != "table":
        return batch
    inner = (config.language_model.width,) if config.setting == "ba" else (k, config.language_model.width)
    states = draw.standard_normal((*shape, *inner), np.float32).astype(jnp.dtype(config.dtype))
    return batch.replace(tokens=None, item_tokens=None, states=states, item_states=states[:, 0, 0])  # type: ignore[attr-defined]


def lower_step(texts: Texts, config: bahe_jax.Config) -> Any:
    """The training step, lowered."""
    host = make_batch(texts, config)
    bahe_jax.check(host, config)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), host)
    step = jax.jit(partial(training.advance, bahe_jax, config, TRAIN), donate_argnums=0)
    return step.lower(jax.eval_shape(partial(training.init_state, bahe_jax, config, TRAIN)), shapes)


def measure(texts: Texts, config: bahe_jax.Config, program: Program, *, steps: int, repeats: int) -> Measured:
    """Runs the compiled step of `lower_step` `repeats` times `steps` times.

    Raises:
      jax.errors.JaxRuntimeError: it does not fit the device's memory.
    """
    batch = jax.device_put(make_batch(texts, config))
    state = jax.jit(partial(training.init_state, bahe_jax, config, TRAIN))()
    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = program.call(state, batch)
        loss = float(metrics["loss"])
        found.append(1000 * (time.perf_counter() - began) / steps)
    if not np.isfinite(loss):
        raise RuntimeError(f"{config.setting}, lower {config.lower!r}: the loss is {loss}; the times mean nothing")
    ms = found[1:]  # the first round is for caches and clocks
    gib = float(program.counts().get("memory_gib") or 0)
    return Measured(float(np.median(ms)), min(ms), max(ms), gib)


def encoding_speed(
    config: bahe_jax.Config, tokens: int, texts: int, *, rows: int, row_length: int, repeats: int
) -> float:
    """Tokens a second through the lower layers into host memory, packing included: the best of `repeats`."""
    config = replace(config, setting="ba", lower="frozen")
    params = jax.jit(bahe_jax.init, static_argnums=1)(jax.random.key(0), config)
    draw = np.random.default_rng(0)
    made = list(draw.integers(0, config.language_model.vocabulary, (texts, tokens)).astype(np.int32))
    run = partial(bahe_jax.encode.encode_tokens, params=params, config=config, rows=rows, row_length=row_length)
    run(made[: rows * row_length // tokens])
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run(made)
        seconds.append(time.perf_counter() - began)
    return texts * tokens / min(seconds)

"""Training BAHE's four settings on texts that lie on the device, scoring them, and their answers for a ranker.

Tokens of every item, the table of the frozen lower layers and every sample's sequences are on the device; a batch is
made there from sample numbers, and a stretch of steps is one call, so that the host adds nothing to the time.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

import bahe_jax
from bahe_jax import encode, language_model
from bahe_jax.export import export
from bahe_jax.table import open_table
from experiments.steps.bahe_text_data import TextProblem, sequences_of
from experiments.steps.runs import order
from rec_core import training
from rec_core.data import pipeline

CALL = 25  # steps of one call


@dataclass(frozen=True, eq=False)
class Language:
    """A language model with its tokenizer."""

    params: dict[str, Any]
    config: language_model.Config
    tokenizer: encode.Tokens

    def weights(self, pretrained: bool, seed: int) -> dict[str, Any]:
        """The model's parameters, or random ones of its shape."""
        return self.params if pretrained else random_weights(self.config, seed)


def random_weights(config: language_model.Config, seed: int) -> dict[str, Any]:
    """Parameters of a language model that has learned nothing."""
    return _random(jax.random.key(seed), config)


@dataclass(frozen=True)
class Words:
    """A toy tokenizer for small runs: a token a word, by its checksum; 0 is the end of text."""

    vocabulary: int

    def encode(self, texts: Sequence[str], limit: int) -> list[Int[np.ndarray, " _"]]:
        """As `bahe_jax.Tokenizer.encode`."""
        words = [text.split()[:limit] for text in texts]
        found = [[1 + zlib.crc32(word.encode()) % (self.vocabulary - 1) for word in text] for text in words]
        return [np.array(text or [0], np.int32) for text in found]

    def identity(self) -> str:
        """All that its ids depend on."""
        return f"words, {self.vocabulary}"


@struct.dataclass
class OnDevice:
    """H texts and n samples. `states`: the table, for settings that read one."""

    tokens: Int[Array, "H K"]
    lengths: Int[Array, " H"]
    sequences: Int[Array, "n N M"]  # rows of the texts, -1 for none
    item: Int[Array, " n"]
    label: Float[Array, " n"]
    states: Float[Array, "H *s"] | None = None


def put(texts: TextProblem, length: int, states: Array | None) -> OnDevice:
    """The samples with texts of `length` tokens."""
    samples = texts.problem.samples
    return OnDevice(
        tokens=jnp.asarray(texts.catalogue.tokens),
        lengths=jnp.asarray(texts.catalogue.lengths),
        sequences=jnp.asarray(sequences_of(texts, length)),
        item=jnp.asarray(samples.item, jnp.int32),
        label=jnp.asarray(samples.label, jnp.float32),
        states=states,
    )


def table(
    texts: TextProblem, language: Language, weights: dict[str, Any], config: bahe_jax.Config, *, rows: int, limit: int
) -> Float[Array, "H *s"]:
    """What the frozen lower layers make of every text, once; on the device, in the dtype of the computation.

    Args:
      rows: packed rows that are encoded at a time. limit: most tokens of a text.
    """
    settings = replace(config, lower="frozen")
    lower = language_model.cut(weights, 0, settings.lower_layers)["decoder"]["layers"]
    params = {"tables": {"token": weights["tables"]["token"]}, "net": {"lower": lower}}
    version = encode.version(params, settings, language.tokenizer, limit)
    states_of: dict[str, Any] = {
        "width": config.language_model.width,
        "tokens": limit if config.setting == "abe" else 0,
    }
    with open_table("memory:", version=version, dtype=config.dtype, **states_of) as found:
        encode.encode(
            texts.texts, language.tokenizer, params, settings, found, limit=limit, rows=rows, row_length=max(limit, 512)
        )
        states, _ = found.rows(texts.texts)
    longest = texts.catalogue.tokens.shape[1]
    return jnp.asarray(states[:, :longest] if config.setting == "abe" else states)


def make_batch(device: OnDevice, index: Int[Array, " B"]) -> bahe_jax.Batch:
    """The samples at `index`, on the device."""
    sequences, item = device.sequences[index], device.item[index]
    row = jnp.maximum(sequences, 0)
    batch = bahe_jax.Batch(
        lengths=jnp.where(sequences < 0, 0, device.lengths[row]),
        item_length=device.lengths[item],
        label=device.label[index],
        weight=jnp.ones(index.shape, jnp.float32),
        ids=row,
        item=item,
        tokens=device.tokens[row] if device.states is None else None,
        item_tokens=device.tokens[item] if device.states is None else None,
    )
    return batch if device.states is None else bahe_jax.with_states(batch, device.states)


def train(
    device: OnDevice,
    index: Int[np.ndarray, " n"],
    weights: dict[str, Any],
    config: bahe_jax.Config,
    settings: training.TrainConfig,
    *,
    batch_size: int,
    seed: int,
    on_call: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> tuple[Any, Float[np.ndarray, " steps"]]:
    """Parameters after `settings.steps` steps, and their losses.

    Args:
      index: the training samples, in an order of the seed's own, again and again.
      weights: of the language model; they are cut by `config`.
      on_call: is told the step, how many steps were made since the last call, and their mean loss.

    Raises:
      DivergedError: a loss or gradient was not finite.
    """
    rows = order(index, settings.steps, batch_size, seed)
    bahe_jax.check(jax.device_get(_batch(device, jnp.asarray(rows[0]))), config)
    state = _begin(weights, jnp.uint32(seed), config=config, settings=settings)
    losses = []
    for first in range(0, settings.steps, CALL):
        state, (found, norms) = _advance(
            state, device, jnp.asarray(rows[first : first + CALL]), config=config, settings=settings
        )
        losses.append(np.asarray(found))
        wrong = int(state.diverged)
        if wrong >= 0:
            raise training.DivergedError(wrong, float(losses[-1][-1]), float(norms[-1]), None)
        on_call(first + len(found), len(found), float(losses[-1].mean()))
    return state.params, np.concatenate(losses)


def scores(
    device: OnDevice, params: Any, index: Int[np.ndarray, " n"], config: bahe_jax.Config, *, batch_size: int
) -> Float[np.ndarray, " n"]:
    """Logits of the samples at `index`."""
    parts = []
    for place, weight in pipeline.evaluation_batches(len(index), min(batch_size, len(index))):
        found = _scores(params, device, jnp.asarray(index[place], jnp.int32), config=config)
        parts.append(np.asarray(found)[weight > 0])
    return np.concatenate(parts)


def answers(
    device: OnDevice,
    params: Any,
    texts: TextProblem,
    index: Int[np.ndarray, " n"],
    config: bahe_jax.Config,
    *,
    batch_size: int,
) -> Float[np.ndarray, "samples d"]:
    """`[Q_u, Q_i]` of the samples at `index`, zeros for others: dense features of a downstream ranker.

    Q_u is made once for each user and moment, from behaviours strictly older; Q_i once an item.
    """

    def of(what: str, ids: np.ndarray) -> np.ndarray:
        named, first = np.unique(ids, return_index=True)
        batches = (
            (named[place], _batch(device, jnp.asarray(index[first[place]], jnp.int32)))
            for place, _ in pipeline.evaluation_batches(len(named), min(batch_size, len(named)))
        )
        return export(params, config, batches, of=what).of(ids)

    both = [of("user", texts.moment[index]), of("item", texts.problem.samples.item[index])]
    found = np.concatenate(both, axis=1)
    out = np.zeros((len(texts.moment), found.shape[1]), np.float32)
    out[index] = found
    return out


_batch = jax.jit(make_batch)
_random = jax.jit(language_model.init, static_argnums=1)


@partial(jax.jit, static_argnames=("config", "settings"))
def _begin(
    weights: dict[str, Any], seed: Array, *, config: bahe_jax.Config, settings: training.TrainConfig
) -> training.State:
    # A copy: steps donate their state, and the language model is read again for the next seed.
    weights = jax.tree.map(jnp.copy, weights)
    params = bahe_jax.from_language_model(training.step_key(seed, 2**32 - 1), weights, config)
    return training.init_state(bahe_jax, config, settings, params, seed=seed)


@partial(jax.jit, static_argnames=("config", "settings"), donate_argnums=0)
def _advance(
    state: Any, device: OnDevice, rows: Int[Array, "steps B"], *, config: Any, settings: training.TrainConfig
) -> Any:
    def step(state: Any, rows: Array) -> Any:
        state, found = training.advance(bahe_jax, config, settings, state, make_batch(device, rows))
        return state, (found["loss"], found["gradient_norm"])

    return jax.lax.scan(step, state, rows)


@partial(jax.jit, static_argnames="config")
def _scores(params: Any, device: OnDevice, index: Array, *, config: bahe_jax.Config) -> Array:
    return bahe_jax.apply(params, make_batch(device, index), config)

"""A language model of two layers, a catalogue of short texts, and what the tests of the BAHE model ask of them."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np

from bahe_jax import Config, catalogue, language_model, model
from rec_core.transformer import TransformerConfig

DECODER = TransformerConfig(width=16, layers=2, heads=2, kv_heads=1, head_width=8, hidden=16)
LM = language_model.Config("llama", vocabulary=32, transformer=DECODER, tied=True)
N, M, K, SIZE = 2, 3, 3, 4
BASE = Config(LM, sequences=N, split=1, lower="frozen", reduced=4, hidden=(8,), row=9, chunk=64)
KEY = jax.random.key(3)
same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


@functools.cache
def language():
    return jax.jit(language_model.init, static_argnums=1)(jax.random.key(0), LM)


@functools.cache
def known(config):
    return jax.jit(model.from_language_model, static_argnums=2)(KEY, language(), config)


def params_of(config):
    """A copy that a test may change; `vectors` reads no head, so all settings share parameters."""
    how = {name: getattr(config, name) for name in ("split", "lower", "upper", "lora", "pooling")}
    return jax.tree.map(lambda x: x, known(dataclasses.replace(BASE, **how)))


def settings(name, **changes):
    return dataclasses.replace(BASE, setting=name, **changes)


run = jax.jit(model.vectors, static_argnums=2)


def vectors(config, batch, params=None):
    """Q_u and Q_i on the host."""
    model.check(batch, config)
    return jax.device_get(run(params_of(config) if params is None else params, batch, config))


@functools.cache
def case():
    """A catalogue of 12 texts, and samples with holes, an empty sequence and a sample without behaviours."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 32, 1 + n % K).astype(np.int32) for n in range(12)]
    sequences = draw.integers(0, 12, (SIZE, N, M))
    sequences[0, 0, 1] = sequences[1, 1] = sequences[2, 0, 0] = sequences[3] = -1
    item = draw.integers(0, 12, SIZE)
    batch = catalogue(texts).batch(sequences, item, np.array([0, 1, 1, 0]), np.ones(SIZE))
    return SimpleNamespace(texts=texts, sequences=sequences, item=item, batch=batch)

"""The golden language models, read once."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bahe_jax import language_model, read
from bahe_jax.texts import Batch

GOLDEN = Path(__file__).parent / "golden"
apply = jax.jit(language_model.apply, static_argnums=2)


@functools.cache
def load(name):
    path = GOLDEN / name if name != "gguf" else GOLDEN / "gguf" / "llama.gguf"
    params, config = read(path)
    stored = dict(np.load(GOLDEN / f"{name}.npz"))
    tokens = jnp.asarray(stored["tokens"], jnp.int32)
    positions = jnp.broadcast_to(jnp.asarray(stored["positions"], jnp.int32), tokens.shape)
    batch = Batch(tokens, jnp.ones_like(tokens), positions)
    return SimpleNamespace(path=path, params=params, config=config, stored=stored, batch=batch, apply=apply)


@pytest.fixture(scope="session")
def golden():
    """`golden(name)`: path, params, config, batch and what was stored, of llama, qwen2, qwen3 or gguf."""
    return load

"""A small ranking model of ADS, a batch of it, and the same as requests."""

import functools
from dataclasses import replace

import jax
import numpy as np

import ads_jax

CONFIG, BATCH = ads_jax.example(batch_size=6, seed=3)
BATCH.mask[0] = False  # a new user
apply = jax.jit(ads_jax.apply, static_argnames=("config", "train"))
score = jax.jit(ads_jax.score, static_argnames=("config", "chunk"))


@functools.cache
def drawn(config, seed=1):
    """Parameters of which none is zero; nothing is compiled."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(ads_jax.init, config=config), jax.random.key(0))
    return jax.tree.map(lambda x: 0.5 * draw.normal(size=x.shape).astype(np.float32), shapes)


def asked(**context):
    """BATCH as requests of three candidates; label and weight are not read."""
    draw = np.random.default_rng(0)
    target = {"item": draw.integers(2, 32, (6, 3)).astype(np.int32)}
    return replace(BATCH, target=target, context={**BATCH.context, **context})

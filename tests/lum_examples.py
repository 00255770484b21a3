"""Small LUM configurations and packed rows that several test files share."""

import jax
import numpy as np

import lum_jax
from rec_core.embedding import Categorical

# Jitted: eager dispatch would compile every operation by itself.
init = jax.jit(lum_jax.init, static_argnums=1)
apply = jax.jit(lum_jax.apply, static_argnums=2)
loss = jax.jit(lum_jax.loss, static_argnums=2)
objective = jax.jit(lum_jax.objective, static_argnums=3)
query = jax.jit(lum_jax.query, static_argnums=3)
prefill = jax.jit(lum_jax.prefill, static_argnums=2, static_argnames="capacity")
extend = jax.jit(lum_jax.extend, static_argnums=3)
ask = jax.jit(lum_jax.ask, static_argnums=3)


def tiny(**changes) -> lum_jax.Config:
    return lum_jax.Config(
        **{
            "item": (Categorical("item", 30, 8),),
            "condition": (Categorical("category", 6, 4), Categorical("domain", 4, 4)),
            "transformer": lum_jax.encoder("6k"),
            **changes,
        }
    )


def packed(rows: list[list[list[int]]], length: int, content: int = 0, seed: int = 0) -> lum_jax.Batch:
    """Rows of users of item ids; conditions follow from the items."""
    shape = (len(rows), length)
    item, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    for r, users in enumerate(rows):
        place = 0
        for number, items in enumerate(users, start=1):
            part = slice(place, place + len(items))
            item[r, part], segments[r, part], positions[r, part] = items, number, np.arange(len(items))
            place += len(items)
    vectors = np.random.default_rng(seed).standard_normal((30, content)).astype(np.float32) if content else None
    return lum_jax.Batch(
        item={"item": item},
        condition={"category": (1 + item % 5) * (segments > 0), "domain": (1 + item % 3) * (segments > 0)},
        segment_ids=segments,
        positions=positions,
        content=None if vectors is None else vectors[item],
    )

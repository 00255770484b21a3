"""The click model's example: with domains, with parameters of which none is zero, and as requests."""

import dataclasses
import functools

import jax
import numpy as np

from rec_core.embedding import Categorical, Continuous
from rec_core.ranking import ctr

CONFIG, BATCH = ctr.example()
PLAIN = dataclasses.replace(CONFIG, interest="average", interest_options=())
DOMAINS = dataclasses.replace(
    PLAIN,
    domain_features=(Categorical("scenario", 3, 4), Continuous("active_days", (1.0, 7.0), 4)),
    domain_field="scenario",
    domains=3,
)
WHERE = {"scenario": np.arange(8, dtype=np.int32) % 3, "active_days": np.linspace(0, 9, 8, dtype=np.float32)}
PLACED = dataclasses.replace(BATCH, context={**BATCH.context, **WHERE})


@functools.cache
def random_params(config, seed=1):
    """Parameters of which none is zero, so that a test sees every one of them; nothing is compiled."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: ctr.init(jax.random.key(0), config)))
    draw = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [0.3 * draw.normal(size=x.shape).astype(np.float32) for x in leaves])


PARAMS = random_params(CONFIG)


def request(batch, candidates, **context):
    draw = np.random.default_rng(1)
    target = {name: draw.integers(2, 30, (8, candidates)).astype(np.int32) for name in batch.target}
    return dataclasses.replace(batch, target=target, context={**batch.context, **context})

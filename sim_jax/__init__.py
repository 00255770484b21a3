"""SIM: search-based interest models over a lifetime of behaviours (arXiv 2006.05639); `dcaf` gives each request the
compute that it is worth (arXiv 2006.09684).

`init`, `apply`, `loss` and `score` are the model's (`model.py`), from `search.py` (general search unit) and `exact.py`
(exact search unit). `tree.py` is the user behaviour tree.
"""

from sim_jax.batch import Batch, Request, check, example
from sim_jax.config import Config
from sim_jax.model import Output, apply, find, init, loss, objective, score, touched

__all__ = [
    "Batch",
    "Config",
    "Output",
    "Request",
    "apply",
    "check",
    "example",
    "find",
    "init",
    "loss",
    "objective",
    "score",
    "touched",
]

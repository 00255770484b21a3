"""LUM: large user model, three steps (arXiv 2502.08309).

Step 1, knowledge construction: `Config`, `init`, `apply`, `objective`, `loss` (`model.py`).
Step 2, knowledge querying: `query` (packed rows), `prefill`, `extend`, `ask` (cached prefix), `knowledge.py` (store).
Step 3, knowledge utilization: `utilization.py` (ranking), `two_tower.py` (retrieval).
"""

from lum_jax.batch import Batch as Batch
from lum_jax.batch import Queries as Queries
from lum_jax.cache import Cache as Cache
from lum_jax.cache import ask as ask
from lum_jax.cache import extend as extend
from lum_jax.cache import prefill as prefill
from lum_jax.config import SIZES as SIZES
from lum_jax.config import Config as Config
from lum_jax.config import encoder as encoder
from lum_jax.model import apply as apply
from lum_jax.model import check as check
from lum_jax.model import example as example
from lum_jax.model import init as init
from lum_jax.model import item_embeddings as item_embeddings
from lum_jax.model import loss as loss
from lum_jax.model import objective as objective
from lum_jax.model import touched as touched
from lum_jax.query import query as query

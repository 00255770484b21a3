"""BAHE: behaviour aggregated hierarchical encoding (arXiv 2403.19347).

Language models: `read`, `save`, `read_config` (`reader.py`), `read_tokenizer` (`tokenizer.py`), `pack_texts`
(`texts.py`), and the model in parts that run apart (`language_model.py`).

The model: `Config`, `init`, `apply`, `loss` and the rest of its face (`model.py`) in four settings, from LLM-CTR to
BAHE; `catalogue` and `newest` make its batches (`batch.py`), and `trainable` says what training moves.
`table.open_table` opens the table of behaviour vectors, `encode.encode` fills it, `export.export` gives a downstream
ranker Q_u and Q_i, and `cost.count` counts multiply-adds.
"""

from bahe_jax import cost as cost
from bahe_jax import encode as encode
from bahe_jax import export as export
from bahe_jax import language_model as language_model
from bahe_jax import table as table
from bahe_jax.batch import Batch as Batch
from bahe_jax.batch import Catalogue as Catalogue
from bahe_jax.batch import behaviors_that_fit as behaviors_that_fit
from bahe_jax.batch import catalogue as catalogue
from bahe_jax.batch import check as check
from bahe_jax.batch import example as example
from bahe_jax.batch import newest as newest
from bahe_jax.batch import with_states as with_states
from bahe_jax.config import Config as Config
from bahe_jax.config import Lora as Lora
from bahe_jax.files import ModelError as ModelError
from bahe_jax.model import apply as apply
from bahe_jax.model import from_language_model as from_language_model
from bahe_jax.model import init as init
from bahe_jax.model import loss as loss
from bahe_jax.model import merge_lora as merge_lora
from bahe_jax.model import objective as objective
from bahe_jax.model import touched as touched
from bahe_jax.model import trainable as trainable
from bahe_jax.model import vectors as vectors
from bahe_jax.model import without_lower as without_lower
from bahe_jax.reader import read as read
from bahe_jax.reader import read_config as read_config
from bahe_jax.reader import save as save
from bahe_jax.texts import pack_texts as pack_texts
from bahe_jax.tokenizer import Tokenizer as Tokenizer
from bahe_jax.tokenizer import read_tokenizer as read_tokenizer

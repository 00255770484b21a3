"""BAHE: behaviour aggregated hierarchical encoding (arXiv 2403.19347).

Language models: `read`, `save`, `read_config` (`reader.py`), `read_tokenizer` (`tokenizer.py`), `pack_texts`
(`texts.py`), and the model in parts that run apart (`language_model.py`).
"""

from bahe_jax import language_model as language_model
from bahe_jax.files import ModelError as ModelError
from bahe_jax.reader import read as read
from bahe_jax.reader import read_config as read_config
from bahe_jax.reader import save as save
from bahe_jax.texts import pack_texts as pack_texts
from bahe_jax.tokenizer import Tokenizer as Tokenizer
from bahe_jax.tokenizer import read_tokenizer as read_tokenizer

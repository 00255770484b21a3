"""Multiply-adds of a forward pass in the four settings, and the paper's formulas beside them.

Counted are the matrix products of the layers, the pairs of attention that a causal text has, F_d and the click head;
not counted are norms, rotations, softmax and pooling, which are some percent. A step of training costs three forward
passes of what is trained, two of frozen layers that gradients pass through, one of those that they do not reach.
"""

from dataclasses import dataclass
from itertools import pairwise

from bahe_jax.config import Config


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of `samples` samples; exact integers. One is two floating point operations.

    Attributes:
      lower_linear, lower_attention: lower layers; with "abe" and "ba" of the distinct behaviours, once.
      upper_linear, upper_attention: upper layers.
      head: F_d and the click head.
      paper: the paper's formula, attention alone and in its own unit (pairs of tokens, summed over layers).
    """

    lower_linear: int
    lower_attention: int
    upper_linear: int
    upper_attention: int
    head: int
    paper: int

    @property
    def total(self) -> int:
        """All multiply-adds."""
        return self.lower_linear + self.lower_attention + self.upper_linear + self.upper_attention + self.head


def count(config: Config, *, behaviors: int, tokens: int, distinct: int = 0, samples: int = 1) -> Cost:
    """Counts for samples of N sequences of M behaviours of K tokens, and an item of K tokens.

    Args:
      behaviors: M. tokens: K.
      distinct: H, texts that the lower layers encode for all of the samples, with "abe" and "ba"; 0 where a table has
        them all.
      samples: S.
    """
    n, m, k, layers = config.sequences, behaviors, tokens, config.language_model.transformer.layers
    low = config.lower_layers
    high = layers - low
    if config.setting == "llm_ctr":
        texts, paper = [n * m * k + k], layers * (n * m * k) ** 2
    elif config.setting == "fp":
        texts, paper = [*[m * k] * n, k], layers * n * (m * k) ** 2
    elif config.setting == "abe":
        texts, paper = [*[m * k] * n, k], high * n * (m * k) ** 2
    else:
        texts, paper = [*[m] * n, 1], high * n * m**2
    slots, pairs = sum(texts), sum(t * (t + 1) // 2 for t in texts)
    if config.by_behavior:
        lower = distinct * k, distinct * k * (k + 1) // 2
        paper = samples * paper + low * distinct * k**2
    else:
        lower, paper = (samples * slots, samples * pairs), samples * paper
    decoder = config.language_model.transformer
    a_pair = 2 * decoder.heads * decoder.head_width  # query by key, and weight by value
    return Cost(
        lower_linear=low * lower[0] * _token(config, config.lower),
        lower_attention=low * lower[1] * a_pair,
        upper_linear=high * samples * slots * _token(config, config.upper),
        upper_attention=high * samples * pairs * a_pair,
        head=samples * _head(config),
        paper=paper,
    )


def _token(config: Config, how: str) -> int:
    """Weights of a layer's matrices: each is one multiply-add a token."""
    decoder = config.language_model.transformer
    width, query, key = decoder.width, decoder.heads * decoder.head_width, decoder.kv_heads * decoder.head_width
    shapes = {"query": (width, query), "key": (width, key), "value": (width, key), "output": (query, width)}
    shapes |= {"gate": (width, decoder.hidden), "up": (width, decoder.hidden), "down": (decoder.hidden, width)}
    extra = sum(config.lora.rank * sum(shapes[name]) for name in config.lora.projections) if how == "lora" else 0
    return sum(a * b for a, b in shapes.values()) + extra


def _head(config: Config) -> int:
    widths = [config.parts * config.reduced + config.dense_width * bool(config.dense), *config.hidden, 1]
    head = sum(a * b for a, b in pairwise(widths)) + config.dense * config.dense_width
    return config.parts * config.language_model.width * config.reduced + head

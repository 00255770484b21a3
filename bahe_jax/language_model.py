"""A causal language model of the Llama family, in parts that run apart.

BAHE (arXiv 2403.19347) cuts a language model: the lower layers encode each behaviour, the upper layers relate the
vectors. So the model is `embed`, `layers` (whatever `cut` left), `normalize` and `logits`, and `apply` is all of them.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bahe_jax.texts import Batch
from rec_core import losses
from rec_core.attention import check_segments, ranges_from_segments
from rec_core.embedding import lookup
from rec_core.sharding import constrain
from rec_core.transformer import RMSNorm, Transformer, TransformerConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class Config:
    """Shape and numerics of a language model.

    Attributes:
      architecture: "llama", "qwen2" (biases on query, key and value) or "qwen3" (norms on query and key).
      vocabulary: rows of the token table.
      transformer: the decoder.
      tied: the token table is the output matrix too.
      context: most positions that the model was trained on; longer texts run, and are the caller's risk.
      bos, eos: ids of the tokens that begin and may end a text, where the model names them.
    """

    architecture: str
    vocabulary: int
    transformer: TransformerConfig
    tied: bool = False
    context: int = 2048
    bos: int | None = None
    eos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture={self.architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
        if self.vocabulary < 1 or self.context < 1:
            raise ValueError(f"vocabulary={self.vocabulary}, context={self.context}: both must be at least 1")
        traits = (self.transformer.qkv_bias, self.transformer.qk_norm)
        if traits != (self.architecture == "qwen2", self.architecture == "qwen3"):
            raise ValueError(
                f"architecture={self.architecture!r} with transformer.qkv_bias={traits[0]}, qk_norm={traits[1]}: "
                "qkv_bias is Qwen2's, qk_norm is Qwen3's, and Llama has neither"
            )
        for token in (*(() if self.bos is None else (self.bos,)), *self.eos):
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"bos={self.bos}, eos={self.eos}: must be below vocabulary={self.vocabulary}")

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.transformer.width

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.transformer.parameters + self.vocabulary * self.width * (1 if self.tied else 2)

    def running(self, **numerics: Any) -> "Config":
        """With other `dtype`, `remat`, `attention` or `dropout` of the decoder: how it runs, not what it is."""
        unknown = set(numerics) - {"dtype", "remat", "attention", "dropout"}
        if unknown:
            raise ValueError(f"{sorted(unknown)} is part of the model; running takes dtype, remat, attention, dropout")
        return dataclasses.replace(self, transformer=dataclasses.replace(self.transformer, **numerics))


def init(key: PRNGKeyArray, config: Config) -> dict:
    """Random parameters, float32.

    `{"tables": {"token": [vocabulary, width]}, "decoder": {"layers": stacked, "final_norm": ...}}`, and `output` beside
    `token` where it is not tied. Tables are normal with deviation .02, as their authors begin.
    """
    token_key, output_key, decoder_key = jax.random.split(key, 3)
    shape, index = (config.vocabulary, config.width), jnp.zeros((1, 1), jnp.int32)
    tables = {"token": 0.02 * jax.random.normal(token_key, shape)}
    if not config.tied:
        tables["output"] = 0.02 * jax.random.normal(output_key, shape)
    decoder = Transformer(config.transformer).init(
        decoder_key, jnp.zeros((1, 1, config.width)), index, index, index
    )  # fmt: skip
    return {"tables": tables, "decoder": decoder["params"]}


def check(batch: Batch, config: Config) -> None:
    """Raises ValueError naming field, row and value for a batch that would run and mean nothing. Host side."""
    tokens = np.asarray(batch.tokens)
    for name in ("tokens", "segment_ids", "positions"):
        array = np.asarray(getattr(batch, name))
        if tokens.ndim != 2 or array.shape != tokens.shape or array.dtype.kind not in "iu":
            raise ValueError(f"Batch.{name} is {array.dtype}{array.shape}: all three must be integers [rows, tokens]")
    for name, most in (("tokens", config.vocabulary), ("positions", 2**31)):
        array = np.asarray(getattr(batch, name))
        wrong = np.argwhere((array < 0) | (array >= most))
        if len(wrong):
            row, column = wrong[0]
            raise ValueError(f"Batch.{name}[{row}, {column}] is {array[row, column]}: must be from 0 to {most - 1}")
    check_segments(np.asarray(batch.segment_ids))


def cut(params: dict, start: int, stop: int | None = None) -> dict:
    """The same parameters with the layers [start, stop) only.

    Gradients of the whole flow through it; taken once, outside of a step, it parts what is trained from what is frozen.

    Raises:
      ValueError: a range outside of the layers that there are.
    """
    decoder = params["decoder"]
    count = _count(params)
    stop = count if stop is None else stop
    if not 0 <= start <= stop <= count:
        raise ValueError(f"layers [{start}, {stop}) of {count}: need 0 <= start <= stop <= {count}")
    part = jax.tree.map(lambda x: x[start:stop], decoder["layers"])
    return {**params, "decoder": {**decoder, "layers": part}}


def _count(params: Mapping[str, Any]) -> int:
    return jax.tree.leaves(params["decoder"]["layers"])[0].shape[0]


def embed(params: Mapping[str, Any], tokens: Int[Array, "B T"], config: Config) -> Float[Array, "B T width"]:
    """Token vectors, in the compute dtype."""
    return constrain(lookup(params["tables"]["token"], tokens).astype(config.transformer.dtype))


def layers(
    params: Mapping[str, Any],
    x: Float[Array, "B T width"],
    positions: Int[Array, "B T"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
) -> Float[Array, "B T width"]:
    """Runs vectors through the layers that `params` holds (see `cut`), without the final norm.

    Args:
      params: from `init`, `reader.read` or `cut`.
      x: vectors, of tokens or of behaviours.
      positions: rotary position of each, from 0 in each text.
      k_start, k_end: what each sees besides itself; for packed rows `rec_core.attention.ranges_from_segments` makes
        them.
      config: settings of the whole model.
      key: for dropout; needed where `train` and the decoder has dropout.
      train: whether dropout is on.

    Returns:
      Hidden states in the compute dtype. Layers [0, i) and then [i, L) give what [0, L) gives.
    """
    count = _count(params)
    if count == 0:
        return x.astype(config.transformer.dtype)
    decoder = Transformer(dataclasses.replace(config.transformer, layers=count), final_norm=False)
    rngs = None if key is None else {"dropout": key}
    out: Any = decoder.apply(
        {"params": {"layers": params["decoder"]["layers"]}},
        x,
        positions,
        k_start,
        k_end,
        deterministic=not train,
        rngs=rngs,
    )
    return out


def hidden(
    params: dict, batch: Batch, config: Config, *, key: PRNGKeyArray | None = None, train: bool = False
) -> Float[Array, "B T width"]:
    """`embed` and `layers` over packed texts: each token sees its text up to itself. Padding rows hold no meaning."""
    k_start, k_end = ranges_from_segments(batch.segment_ids)
    x = embed(params, batch.tokens, config)
    return layers(params, x, batch.positions, k_start, k_end, config, key=key, train=train)


def normalize(params: Mapping[str, Any], x: Float[Array, "*b width"], config: Config) -> Float[Array, "*b width"]:
    """The final norm."""
    norm = RMSNorm(epsilon=config.transformer.norm_eps, dtype=config.transformer.dtype)
    out: Any = norm.apply({"params": params["decoder"]["final_norm"]}, x)
    return out


def logits(params: dict, x: Float[Array, "*b width"], config: Config) -> Float[Array, "*b vocabulary"]:
    """Final norm and output matrix; float32."""
    table = params["tables"]["token" if config.tied else "output"].astype(config.transformer.dtype)
    return jnp.einsum("...d,vd->...v", normalize(params, x, config), table, preferred_element_type=jnp.float32)


def apply(
    params: dict, batch: Batch, config: Config, *, key: PRNGKeyArray | None = None, train: bool = False
) -> Float[Array, "B T vocabulary"]:
    """Logits of the next token at every token of packed texts, float32."""
    return logits(params, hidden(params, batch, config, key=key, train=train), config)


def loss(
    params: dict,
    batch: Batch,
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = True,
    axis_name: str | None = None,
) -> tuple[Array, dict]:
    """Mean negative log-likelihood, in nats, of each token after the first of its text.

    Logits are made a row at a time, so that memory holds one row's.

    Returns:
      The loss and `{"loss": (sum, weight)}`.
    """
    states = hidden(params, batch, config, key=key, train=train)
    following = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] > 0)

    def of_row(row: tuple[Array, Array]) -> Array:
        states, targets = row
        scores = logits(params, states, config)
        return jax.nn.logsumexp(scores, axis=-1) - jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]

    each = jax.lax.map(jax.checkpoint(of_row), (states[:, :-1], batch.tokens[:, 1:]))
    total, weight = losses.sum_over(axis_name, (jnp.sum(jnp.where(following, each, 0.0)), jnp.sum(following * 1.0)))
    return losses.mean(total, weight), {"loss": (total, weight)}

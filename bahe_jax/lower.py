"""ABE's lower layers: each distinct behaviour alone, once (arXiv 2403.19347, atomic behaviour encoding).

`E[a] = F_p(LLM_low(a))`. Behaviours are short, so several lie in a row, each a segment that sees nothing else.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bahe_jax import language_model, lora
from bahe_jax.config import Config
from bahe_jax.pooling import pool
from bahe_jax.texts import Batch as Rows
from rec_core.attention import ranges_from_segments

_NONE = 2**31 - 1  # the id of no behaviour: sorts behind all others


def run_layers(
    params: Mapping[str, Any],
    part: str,
    x: Float[Array, "R T d"],
    positions: Int[Array, "R T"],
    ranges: tuple[Int[Array, "R T"], Int[Array, "R T"]],
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
) -> Float[Array, "R T d"]:
    """Runs vectors through the layers of `part`, "lower" or "upper", with what LoRA adds to them."""
    net = params["net"]
    additions = net.get("lora", {}).get(part, {})
    layers = {"decoder": {"layers": lora.join(net[part], additions)}}
    with lora.added(config.lora):
        return language_model.layers(
            layers, x, positions, *ranges, config.language_model, key=key, train=train
        )  # fmt: skip


def encode_rows(
    params: Mapping[str, Any],
    rows: Rows,
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
) -> Float[Array, "R T d"]:
    """States of packed texts behind the lower layers; padding holds no meaning."""
    x = language_model.embed(params, rows.tokens, config.language_model)
    ranges = ranges_from_segments(rows.segment_ids)
    return run_layers(params, "lower", x, rows.positions, ranges, config, key=key, train=train)


def query(params: Mapping[str, Any], part: str) -> Float[Array, " d"] | None:
    """The learned query of "attention" pooling."""
    pools = params["net"].get("pool")
    return None if pools is None else pools[part]


def pool_texts(
    params: Mapping[str, Any], states: Float[Array, "n T d"], mask: Bool[Array, "n P T"], config: Config
) -> Float[Array, "n P d"]:
    """F_p of the lower layers' states, over all tokens of a text but its first, where it has more.

    Pre-trained decoders keep a sink for attention at the first token: its state is nearly the same for every text, and
    behind half of SmolLM2-135M's layers 150 times as long as others. With it all texts have nearly one mean.
    """
    if config.lower_layers:
        first = jnp.argmax(mask, axis=-1, keepdims=True)
        mask &= (jnp.arange(mask.shape[-1]) != first) | (jnp.sum(mask, axis=-1, keepdims=True) == 1)
    return pool(states, mask, config.pooling, query(params, "lower"))


def encode_texts(
    params: Mapping[str, Any],
    tokens: Int[Array, "n K"],
    lengths: Int[Array, " n"],
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
) -> Float[Array, "n S d"]:
    """What the upper layers read of each text: its vector (S = 1, "ba") or its tokens' states (S = K, "abe").

    Zeros behind the text and for one of length 0. Texts lie in rows of up to `Config.row` slots, K slots each.
    """
    n, k = tokens.shape
    # A multiple of 8 slots where it fits: attention would copy rows of other lengths to such, in every layer.
    eights = 8 // math.gcd(8, k)
    a_row = max(1, config.row // k // eights * eights or config.row // k)
    rows = -(-n // a_row)
    rows += -rows % _data_axis()
    # Places that are left over hold the first texts again: a token of the batch, so one that was gathered.
    place = jnp.arange(rows * a_row) % n
    slot = jnp.tile(jnp.arange(k, dtype=jnp.int32), a_row)
    number = jnp.repeat(jnp.arange(1, a_row + 1, dtype=jnp.int32), k)
    used = slot < jnp.repeat(lengths[place].reshape(rows, a_row), k, axis=1)
    packed = Rows(
        tokens=tokens[place].reshape(rows, a_row * k),
        segment_ids=jnp.where(used, number, 0),
        positions=jnp.broadcast_to(slot, used.shape),
    )
    states = encode_rows(params, packed, config, key=key, train=train).reshape(rows * a_row, k, -1)[:n]
    mask = jnp.arange(k) < lengths[:, None]
    if config.setting == "abe":
        return jnp.where(mask[..., None], states, 0)
    return pool_texts(params, states, mask[:, None], config)


def encode_distinct(
    params: Mapping[str, Any],
    ids: Int[Array, " n"],
    tokens: Int[Array, "n K"],
    lengths: Int[Array, " n"],
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
) -> tuple[Float[Array, "m S d"], Int[Array, " n"]]:
    """Encodes each distinct behaviour among n once: `(encoded, place)`, with `encoded[place]` those of all n.

    `Config.chunk` of them go at once. What a batch has beyond goes as many at a time, for as long as there are some,
    with layers computed again in the backward pass: the time is that of the distinct ones, sizes are fixed, and memory
    holds the layers of one chunk. Entries of length 0 are no behaviours; their places hold no meaning. Gradients flow.
    """
    n = len(tokens)
    known = jnp.where(lengths > 0, ids, _NONE)
    found, first, place = jnp.unique(known, size=n, fill_value=_NONE, return_index=True, return_inverse=True)
    tokens, lengths = tokens[first], jnp.where(found == _NONE, 0, lengths[first])
    count = jnp.sum(found != _NONE)

    def encode(start: Int[Array, ""] | int, config: Config = config) -> Float[Array, "chunk S d"]:
        rows = jnp.minimum(start + jnp.arange(min(n, config.chunk)), n - 1)  # behind the last the last again
        part_key = None if key is None else jax.random.fold_in(key, start)
        return encode_texts(params, tokens[rows], lengths[rows], config, key=part_key, train=train)

    encoded = encode(0)
    if n <= config.chunk:
        return encoded, place
    again = partial(encode, config=replace(config, language_model=config.language_model.running(remat="full")))

    def step(_: None, start: Int[Array, ""]) -> tuple[None, Array]:
        return None, jax.lax.cond(start < count, again, lambda _: jnp.zeros_like(encoded), start)

    _, more = jax.lax.scan(step, None, jnp.arange(config.chunk, n, config.chunk))
    return jnp.concatenate([encoded, more.reshape(-1, *encoded.shape[1:])]), place


def _data_axis() -> int:
    """Parts that examples are split into: rows must divide among them."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {n: mesh.shape[n] for n, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    return sizes.get("data", 1)

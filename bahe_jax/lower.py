"""ABE's lower layers: each distinct behaviour alone, once (arXiv 2403.19347, atomic behaviour encoding).

`E[a] = F_p(LLM_low(a))`. Behaviours are short, so several lie in a row, each a segment that sees nothing else.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int, PRNGKeyArray

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

    Zeros behind the text and for one of length 0. Texts lie in rows of `Config.row` slots, K slots each.
    """
    n, k = tokens.shape
    a_row = max(1, config.row // k)
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
    return pool(states, mask[:, None], config.pooling, query(params, "lower"))


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

    `Config.chunk` of them go at a time, as many times as there are distinct ones: the time is that of these, while the
    size is fixed. Entries of length 0 are no behaviours, and their places hold no meaning. Gradients flow.
    """
    n, k = tokens.shape
    known = jnp.where(lengths > 0, ids, _NONE)
    found, first, place = jnp.unique(known, size=n, fill_value=_NONE, return_index=True, return_inverse=True)
    tokens, lengths = tokens[first], jnp.where(found == _NONE, 0, lengths[first])
    if n <= config.chunk:
        return encode_texts(params, tokens, lengths, config, key=key, train=train), place
    chunks = -(-n // config.chunk)
    order = jnp.minimum(jnp.arange(chunks * config.chunk), n - 1).reshape(chunks, config.chunk)
    count = jnp.sum(found != _NONE)
    shape = (config.chunk, k if config.setting == "abe" else 1, config.language_model.width)

    def encode(chunk: tuple[Array, Array]) -> Array:
        number, rows = chunk
        part_key = None if key is None else jax.random.fold_in(key, number)
        return encode_texts(params, tokens[rows], lengths[rows], config, key=part_key, train=train)

    def step(_: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        begun = chunk[0] * config.chunk < count
        return None, jax.lax.cond(begun, encode, lambda _: jnp.zeros(shape, config.dtype), chunk)

    # Computed again in the backward pass: memory holds the layers of one chunk.
    _, encoded = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), None, (jnp.arange(chunks), order))
    return encoded.reshape(-1, *shape[1:]), place


def _data_axis() -> int:
    """Parts that examples are split into: rows must divide among them."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {n: mesh.shape[n] for n, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    return sizes.get("data", 1)

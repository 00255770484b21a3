"""LUM step 1, knowledge construction: next-condition-item prediction (arXiv 2502.08309, section 4.1).

`p(i_1 ... i_L | c_1 ... c_L) = prod_l p(i_l | c_1, i_1, ..., i_{l-1}, c_l)`: the output at condition token c_l must
find item i_l, by InfoNCE against the other items of the batch. The loss stands at condition positions only.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import struct
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lum_jax.batch import Batch
from lum_jax.config import Config, encoder
from lum_jax.token_encoder import TokenEncoder
from rec_core import embedding, losses
from rec_core.attention import ranges_from_segments
from rec_core.features import check_features, check_not_nan, check_shape
from rec_core.transformer import Transformer


@struct.dataclass
class Output:
    """What `apply` returns, each with the batch's leading axis.

    Attributes:
      outputs: o_l, the user encoder's output that must find item l, `[B, L, width]`.
      items: e_l, the item token embeddings, `[B, L, width]`.
      negatives: embeddings of given negatives, `[B, N, width]`, or None.
    """

    outputs: Float[Array, "B L d"]
    items: Float[Array, "B L d"]
    negatives: Float[Array, "B N d"] | None = None


def init(key: PRNGKeyArray, config: Config) -> dict:
    """Parameters, float32: `{"tables": {name: [rows, width]}, "net": {"item", "condition", "encoder"}}`.

    "net" holds one projection per token type, the user encoder and, where it is learned, `log_temperature`.
    """
    table_key, item_key, condition_key, encoder_key = jax.random.split(key, 4)
    token = _token_encoder(config)
    features = jnp.zeros((1, embedding.width(config.item) + config.item_content))
    index = jnp.zeros((1, 1), jnp.int32)
    net = {
        "item": token.init(item_key, features)["params"],
        "encoder": Transformer(config.transformer).init(
            encoder_key, jnp.zeros((1, 1, config.width)), index, index, index
        )["params"],
    }
    if config.condition_tokens:
        features = jnp.zeros((1, embedding.width(config.condition)))
        net["condition"] = token.init(condition_key, features)["params"]
    if config.learn_temperature:
        net["log_temperature"] = jnp.log(jnp.float32(config.temperature))
    return {"tables": embedding.init_tables(table_key, config.item + config.condition), "net": net}


def _token_encoder(config: Config) -> TokenEncoder:
    return TokenEncoder(config.width, config.transformer.dtype)


def item_embeddings(params: dict, item: dict[str, Any], config: Config, content: Any = None) -> Array:
    """Item token embeddings e_i from raw item features of any common shape; `[..., width]`."""
    features = embedding.embed(params["tables"], config.item, item)
    if config.item_content:
        assert content is not None, "config.item_content asks for the items' content vectors"
        features = jnp.concatenate([features, content], axis=-1)
    vectors: Any = _token_encoder(config).apply({"params": params["net"]["item"]}, features)
    return vectors


def condition_embeddings(params: dict, condition: dict[str, Any], config: Config) -> Array:
    """Condition token embeddings from raw condition features of any common shape; `[..., width]`."""
    features = embedding.embed(params["tables"], config.condition, condition)
    vectors: Any = _token_encoder(config).apply({"params": params["net"]["condition"]}, features)
    return vectors


def encode(
    params: dict, config: Config, tokens: Array, positions: Array, k_start: Array, k_end: Array, *, key=None, **kwargs
):
    """The user encoder over tokens `[B, T, width]`; see `rec_core.transformer.Transformer` for the rest."""
    # Folded, since `objective` draws its negatives with the same key.
    rngs = None if key is None else {"dropout": jax.random.fold_in(key, 0)}
    return Transformer(config.transformer).apply(
        {"params": params["net"]["encoder"]}, tokens, positions, k_start, k_end, rngs=rngs, **kwargs
    )


def interleave(condition: Array | None, item: Array) -> Array:
    """`c_1 i_1 c_2 i_2 ...`: `[B, L, ...]` twice -> `[B, 2L, ...]`; items alone where there are no conditions."""
    if condition is None:
        return item
    pairs = jnp.stack([condition, item], axis=2)
    return pairs.reshape(item.shape[0], -1, *item.shape[2:])


def prefix_tokens(params: dict, batch: Batch, config: Config) -> tuple[Array, Array, Array, Array]:
    """Tokens of packed rows, their segments and positions, and the items' embeddings.

    Returns:
      tokens `[B, T, width]`, segment ids `[B, T]`, positions `[B, T]` with T = 2L (L without condition tokens), and
      items `[B, L, width]`.
    """
    items = item_embeddings(params, batch.item, config, batch.content)
    conditions = condition_embeddings(params, batch.condition, config) if config.condition_tokens else None
    segments = jnp.repeat(batch.segment_ids, config.stride, axis=1)
    offset = jnp.arange(segments.shape[1]) % config.stride
    positions = config.stride * jnp.repeat(batch.positions, config.stride, axis=1) + offset
    return interleave(conditions, items), segments, positions, items


def apply(
    params: dict, batch: Batch, config: Config, *, key: PRNGKeyArray | None = None, train: bool = False
) -> Output:
    """Runs the user encoder over packed rows.

    Args:
      params: from `init`.
      batch: packed rows, B rows of L events.
      config: settings.
      key: for dropout; needed where `train` and the encoder has dropout.
      train: whether dropout is on.

    Returns:
      `Output`; `outputs[:, l]` is o at condition token c_l (without condition tokens: at the item before, zeros at the
      first event of a user).
    """
    tokens, segments, positions, items = prefix_tokens(params, batch, config)
    k_start, k_end = ranges_from_segments(segments)
    hidden = encode(params, config, tokens, positions, k_start, k_end, deterministic=not train, key=key)
    if config.condition_tokens:
        outputs = hidden[:, ::2]
    else:
        outputs = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0))) * (batch.positions > 0)[..., None]
    negatives = None
    if config.negatives == "given":
        assert batch.negatives is not None, "config.negatives='given' asks for Batch.negatives"
        negatives = item_embeddings(params, batch.negatives, config, batch.negative_content)
    return Output(outputs, items, negatives)


def weights(batch: Batch, config: Config) -> Float[Array, "B L"]:
    """1 where an event has a prediction: every event, but without condition tokens not the first of a user."""
    valid = batch.segment_ids > 0
    return (valid if config.condition_tokens else valid & (batch.positions > 0)).astype(jnp.float32)


def objective(
    params: dict,
    output: Output,
    batch: Batch,
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    axis_name: str | None = None,
) -> tuple[Array, dict]:
    """InfoNCE at condition positions, mean over the global batch's predictions (LUM, step 1; mean and K are ours).

    Args:
      params: read for the learned temperature only.
      output: from `apply`, for the whole batch of this device.
      batch: the same rows.
      config: settings.
      key: draws the `negative_count` negatives; the same on every device. None takes them evenly spaced.
      axis_name: the pmap or shard_map axis over which the global batch is spread.

    Returns:
      The loss and `{"loss": (sum, weight)}`.
    """
    rows, length = batch.segment_ids.shape
    weight = weights(batch, config)
    first_row = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
    # One number a user of the global batch: segments of a row are at most as many as its events.
    users = (first_row + jnp.arange(rows))[:, None] * (length + 1) + batch.segment_ids
    pool = _pool(output, batch, config, users)
    pool = losses.gather_over(axis_name, pool)
    if config.negatives == "batch":
        pool = _draw(pool, config.negative_count, key)
    temperature = jnp.exp(params["net"]["log_temperature"]) if config.learn_temperature else config.temperature
    flat: Callable[[Any], Array] = functools.partial(jnp.reshape, shape=-1)
    total, count = losses.info_nce(
        output.outputs.reshape(-1, config.width),
        output.items.reshape(-1, config.width),
        pool["embedding"],
        positive_ids=flat(batch.item[config.target]),
        negative_ids=pool["id"],
        negative_mask=pool["valid"],
        weights=flat(weight),
        log_q=pool.get("log_q"),
        positive_log_q=flat(batch.log_q) if config.popularity_correction else None,
        query_users=None if config.own_items else flat(users),
        negative_users=None if config.own_items else pool["user"],
        temperature=temperature,
        similarity=config.similarity,
        chunk=config.chunk,
    )
    total, count = losses.sum_over(axis_name, (total, count))
    return losses.mean(total, count), {"loss": (total, count)}


def _pool(output: Output, batch: Batch, config: Config, users: Int[Array, "B L"]) -> dict[str, Array]:
    """This device's candidates for negatives, flat."""
    pool: dict[str, Any]
    if config.negatives == "given":
        assert batch.negatives is not None, "config.negatives='given' asks for Batch.negatives"
        ids = batch.negatives[config.target]
        pool = {
            "embedding": output.negatives,
            "id": ids,
            "valid": ids > 0,
            "user": jnp.full(ids.shape, -1, users.dtype),
        }
        log_q = batch.negative_log_q
    else:
        pool = {
            "embedding": output.items,
            "id": batch.item[config.target],
            "valid": batch.segment_ids > 0,
            "user": users,
        }
        log_q = batch.log_q
    if config.popularity_correction:
        pool["log_q"] = log_q
    return {k: v.reshape(-1, *v.shape[2:]) for k, v in pool.items()}


def _draw(pool: dict[str, Array], count: int | None, key: PRNGKeyArray | None) -> dict[str, Array]:
    """`count` of the valid candidates, with replacement; K and its distribution know no device and no micro-batch."""
    total = pool["id"].shape[0]
    if count is None:
        return pool
    order = jnp.cumsum(pool["valid"].astype(jnp.int32))
    if key is None:
        rank = (jnp.arange(count) * jnp.maximum(order[-1], 1)) // count
    else:
        rank = jax.random.randint(key, (count,), 0, jnp.maximum(order[-1], 1))
    chosen = jnp.minimum(jnp.searchsorted(order, rank + 1), total - 1)
    return {k: v[chosen] for k, v in pool.items()}


def loss(
    params: dict,
    batch: Batch,
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = True,
    axis_name: str | None = None,
) -> tuple[Array, dict]:
    """`objective(apply(...))`; see both."""
    output = apply(params, batch, config, key=key, train=train)
    return objective(params, output, batch, config, key=key, axis_name=axis_name)


def touched(batch: Batch, config: Config) -> dict[str, Int[Array, " n"]]:
    """The table rows that the batch reads, with repetitions."""
    groups: list[tuple[tuple[embedding.Feature, ...], Any]] = [(config.item, batch.item)]
    if config.condition_tokens:
        groups.append((config.condition, batch.condition))
    if config.negatives == "given":
        groups.append((config.item, batch.negatives))
    return embedding.touched(*groups)


def check(batch: Batch, config: Config) -> None:
    """Raises ValueError naming field, row and value for ids out of range, NaN features and malformed packing."""
    shape = np.shape(batch.segment_ids)
    if len(shape) != 2:
        raise ValueError(f"lum_jax.Batch: segment_ids has shape {shape}, must be [B, L]")
    check_shape("lum_jax.Batch.positions", batch.positions, shape)
    check_features("lum_jax.Batch.item", config.item, batch.item, shape)
    if config.condition_tokens:
        check_features("lum_jax.Batch.condition", config.condition, batch.condition, shape)
    segments, positions = np.asarray(batch.segment_ids), np.asarray(batch.positions)
    if not (segments > 0).any():
        raise ValueError("lum_jax.Batch: every event is padding (segment_ids is 0 everywhere)")
    before = np.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    wanted = np.where(segments == before, np.pad(positions, ((0, 0), (1, 0)))[:, :-1] + 1, 0)
    wrong = np.argwhere((segments > 0) & (positions != wanted))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"lum_jax.Batch: positions[{row}, {column}] is {positions[row, column]}, must be {wanted[row, column]}: "
            "positions count 0, 1, ... inside each segment"
        )
    floats = {
        "content": (config.item_content > 0, (*shape, config.item_content)),
        "log_q": (config.popularity_correction and config.negatives == "batch", shape),
    }
    if config.negatives == "given":
        if batch.negatives is None:
            raise ValueError("lum_jax.Batch: negatives is missing; config.negatives is 'given'")
        pool = np.shape(batch.negatives[config.target])
        check_features("lum_jax.Batch.negatives", config.item, batch.negatives, pool)
        floats["negative_content"] = (config.item_content > 0, (*pool, config.item_content))
        floats["negative_log_q"] = (config.popularity_correction, pool)
        floats["log_q"] = (config.popularity_correction, shape)
    for name, (needed, expected) in floats.items():
        value = getattr(batch, name)
        if value is None and needed:
            raise ValueError(f"lum_jax.Batch: {name} is missing; the config asks for it")
        if value is not None:
            check_shape(f"lum_jax.Batch.{name}", value, expected)
            check_not_nan(f"lum_jax.Batch.{name}", value, finite=True)


def example(batch_size: int = 8, seed: int = 0) -> tuple[Config, Batch]:
    """A small configuration and a valid random batch of `batch_size` rows: for tests, warm-up and lowering."""
    rng = np.random.default_rng(seed)
    length = 12
    config = Config(
        item=(embedding.Categorical("item", 50, 16), embedding.Categorical("category", 8, 8)),
        condition=(embedding.Categorical("category", 8, 8), embedding.Categorical("liked", 3, 4)),
        transformer=encoder("25k"),
        negative_count=64,
        chunk=32,
    )
    segments = np.zeros((batch_size, length), np.int32)
    positions = np.zeros((batch_size, length), np.int32)
    for row in range(batch_size):
        cuts = np.sort(rng.choice(np.arange(1, length), size=2, replace=False))
        for number, (start, end) in enumerate([(0, cuts[0]), (cuts[0], cuts[1])], start=1):
            segments[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
    items = rng.integers(2, 50, segments.shape, dtype=np.int32) * (segments > 0)
    categories = (1 + items % 7).astype(np.int32) * (segments > 0)
    liked = rng.integers(1, 3, segments.shape, dtype=np.int32) * (segments > 0)
    batch = Batch(
        item={"item": items, "category": categories},
        condition={"category": categories, "liked": liked},
        segment_ids=segments,
        positions=positions,
    )
    return config, batch

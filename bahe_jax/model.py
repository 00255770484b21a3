"""The BAHE model and its ablation: LLM-CTR, + FP, + ABE, + BA (arXiv 2403.19347), one model in four settings.

    E[a]  = F_p(LLM_low(a))                              each distinct behaviour, once ("ba"; "abe" keeps its K states)
    Q_un  = F_d(F_p(LLM_high(E[a_un1] ... E[a_unM])))    each of N sequences, causal, positions from 0
    y     = F_theta(Q_u, Q_i, dense),  Q_u = [Q_u1 ... Q_uN]

"fp" runs the tokens of each sequence through all layers. "llm_ctr" runs one text, the sequences in their order and then
the item: Q_u pools the user's tokens and Q_i the item's, and since the text is causal Q_u does not depend on the item.
The final norm of the language model stands before F_p. Where the layers see several texts of one sample, these lie in
one row as segments.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bahe_jax import language_model, lora, lower
from bahe_jax.batch import Batch, check, example
from bahe_jax.config import Config
from bahe_jax.pooling import pool
from rec_core import losses
from rec_core.attention import ranges_from_segments
from rec_core.ranking.ctr import Head, click_sums
from rec_core.sharding import constrain, path_name

__all__ = [
    "Batch", "Config", "apply", "check", "example", "from_language_model", "init", "loss", "merge_lora", "objective",
    "touched", "trainable", "vectors", "without_lower",
]  # fmt: skip


def init(key: PRNGKeyArray, config: Config) -> dict[str, Any]:
    """Random parameters, float32: `{"tables": {"token": ...}, "net": ...}`, without token table and lower layers where
    `config.lower` is "table"."""
    model_key, key = jax.random.split(key)
    return from_language_model(key, language_model.init(model_key, config.language_model), config)


def from_language_model(key: PRNGKeyArray, params: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Parameters from those of a language model (`reader.read`), cut; what it lacks is drawn.

    Raises:
      ValueError: parameters of another number of layers or width.
    """
    wanted = jax.eval_shape(lambda: language_model.init(jax.random.key(0), config.language_model))
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, wanted):
        raise ValueError("params are not those of config.language_model: shapes differ; read both from one place")
    at, width = config.lower_layers, config.language_model.width
    parts = {
        "lower": language_model.cut(dict(params), 0, at)["decoder"]["layers"],
        "upper": language_model.cut(dict(params), at)["decoder"]["layers"],
    }
    reduce_key, head_key, lower_key, upper_key = jax.random.split(key, 4)
    net: dict[str, Any] = {**parts, "final_norm": params["decoder"]["final_norm"]}
    adapted = {"lower": (config.lower, lower_key), "upper": (config.upper, upper_key)}
    additions = {
        name: lora.init(part_key, parts[name], config.lora)
        for name, (how, part_key) in adapted.items()
        if how == "lora"
    }
    if additions:
        net["lora"] = additions
    if config.pooling == "attention":
        net["pool"] = {name: jnp.zeros(width) for name in parts}
    net["reduce"] = _reduce(config).init(reduce_key, jnp.zeros((1, width)))["params"]
    user, item = (jnp.zeros((1, n * config.reduced)) for n in (config.parts - 1, 1))
    dense = jnp.zeros((1, config.dense)) if config.dense else None
    net["head"] = _head(config).init(head_key, [user, item], dense)["params"]
    found = {"tables": {"token": params["tables"]["token"]}, "net": net}
    return without_lower(found) if config.lower == "table" else found


def without_lower(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the same model with `lower="table"`, once a table was made with these."""
    net = {name: value for name, value in params["net"].items() if name != "lower"}
    for name in ("lora", "pool"):
        if name in net:
            net[name] = {part: value for part, value in net[name].items() if part != "lower"}
            if not net[name]:
                del net[name]
    return {"tables": {}, "net": net}


def merge_lora(params: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The parameters with LoRA's products added to the weights and its own left out; for the same settings with
    "frozen" or "full" in place of "lora"."""
    net = {name: value for name, value in params["net"].items() if name != "lora"}
    for part, additions in params["net"].get("lora", {}).items():
        net[part] = lora.merge(net[part], additions, config.lora)
    return {"tables": dict(params["tables"]), "net": net}


def trainable(params: Mapping[str, Any], config: Config) -> Any:
    """Tree of bools like `params`: what training moves. The rest has gradients of exactly zero, and needs no optimizer
    state (`rec_core.partition`)."""
    moved = {"lora/": True, "pool/upper": True, "reduce/": True, "head/": True}
    moved |= {"lower/": config.lower == "full", "pool/lower": config.lower in ("full", "lora")}
    moved |= {"upper/": config.upper == "full", "final_norm/": config.upper == "full"}
    start = {f"net/{name}": value for name, value in moved.items()} | {"tables/": config.lower == "full"}

    def of(path: Any, leaf: Any) -> bool:
        name = path_name(path)
        return next(value for prefix, value in start.items() if name.startswith(prefix))

    return jax.tree_util.tree_map_with_path(of, params)


def vectors(
    params: Mapping[str, Any],
    batch: Batch,
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
) -> tuple[Float[Array, "B d_u"], Float[Array, "B d_i"]]:
    """`Q_u` and `Q_i`, from which any ranker may go on; `d_u = (config.parts - 1) reduced`, `d_i = reduced`.

    Label and weight are not read. `key` is for the language model's dropout, in training only.
    """
    params = jax.tree.map(
        lambda moved, leaf: leaf if moved else jax.lax.stop_gradient(leaf), trainable(params, config), params
    )
    lower_key, upper_key = (None, None) if key is None else jax.random.split(key)
    run: dict[str, Any] = {"train": train}
    read, width = _read(params, batch, config, lower_key, train)
    used, part = _places(batch, config, width)
    order, part = _close(used, part, config)
    segment = jnp.minimum(part, 1) if config.setting == "llm_ctr" else part
    ranges = ranges_from_segments(segment)
    positions = _positions(segment)
    x = constrain(read(order))
    if not config.by_behavior:
        x = lower.run_layers(params, "lower", x, positions, ranges, config, key=lower_key, **run)
    x = lower.run_layers(params, "upper", x, positions, ranges, config, key=upper_key, **run)
    x = language_model.normalize({"decoder": {"final_norm": params["net"]["final_norm"]}}, x, config.language_model)
    mask = part[:, None] == jnp.arange(1, config.parts + 1)[:, None]
    pooled = pool(x, mask, config.pooling, lower.query(params, "upper"))
    q: Any = _reduce(config).apply({"params": params["net"]["reduce"]}, pooled)
    return constrain(q[:, :-1].reshape(len(q), -1)), constrain(q[:, -1])


def apply(
    params: Mapping[str, Any],
    batch: Batch,
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
) -> Float[Array, " B"]:
    """Logits. `key` is for dropout, in training only."""
    deterministic = not train or config.dropout == 0
    if train and key is None and max(config.dropout, config.language_model.transformer.dropout) > 0:
        raise ValueError(f"apply in training needs a key: dropout is {config.dropout}, or the language model has some")
    model_key, head_key = (None, None) if key is None else jax.random.split(key)
    both = vectors(params, batch, config, key=model_key, train=train)
    logits: Any = _head(config).apply(
        {"params": params["net"]["head"]},
        list(both),
        jnp.asarray(batch.dense) if config.dense else None,
        deterministic,
        rngs=None if deterministic or head_key is None else {"dropout": head_key},
    )
    return logits[:, 0]


def objective(
    params: Any,
    output: Float[Array, " B"],
    batch: Batch,
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], dict[str, losses.Sum]]:
    """Mean binary cross-entropy over impressions. The aux sums are of the whole batch, over all devices."""
    del params, config, key
    aux = losses.sum_over(axis_name, click_sums(output, batch.label, batch.weight))
    return losses.mean(*aux["loss"]), jax.lax.stop_gradient(aux)


def loss(
    params: Any,
    batch: Batch,
    config: Config,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = True,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], dict[str, losses.Sum]]:
    output = apply(params, batch, config, key=key, train=train)
    return objective(params, output, batch, config, key=key, axis_name=axis_name)


def touched(batch: Batch, config: Config) -> dict[str, Int[Array, " n"]]:
    """Rows of the token table that the batch reads; none with `lower="table"`."""
    if config.lower == "table":
        return {}
    return {"token": jnp.concatenate([jnp.ravel(jnp.asarray(x)) for x in (batch.tokens, batch.item_tokens)])}


def _reduce(config: Config) -> nn.Dense:
    """F_d."""
    return nn.Dense(config.reduced, dtype=config.dtype)


def _head(config: Config) -> Head:
    return Head(config.hidden, config.dropout, 1, config.dense_width, config.dtype)


def _read(
    params: Mapping[str, Any], batch: Batch, config: Config, key: PRNGKeyArray | None, train: bool
) -> tuple[Any, int]:
    """How to read vectors at the places of a sample, `[B, T] -> [B, T, d]`, and S, the places of a behaviour.

    A sample has (N M + 1) S places: those of its behaviours and then of its item.
    """
    size = batch.lengths.shape[0]

    def from_own(values: Any, item: Any, inner: tuple[int, ...]) -> Array:
        values, item = jnp.asarray(values), jnp.asarray(item)
        return jnp.concatenate([values.reshape(size, -1, *inner), item.reshape(size, -1, *inner)], axis=1)

    if config.lower == "table":
        d = config.language_model.width
        width = 1 if config.setting == "ba" else jnp.asarray(batch.item_states).shape[1]
        states = from_own(batch.states, batch.item_states, (d,)).astype(config.dtype)
        return lambda order: jnp.take_along_axis(states, order[..., None], axis=1), width
    k = jnp.asarray(batch.item_tokens).shape[1]
    tokens = from_own(batch.tokens, batch.item_tokens, ())
    if not config.by_behavior:

        def embed(order: Array) -> Array:
            at = jnp.take_along_axis(tokens, order, axis=1)
            return language_model.embed(params, at, config.language_model)

        return embed, k
    lengths, ids = (from_own(*both, ()) for both in ((batch.lengths, batch.item_length), (batch.ids, batch.item)))
    encoded, place = lower.encode_distinct(
        params, ids.ravel(), tokens.reshape(-1, k), lengths.ravel(), config, key=key, train=train
    )
    width = encoded.shape[1]
    place = place.reshape(size, -1)

    def gather(order: Array) -> Array:
        row = jnp.take_along_axis(place, order // width, axis=1)
        return encoded[row, order % width]

    return gather, width


def _places(batch: Batch, config: Config, width: int) -> tuple[Bool[Array, "B T"], Int[Array, " T"]]:
    """Which places of a sample hold something, and of which pooled part, from 1, each place is."""
    size, kinds, most = batch.lengths.shape
    lengths = jnp.concatenate(
        [jnp.asarray(batch.lengths).reshape(size, -1), jnp.asarray(batch.item_length)[:, None]], axis=1
    )
    used = (jnp.arange(width) < lengths[..., None]).reshape(size, -1)
    kind = jnp.repeat(jnp.arange(1, kinds + 1), most * width)
    kind = jnp.ones_like(kind) if config.setting == "llm_ctr" else kind
    return used, jnp.concatenate([kind, jnp.full(width, config.parts)]).astype(jnp.int32)


def _close(
    used: Bool[Array, "B P"], part: Int[Array, " P"], config: Config
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The places in use, closed up in their order, and their parts; part 0 behind the last, up to a multiple of 8."""
    order = jnp.argsort(~used, axis=1, stable=True)
    if config.slots:
        order = order[:, : config.slots]
    part = jnp.where(jnp.take_along_axis(used, order, axis=1), part[order], 0)
    # Attention and matrix products of other lengths would copy their operands to such a one, in every layer.
    more = (0, 0), (0, -order.shape[1] % 8)
    return jnp.pad(order, more), jnp.pad(part, more)


def _positions(segment: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The index of each place in its segment."""
    place = jnp.arange(segment.shape[1], dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones_like(segment[:, :1]), segment[:, 1:] != segment[:, :-1]], axis=1)
    return place - jax.lax.cummax(jnp.where(begins > 0, place, 0), axis=1)

"""SIM: search in a lifetime of behaviours, then exact attention over what was found, beside the recent interest (Pi et
al., CIKM 2020, arXiv 2006.05639).

    logit = MLP([exact search unit ; interest in the recent behaviours ; E_U ; E_I ; E_O ; dense])
    Loss = alpha Loss_GSU + beta Loss_ESU, beta = 1

`Config.search` says how the long sequence is searched: "hard" and "soft" on the device, for each target; "none" reads
it as it is: what the behaviour tree found (`sim_jax.tree`, `sim_jax.resident`), or all of it, which makes the ceiling
and the rivals (DIN, MIMN, TWIN, ETA, SDIM over the whole). Hard search has no parameters, so a model trained on one of
the two forms serves with the other. `Config.exact` "search" leaves the exact unit out and pools what was found by the
search's own relevance: the general search unit alone.

Target, recent and long behaviours share the item features and their tables.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rec_core import embedding, losses
from rec_core.chunks import map_chunks
from rec_core.embedding import Feature
from rec_core.interest import INTEREST
from rec_core.ranking.ctr import Head, click_sums
from rec_core.sharding import constrain
from sim_jax import search
from sim_jax.batch import Batch, Request
from sim_jax.config import Config
from sim_jax.exact import ORDERED, ExactSearch

_SHORT_LOSS, _EXACT_LOSS = "short_", "exact_"  # before the names of the interest modules' own losses


@struct.dataclass
class Output:
    """What the loss is made of, by example."""

    logit: Float[Array, "B"]  # [B, tasks] for several tasks
    search: Float[Array, "B"] | None  # the soft search's own click logit, in training
    auxiliary: dict[str, tuple[Float[Array, "B"], Float[Array, "B"]]]  # sum and weight of each, in training


@struct.dataclass
class Found:
    """Behaviours that the exact unit reads: vectors, which are real, their ages."""

    sequence: Float[Array, "B K d"]
    mask: Bool[Array, "B K"]
    time: Float[Array, "B K"] | None


class Long(NamedTuple):
    """A lifelong sequence as it came, or a part of it."""

    fields: Mapping[str, Any]  # each [B, T]
    mask: Bool[Any, "B T"]
    time: Float[Any, "B T"] | None


class Net(nn.Module):
    """From vectors to logits in steps, so that a request takes once what its candidates share."""

    config: Config

    def setup(self) -> None:
        c = self.config
        if c.search == "soft":
            self.search = search.SoftSearch(c.search_width)
            self.search_click = search.SearchClick(c.search_hidden, c.dtype)
        if c.exact not in ("", "search"):
            self.exact = ExactSearch(c.exact, c.exact_options, c.ages, c.age_width, c.dtype)
        if c.short:
            self.short = INTEREST[c.short](**dict(c.short_options), dtype=c.dtype)
        self.head = Head(c.hidden, c.dropout, c.tasks, c.dense_width, c.dtype)

    def __call__(self, target: Array, short: Found, long: Found, negatives: Array | None, rest: dict[str, Any]) -> Any:
        """All of it once, which makes all parameters."""
        parts = self.encode_short(short), self.encode_long(long)
        if self.config.search == "soft":
            self.click(target, long)
        return self.logit(target, *parts, long, **rest), self.auxiliary(*parts, negatives)

    def query(self, target: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        query: Array = self.search(target)
        return query

    def click(
        self, target: Float[Array, "B d"], sampled: Found, count: Float[Array, "B"] | None = None
    ) -> Float[Array, " B"]:
        """The auxiliary task of the soft search, from behaviours drawn from ``count``."""
        r = search.relevance(self.search(target), sampled.sequence)
        logit: Array = self.search_click(search.pool(r, sampled.sequence, sampled.mask, count), target)
        return logit

    def encode_short(self, recent: Found) -> Any:
        return self.short.encode(recent.sequence, recent.mask) if self.config.short else None

    def encode_long(self, found: Found) -> Any:
        if self.config.exact in ("", "search"):
            return None
        return self.exact.encode(found.sequence, found.mask, found.time)

    def logit(
        self,
        target: Float[Array, "B d"],
        short: Any,
        long: Any,
        found: Found,
        user: Array | None = None,
        context: Array | None = None,
        dense: Array | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B tasks"]:
        """From the encoded sequences; `found` is read where there is no exact unit."""
        c, interests = self.config, []
        if c.exact == "search":
            r = search.relevance(self.search(target), found.sequence)
            interests.append(search.pool(r, found.sequence, found.mask))
        elif c.exact:
            interests.append(self.exact.read(long, target))
        if c.short:
            interests.append(self.short.read(short, target))
        logits: Array = self.head([*interests, user, target, context], dense, deterministic)
        return logits

    def auxiliary(self, short: Any, long: Any, negatives: Array | None) -> dict[str, Any]:
        """The interest modules' own losses, by example."""
        c = self.config
        found: dict[str, Any] = {}
        if c.short and (c.short != "dien" or negatives is not None):
            found |= _by_example(self.short.auxiliary, _SHORT_LOSS, short, negatives)
        if long is not None:
            found |= _by_example(lambda encoded, _: self.exact.auxiliary(encoded), _EXACT_LOSS, long, None)
        return found


def init(key: Array, config: Config) -> dict[str, Any]:
    """Parameters: `{"tables": {name: [rows, width]}, "net": ...}`, float32."""
    table_key, net_key = jax.random.split(key)
    d = embedding.width(config.item_features)

    def vectors(specs: tuple[Feature, ...]) -> Array | None:
        return jnp.zeros((1, embedding.width(specs))) if specs else None

    one = Found(jnp.zeros((1, 1, d)), jnp.ones((1, 1), bool), jnp.zeros((1, 1)))
    rest = {
        "user": vectors(config.user_features),
        "context": vectors(config.context_features),
        "dense": jnp.zeros((1, config.dense)) if config.dense else None,
    }
    net = Net(config).init(net_key, jnp.zeros((1, d)), one, one, jnp.zeros((1, 1, d)), rest)["params"]
    return {"tables": embedding.init_tables(table_key, config.features, scale=config.embedding_scale), "net": net}


def apply(params: Any, batch: Batch, config: Config, *, key: Array | None = None, train: bool = False) -> Output:
    """Logits, and in training what the other losses are made of.

    `key`: for dropout and for the behaviours that the auxiliary task of a soft search reads; in training only.
    """
    deterministic = not train or config.dropout == 0
    if train and key is None and (config.dropout > 0 or config.samples):
        raise ValueError(f"apply in training needs a key: dropout is {config.dropout}, sample {config.sample}")
    sample_key, dropout_key = (None, None) if key is None else jax.random.split(key)
    rngs = None if deterministic or dropout_key is None else {"dropout": dropout_key}
    tables, net = params["tables"], Net(config).bind({"params": params["net"]}, rngs=rngs)
    target = constrain(embedding.embed(tables, config.item_features, batch.target))
    recent = _vectors(tables, config, batch.sequence, batch.mask)
    whole = Long(batch.long, batch.long_mask, batch.long_time)
    found = _found(net, tables, config, batch.target, target, whole)
    short, long = net.encode_short(recent), net.encode_long(found)
    logits = net.logit(target, short, long, found, **_rest(tables, batch, config), deterministic=deterministic)
    logits = logits[:, 0] if config.tasks == 1 else logits
    if not train:
        return Output(logits, None, {})
    clicked = None
    if config.search == "soft":
        count = jnp.sum(jnp.asarray(whole.mask), axis=-1, dtype=jnp.float32)
        if config.samples and sample_key is not None:
            whole = _take(whole, *search.sample(sample_key, jnp.asarray(whole.mask), config.sample))
        clicked = net.click(target, _vectors(tables, config, whole.fields, whole.mask), count)
    negatives = None
    if config.uses_negatives and batch.negatives is not None:
        negatives = constrain(embedding.embed(tables, config.item_features, batch.negatives))
    auxiliary = net.auxiliary(short, long, negatives) if config.auxiliary_weight else {}
    return Output(logits, clicked, auxiliary)


def find(params: Any, batch: Batch, config: Config) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
    """Positions in `batch.long` that the search finds for each target, best first, and which of them are behaviours.

    For search "none" a ValueError: there is nothing to find.
    """
    if config.search == "none":
        raise ValueError('search is "none": the exact unit reads the long sequence as it is')
    tables, net = params["tables"], Net(config).bind({"params": params["net"]})
    target = embedding.embed(tables, config.item_features, batch.target)
    return _search(net, tables, config, batch.target, target, Long(batch.long, batch.long_mask, batch.long_time))


def objective(
    params: Any,
    output: Output,
    batch: Batch,
    config: Config,
    *,
    key: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], dict[str, losses.Sum]]:
    """`Loss_ESU + search_weight Loss_GSU + auxiliary_weight (the modules' own)`, each a mean over impressions.

    Both click losses are mean binary cross-entropies (the search's on the first task). Aux: `loss` is Loss_ESU, then
    `search`, the modules' own by name, `predicted` and `clicked`; sums of the whole batch, over all devices.
    """
    del params, key
    weight, label = (jnp.asarray(x, jnp.float32) for x in (batch.weight, batch.label))
    aux = click_sums(output.logit, label, weight)
    weights = {"loss": 1.0}
    if output.search is not None:
        aux["search"] = losses.bce_with_logits(output.search, label if label.ndim == 1 else label[:, 0], weight)
        weights["search"] = config.search_weight
    for name, (sums, counts) in output.auxiliary.items():
        aux[name] = jnp.sum(jnp.where(weight > 0, sums, 0) * weight), jnp.sum(counts * weight)
        weights[name] = config.auxiliary_weight
    aux = losses.sum_over(axis_name, aux)
    loss = sum((factor * losses.mean(*aux[name]) for name, factor in weights.items()), jnp.zeros(()))
    return loss, jax.lax.stop_gradient(aux)


def loss(
    params: Any,
    batch: Batch,
    config: Config,
    *,
    key: Array | None = None,
    train: bool = True,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], dict[str, losses.Sum]]:
    output = apply(params, batch, config, key=key, train=train)
    return objective(params, output, batch, config, key=key, axis_name=axis_name)


def score(params: Any, request: Request, config: Config, *, chunk: int = 128) -> Float[Array, "B C"]:
    """Logits of C candidates for each request: `[B, C]`, or `[B, C, tasks]` for several tasks.

    Recent behaviours are encoded once a request, and what the tree found once a key; `chunk` candidates are searched
    for and read at a time. A candidate's number is that of `apply` for it alone.
    """
    tables, net = params["tables"], Net(config).bind({"params": params["net"]})
    shape = jnp.shape(next(iter(request.target.values())))
    if len(shape) != 2:
        raise ValueError(f"score takes targets [B, C], got {shape}; for one target an example use apply")
    size, keys = jnp.shape(request.long_mask)[:2]
    short = net.encode_short(_vectors(tables, config, request.sequence, request.mask))
    sequences = Long(dict(request.long), request.long_mask, request.long_time)  # [B, n, T] as [B n, T]
    sequences = jax.tree.map(lambda x: jnp.reshape(x, (size * keys, -1)), sequences)
    searched = config.search == "none" and bool(config.exact)
    if searched:
        found_by_key = _vectors(tables, config, *sequences)
        long_by_key = net.encode_long(found_by_key)

    def one(candidate: Request) -> Array:
        target = embedding.embed(tables, config.item_features, candidate.target)
        row = jnp.arange(size) * keys + candidate.place
        if searched:
            found, long = jax.tree.map(lambda x: x[row], (found_by_key, long_by_key))
        else:
            mine = jax.tree.map(lambda x: x[row], sequences)
            found = _found(net, tables, config, candidate.target, target, mine)
            long = net.encode_long(found)
        logits: Array = net.logit(target, short, long, found, **_rest(tables, candidate, config))
        return logits

    def per_candidate(x: Any) -> Array:  # [B] or [B, C, ...] to [C, B, ...]
        x = jnp.asarray(x)
        return jnp.moveaxis(jnp.broadcast_to(x if x.ndim > 1 else x[:, None], (*shape, *x.shape[2:])), 1, 0)

    own = {"target": dict(request.target), "place": request.place, "context": dict(request.context)}
    if config.dense:
        own["dense"] = request.dense
    each = jax.tree.map(per_candidate, own)
    logits: Array = map_chunks(lambda part: one(replace(request, **part)), each, chunk).swapaxes(0, 1)
    return logits[..., 0] if config.tasks == 1 else logits


def touched(batch: Batch, config: Config) -> dict[str, Int[Array, " n"]]:
    """Rows of each table that the batch reads, those that a search passes over included."""
    groups: list[tuple[tuple[Feature, ...], Mapping[str, Any]]] = [
        (config.user_features, batch.user),
        (config.item_features, batch.target),
        (config.item_features, batch.sequence),
        (config.item_features, batch.long),
        (config.context_features, {**batch.user, **batch.target, **batch.context}),
    ]
    if config.uses_negatives and batch.negatives is not None:
        groups.append((config.item_features, batch.negatives))
    return embedding.touched(*groups)


def _vectors(
    tables: Mapping[str, Any], config: Config, fields: Mapping[str, Any], mask: Any, time: Any = None
) -> Found:
    mask = jnp.asarray(mask)
    sequence = constrain(embedding.embed(tables, config.item_features, fields, where=mask.astype(bool)))
    return Found(sequence, mask, None if time is None else jnp.asarray(time))


def _rest(tables: Mapping[str, Any], batch: Batch | Request, config: Config) -> dict[str, Any]:
    """What the head reads beside interests and target."""
    together = {**batch.user, **batch.target, **batch.context}
    groups = {"user": (config.user_features, batch.user), "context": (config.context_features, together)}
    found: dict[str, Any] = {
        name: constrain(embedding.embed(tables, specs, fields)) for name, (specs, fields) in groups.items() if specs
    }
    return found | ({"dense": jnp.asarray(batch.dense)} if config.dense else {})


def _search(
    net: Net, tables: Mapping[str, Any], config: Config, fields: Mapping[str, Any], target: Array, long: Long
) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
    mask = jnp.asarray(long.mask)
    if config.search == "hard":
        category = jnp.asarray(fields[config.category])
        return search.hard(category, jnp.asarray(long.fields[config.category]), mask, config.top)
    # No gradient goes through the choice, so none needs the T vectors.
    sequence = jax.lax.stop_gradient(embedding.embed(tables, config.item_features, long.fields))
    r = search.relevance(net.query(jax.lax.stop_gradient(target)), sequence)
    return search.soft(r, mask, config.top, recall=config.recall)


def _found(
    net: Net, tables: Mapping[str, Any], config: Config, fields: Mapping[str, Any], target: Array, long: Long
) -> Found:
    """What the exact unit reads: the search's K behaviours, embedded once they are chosen, or the sequence as it is."""
    if config.search != "none":
        position, present = _search(net, tables, config, fields, target, long)
        if config.exact in ORDERED:  # a search gives the best, or the newest, first
            order = jnp.argsort(jnp.where(present, position, -1), axis=1)
            position, present = (jnp.take_along_axis(x, order, axis=1) for x in (position, present))
        long = _take(long, position, present)
    return _vectors(tables, config, *long)


def _take(long: Long, position: Int[Array, "B K"], found: Bool[Array, "B K"]) -> Long:
    """The behaviours at these positions; padding where nothing was found."""

    def pick(x: Any) -> Array:
        return jnp.where(found, jnp.take_along_axis(jnp.asarray(x), position, axis=1), 0)

    fields = {name: pick(x) for name, x in long.fields.items()}
    return Long(fields, found, None if long.time is None else pick(long.time))


def _by_example(auxiliary: Any, prefix: str, encoded: Any, negatives: Array | None) -> dict[str, Any]:
    """A module's mergeable sums over a batch, each example's own: `{prefix + name: (sums [B], weights [B])}`."""

    def one(encoded: Any, negatives: Array | None) -> Any:
        return auxiliary(*jax.tree.map(lambda x: x[None], (encoded, negatives)))

    sums: dict[str, Any] = jax.vmap(one)(encoded, negatives)
    return {prefix + name: pair for name, pair in sums.items()}

"""The click model `y = sigmoid(MLP(s + E_U + E_I + E_O + dense))`, `+` being concatenation, with any interest module.

`s` is what `config.interest` makes of the behaviours for the target: "din" gives DIN (arXiv 1706.06978), "average" a
plain DNN with pooled behaviours. With `config.pooled` the mean of the behaviours stands beside it. Behaviours are
described by the target's features and share its tables. The loss is the clicks' alone: the modules' own (DIEN's,
MIMN's) are not added.

In the MLP's place may stand any network of `rec_core.ranking.networks`, behind a gate of `rec_core.ranking.gates`:
the rivals of ADS for several domains. ADS's own model (`ads_jax`) is this one with another interest module.

Float features (`dense`, such as LUM's answers) pass `sign(x) log(1 + |x|)`, which tames large counts and keeps small
values as they are, and a linear layer of their own. A layer norm would not do: it erases the size of a single feature.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from rec_core import embedding, losses
from rec_core.chunks import map_chunks
from rec_core.embedding import Feature
from rec_core.interest.average import mean_of
from rec_core.ranking.ctr_batch import Batch, check, check_shapes, example
from rec_core.ranking.ctr_config import Config
from rec_core.ranking.head import Head
from rec_core.sharding import constrain

__all__ = [
    "Batch", "Config", "Head", "Net", "Vectors", "apply", "check", "click_sums", "example", "init", "loss", "objective",
    "score", "touched",
]  # fmt: skip


@struct.dataclass
class Vectors:
    """A batch as the net reads it: features looked up in the tables."""

    sequence: Float[Array, "B T d_I"]
    mask: Bool[Array, "B T"]
    time: Float[Array, "B T"] | None
    pooled: Float[Array, "B d_I"] | None = None
    user: Float[Array, "B d_U"] | None = None
    target: Float[Array, "B d_I"] | None = None  # what of it is not there yet in `score` is None
    query: Float[Array, "B d_Q"] | None = None  # what the interest module reads of the candidate
    context: Float[Array, "B d_O"] | None = None
    domain: Float[Array, "B d_D"] | None = None
    domain_id: Int[Array, " B"] | None = None
    dense: Float[Array, "B F"] | None = None


class Net(nn.Module):
    """From vectors to logits; the tables are outside."""

    config: Config

    def setup(self) -> None:
        self.interest = self.config.make_interest()
        self.head = self.config.make_head()

    def __call__(self, x: Vectors, deterministic: bool = True) -> Float[Array, "B tasks"]:
        read = self.interest(x.query, x.sequence, x.mask, *self._domain(x), time=x.time)
        return self._end(x, read, deterministic)

    def encode(self, x: Vectors) -> Any:
        """What the interest module makes of the sequence for all candidates."""
        return self.interest.encode(x.sequence, x.mask, *self._domain(x), time=x.time)

    def logits(self, x: Vectors, encoded: Any) -> Float[Array, "B tasks"]:
        """From what `encode` gave."""
        return self._end(x, self.interest.read(encoded, x.query, *self._domain(x)), True)

    def _domain(self, x: Vectors) -> tuple[Array | None, ...]:
        return (x.domain,) if self.config.personal else ()

    def _end(self, x: Vectors, read: Array, deterministic: bool) -> Array:
        parts = [read, x.pooled, x.user, x.target, x.context, x.domain]
        if isinstance(self.head, Head):
            logits: Array = self.head(parts, x.dense, deterministic)
            return logits
        prior = jnp.concatenate([part for part in (x.user, x.target) if part is not None], axis=-1)
        logits = self.head(parts, x.dense, deterministic, domain=x.domain, domain_id=x.domain_id, prior=prior)
        return logits


def init(key: Array, config: Config) -> dict[str, Any]:
    """Parameters: `{"tables": {name: [rows, width]}, "net": ...}`, float32."""
    table_key, net_key = jax.random.split(key)

    def vectors(specs: tuple[Feature, ...]) -> Array | None:
        return jnp.zeros((1, embedding.width(specs))) if specs else None

    item = jnp.zeros((1, embedding.width(config.item_features)))
    one = Vectors(
        user=vectors(config.user_features),
        target=item,
        query=vectors(config.query_features or config.item_features),
        sequence=item[:, None],
        mask=jnp.ones((1, 1), bool),
        time=jnp.zeros((1, 1)),
        pooled=item if config.pooled else None,
        context=vectors(config.context_features),
        domain=vectors(config.domain_features),
        domain_id=jnp.zeros(1, jnp.int32) if config.domain_field else None,
        dense=jnp.zeros((1, config.dense)) if config.dense else None,
    )
    net = Net(config).init(net_key, one)["params"]
    return {"tables": embedding.init_tables(table_key, config.features, scale=config.embedding_scale), "net": net}


def apply(
    params: Any, batch: Batch, config: Config, *, key: Array | None = None, train: bool = False
) -> Float[Array, "B"] | Float[Array, "B tasks"]:
    """Logits, `[B]` for one task. `key` is for dropout, in training only.

    Raises:
      ValueError: a field is missing, arrays do not go together, or dropout has no key.
    """
    check_shapes(batch, config)
    deterministic = not train or config.dropout == 0
    if not deterministic and key is None:
        raise ValueError(f"apply in training with dropout {config.dropout} needs a key")
    tables = params["tables"]
    dense = jnp.asarray(batch.dense) if config.dense else None
    vectors = replace(_shared(tables, batch, config), **_asked(tables, batch, config), dense=dense)
    # Laid out over the mesh's data axis, where there is one: left to itself the compiler may choose to replicate.
    logits: Any = Net(config).apply(
        {"params": params["net"]},
        jax.tree.map(constrain, vectors),
        deterministic=deterministic,
        rngs=None if deterministic or key is None else {"dropout": key},
    )
    return logits[:, 0] if config.tasks == 1 else logits


def click_sums(
    logits: Float[Array, "B"] | Float[Array, "B tasks"], label: Any, weight: Float[Any, "B"]
) -> dict[str, losses.Sum]:
    """`loss`, the binary cross-entropy, `predicted` and `clicked`, over impressions (and tasks), as mergeable sums.

    Raises:
      ValueError: `label` has another shape than the logits, or `weight` another number of impressions.
    """
    if jnp.shape(weight) != logits.shape[:1]:
        raise ValueError(f"weight has shape {jnp.shape(weight)}, must be {logits.shape[:1]}, one an impression")
    weight = jnp.asarray(weight, jnp.float32).reshape(-1, *[1] * (logits.ndim - 1))
    loss, count = losses.bce_with_logits(logits, label, weight)
    weight = jnp.broadcast_to(weight, logits.shape)
    predicted = jnp.sum(jax.nn.sigmoid(jnp.where(weight > 0, logits, 0)) * weight)
    clicked = jnp.sum(jnp.where(weight > 0, jnp.asarray(label, jnp.float32), 0) * weight)
    return {"loss": (loss, count), "predicted": (predicted, count), "clicked": (clicked, count)}


def objective(
    params: Any,
    output: Float[Array, "B"] | Float[Array, "B tasks"],
    batch: Batch,
    config: Config,
    *,
    key: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], dict[str, losses.Sum]]:
    """Mean binary cross-entropy over impressions (and tasks). The aux sums are of the whole batch, over all devices."""
    aux = losses.sum_over(axis_name, click_sums(output, batch.label, batch.weight))
    return losses.mean(*aux["loss"]), jax.lax.stop_gradient(aux)


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


def score(params: Any, batch: Batch, config: Config, *, chunk: int = 32) -> Float[Array, "B C"]:
    """Logits of C candidates for each request: `[B, C]`, or `[B, C, tasks]` for several tasks.

    User and behaviours are embedded, and the behaviours encoded, once a request and never repeated; `chunk` candidates
    are read by the interest module and go through the MLP at a time. Only where an interest module reads the domain,
    and the domain's fields are of the candidate, are the behaviours encoded once a candidate. Label and weight are not
    read. Ids and numbers are not looked at: `check(batch, config, candidates=True)` does so on the host.
    """
    shape = check_shapes(batch, config, candidates=True)

    def per_candidate(x: Any) -> Array:  # [B] or [B, C] to [C, B]
        x = jnp.asarray(x)
        return jnp.broadcast_to(x if x.ndim == 2 else x[:, None], shape).T

    dense = None
    if config.dense:
        given = jnp.asarray(batch.dense)
        dense = jnp.broadcast_to(given if given.ndim == 3 else given[:, None], (*shape, config.dense)).swapaxes(0, 1)
    tables, net = params["tables"], Net(config).bind({"params": params["net"]})
    shared, encoded = _shared(tables, batch, config), None
    domain_of_candidate = any(jnp.ndim(batch.fields[name]) > 1 for name in embedding.fields(config.domain_features))
    if config.personal and not domain_of_candidate:
        shared = replace(shared, domain=_embed(tables, config.domain_features, batch.fields))
    if not (config.personal and domain_of_candidate):
        encoded = net.encode(shared)

    def one(candidate: dict[str, Any]) -> Array:
        part = replace(batch, target=candidate["target"], context=candidate["context"])
        x = replace(shared, **_asked(tables, part, config), dense=candidate["dense"])
        return net.logits(x, net.encode(x) if encoded is None else encoded)

    candidates = {
        "target": {name: per_candidate(x) for name, x in batch.target.items()},
        "context": {name: per_candidate(x) for name, x in batch.context.items()},
        "dense": dense,
    }
    logits: Array = map_chunks(one, candidates, chunk).swapaxes(0, 1)
    return logits[..., 0] if config.tasks == 1 else logits


def touched(batch: Batch, config: Config) -> dict[str, Int[Array, " n"]]:
    """Rows of each table that the batch reads."""
    groups: list[tuple[tuple[Feature, ...], Mapping[str, Any]]] = [
        (config.user_features, batch.user),
        (config.item_features + config.query_features, batch.target),
        (config.item_features, batch.sequence),
        (config.context_features + config.domain_features, batch.fields),
    ]
    return embedding.touched(*groups)


def _embed(tables: Mapping[str, Any], specs: tuple[Feature, ...], fields: Mapping[str, Any]) -> Array | None:
    return embedding.embed(tables, specs, fields) if specs else None


def _shared(tables: Mapping[str, Any], batch: Batch, config: Config) -> Vectors:
    """What no candidate changes."""
    mask = jnp.asarray(batch.mask)
    sequence = embedding.embed(tables, config.item_features, batch.sequence, where=mask.astype(bool))
    return Vectors(
        user=_embed(tables, config.user_features, batch.user),
        sequence=sequence,
        pooled=mean_of(sequence, mask) if config.pooled else None,
        mask=mask,
        time=None if batch.time is None else jnp.asarray(batch.time),
    )


def _asked(tables: Mapping[str, Any], batch: Batch, config: Config) -> dict[str, Any]:
    """What is asked about, one target an example."""
    target = embedding.embed(tables, config.item_features, batch.target)
    return {
        "target": target,
        "query": embedding.embed(tables, config.query_features, batch.target) if config.query_features else target,
        "context": _embed(tables, config.context_features, batch.fields),
        "domain": _embed(tables, config.domain_features, batch.fields),
        "domain_id": jnp.asarray(batch.fields[config.domain_field], jnp.int32) if config.domain_field else None,
    }

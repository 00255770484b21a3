"""The ranking model of ADS (arXiv 2502.05523, equation 13): `y = MLP(s + E_U + E_I + E_O)`, `+` being concatenation.

s is what any attention of `rec_core.interest` makes of the behaviours, with PSRG and PCRG in front of it. All the rest
is the click model of `rec_core.ranking.ctr`: tables, head, loss, several tasks and a request's candidates; E_O holds
the context's vectors and E_D. A batch is that model's, too.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ads_jax.config import Config
from ads_jax.order import newest_last
from rec_core import embedding, losses
from rec_core.embedding import Categorical, Continuous
from rec_core.features import check_mask
from rec_core.ranking import ctr
from rec_core.ranking.ctr import Batch


def init(key: Array, config: Config) -> dict[str, Any]:
    """Parameters: `{"tables": {name: [rows, width]}, "net": ...}`, float32. A new model ranks as the plain one does."""
    return ctr.init(key, config)


def apply(
    params: Any, batch: Batch, config: Config, *, key: Array | None = None, train: bool = False
) -> Float[Array, "B"] | Float[Array, "B tasks"]:
    """Logits, `[B]` for one task: equation 13 before its sigmoid.

    Ids and numbers must be what `check` lets pass; they are not looked at here. A row without behaviours is legal.

    Args:
      params: as of `init`. key: for dropout, which is in training (`train`) only.

    Raises:
      ValueError: more slots than `config.length`, arrays that do not go together, or no key where dropout needs one.
    """
    return ctr.apply(params, *_arranged(batch, config), key=key, train=train)


def objective(
    params: Any,
    output: Float[Array, "B"] | Float[Array, "B tasks"],
    batch: Batch,
    config: Config,
    *,
    key: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], dict[str, losses.Sum]]:
    """Mean binary cross-entropy over impressions and tasks. The aux sums are of the whole batch, over all devices."""
    return ctr.objective(params, output, batch, config, key=key, axis_name=axis_name)


def loss(
    params: Any,
    batch: Batch,
    config: Config,
    *,
    key: Array | None = None,
    train: bool = True,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], dict[str, losses.Sum]]:
    """`objective` of `apply`: what is minimised, and the sums of `rec_core.ranking.ctr.click_sums` by name.

    Args:
      key, train: as for `apply`. axis_name: the mapped axis of `jax.pmap` that the batch is spread over, if any.

    Raises:
      ValueError: as `apply` does.
    """
    return ctr.loss(params, *_arranged(batch, config), key=key, train=train, axis_name=axis_name)


def score(params: Any, batch: Batch, config: Config, *, chunk: int | None = None) -> Float[Array, "B C"]:
    """Logits of C candidates for each request: `[B, C]`, or `[B, C, tasks]` for several tasks.

    Once a request, user and behaviours are embedded and PSRG's weights generated; the personal sequence is made of them
    for all attentions but multi-head, which takes the weights as they are. Multi-head attention never makes values of
    the behaviours. Where queries are few it makes no keys either; where they are many (unchunked) the keys
    `[B, T, heads, width]` are made once for each `chunk` candidates, which share them.

    Where a domain feature reads a field of the candidate (its category, as in the paper's Taobao data), each candidate
    has a sequence of its own, and memory is that of `chunk` sequences.

    Args:
      batch: a request a row: targets `[B, C]`. Ids and numbers must be what `check(batch, config, candidates=True)`
        lets pass; they are not looked at here. Label and weight are not read.
      chunk: candidates at a time, `ads_jax.ADS.at_a_time` if None. Memory grows with it: see `ads_jax.candidates`.

    Raises:
      ValueError: targets are not `[B, C]`, `chunk` is below 1, or as `apply` does.
    """
    chunk = config.make_interest().at_a_time if chunk is None else chunk
    return ctr.score(params, *_arranged(batch, config, candidates=True), chunk=chunk)


def touched(batch: Batch, config: Config) -> dict[str, Int[Array, " n"]]:
    """Rows of each table that the batch reads, by the table's name: those whose gradient may not be zero.

    A row may be there more than once.
    """
    return ctr.touched(batch, config)


def check(batch: Batch, config: Config, *, candidates: bool = False) -> None:
    """ValueError naming field, row and value for what would pass unseen on a device.

    A row without any behaviour is legal, and so is a length that the chunks do not divide.

    Args:
      candidates: the batch is of `score`, a request a row, and not of `apply` (see `rec_core.ranking.ctr.check`).
    """
    slots = check_mask("mask", batch.mask)[1]
    if config.arranged:
        mask = np.asarray(batch.mask)
        wrong = np.flatnonzero((mask[:, :-1] > mask[:, 1:]).any(axis=1))
        if len(wrong):
            raise ValueError(
                f"mask: padding after a behaviour at row {wrong[0]}, and config.arranged is True; put padding first, "
                "or set arranged to False"
            )
    if slots > config.length:
        raise ValueError(f"mask: {slots} slots, config.length is {config.length}; raise it, or cut the oldest")
    ctr.check(batch, config, candidates=candidates)


def _arranged(batch: Batch, config: Config, *, candidates: bool = False) -> tuple[Batch, Config]:
    """The padding first: as ids, which are a small part of the vectors and have no gradient."""
    if config.arranged:
        return batch, config
    ctr.check_shapes(batch, config, candidates=candidates)
    mask = jnp.asarray(batch.mask)
    sequence, time, mask = newest_last(mask, (dict(batch.sequence), batch.time, mask))
    return replace(batch, sequence=sequence, time=time, mask=mask), replace(config, arranged=True)


def example(batch_size: int = 8, seed: int = 0) -> tuple[Config, Batch]:
    """A small config of two tasks, with an explicit and an implicit domain feature, and a valid random batch."""
    length = 6
    config = Config(
        item_features=(Categorical("item", 32, 4),),
        user_features=(Categorical("user", 24, 4),),
        interest="multi_head",
        interest_options=(("heads", 2), ("width", 4)),
        hidden=(8,),
        tasks=2,
        domain_features=(Categorical("scenario", 3, 4), Continuous("active_days", (1.0, 7.0), 4)),
        domain_field="scenario",
        domains=3,
        length=length,
        items=4,
        generator=8,
    )
    draw = np.random.default_rng(seed)

    def ids(low: int, high: int, *shape: int) -> np.ndarray:
        return draw.integers(low, high, (batch_size, *shape)).astype(np.int32)

    mask = np.arange(length) >= ids(0, length, 1)
    clicked, then_bought = ids(0, 2), ids(0, 2)
    return config, Batch(
        user={"user": ids(2, 24)},
        target={"item": ids(2, 32)},
        sequence={"item": np.where(mask, ids(2, 32, length), embedding.PAD)},
        mask=mask,
        context={"scenario": ids(0, 3), "active_days": draw.exponential(5, batch_size).astype(np.float32)},
        label=np.stack([clicked, clicked * then_bought], axis=1).astype(np.float32),
        weight=np.ones(batch_size, np.float32),
    )

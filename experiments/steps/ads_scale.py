"""A click model at the sizes of production, plain and with ADS: features, batches, and states made without training.

What is measured with it is time and memory, which content does not change: ids follow a long-tailed law, weights are
drawn, and no table is ever on the host.
"""

from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import ads_jax
from rec_core import embedding, training
from rec_core.embedding import Categorical, Continuous, Hashed
from rec_core.interest.can import parameters
from rec_core.ranking import ctr
from rec_core.sharding import shardings
from rec_core.training import State, TrainConfig

# Only the rows that a batch reads move; the rate is small, since what is timed must stay finite. Of a batch's items, as
# `make_batch` draws them, .63 are distinct.
TRAIN = TrainConfig(
    steps=1_000_000, learning_rate=1e-5, decay="constant", sparse_tables=True,
    distinct_share=0.65, general_exchange=False, exchange_dtype="bfloat16",
)  # fmt: skip
HEADS, MICRO = 4, (4, 2)
SPREAD = 2_654_435_761  # a prime: rows in no order of popularity, as hashed ids are


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and its batch; those of the docstring of `experiments.ads_cost` by default.

    Attributes:
      items, users, categories: rows of the tables; even, so that two devices split them.
      co_action: rows of CAN's table, which candidates are hashed into.
      batch: examples of a step.
      width: of an item's vector. sides, context: the other fields of a behaviour and those of the moment, each half as
        wide.
      hidden: layers of the dense network. activation: of DIN's MLP. generator: hidden units of PSRG and PCRG.
      dtype: of the computation; parameters, tables and optimizer are float32.
    """

    items: int = 10_000_000
    users: int = 1_000_000
    categories: int = 10_000
    co_action: int = 1_000_000
    batch: int = 4096
    width: int = 32
    hidden: tuple[int, ...] = (1024, 512, 256)
    activation: tuple[int, ...] = (80, 40)
    generator: int = 32
    dtype: str = "bfloat16"
    sides: tuple[str, ...] = ("category", "action")
    context: tuple[str, ...] = ("hour", "position")

    @property
    def behavior(self) -> int:
        """Width of a behaviour's vector."""
        return self.width + self.width // 2 * len(self.sides)

    @property
    def rows(self) -> dict[str, int]:
        """Rows of the table of each field but CAN's."""
        some = {"category": self.categories, "action": 8, "hour": 24, "position": 16, "scenario": 64}
        names = ("item", *self.sides, "user", *self.context, "scenario")
        return {name: ({"item": self.items, "user": self.users} | some)[name] for name in names}


TINY = Sizes(512, 64, 32, 64, 4, 4, (8,), (4,), 4, "float32", (), ())


def model(sizes: Sizes, attention: str, length: int, items: int | None) -> tuple[ModuleType, ctr.Config]:
    """The model under the contract, and its configuration.

    Args:
      attention: "MHA", "DIN" or "CAN".
      length: T. items: neighbouring behaviours that share a query; None for the attention alone.
    """

    def ids(*names: str) -> tuple[Categorical, ...]:
        wide = ("item", "user")
        return tuple(Categorical(n, sizes.rows[n], sizes.width if n in wide else sizes.width // 2) for n in names)

    activity = Continuous("activity", tuple(2.0**i for i in range(13)), sizes.width // 2)
    values: dict[str, Any] = {
        "item_features": ids("item", *sizes.sides),
        "user_features": ids("user"),
        "context_features": ids(*sizes.context),
        "domain_features": (*ids("scenario"), activity),
        "hidden": sizes.hidden,
        "dtype": sizes.dtype,
    }
    if attention == "MHA":
        values |= {"interest": "multi_head", "interest_options": (("heads", HEADS), ("width", sizes.behavior // HEADS))}
    elif attention == "DIN":
        values |= {"interest": "din", "interest_options": (("hidden", sizes.activation),)}
    else:
        co_action = Hashed("item", sizes.co_action, parameters(sizes.behavior, MICRO), hashes=1, table="co_action")
        values |= {"interest": "can", "interest_options": (("hidden", MICRO), ("generate", False))}
        values |= {"query_features": (co_action,)}
    if items is None:
        return ctr, ctr.Config(**values)
    # `make_batch` puts the padding first.
    return ads_jax, ads_jax.Config(**values, length=length, items=items, generator=sizes.generator, arranged=True)


def make_batch(sizes: Sizes, length: int, *, batch: int | None = None, candidates: int = 0, seed: int = 0) -> ctr.Batch:
    """A batch on the host: half to all of the slots hold behaviours, the newest last.

    Args:
      batch: examples, `sizes.batch` by default. candidates: of each request; 0 for one target an example.
    """
    draw, size = np.random.default_rng(seed), batch or sizes.batch
    targets = (size, candidates) if candidates else (size,)

    def ids(names: tuple[str, ...], *shape: int) -> dict[str, np.ndarray]:
        found = {}
        for name in names:
            rank = ((sizes.rows[name] - 2) * draw.random(shape) ** 3).astype(np.int64)  # a few are asked for most
            found[name] = (2 + rank * SPREAD % (sizes.rows[name] - 2)).astype(np.int32)
        return found

    item = ("item", *sizes.sides)
    mask = np.arange(length) >= draw.integers(0, length // 2 + 1, (size, 1))
    return ctr.Batch(
        target=ids(item, *targets),
        sequence={name: np.where(mask, x, embedding.PAD) for name, x in ids(item, size, length).items()},
        mask=mask,
        label=draw.integers(0, 2, size).astype(np.float32),
        weight=np.ones(size, np.float32),
        user=ids(("user",), size),
        context={
            **ids((*sizes.context, "scenario"), size),
            "activity": draw.exponential(200.0, size).astype(np.float32),
        },
    )


def abstract_state(module: ModuleType, config: ctr.Config) -> State:
    """Shapes of the state before the first step; nothing is computed."""
    state: State = jax.eval_shape(partial(training.init_state, module, config, TRAIN))
    return state


def make_state(module: ModuleType, config: ctr.Config, mesh: Mesh, tables: Any = None) -> State:
    """A state of drawn weights, laid out on the mesh.

    Args:
      tables: what `split_state` took from another model's state, instead of new tables and moments.
    """
    shapes = abstract_state(module, config)
    where = shardings(shapes, mesh)
    draw = np.random.default_rng(0)

    def zeros(shape: Any, sharding: Any) -> Any:
        return jnp.zeros(shape.shape, shape.dtype, device=sharding)

    def drawn(shape: Any, sharding: Any) -> Any:
        return jax.device_put((0.05 * draw.standard_normal(shape.shape)).astype(np.float32), sharding)

    def table(shape: Any, sharding: Any) -> Any:
        make = partial(jax.random.uniform, shape=shape.shape, minval=-0.05, maxval=0.05)
        return jax.jit(make, out_shardings=sharding)(jax.random.key(0))

    own = replace(
        jax.tree.map(zeros, replace(shapes, params={}, opt_state={}), replace(where, params={}, opt_state={})),
        diverged=jax.device_put(np.int32(-1), where.diverged),
        params={"net": jax.tree.map(drawn, shapes.params["net"], where.params["net"])},
        opt_state={"whole": jax.tree.map(zeros, shapes.opt_state["whole"], where.opt_state["whole"])},
    )
    if tables is None:
        tables = (
            jax.tree.map(table, shapes.params["tables"], where.params["tables"]),
            jax.tree.map(zeros, shapes.opt_state["tables"], where.opt_state["tables"]),
        )
    return join_state(own, tables)


def split_state(state: State) -> tuple[State, Any]:
    """What is a model's own, and the tables with their moments, which models of the same features can share."""
    tables = (state.params["tables"], state.opt_state["tables"])
    own = replace(state, params={"net": state.params["net"]}, opt_state={"whole": state.opt_state["whole"]})
    return own, tables


def join_state(own: State, tables: Any) -> State:
    """The state that `split_state` took apart."""
    params, moments = tables
    return replace(own, params={**own.params, "tables": params}, opt_state={**own.opt_state, "tables": moments})

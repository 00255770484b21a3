"""How parameters move: the training configuration, the schedule, Optax for the net, lazy Adam for embedding tables.

Lazy Adam updates the rows that a batch reads and nothing else: the moments of the other rows stay as they are, so they
neither decay nor drift on old momentum, where dense Adam would go on moving them. The first step is the same, later
ones are not. The bias correction counts steps of the run, not of a row. It costs time by rows touched, not by rows.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from rec_core.embedding import Rows, scatter_rows, take_rows
from rec_core.sharding import path_name

_OPTIMIZERS = ("adamw", "adafactor")
_DECAYS = ("cosine", "linear", "constant")
_MODES = ("max", "min")
_EXCHANGED = ("float32", "bfloat16")
# Not decayed: tables, and every vector of a net (also where scanned layers stack them into a matrix).
_WHOLE = re.compile(r"(^|/)tables/|norm|(^|/)(bias|scale|embedding)$")


@dataclass(frozen=True)
class EarlyStopping:
    """Stop when ``metric`` (a name that ``evaluate`` returns) has not improved for ``patience`` evaluations."""

    metric: str
    patience: int = 3
    mode: str = "max"

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"early_stopping.patience is {self.patience}: at least 1 evaluation")
        if self.mode not in _MODES:
            raise ValueError(f"early_stopping.mode is {self.mode!r}: one of {_MODES}")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. ``*_every`` count steps; 0 leaves the thing to the end of the run."""

    steps: int
    learning_rate: float = 1e-3
    optimizer: str = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # not on norms, biases and tables
    warmup: int = 0  # steps of linear growth before the decay
    decay: str = "cosine"
    clip: float | None = 1.0  # global norm; None: no clipping
    micro_batches: int = 1  # the batch is computed in so many parts; the numbers are those of the whole
    sparse_tables: bool = False  # lazy Adam on the rows a batch reads; untouched rows keep their value and moments
    distinct_share: float = 1.0  # of a device's ids of a split table, at most; where there are more, a step is slower
    general_exchange: bool = True  # False: where there are more, a run ends as diverged, and no step waits for the host
    exchange_dtype: str = "float32"  # of split tables' rows and gradients on their way between devices
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2  # checkpoints kept
    early_stopping: EarlyStopping | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("optimizer", self.optimizer, _OPTIMIZERS)
        _one_of("decay", self.decay, _DECAYS)
        _one_of("exchange_dtype", self.exchange_dtype, _EXCHANGED)
        for name, least in (("steps", 1), ("micro_batches", 1), ("log_every", 1), ("keep", 1), ("warmup", 0)):
            _at_least(name, getattr(self, name), least)
        for name in ("evaluate_every", "checkpoint_every"):
            _at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}: must be a finite number above 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: must be in [0, 1)")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay is {self.weight_decay}: must be a finite number, 0 or more")
        if not 0 < self.distinct_share <= 1:
            raise ValueError(f"distinct_share is {self.distinct_share}: must be above 0, and at most 1")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}: must be above 0, or None for no clipping")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup} of {self.steps} steps: must be fewer than the steps")


def schedule(train: TrainConfig) -> optax.Schedule:
    """Step (from 0) -> learning rate: a linear warm-up from ``1/(warmup + 1)`` of it, then the decay towards 0."""
    rest = train.steps - train.warmup
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(train.learning_rate, rest),
        "linear": lambda: optax.linear_schedule(train.learning_rate, 0.0, rest),
        "constant": lambda: optax.constant_schedule(train.learning_rate),
    }[train.decay]()
    if not train.warmup:
        return after
    warmup = optax.linear_schedule(train.learning_rate / (train.warmup + 1), train.learning_rate, train.warmup)
    return optax.join_schedules([warmup, after], [train.warmup])


def decayed(params: Any) -> Any:
    """Tree of bools: which parameters weight decay acts on (matrices of the net)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim >= 2 and not _WHOLE.search(path_name(path)), params
    )


def transformation(train: TrainConfig) -> optax.GradientTransformation:
    """The Optax chain for whole parameters, clipping left out (it needs the norm over rows too)."""
    if train.optimizer == "adafactor":
        return optax.chain(
            # Not scaled by the parameter's size (a table that starts near zero would hardly move); gives -direction.
            optax.adafactor(None, multiply_by_parameter_scale=False),
            optax.add_decayed_weights(-train.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(schedule(train), flip_sign=False),
        )
    return optax.adamw(schedule(train), train.b1, train.b2, train.eps, weight_decay=train.weight_decay, mask=decayed)


def init_optimizer(params: Mapping[str, Any], train: TrainConfig) -> dict[str, Any]:
    """Optimizer state: ``whole`` (Optax) and, with ``sparse_tables``, ``tables`` (first and second moments of each).

    A parameter that is None (see `rec_core.partition`) has none.
    """
    if not train.sparse_tables:
        return {"whole": transformation(train).init(params)}
    moments = {
        name: {"mu": jnp.zeros_like(table), "nu": jnp.zeros_like(table)}
        for name, table in params["tables"].items()
        if table is not None
    }
    return {"whole": transformation(train).init(_without_tables(params)), "tables": moments}


def gradient_norm(gradients: Any) -> Float[Array, ""]:
    """Global norm; the ids of `Rows` do not count."""
    return optax.tree.norm([leaf for leaf in jax.tree.leaves(gradients) if jnp.issubdtype(leaf.dtype, jnp.inexact)])


def clip(gradients: Any, norm: Float[Array, ""], limit: float | None) -> Any:
    """Gradients scaled to a global norm of at most ``limit``; the ids of `Rows` stay."""
    if limit is None:
        return gradients
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return jax.tree.map(lambda g: g * scale if jnp.issubdtype(g.dtype, jnp.inexact) else g, gradients)


def update(
    params: Mapping[str, Any],
    gradients: Mapping[str, Any],
    opt_state: Mapping[str, Any],
    train: TrainConfig,
    *,
    step: Int[Array, ""],
    go: Bool[Array, ""] | bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One step of the optimizer; where ``go`` is false everything stays as it was.

    Args:
      gradients: like ``params``; a table's entry may be `Rows`, the gradient of the rows it names (sparse tables).
      step: updates made before this one.
    """

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(go, a, b), new, old)

    whole, whole_gradients = params, gradients
    if train.sparse_tables:
        whole, whole_gradients = _without_tables(params), _without_tables(gradients)
    updates, state = transformation(train).update(whole_gradients, opt_state["whole"], whole)
    new_params = dict(keep(optax.apply_updates(whole, updates), whole))
    new_state: dict[str, Any] = {"whole": keep(state, opt_state["whole"])}
    if not train.sparse_tables:
        return new_params, new_state

    tables: dict[str, Any] = {}
    moments: dict[str, Any] = {}
    for name, table in params["tables"].items():
        if table is None:
            tables[name] = None
            continue
        gradient, moment = gradients["tables"][name], opt_state["tables"][name]
        arrays: tuple[Array, ...] = (table, moment["mu"], moment["nu"])
        if isinstance(gradient, Rows):  # `go` acts on the rows: a choice over the whole table would cost a pass over it
            old = tuple(take_rows(array, gradient.ids) for array in arrays)
            new = keep(_adam(old, gradient.values, train, step), old)
            arrays = tuple(scatter_rows(a, replace(gradient, values=x)) for a, x in zip(arrays, new))
        else:
            arrays = keep(_adam(arrays, gradient, train, step), arrays)
        tables[name], moments[name] = arrays[0], {"mu": arrays[1], "nu": arrays[2]}
    return new_params | {"tables": tables}, new_state | {"tables": moments}


def _adam(arrays: tuple[Array, ...], gradient: Array, train: TrainConfig, step: Int[Array, ""]) -> tuple[Array, ...]:
    values, mu, nu = arrays
    adam = optax.scale_by_adam(train.b1, train.b2, train.eps)
    change, state = adam.update(gradient, optax.ScaleByAdamState(step, mu, nu))
    return values - schedule(train)(step) * change, state.mu, state.nu


def _without_tables(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name != "tables"}


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: one of {allowed}")


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}: must be a whole number of at least {least}")

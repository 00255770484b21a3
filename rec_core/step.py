"""One training step under the contract: gradients of a whole batch in parts, and the step on a mesh or under pmap.

A model is a module with `Config`, `init`, `apply`, `objective`, `touched` and `check`; one that trains a part of its
parameters also has `trainable(params, config)`, a tree of bools: the rest has neither gradient nor optimizer state. The
objective is computed once on the outputs of the whole batch, so in-batch negatives are the same however the batch is
split (as in GradCache, arXiv 2101.06983; here over a mesh too). What must be the same everywhere is the loss and the
first gradient; dropout draws other masks for other splits.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt32

from rec_core import exchange, optimizers, partition
from rec_core.embedding import Rows, gather_rows
from rec_core.optimizers import TrainConfig
from rec_core.sharding import batch_sharding, constrain, replicated, shardings


@struct.dataclass
class State:
    """What a run carries from step to step. ``diverged`` is -1, or the step whose loss or gradient was not finite:
    from there on no update is applied, so ``params`` stay those of the last finite step."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    diverged: Int[Array, ""]
    seed: UInt32[Array, ""]  # here and not in the compiled step, so that runs of several seeds share it


def value_and_grad(
    model: Any,
    params: Any,
    batch: Any,
    config: Any,
    *,
    key: Array | None = None,
    micro_batches: int = 1,
    axis_name: str | None = None,
) -> tuple[tuple[Float[Array, ""], dict[str, Any]], Any]:
    """``((loss, aux), gradients)`` of the whole batch; None in place of the gradient of what is not trained.

    With ``micro_batches`` n the outputs of all parts are computed first, the objective once, and the gradient is
    carried back through one part at a time: the memory of the layers is that of B / n examples. Part j takes examples
    j, j + n, ...: each part stays balanced over the data axis. Under ``axis_name`` loss, aux and gradients are the
    means over the axis (an objective that sums over the axis gives the same on each device already); only the gradients
    of `Rows`, which name other rows on each device, stay the device's part of that mean.

    Args:
      params: may hold `Rows` in place of tables. Gradients are like ``params``; leaves of integers come back as given.
      key: `apply` sees it folded with the part and the device, `objective` as it is.

    Raises:
      ValueError: the batch is not a multiple of ``micro_batches``.
    """
    leaves, tree = jax.tree.flatten(params)
    trained = jax.tree.leaves(_trainable(model, params, config))
    where = [i for i, leaf in enumerate(leaves) if trained[i] and jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def put(values: list[Array]) -> Any:
        found = dict(zip(where, values))
        return jax.tree.unflatten(tree, [found.get(i, leaf) for i, leaf in enumerate(leaves)])

    values = [leaves[i] for i in where]
    apply_key = key
    if key is not None and axis_name is not None:
        apply_key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    def forward(values: list[Array], part: Any, j: Array | None = None) -> Any:
        part_key = apply_key if apply_key is None or j is None else jax.random.fold_in(apply_key, j)
        return model.apply(put(values), part, config, key=part_key, train=True)

    def objective(values: list[Array], output: Any) -> Any:
        return model.objective(put(values), output, batch, config, key=key, axis_name=axis_name)

    if micro_batches == 1:
        (loss, aux), gradients = jax.value_and_grad(lambda v: objective(v, forward(v, batch)), has_aux=True)(values)
    else:
        parts = (_split(batch, micro_batches), jnp.arange(micro_batches))
        output = _merge(jax.lax.map(lambda part: forward(values, *part), parts))
        (loss, aux), (direct, cotangent) = jax.value_and_grad(objective, (0, 1), has_aux=True)(values, output)

        def back(total: list[Array], item: Any) -> tuple[list[Array], None]:
            part, part_cotangent = item
            _, pull = jax.vjp(lambda v: forward(v, *part), values)
            return jax.tree.map(jnp.add, total, pull(part_cotangent)[0]), None

        gradients, _ = jax.lax.scan(back, direct, (parts, _split(cotangent, micro_batches)))
    gradients = partition.split(put(gradients), jax.tree.unflatten(tree, trained))[0]
    if axis_name is None:
        return (loss, aux), gradients
    return jax.lax.pmean((loss, aux), axis_name), _mean_gradients(gradients, axis_name)


def _mean_gradients(gradients: Any, axis_name: str) -> Any:
    """Means over the axis; of `Rows` this device's part of them."""
    devices = jax.lax.axis_size(axis_name)

    def mean(leaf: Any) -> Any:
        if _is_rows(leaf):
            return jax.tree.map(lambda x: x / devices if jnp.issubdtype(x.dtype, jnp.inexact) else x, leaf)
        return jax.lax.pmean(leaf, axis_name) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree.map(mean, gradients, is_leaf=_is_rows)


def _is_rows(x: Any) -> bool:
    return isinstance(x, Rows)


def _trainable(model: Any, params: Any, config: Any) -> Any:
    """Tree of bools: what a step moves."""
    return model.trainable(params, config) if hasattr(model, "trainable") else jax.tree.map(lambda _: True, params)


def init_state(
    model: Any, config: Any, train: TrainConfig, params: Any = None, *, seed: UInt32[Array, ""] | None = None
) -> State:
    """The state before the first step, from ``seed`` (default ``train.seed``) or from given parameters. Pure."""
    seed = jnp.uint32(train.seed) if seed is None else seed
    if params is None:
        params = model.init(step_key(seed, 2**32 - 1), config)
    zero = jnp.zeros((), jnp.int32)
    moved, _ = partition.split(params, _trainable(model, params, config))
    return State(zero, params, optimizers.init_optimizer(moved, train), zero - 1, seed)


def step_key(seed: int | UInt32[Array, ""], step: int | Int[Array, ""]) -> Array:
    """The key that a step draws with: a function of the seed and the step, so a run that resumes draws the same."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_step(model: Any, config: Any, train: TrainConfig, mesh: Mesh | AbstractMesh) -> Any:
    """The jitted ``(state, batch) -> (state, metrics)`` on a mesh; ``state`` is donated.

    Metrics: ``loss``, ``gradient_norm`` (before clipping), ``learning_rate``, ``diverged``, and ``aux`` as the model
    gave it. Parameters, optimizer state and gradients are laid out by `rec_core.sharding.RULES`, the batch by example.
    Calls that differ in nothing the step computes (seed, logging, saving) get the same function: it is compiled once.
    """
    return _jitted_step(model, config, computed(train), mesh)


def computed(train: TrainConfig) -> TrainConfig:
    """What of a configuration enters the compiled step; the rest is set to its default."""
    return replace(train, seed=0, log_every=1, evaluate_every=0, checkpoint_every=0, keep=1, early_stopping=None)


@lru_cache(maxsize=16)
def jitted_init(model: Any, config: Any, train: TrainConfig, mesh: Mesh) -> Any:
    out = shardings(jax.eval_shape(partial(init_state, model, config, train)), mesh)
    return jax.jit(lambda seed: init_state(model, config, train, seed=seed), out_shardings=out)


@lru_cache(maxsize=16)
def _jitted_step(model: Any, config: Any, train: TrainConfig, mesh: Mesh | AbstractMesh) -> Any:
    state_shardings = shardings(jax.eval_shape(partial(init_state, model, config, train)), mesh)

    def step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        with jax.sharding.use_abstract_mesh(mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh):
            return advance(model, config, train, state, batch, mesh=mesh)

    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )


def pmap_step(model: Any, config: Any, train: TrainConfig) -> Any:
    """The same per-device step under `jax.pmap`: ``(state, batch [devices, B / devices, ...]) -> (state, metrics)``.

    The state goes in and comes out whole (every device holds all of it).
    """
    step = partial(advance, model, config, train, axis_name="data")
    return jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None)


def advance(
    model: Any,
    config: Any,
    train: TrainConfig,
    state: State,
    batch: Any,
    *,
    axis_name: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[State, dict[str, Any]]:
    """One step, pure: what `make_step` and `pmap_step` compile, for loops of one's own (a scan over steps, a vmap over
    seeds). Metrics as in `make_step`; ``mesh`` lays the gradients out.

    With ``sparse_tables``, on a mesh that splits the examples alone, each device works for its own: rows travel from
    their owners and gradients to them (`rec_core.exchange`). Else the compiler is left to split the whole.
    """
    if mesh is not None and axis_name is None and _apart(model, config, train, state, batch, mesh):
        return _advance_apart(model, config, train, state, batch, mesh)
    return _advance(model, config, train, state, batch, axis_name=axis_name, mesh=mesh)


def _apart(model: Any, config: Any, train: TrainConfig, state: State, batch: Any, mesh: Mesh | AbstractMesh) -> bool:
    """Whether each device can do the step for its own examples: they divide, and no split table is read whole."""
    data = mesh.shape["data"]
    if not train.sparse_tables or data == 1 or data != mesh.size:
        return False
    if any(leaf.shape[0] % (data * train.micro_batches) for leaf in jax.tree.leaves(batch)):
        return False
    return _split_tables(state, mesh) <= jax.eval_shape(lambda batch: model.touched(batch, config), batch).keys()


def _split_tables(state: State, mesh: Mesh | AbstractMesh) -> frozenset[str]:
    """Names of the tables whose rows are split over the mesh."""
    where = shardings({"tables": state.params["tables"]}, mesh)["tables"]
    return frozenset(name for name, sharding in where.items() if not sharding.is_fully_replicated)


def _advance_apart(
    model: Any, config: Any, train: TrainConfig, state: State, batch: Any, mesh: Mesh | AbstractMesh
) -> tuple[State, dict[str, Any]]:
    split = _split_tables(state, mesh)

    def step(state: State, batch: Any) -> Any:
        plans = {
            name: exchange.plan(
                state.params["tables"][name],
                ids,
                "data",
                split=name in split,
                distinct_share=train.distinct_share,
                dtype=train.exchange_dtype,
            )
            for name, ids in model.touched(batch, config).items()
        }
        own = partial(_advance, model, config, train, state, batch, axis_name="data", split=split, plans=plans)
        fits = exchange.fits([plans[name] for name in split], "data")
        if fits is None or not train.general_exchange:
            return own(scant=fits is not None)
        return jax.lax.cond(fits, partial(own, scant=True), own)

    where = jax.tree.map(lambda sharding: sharding.spec, shardings(state, mesh))
    given, made = (where, batch_sharding(mesh).spec), (where, P())
    # Replication is not checked: as under pmap, the transpose of a sum over the axis is then a sum, on which the means
    # of `value_and_grad` rest.
    return jax.shard_map(step, mesh=mesh, in_specs=given, out_specs=made, check_vma=False)(state, batch)


def _advance(
    model: Any,
    config: Any,
    train: TrainConfig,
    state: State,
    batch: Any,
    *,
    axis_name: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    split: frozenset[str] = frozenset(),
    plans: Mapping[str, exchange.Plan] | None = None,
    scant: bool = False,
) -> tuple[State, dict[str, Any]]:
    """`advance`, under ``axis_name`` on one device's examples; the tables named by ``split`` are its part of them, and
    ``plans`` say what it reads of which table (`exchange.read`, as ``scant``)."""
    key = step_key(state.seed, state.step)
    params = state.params
    moved, rest = partition.split(params, _trainable(model, params, config))
    routes = {}
    if train.sparse_tables:
        rows: dict[str, Any] = {}
        for name, ids in model.touched(batch, config).items():
            table = params["tables"][name]
            if moved["tables"][name] is None and name not in split:
                continue  # frozen and all here: read as it is
            if axis_name is None:
                rows[name] = gather_rows(table, constrain(ids, P()))
            else:
                own = plans[name] if plans else exchange.plan(table, ids, axis_name, split=False)
                rows[name], routes[name] = exchange.read(table, own, axis_name, split=name in split, scant=scant)
        params = {**params, "tables": {**params["tables"], **rows}}
    (loss, aux), gradients = value_and_grad(
        model, params, batch, config, key=key, micro_batches=train.micro_batches, axis_name=axis_name
    )
    if mesh is not None:
        gradients = _lay_out(gradients, mesh)
    if axis_name is None:
        norm = optimizers.gradient_norm(gradients)
    else:
        combined = {
            name: exchange.combine(gradients["tables"][name], route, table, axis_name)
            for name, route in routes.items()
            if (table := moved["tables"][name]) is not None
        }
        gradients = {**gradients, "tables": {**gradients["tables"], **combined}}
        norm = exchange.global_norm(gradients, axis_name, split)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    go = finite & (state.diverged < 0)
    moved, opt_state = optimizers.update(
        moved,
        optimizers.clip(gradients, norm, train.clip),
        state.opt_state,
        train,
        step=state.step,
        go=go,
    )
    diverged = jnp.where((state.diverged < 0) & ~finite, state.step, state.diverged)
    metrics = {
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": optimizers.schedule(train)(state.step),
        "diverged": diverged,
        "aux": aux,
    }
    params = partition.join(moved, rest)
    return State(state.step + go.astype(jnp.int32), params, opt_state, diverged, state.seed), metrics


def _lay_out(gradients: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Gradients where their parameters are; the few `Rows` of a sparse table on every device."""

    def place(sharding: Any, leaf: Any) -> Any:
        return leaf if _is_rows(leaf) else jax.lax.with_sharding_constraint(leaf, sharding)

    flat, tree = jax.tree.flatten(gradients, is_leaf=_is_rows)
    whole = jax.tree.map(lambda x: x.ids if _is_rows(x) else x, gradients, is_leaf=_is_rows)
    return jax.tree.unflatten(tree, map(place, jax.tree.leaves(shardings(whole, mesh)), flat))


def _split(tree: Any, n: int) -> Any:
    """[B, ...] -> [n, B / n, ...]; part j is examples j, j + n, ..."""

    def split(x: Array) -> Array:
        if x.shape[0] % n:
            raise ValueError(f"batch of {x.shape[0]} examples cannot be cut into {n} micro_batches: make it a multiple")
        return constrain(x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), P(None, "data"))

    return jax.tree.map(split, tree)


def _merge(tree: Any) -> Any:
    """[n, B / n, ...] -> [B, ...], the inverse of `_split`."""
    return jax.tree.map(lambda x: constrain(x.swapaxes(0, 1).reshape(-1, *x.shape[2:])), tree)

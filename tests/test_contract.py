"""Every model, found by itself, is held to the contract: pure functions whose numbers do not depend on how they run.

"Same numbers" is f32: 1e-5 relative on the loss, 1e-4 on the first step's gradients. Parameters after Adam are never
compared where the gradient is rounding noise, since Adam turns noise into steps of full size.
"""

import dataclasses
import functools
import importlib
import pkgutil
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rival_models
import toy_model
from jax.sharding import AbstractMesh, AxisType, Mesh

from rec_core import optimizers
from rec_core.ranking.networks import NETWORKS
from rec_core.sharding import AXES, make_mesh, path_name, put_batch, shardings
from rec_core.training import TrainConfig, init_state, make_step, step_key, value_and_grad

PACKAGES = ("rec_core", "ads_jax", "lum_jax", "sim_jax", "bahe_jax")
FACE = ("Config", "init", "apply", "objective", "loss", "touched", "check", "example")
BATCH = 16
TRAIN = TrainConfig(steps=10, clip=None)
KEY = step_key(TRAIN.seed, 0)  # what the first step draws with


def discover(packages: tuple[str, ...]) -> list[types.ModuleType]:
    """Modules with the contract's face, each model once (a package may re-export its module's functions)."""
    found: dict[Any, types.ModuleType] = {}
    for package in packages:
        root = importlib.import_module(package)
        names = [package, *(info.name for info in pkgutil.walk_packages(root.__path__, package + "."))]
        for name in sorted(names, key=lambda name: (name.count("."), name)):
            if name.endswith("__main__"):
                continue
            module = importlib.import_module(name)
            if all(callable(getattr(module, part, None)) for part in FACE):
                found.setdefault((module.init, module.apply), module)
    return list(found.values())


MODELS = discover(PACKAGES)
TOY: Any = toy_model  # holds the suite itself to something that is small and has every trait
# By module scope: all tests of a model stand together, so two workers seldom compute the same case.
each_model = pytest.mark.parametrize("model", [TOY, *MODELS], ids=lambda model: model.__name__, scope="module")


class Traced:
    """A model whose `init` is jitted: traced once, however many tests ask for its shapes or its values."""

    def __init__(self, model: Any) -> None:
        vars(self).update({name: getattr(model, name) for name in FACE})
        self.init = jax.jit(model.init, static_argnums=1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model's example and the numbers to agree with: jit on one device, the whole batch at once."""

    model: Any
    config: Any
    batch: Any
    params: Any
    compute: Any
    loss: float
    aux: Any
    gradients: Any  # on the host, as all that is compared: JAX would compile each small operation for each shape
    norm: float


@functools.cache
def case(model: Any) -> Case:
    config, batch = example(model, BATCH)
    traced = Traced(model)
    params = traced.init(jax.random.key(0), config)
    compute = jax.jit(lambda params, batch: value_and_grad(model, params, batch, config, key=KEY))
    (loss, aux), gradients = jax.device_get(compute(params, batch))
    norm = np.sqrt(sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in jax.tree.leaves(gradients)))
    assert np.isfinite(loss), "the example's loss is not finite"
    assert norm > 0, "the example has no gradient: the comparisons would be empty"
    return Case(traced, config, batch, params, compute, float(loss), aux, gradients, norm)


def example(model: Any, size: int) -> tuple[Any, Any]:
    """The model's example without dropout, whose masks may depend on the split."""
    config, batch = model.example(batch_size=size, seed=0)
    if getattr(config, "dropout", 0):
        config = dataclasses.replace(config, dropout=0.0)
    return config, batch


def one_step(known: Case, mesh: Mesh, train: TrainConfig, moments: Any = None) -> tuple[Any, Any]:
    """State and metrics after the first step; everything stays where the rules put it.

    `moments` are the optimizer's of the tables, with `sparse_tables`, in the place of zeros.
    """

    def begin(params: Any) -> Any:  # in arrays of its own, since the step donates them
        state = init_state(known.model, known.config, train, jax.tree.map(jnp.copy, params))
        return state if moments is None else state.replace(opt_state={**state.opt_state, "tables": moments})

    wanted = shardings(jax.eval_shape(begin, known.params), mesh)
    state = jax.jit(begin, out_shardings=wanted)(known.params)
    state, metrics = make_step(known.model, known.config, train, mesh)(state, put_batch(known.batch, mesh))
    for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(wanted)):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim), path_name(path)
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert split, "nothing is split: give the example a table of a multiple of 8 rows"
    return jax.device_get((state, metrics))


def assert_same(known: Case, loss: Any, gradients: Any) -> None:
    np.testing.assert_allclose(float(loss), known.loss, rtol=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(known.gradients))
    assert jax.tree.structure(gradients) == jax.tree.structure(known.gradients)
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(known.gradients), jax.tree.leaves(gradients)):
        want, got = np.asarray(want), np.asarray(got)
        # A gradient that is zero but for rounding (a bias that cancels) is held to the scale of the others.
        atol = 1e-4 * np.abs(want).max() + 1e-6 * scale
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=atol, err_msg=path_name(path))


def assert_same_aux(known: Case, aux: Any) -> None:
    """Aux is (sum, weight): its mean must agree (under pmap the sums may be of one device or of all)."""
    assert aux.keys() == known.aux.keys()
    for name, (total, weight) in known.aux.items():
        want = float(total) / max(float(weight), 1e-30)
        np.testing.assert_allclose(float(aux[name][0]) / max(float(aux[name][1]), 1e-30), want, rtol=1e-4, atol=1e-6)


def first_gradients(state: Any) -> Any:
    """The gradient that Adam saw, from its first moments after one step."""
    whole = state.opt_state["whole"][0].mu
    tables = {name: moments["mu"] for name, moments in state.opt_state.get("tables", {}).items()}
    moments = {**whole, "tables": {**whole.get("tables", {}), **tables}}
    return jax.tree.map(lambda mu: mu / (1 - TRAIN.b1), moments)


def test_models_are_found() -> None:
    assert MODELS, f"no module in {PACKAGES} has {FACE}"


@pytest.mark.portable
def test_discovery_finds_each_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    face = "".join(f"def {name}(*a, **k): ...\n" for name in FACE)
    package = tmp_path / "fake_models"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("from fake_models.inner.model import " + ", ".join(FACE) + "\n")
    (package / "inner" / "model.py").write_text(face)
    (package / "other.py").write_text(face)
    (package / "half.py").write_text("def init(): ...\ndef apply(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [module.__name__ for module in discover(("fake_models",))] == ["fake_models.inner", "fake_models.other"]


@each_model
def test_init_is_pure_and_abstract(model: Any) -> None:
    known = case(model)
    again = known.model.init(jax.random.key(0), known.config)
    other = known.model.init(jax.random.key(1), known.config)
    shapes = jax.eval_shape(lambda key: model.init(key, known.config), jax.random.key(0))
    assert set(known.params) == {"tables", "net"}
    assert jax.tree.structure(shapes) == jax.tree.structure(known.params)
    for leaf, same, shape in zip(*map(jax.tree.leaves, (known.params, again, shapes))):
        assert leaf.dtype == shape.dtype == jnp.float32, "parameters are float32, whatever the compute dtype"
        assert leaf.shape == shape.shape
        np.testing.assert_array_equal(leaf, same)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(known.params), jax.tree.leaves(other)))
    assert all(table.ndim == 2 for table in known.params["tables"].values())


@each_model
def test_config_and_batch(model: Any) -> None:
    known = case(model)
    assert hash(known.config) == hash(dataclasses.replace(known.config))
    assert all(leaf.shape[0] == BATCH for leaf in jax.tree.leaves(known.batch))
    _, other = model.example(batch_size=BATCH, seed=1)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(known.batch), jax.tree.leaves(other)))


@each_model
def test_outputs_are_floats_by_example(model: Any) -> None:
    known = case(model)
    output = jax.eval_shape(
        lambda params, batch: model.apply(params, batch, known.config, key=KEY, train=True), known.params, known.batch
    )
    assert jax.tree.leaves(output)
    for path, leaf in jax.tree_util.tree_leaves_with_path(output):
        assert jnp.issubdtype(leaf.dtype, jnp.floating), path_name(path)
        assert leaf.shape[:1] == (BATCH,), path_name(path)


@each_model
def test_loss_without_jit_is_the_objective_of_the_outputs(model: Any) -> None:
    known = case(model)
    loss, aux = model.loss(known.params, known.batch, known.config, key=KEY)
    np.testing.assert_allclose(float(loss), known.loss, rtol=1e-5)
    assert_same_aux(known, aux)
    again = known.compute(known.params, known.batch)[0][0]
    assert float(again) == known.loss, "the same call gave another number: the model has a state"


def run_pmap(known: Case) -> tuple[Any, Any, Any]:
    devices = jax.device_count()
    assert devices == 8
    parts = jax.tree.map(lambda x: np.asarray(x).reshape(devices, -1, *x.shape[1:]), known.batch)

    def run(params: Any, batch: Any) -> Any:
        return value_and_grad(known.model, params, batch, known.config, key=KEY, axis_name="data")

    (loss, aux), gradients = jax.pmap(run, axis_name="data", in_axes=(None, 0))(known.params, parts)
    assert len(set(np.asarray(loss).tolist())) == 1
    one = jax.tree.map(lambda x: np.asarray(x)[0], (loss, aux, gradients))
    return one


@each_model
def test_pmap(model: Any) -> None:
    known = case(model)
    loss, aux, gradients = run_pmap(known)
    assert_same(known, loss, gradients)
    assert_same_aux(known, aux)


@pytest.mark.parametrize(
    ("model", "data", "width", "micro_batches"),
    [(TOY, 1, 8, 4), *((model, 4, 2, 2) for model in (TOY, *MODELS))],
    ids=lambda value: getattr(value, "__name__", None),
    scope="module",
)
def test_mesh(model: Any, data: int, width: int, micro_batches: int) -> None:
    """Loss and gradients of one device and the whole batch."""
    known = case(model)
    train = dataclasses.replace(TRAIN, micro_batches=micro_batches)
    state, metrics = one_step(known, make_mesh(data, width), train)
    assert_same(known, metrics["loss"], first_gradients(state))
    assert_same_aux(known, metrics["aux"])


@each_model
def test_lowers_for_a_large_mesh(model: Any) -> None:
    mesh = AbstractMesh((64, 8), AXES, axis_types=(AxisType.Auto,) * 2)
    config, batch = example(model, 64)
    model = case(model).model
    state = jax.eval_shape(lambda: init_state(model, config, TRAIN))
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    text = make_step(model, config, TRAIN, mesh).trace(state, batch).lower(lowering_platforms=("tpu",)).as_text()
    assert '"data"=64, "model"=8' in text


@each_model
def test_examples_of_weight_zero_do_not_matter(model: Any) -> None:
    known = case(model)
    if not hasattr(known.batch, "weight"):
        assert "weight" not in {field.name for field in dataclasses.fields(known.batch)}
        return
    half = np.arange(BATCH) % 2 == 0
    weight = np.asarray(known.batch.weight)
    shape = (BATCH, *(1,) * (weight.ndim - 1))
    padded = known.batch.replace(weight=np.where(half.reshape(shape), weight, 0).astype(weight.dtype))

    def refill(leaf: Any) -> Any:  # the padding holds other examples
        leaf = np.asarray(leaf)
        return np.where(half.reshape(BATCH, *(1,) * (leaf.ndim - 1)), leaf, np.roll(leaf, 2, axis=0))

    other = jax.tree.map(refill, padded).replace(weight=padded.weight)
    (loss, _), gradients = known.compute(known.params, padded)
    (loss_other, _), gradients_other = known.compute(known.params, other)
    assert float(loss) != known.loss
    assert_same(dataclasses.replace(known, loss=float(loss), gradients=gradients), loss_other, gradients_other)


@each_model
def test_check_accepts_the_example_and_rejects_what_would_go_wrong(model: Any) -> None:
    known = case(model)
    model.check(known.batch, known.config)
    rows = {name: table.shape[0] for name, table in known.params["tables"].items()}
    leaves, tree = jax.tree.flatten(known.batch)
    bad_ids = 0
    for i, leaf in enumerate(leaves):
        leaf = np.asarray(leaf)
        integer = np.issubdtype(leaf.dtype, np.integer)
        for value in (10**8, -5) if integer else (np.nan,):
            if not integer and not np.issubdtype(leaf.dtype, np.floating):
                continue
            wrong = tree.unflatten([np.full_like(x, value) if j == i else x for j, x in enumerate(leaves)])
            if integer:
                read = model.touched(wrong, known.config)
                harmful = any(
                    ((np.asarray(ids) < 0) | (np.asarray(ids) >= rows[name])).any() for name, ids in read.items()
                )
                bad_ids += harmful
            else:
                harmful = not np.isfinite(known.compute(known.params, wrong)[0][0])
            if harmful:
                with pytest.raises(ValueError):
                    model.check(wrong, known.config)
    assert bad_ids, "no corrupted field leads outside of a table: the test is empty"


@each_model
def test_sparse_first_step_is_the_dense_one(model: Any) -> None:
    """Lazy Adam moves the rows that a batch reads as Adam would, and no other; `touched` names every row read.

    On a mesh that splits the model alone: the numbers are those of dense tables on one device.
    """
    known = case(model)
    state, metrics = one_step(known, make_mesh(1, 8), dataclasses.replace(TRAIN, sparse_tables=True))
    assert_same(known, metrics["loss"], first_gradients(state))
    assert_same_aux(known, metrics["aux"])
    np.testing.assert_allclose(metrics["gradient_norm"], known.norm, rtol=1e-4)
    tables, gradients = ({"tables": tree["tables"], "net": {}} for tree in (known.params, known.gradients))
    dense = jax.jit(
        lambda params, gradients: optimizers.update(
            params, gradients, optimizers.init_optimizer(params, TRAIN), TRAIN, step=jnp.int32(0)
        )[0]
    )(tables, gradients)
    touched = model.touched(known.batch, known.config)
    assert touched.keys() <= known.params["tables"].keys()
    for name, table in known.params["tables"].items():
        table, gradient = np.asarray(table), known.gradients["tables"][name]
        large = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
        moved, want = state.params["tables"][name], np.asarray(dense["tables"][name])
        np.testing.assert_allclose(moved[large], want[large], rtol=1e-5, atol=1e-7)
        if name in touched:
            left = np.setdiff1d(np.arange(len(table)), np.asarray(touched[name]))
            np.testing.assert_array_equal(moved[left], table[left])
            np.testing.assert_array_equal(gradient[left], 0)


@pytest.mark.parametrize(
    ("model", "data", "width"),
    [(TOY, 8, 1), *((model, 1, 8) for model in (TOY, *MODELS))],
    ids=lambda value: getattr(value, "__name__", None),
    scope="module",
)
def test_sparse_step_leaves_rows_and_moments_that_the_batch_does_not_read(model: Any, data: int, width: int) -> None:
    """Bit for bit, where there are moments to decay; those that it reads move as Adam would move them."""
    known, draw = case(model), np.random.default_rng(0)
    tables, gradients = ({"tables": jax.device_get(tree["tables"])} for tree in (known.params, known.gradients))
    scale = {name: np.abs(x).max() + np.float32(1e-6) for name, x in gradients["tables"].items()}
    moments = {
        name: {"mu": scale[name] * drawn, "nu": (scale[name] * drawn) ** 2 + scale[name] ** 2}
        for name, x in tables["tables"].items()
        for drawn in [draw.normal(size=x.shape).astype(np.float32)]
    }
    state, _ = one_step(known, make_mesh(data, width), dataclasses.replace(TRAIN, sparse_tables=True), moments)

    adam, *rest = optimizers.init_optimizer(tables, TRAIN)["whole"]
    mu, nu = ({"tables": {name: x[part] for name, x in moments.items()}} for part in ("mu", "nu"))
    dense, known_state = jax.jit(functools.partial(optimizers.update, train=TRAIN, step=jnp.int32(0)))(
        tables, gradients, {"whole": (adam._replace(mu=mu, nu=nu), *rest)}
    )
    alone = 0
    for name, ids in model.touched(known.batch, known.config).items():
        read = np.unique(ids)
        left = np.setdiff1d(np.arange(len(tables["tables"][name])), read)
        alone += len(left)
        before = {"table": tables["tables"][name], **moments[name]}
        after = {"table": state.params["tables"][name], **state.opt_state["tables"][name]}
        adam = known_state["whole"][0]
        wanted = {"table": dense["tables"][name], "mu": adam.mu["tables"][name], "nu": adam.nu["tables"][name]}
        for part, x in after.items():
            where = f"{name}, {part}"
            np.testing.assert_array_equal(x[left], before[part][left], err_msg=where)
            assert (x[read] != before[part][read]).any(axis=1).all(), where
            np.testing.assert_allclose(
                x[read], wanted[part][read], rtol=1e-4, atol=1e-5 * np.abs(wanted[part]).max(), err_msg=where
            )
    assert alone, "the batch reads all rows of all tables: the test is empty"


@pytest.mark.parametrize("model", rival_models.RIVALS, ids=lambda model: model.__name__, scope="module")
def test_networks_and_gates(model: Any) -> None:
    """The click model's networks and gates under pmap, and on a mesh in micro-batches with sparse tables."""
    known = case(model)
    for path, gradient in jax.tree_util.tree_leaves_with_path(known.gradients["net"]):
        assert np.abs(gradient).max() > 1e-7, f"nothing is compared: no gradient at {path_name(path)}"
    loss, aux, gradients = run_pmap(known)
    assert_same(known, loss, gradients)
    assert_same_aux(known, aux)
    train = dataclasses.replace(TRAIN, micro_batches=2, sparse_tables=True)
    state, metrics = one_step(known, make_mesh(4, 2), train)
    assert_same(known, metrics["loss"], first_gradients(state))
    assert_same_aux(known, metrics["aux"])


def test_the_suite_notices_a_network_that_reads_other_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["mlr"]
    logits = network.logits

    def centered(self: Any, inputs: Any, deterministic: bool) -> Any:  # as a batch norm would
        made = logits(self, inputs, deterministic)
        return made - made.mean(axis=0)

    monkeypatch.setattr(network, "logits", centered)
    known = case(rival_models.rival("centered", {"network": "mlr"}))
    loss, _, gradients = run_pmap(known)
    with pytest.raises(AssertionError):
        assert_same(known, loss, gradients)


def test_the_suite_notices_a_loss_that_is_averaged_by_device() -> None:
    """A mean of means is not the mean: with unequal weights pmap must not pass."""

    def objective(params: Any, output: Any, batch: Any, config: Any, **kwargs: Any) -> Any:
        kwargs["axis_name"] = None
        return TOY.objective(params, output, batch, config, **kwargs)

    known = case(TOY)
    broken = types.SimpleNamespace(**vars(TOY) | {"objective": objective})
    loss, _, gradients = run_pmap(dataclasses.replace(known, model=broken))
    with pytest.raises(AssertionError):
        assert_same(known, loss, gradients)

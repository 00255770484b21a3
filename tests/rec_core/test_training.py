"""The step and `fit` on a toy model; that a model's numbers do not depend on the mesh is the contract suite's."""

import dataclasses
import itertools
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_model

from rec_core import optimizers
from rec_core.checkpoint import CheckpointError, Checkpoints, restore_params
from rec_core.sharding import make_mesh, put_batch
from rec_core.training import (
    DivergedError,
    EarlyStopping,
    TrainConfig,
    fit,
    init_state,
    make_step,
    pmap_step,
    value_and_grad,
)

CONFIG, BATCH = toy_model.example(batch_size=16)
TRAIN = TrainConfig(steps=6, learning_rate=1e-2, log_every=1)


def batches(start: int = 0) -> Iterator[Any]:
    for i in itertools.count(start):
        yield toy_model.make_batch(np.random.default_rng(i), 16, CONFIG)


def losses(history: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in history if "loss" in record]


def test_schedule() -> None:
    train = TrainConfig(steps=8, learning_rate=1.0, warmup=3, decay="linear")
    got = [float(optimizers.schedule(train)(i)) for i in range(9)]
    np.testing.assert_allclose(got, [0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-6)
    constant = optimizers.schedule(dataclasses.replace(train, decay="constant", warmup=0))
    assert float(constant(0)) == float(constant(99)) == 1
    cosine = optimizers.schedule(dataclasses.replace(train, decay="cosine", warmup=0))
    np.testing.assert_allclose([cosine(0), cosine(4), cosine(8)], [1, 0.5, 0], atol=1e-6)


def test_weight_decay_spares_norms_biases_and_tables() -> None:
    params = jax.eval_shape(lambda: toy_model.init(jax.random.key(0), CONFIG))
    params["net"]["layers"] = {
        "norm": {"scale": jnp.ones((3, 8))},
        "up": {"kernel": jnp.ones((3, 8, 8)), "bias": jnp.ones((3, 8))},
    }
    found = {path for path, yes in jax.tree_util.tree_leaves_with_path(optimizers.decayed(params)) if yes}
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path in found}
    assert names == {"net/params/gate/kernel", "net/params/down/kernel", "net/layers/up/kernel"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd': one of"),
        ({"decay": "step"}, "decay is 'step'"),
        ({"micro_batches": 0}, "micro_batches is 0"),
        ({"warmup": 6}, "warmup is 6 of 6 steps"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"b2": 1.0}, r"b2 is 1.0: must be in \[0, 1\)"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAIN, **change)


@pytest.mark.portable
def test_micro_batches_are_the_whole_batch_and_keep_the_data_axis_balanced() -> None:
    params = toy_model.init(jax.random.key(0), CONFIG)
    whole, parts = (
        jax.jit(lambda p, b, n=n: value_and_grad(toy_model, p, b, CONFIG, key=jax.random.key(1), micro_batches=n))
        for n in (1, 4)
    )
    (loss, _), gradients = whole(params, BATCH)
    (loss_parts, _), gradients_parts = parts(params, BATCH)
    np.testing.assert_allclose(loss_parts, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_parts)):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="batch of 16 examples cannot be cut into 3 micro_batches"):
        jax.eval_shape(lambda p: value_and_grad(toy_model, p, BATCH, CONFIG, micro_batches=3), params)


def test_pmap_step_gives_the_steps_of_the_mesh() -> None:
    """Sparse tables included; plain numbers are compared, since only the moments are free of Adam's noise."""
    train = dataclasses.replace(TRAIN, sparse_tables=True)
    parts = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), BATCH)
    state, metrics = pmap_step(toy_model, CONFIG, train)(init_state(toy_model, CONFIG, train), parts)
    mesh = make_mesh(4, 2)
    one, wanted = make_step(toy_model, CONFIG, train, mesh)(
        init_state(toy_model, CONFIG, train), put_batch(BATCH, mesh)
    )
    for name in ("loss", "gradient_norm", "learning_rate"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5)
    assert int(state.step) == int(one.step) == 1
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(one.opt_state)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_lazy_adam_leaves_untouched_rows_where_dense_adam_moves_them() -> None:
    params = {"tables": {"item": jnp.ones((5, 2))}, "net": {"kernel": jnp.ones((2, 2))}}
    step, train = jnp.int32(0), TrainConfig(steps=9, clip=None, decay="constant", sparse_tables=True, weight_decay=0.1)
    dense = dataclasses.replace(train, sparse_tables=False)
    states = {t: (params, optimizers.init_optimizer(params, t)) for t in (train, dense)}
    moments = []
    for i, row in enumerate((1, 3)):
        gradient = jnp.zeros((5, 2)).at[row].set(2.0)
        for t in (train, dense):
            now, state = states[t]
            table = gradient
            if t is train:
                ids = jnp.array([row, 5, 5], jnp.int32)  # padded with ids past the end
                table = optimizers.Rows(ids, jnp.zeros((3, 2)).at[0].set(2.0))
            gradients = {"tables": {"item": table}, "net": {"kernel": jnp.zeros((2, 2))}}
            states[t] = optimizers.update(now, gradients, state, t, step=step + i)
        moments.append(jax.device_get(states[train][1]["tables"]["item"]))
    for part, first in moments[0].items():
        assert (first[1] != 0).all()
        np.testing.assert_array_equal(moments[1][part][[0, 1, 2, 4]], first[[0, 1, 2, 4]])
        assert (moments[1][part][3] != first[3]).all()
    lazy, whole = (np.asarray(states[t][0]["tables"]["item"]) for t in (train, dense))
    np.testing.assert_array_equal(lazy[[0, 2, 4]], 1)
    np.testing.assert_array_equal(whole[[0, 2, 4]], 1)
    np.testing.assert_allclose(lazy[1], 1 - 1e-3, rtol=1e-6)  # one Adam step of the learning rate
    assert (whole[1] < lazy[1] - 1e-4).all()  # dense Adam goes on with old momentum
    np.testing.assert_allclose(lazy[3], whole[3], rtol=1e-6)
    assert (np.asarray(states[train][0]["net"]["kernel"]) < 1).all()  # the net decays


def test_adafactor_against_optax() -> None:
    train = TrainConfig(
        steps=4, optimizer="adafactor", learning_rate=0.1, decay="constant", weight_decay=0.5, clip=None
    )
    params = {"tables": {"item": jnp.ones((4, 3))}, "net": {"kernel": jnp.full((3, 3), 2.0)}}
    gradients = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), params)
    new, _ = optimizers.update(params, gradients, optimizers.init_optimizer(params, train), train, step=jnp.int32(0))
    plain = optax.adafactor(0.1, multiply_by_parameter_scale=False)
    updates, _ = plain.update(gradients, plain.init(params), params)
    np.testing.assert_allclose(new["tables"]["item"], params["tables"]["item"] + updates["tables"]["item"], rtol=1e-6)
    np.testing.assert_allclose(new["net"]["kernel"], 2.0 + updates["net"]["kernel"] - 0.1 * 0.5 * 2.0, rtol=1e-6)


def test_fit_learns_logs_evaluates_and_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    train = dataclasses.replace(TRAIN, checkpoint_every=2, evaluate_every=3)
    config = dataclasses.replace(CONFIG, dropout=0.2)

    def evaluate(params: Any) -> dict[str, float]:
        return {"size": float(jnp.abs(params["tables"]["item"]).mean())}

    options = {"evaluate": evaluate, "tensorboard": True}
    whole = fit(toy_model, config, train, batches(), directory=tmp_path / "a", on_log=seen.append, **options)
    assert whole.stopped == "steps" and whole.steps == 6
    assert [record["step"] for record in whole.history if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in whole.history if "evaluation" in record] == [3, 6]
    assert seen == whole.history == [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    assert {"loss", "gradient_norm", "learning_rate", "hit", "examples_per_second"} <= whole.history[2].keys()
    assert list((tmp_path / "a" / "tensorboard").iterdir())

    stop = itertools.islice(batches(), 5)  # the data ends: a run is cut at step 5
    first = fit(toy_model, config, train, stop, directory=tmp_path / "b", **options)
    assert (first.stopped, first.steps) == ("data", 5)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.0}\n{"step": 7, "lo')  # a step that is made again, and a torn line
    rest = fit(toy_model, config, train, batches(), directory=tmp_path / "b", **options)
    assert losses(rest.history) == losses(whole.history)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(rest.params)):
        np.testing.assert_array_equal(a, b)

    again = fit(toy_model, config, train, batches(), directory=tmp_path / "b", **options)  # done is not run again
    assert losses(again.history) == losses(whole.history)


def test_runs_of_several_seeds_share_one_compiled_step_and_draw_their_own_numbers(tmp_path: Path) -> None:
    traced: list[None] = []

    def apply(*args: Any, **options: Any) -> Any:
        traced.append(None)
        return toy_model.apply(*args, **options)

    model = types.ModuleType("toy_that_counts")
    model.__dict__.update({**vars(toy_model), "apply": apply, "__name__": "toy_that_counts"})
    config = dataclasses.replace(CONFIG, dropout=0.5)
    params = toy_model.init(jax.random.key(0), config)  # given, so that only the steps' own draws differ

    def run(seed: int, directory: Path | None = None, cut: int = 6, **options: Any) -> list[float]:
        train = dataclasses.replace(TRAIN, seed=seed, checkpoint_every=seed, log_every=1)
        data = itertools.islice(batches(), cut)
        return losses(fit(model, config, train, data, directory=directory, **options).history)

    first = run(5, params=params)
    once = len(traced)
    assert once
    assert all(a != b for a, b in zip(run(6, params=params), first))
    whole, other = run(5), run(6)
    assert whole[0] != first[0] and whole[0] != other[0]  # the parameters are the seed's as well

    run(5, tmp_path, cut=3)
    with Checkpoints(tmp_path, {}) as saves:
        assert int(saves.read(3)[0]["seed"]) == 5
    assert run(5, tmp_path) == whole
    with pytest.raises(CheckpointError, match=r"train\.seed: 5 in the checkpoint, 6 now"):
        run(6, tmp_path)
    assert len(traced) == once, "a run that differs in its seed alone was traced again"


def test_early_stopping_gives_the_best_parameters(tmp_path: Path) -> None:
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    kept: list[Any] = []

    def evaluate(params: Any) -> dict[str, float]:
        kept.append(jax.tree.map(np.asarray, jax.tree.map(jnp.copy, params)))
        return {"auc": next(scores)}

    train = dataclasses.replace(TRAIN, evaluate_every=1, early_stopping=EarlyStopping("auc", patience=2))
    result = fit(toy_model, CONFIG, train, batches(), evaluate=evaluate, directory=tmp_path)
    assert (result.stopped, result.steps) == ("early_stopping", 4)
    assert result.best == {"step": 2, "evaluation": {"auc": 0.3}}
    for got, want in zip(jax.tree.leaves(result.params), jax.tree.leaves(kept[1])):
        np.testing.assert_array_equal(got, want)
    assert not np.array_equal(kept[1]["tables"]["item"], kept[3]["tables"]["item"])
    again = fit(toy_model, CONFIG, train, batches(), evaluate=evaluate, directory=tmp_path)  # stopped stays stopped
    assert (again.stopped, again.steps, len(kept)) == ("early_stopping", 4, 4)
    np.testing.assert_array_equal(again.params["tables"]["item"], kept[1]["tables"]["item"])


def test_early_stopping_needs_its_metric() -> None:
    train = dataclasses.replace(TRAIN, evaluate_every=1, early_stopping=EarlyStopping("auc"))
    with pytest.raises(ValueError, match="pass evaluate"):
        fit(toy_model, CONFIG, train, batches())
    with pytest.raises(ValueError, match=r"watches 'auc', but evaluate at step 1 gave \{'AUC': 0.5\}"):
        fit(toy_model, CONFIG, train, batches(), evaluate=lambda params: {"AUC": 0.5})


def test_a_diverging_run_ends_with_its_last_finite_state(tmp_path: Path) -> None:
    def broken() -> Iterator[Any]:
        for i, batch in enumerate(batches()):
            price = batch.price.copy()
            if i == 3:
                price[5] = np.nan
            yield batch.replace(price=price)

    with pytest.raises(
        DivergedError, match="diverged at step 3: loss nan, gradient norm nan; the state before"
    ) as info:
        fit(toy_model, CONFIG, TRAIN, broken(), directory=tmp_path, check=False)
    assert info.value.step == 3 and re.search(r"Lower learning_rate", str(info.value))
    saved = restore_params(tmp_path, 3)
    # Checked, the same batch is refused before it is used, and the run keeps what it had: the same three steps.
    with pytest.raises(ValueError, match=r"price\[5\] is not a finite number") as refused:
        fit(toy_model, CONFIG, TRAIN, broken(), directory=tmp_path / "checked")
    assert "in the batch of step 3" in refused.value.__notes__[0]
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(restore_params(tmp_path / "checked", 3))):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def test_parameters_given_are_used_and_not_donated() -> None:
    params = toy_model.init(jax.random.key(5), CONFIG)
    result = fit(toy_model, CONFIG, dataclasses.replace(TRAIN, steps=1), batches(), params=params)
    want, _ = toy_model.loss(params, next(batches()), CONFIG)
    np.testing.assert_allclose(result.history[0]["loss"], float(want), rtol=1e-5)
    other = dataclasses.replace(CONFIG, width=4)
    with pytest.raises(ValueError, match=r"net/params/down/kernel: \(16, 8\), the model has \(16, 4\)"):
        fit(toy_model, other, TRAIN, batches(), params=params)


def test_the_sparse_step_never_gathers_a_table() -> None:
    """On a mesh the touched rows travel, not the table: no array of the table's size is made on a device."""
    config = dataclasses.replace(CONFIG, items=100_000, users=50_000)
    train, mesh = dataclasses.replace(TRAIN, sparse_tables=True), make_mesh(4, 2)
    state = jax.eval_shape(lambda: init_state(toy_model, config, train))
    text = make_step(toy_model, config, train, mesh).trace(state, BATCH).lower().compile().as_text()
    assert "f32[12500,8]" in text  # an eighth of the table
    assert "f32[100000," not in text and "f32[50000," not in text

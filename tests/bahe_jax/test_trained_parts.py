"""What training moves: gradients through shared behaviours, frozen parts, LoRA, learned pooling."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from bahe_examples import BASE, KEY, SIZE, M, N, case, params_of, run, same, settings, vectors

from bahe_jax import Lora, model
from rec_core import optimizers, partition, training
from rec_core.training import TrainConfig


@functools.cache
def gradient_of(config):
    def of(params, batch):
        return model.loss(params, batch, config)[0]

    return jax.jit(jax.value_and_grad(of))


def test_training_through_encodes_each_behavior_once_with_the_gradients_of_all_occurrences():
    config = settings("ba", lower="full", chunk=8)  # three chunks and a part of one
    params, batch = params_of(config), case().batch
    loss, gradients = gradient_of(config)(params, batch)
    apart = batch.replace(
        ids=np.arange(SIZE * N * M, dtype=np.int32).reshape(SIZE, N, M),
        item=np.arange(100, 100 + SIZE, dtype=np.int32),
    )
    loss_apart, gradients_apart = gradient_of(config)(params, apart)
    np.testing.assert_allclose(loss, loss_apart, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(jax.device_get(gradients)), jax.tree.leaves(gradients_apart)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(jax.device_get(gradients["net"]["lower"])))
    assert np.abs(gradients["tables"]["token"]).max() > 0
    same(run(params, batch, config)[0], vectors(settings("ba"), batch)[0])  # in chunks as at once


def test_frozen_parts_have_no_gradient_and_no_optimizer_state():
    config = settings("ba", upper="lora")
    params = params_of(config)
    params["net"]["lora"] = jax.tree.map(lambda x: x + 0.1, params["net"]["lora"])
    _, gradients = gradient_of(config)(params, case().batch)
    mask = model.trainable(params, config)
    for moved, gradient in zip(jax.tree.leaves(mask), jax.tree.leaves(jax.device_get(gradients))):
        assert np.any(gradient) == moved
    moved, rest = partition.split(params, mask)
    assert set(jax.tree.leaves(mask["net"]["upper"]) + jax.tree.leaves(mask["net"]["lower"])) == {False}
    assert {jax.tree_util.keystr(p).split("'")[3] for p, _ in jax.tree.leaves_with_path(moved)} == {
        "lora", "reduce", "head",
    }  # fmt: skip
    state = optax.adam(1e-3).init(moved)
    assert sum(x.size for x in jax.tree.leaves(state)) == 1 + 2 * sum(x.size for x in jax.tree.leaves(moved))
    again = partition.join(moved, rest)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params)))


def test_a_step_of_training_moves_what_is_trained_and_keeps_the_rest():
    config = settings("ba", lower="full", upper="frozen")
    train = TrainConfig(steps=2, learning_rate=0.1, weight_decay=0.1, sparse_tables=True)
    state = training.init_state(model, config, train, params_of(config))
    moved, _ = partition.split(state.params, model.trainable(state.params, config))
    slots = sum(x.size for x in jax.tree.leaves(state.opt_state) if np.ndim(x))
    assert slots == 2 * sum(x.size for x in jax.tree.leaves(moved))
    new, metrics = jax.jit(lambda state, batch: training.advance(model, config, train, state, batch))(
        state, case().batch
    )
    _, gradients = gradient_of(config)(state.params, case().batch)
    np.testing.assert_allclose(metrics["gradient_norm"], optimizers.gradient_norm(gradients), rtol=1e-4)
    changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), state.params, new.params)
    assert jax.tree.leaves(changed) == jax.tree.leaves(model.trainable(state.params, config))
    assert jax.tree.structure(new.opt_state) == jax.tree.structure(state.opt_state)


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"lower": "full", "upper": "full"}, {"tables", "lower", "upper", "final_norm"}),
        ({"lower": "frozen", "upper": "full"}, {"upper", "final_norm"}),
        ({"lower": "full", "upper": "frozen"}, {"tables", "lower"}),
        ({"lower": "lora", "upper": "lora"}, {"lora"}),
        ({"lower": "table", "upper": "full"}, {"upper", "final_norm"}),
        (
            {"lower": "full", "upper": "full", "pooling": "attention"},
            {"tables", "lower", "upper", "final_norm", "pool"},
        ),
        ({"lower": "table", "upper": "frozen", "pooling": "attention"}, {"pool"}),
    ],
)
def test_what_is_trained(changes, moved):
    config = dataclasses.replace(BASE, **changes)
    params = jax.eval_shape(lambda: model.init(KEY, config))
    mask = model.trainable(params, config)
    parts = {"tables": mask["tables"], **mask["net"]}
    assert {name for name, part in parts.items() if any(jax.tree.leaves(part))} == moved | {"reduce", "head"}
    assert (config.lower == "table") == (not params["tables"]) == ("lower" not in params["net"])


@pytest.mark.portable
def test_lora_begins_as_the_base_model_and_merges_into_it():
    lora = Lora(rank=2, alpha=3.0, projections=("query", "value", "output", "gate", "down"))
    config = settings("ba", lower="lora", upper="lora", lora=lora)
    params, batch = params_of(config), case().batch
    base = vectors(settings("ba"), batch)
    for ours, theirs in zip(vectors(config, batch, params), base):
        same(ours, theirs)
    keys = iter(jax.random.split(KEY, 20))
    params["net"]["lora"] = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params["net"]["lora"])
    moved = vectors(config, batch, params)
    assert np.abs(moved[0] - base[0]).max() > 1e-2
    merged = model.merge_lora(params, config)
    assert "lora" not in merged["net"] and "lora" in params["net"]
    for ours, theirs in zip(vectors(settings("ba"), batch, merged), moved):
        same(ours, theirs)

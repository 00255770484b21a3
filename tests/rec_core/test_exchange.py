"""Sparse tables on a mesh that splits the examples: each device's own rows give the numbers of one device."""

import dataclasses
import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_model
from jax.sharding import PartitionSpec as P

from rec_core import exchange
from rec_core.sharding import make_mesh, put_batch, shardings
from rec_core.training import DivergedError, TrainConfig, fit, init_state, make_step

DEVICES, ROWS = 4, 12
# The users divide by no number of devices, the items by all; and what a step needs beside the items' table is small.
CONFIG = dataclasses.replace(toy_model.Config(), users=41, items=160_000)
# eps well above the gradients' rounding: parameters can be compared after several steps.
TRAIN = TrainConfig(steps=9, learning_rate=0.05, eps=1e-2, clip=0.5, sparse_tables=True, weight_decay=0.01)


@pytest.fixture(autouse=True)
def few_ids_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FEW_IDS", 4)


def frozen_items(params: Any, config: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "item" not in jax.tree_util.keystr(path), params)


def variant(**changes: Any) -> types.ModuleType:
    module = types.ModuleType("variant")
    vars(module).update(vars(toy_model) | changes)
    return module


FROZEN = variant(trainable=frozen_items)
BATCHES = [toy_model.make_batch(np.random.default_rng(i), 16, CONFIG) for i in range(3)]
# Some rows are read by several devices and several times by one; none of the last owner's at first.
BATCHES[:2] = [batch.replace(item=batch.item % 5, history=batch.history % 8) for batch in BATCHES[:2]]
BROKEN = BATCHES[0].replace(price=np.where(np.arange(16) == 11, np.inf, 1).astype(np.float32))


def steps(model: Any, train: TrainConfig, data: int) -> tuple[list[Any], list[Any]]:
    """State and metrics, on the host, after each of three steps and one whose numbers are not finite."""
    mesh, found = make_mesh(data), []
    begin = functools.partial(init_state, model, CONFIG, train)
    state = jax.jit(begin, out_shardings=shardings(jax.eval_shape(begin), mesh))()
    step = make_step(model, CONFIG, train, mesh).trace(state, BROKEN).lower().compile()
    memory, part = step.memory_analysis(), 4 * CONFIG.items * CONFIG.width / data
    assert memory.temp_size_in_bytes < part / 5  # no pass over a table, but a number a row
    assert memory.alias_size_in_bytes > part * (1 if model is FROZEN else 3)  # it and its moments: changed in place
    for batch in (*BATCHES, BROKEN):
        state, metrics = step(state, put_batch(batch, mesh))
        found.append(jax.device_get((state, metrics)))
    states, metrics = zip(*found)
    return list(states), list(metrics)


@functools.cache
def alone(model: Any) -> tuple[list[Any], list[Any]]:
    return steps(model, TRAIN, 1)


def same(got: Any, want: Any) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("model", "data", "micro_batches"),
    [(toy_model, 8, 2), (FROZEN, 2, 1)],
    ids=["eight devices in parts", "two devices and a frozen table"],
)
def test_the_steps_are_those_of_one_device(model: Any, data: int, micro_batches: int) -> None:
    want_states, want = alone(model)
    states, metrics = steps(model, dataclasses.replace(TRAIN, micro_batches=micro_batches), data)
    for i in range(3):
        same(metrics[i], want[i])
        assert metrics[i]["gradient_norm"] > TRAIN.clip  # the true norm counts
    same(states[2], want_states[2])
    moved = [np.any(a != b) for a, b in zip(jax.tree.leaves(states[2].params), jax.tree.leaves(states[0].params))]
    assert sum(moved) == len(moved) - (model is FROZEN)
    assert int(metrics[3]["diverged"]) == 3
    for before, after in zip(*(jax.tree.leaves((s.params, s.opt_state, s.step)) for s in states[2:])):
        np.testing.assert_array_equal(after, before)


def lowered(
    config: Any, data: int, width: int = 1, model: Any = toy_model, micro_batches: int = 1, train: Any = TRAIN
) -> Any:
    train = dataclasses.replace(train, micro_batches=micro_batches)
    state = jax.eval_shape(lambda: init_state(model, config, train))
    return make_step(model, config, train, make_mesh(data, width)).trace(state, BATCHES[0])


def test_what_devices_cannot_do_alone_is_left_to_the_compiler() -> None:
    """Widths that are split, examples that the parts do not divide, a split table that a model reads whole."""

    def touched(batch: Any, config: Any) -> Any:
        return {"user": batch.user}

    whole = variant(touched=touched)
    assert "reduce_scatter" in str(lowered(CONFIG, 2).jaxpr)
    for other in (lowered(CONFIG, 4, 2), lowered(CONFIG, 8, micro_batches=4), lowered(CONFIG, 2, model=whole)):
        assert "reduce_scatter" not in str(other.jaxpr)


@functools.cache
def exchanged(split: bool, scant: bool = False, share: float = 1.0, dtype: str = "float32") -> Any:
    """Whether the scant form suffices; rows that each device reads, and their gradients combined: ids, values, own ids,
    sums; by device."""

    def run(table: Any, ids: Any, slope: Any) -> Any:
        plan = exchange.plan(table, ids, "data", split=split, distinct_share=share, dtype=dtype)
        fits = exchange.fits([plan], "data") if split else None
        rows, route = exchange.read(table, plan, "data", split=split, scant=scant)
        gradient = dataclasses.replace(rows, values=rows.values * slope)
        total = exchange.combine(gradient, route, table, "data")
        found = (jnp.bool(True) if fits is None else fits, rows.ids, rows.values, total.ids, total.values)
        return jax.tree.map(lambda x: x[None], found)

    specs = (P("data") if split else P(), P("data"), P("data"))
    return jax.jit(jax.shard_map(run, mesh=make_mesh(DEVICES), in_specs=specs, out_specs=P("data"), check_vma=False))


def check_exchange(
    ids: np.ndarray, rows: int, *, split: bool, scant: bool = False, share: float = 1.0, dtype: str = "float32"
) -> bool:
    """That all devices have their rows, and the owners the sums; whether the scant form suffices."""
    table = np.arange(1.0, 2 * rows + 1, dtype=np.float32).reshape(rows, 2) / 3

    def sent(x: Any) -> Any:
        """As numbers arrive."""
        return x.astype(dtype).astype(np.float32) if split else x

    slope = np.array([[1.0], [10.0], [100.0], [1000.0]], np.float32)
    fits, own, values, owned, total = jax.device_get(
        exchanged(split, scant, share, dtype)(table, ids.astype(np.int32).reshape(-1), slope)
    )
    if scant and not fits.all():
        return False
    ids, want, read = np.minimum(ids, rows - 1), np.zeros_like(table), np.zeros(rows, bool)
    for i in range(DEVICES):
        distinct, there = np.unique(ids[i]), own[i] < rows
        np.testing.assert_array_equal(own[i][there], distinct)
        np.testing.assert_array_equal(values[i][there], sent(table[distinct]))
        assert (own[i][~there] == rows).all()
        want[distinct] += sent(slope[i] * sent(table[distinct]))
        read[distinct] = True
    size = rows // DEVICES if split else rows
    for i in range(DEVICES):
        mine = slice(i * size, (i + 1) * size) if split else slice(None)
        got, there = np.zeros_like(want[mine]), owned[i] < size
        got[owned[i][there]] = total[i][there]
        np.testing.assert_array_equal(got, want[mine])
        np.testing.assert_array_equal(np.sort(owned[i][there]), np.flatnonzero(read[mine]))
        assert not total[i][~there].any()
    assert (fits == fits[0]).all()
    return bool(fits[0])


@pytest.mark.portable
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("rows", [ROWS, 4], ids=["large", "small"])
def test_rows_travel_once_and_gradients_add_up_at_their_owners(split: bool, rows: int) -> None:
    draw = np.random.default_rng(0)
    cases = [draw.integers(0, rows, (DEVICES, 5)) for _ in range(5)]
    cases += [
        np.zeros((DEVICES, 5), int),
        np.full((DEVICES, 5), rows - 1),
        np.array([[0] * 5, [3] * 5, [11] * 5, [4] * 5]) % rows,
    ]
    cases += [np.full((DEVICES, 5), 99)]  # clipped to the last row, as a look-up is
    for ids in cases:
        assert check_exchange(ids, rows, split=split)


def test_owners_that_are_asked_alike_are_sent_a_share_each() -> None:
    draw, rows, n = np.random.default_rng(0), 400, 60
    scant = math.ceil(1.1 * n / DEVICES) + 8
    even = draw.permuted(np.tile(np.arange(rows), (DEVICES, 1)), axis=1)[:, :n]
    full = np.arange(scant)[None] + np.zeros((DEVICES, 1), int)  # as many of one owner as there is room for
    others = np.arange(rows // DEVICES, rows, 8)[: n - scant]
    full = np.concatenate([full, np.tile(others, (DEVICES, 1))], axis=1)
    over = even.copy()
    over[2] = np.arange(n)  # one device asks one owner for all
    for ids, suffices in ((even, True), (full, True), (over, False)):
        assert check_exchange(ids, rows, split=True, scant=True) == suffices
        check_exchange(ids, rows, split=True)


def test_repeated_ids_need_less_room() -> None:
    """Half of the ids distinct: half the share suffices, a third does not, and then nothing is sent by it."""
    draw, rows, n = np.random.default_rng(0), 4000, 600
    few = draw.permuted(np.tile(np.arange(0, rows, 13), (DEVICES, 1)), axis=1)[:, : n // 2]
    ids = draw.permuted(np.concatenate([few, few], axis=1), axis=1)
    assert check_exchange(ids, rows, split=True, scant=True, share=0.55)
    assert not check_exchange(ids, rows, split=True, scant=True, share=0.35)
    with pytest.raises(ValueError, match=r"distinct_share is 0: must be above 0"):
        TrainConfig(steps=1, distinct_share=0)


def test_rows_and_gradients_travel_in_fewer_bits_and_add_up_in_all() -> None:
    draw = np.random.default_rng(0)
    for scant in (True, False):
        assert check_exchange(draw.integers(0, 400, (DEVICES, 60)), 400, split=True, scant=scant, dtype="bfloat16")
    check_exchange(draw.integers(0, 400, (DEVICES, 60)), 400, split=False, dtype="bfloat16")  # it does not travel
    with pytest.raises(ValueError, match=r"exchange_dtype is 'float16'"):
        TrainConfig(steps=1, exchange_dtype="float16")


def test_a_batch_that_does_not_fit_ends_a_run_that_has_no_general_form() -> None:
    train = dataclasses.replace(TRAIN, general_exchange=False)
    assert "cond[" in str(lowered(CONFIG, 2).jaxpr) and "cond[" not in str(lowered(CONFIG, 2, train=train).jaxpr)
    states, _ = steps(toy_model, train, 2)
    same(states[2], alone(toy_model)[0][2])
    tight = dataclasses.replace(train, distinct_share=0.01)
    states, metrics = steps(toy_model, tight, 2)
    same(states[1], alone(toy_model)[0][1])  # whose few ids fit
    assert int(metrics[2]["diverged"]) == 2 and np.isnan(metrics[2]["loss"])
    for before, after in zip(*(jax.tree.leaves((s.params, s.opt_state, s.step)) for s in states[1:3])):
        np.testing.assert_array_equal(after, before)
    with pytest.raises(DivergedError, match=r"at step 2: .* distinct ids than distinct_share, .* general form"):
        fit(toy_model, CONFIG, tight, iter(BATCHES), mesh=make_mesh(2))


def test_few_ids_have_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FEW_IDS", 16)

    def need(table: Any, ids: Any) -> Any:
        return exchange.plan(table, ids, "data", split=True, distinct_share=0.1)

    table = jax.ShapeDtypeStruct((100, 2), jnp.float32)
    for n, room in ((16, 16), (320, 17)):
        ids = jax.ShapeDtypeStruct((n,), jnp.int32)
        made = jax.eval_shape(jax.vmap(need, axis_name="data", axis_size=DEVICES, in_axes=None), table, ids)
        assert made.scant == room


def test_the_norm_counts_each_row_once() -> None:
    gradients = {"net": jnp.full(2, 3.0), "tables": {"a": jnp.arange(8.0), "b": jnp.full(3, 2.0)}}

    def norm(gradients: Any) -> Any:
        return exchange.global_norm(gradients, "data", frozenset({"a"}))

    specs = {"net": P(), "tables": {"a": P("data"), "b": P()}}
    mapped = jax.shard_map(norm, mesh=make_mesh(DEVICES), in_specs=(specs,), out_specs=P(), check_vma=False)
    got = jax.jit(mapped)(gradients)
    np.testing.assert_allclose(got, np.sqrt(2 * 9 + np.sum(np.arange(8.0) ** 2) + 3 * 4), rtol=1e-6)

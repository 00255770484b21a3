"""What the contract's own tests do not see of the value estimator."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from rec_core.embedding import Categorical
from sim_jax.dcaf import replay, value

CONFIG, BATCH = value.example()
PARAMS = value.init(jax.random.key(0), CONFIG)
FREE = dataclasses.replace(CONFIG, monotone=False)
apply = jax.jit(value.apply, static_argnames="config")
loss_and_gradient = jax.jit(jax.value_and_grad(value.loss, has_aux=True), static_argnums=2)


@pytest.mark.portable
def test_monotone_estimates_never_fall_with_the_action():
    free, monotone = apply(PARAMS, BATCH, FREE), apply(PARAMS, BATCH, CONFIG)
    assert (np.diff(free, axis=1) < 0).any()
    expected = np.cumsum(np.logaddexp(0, np.asarray(free, np.float64) / CONFIG.scale), axis=1) * CONFIG.scale
    np.testing.assert_allclose(monotone, expected, rtol=1e-5)
    assert (np.diff(monotone, axis=1) >= 0).all() and (np.asarray(monotone) >= 0).all()


@pytest.mark.parametrize("monotone", [True, False])
def test_training_starts_at_the_mean_gains(monotone):
    start = (1.0, 1.5, 4.0, 4.5, 9.0)
    config = dataclasses.replace(CONFIG, start=start, monotone=monotone)
    params = value.init(jax.random.key(0), config)
    params["net"]["gain"]["kernel"] *= 0
    np.testing.assert_allclose(apply(params, BATCH, config), np.tile(start, (8, 1)), rtol=1e-5)


def test_loss_is_of_the_observed_alone():
    weight = np.array([1, 2, 0, 1, 1, 0, 3, 1], np.float32)
    batch = BATCH.replace(weight=weight)
    (loss, aux), gradient = loss_and_gradient(PARAMS, batch, CONFIG)
    each = np.where(BATCH.observed, weight[:, None], 0)
    error = (np.asarray(apply(PARAMS, batch, CONFIG)) - BATCH.gain) / CONFIG.scale
    np.testing.assert_allclose(loss, (each * error**2).sum() / each.sum(), rtol=1e-5)
    np.testing.assert_allclose(aux["gained"], ((each * BATCH.gain).sum() / CONFIG.scale, each.sum()), rtol=1e-5)
    other = batch.replace(gain=np.where(each > 0, BATCH.gain, np.nan).astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, loss_and_gradient(PARAMS, other, CONFIG), ((loss, aux), gradient))
    value.check(other.replace(observed=each > 0), CONFIG)


def test_trained_on_a_period_it_allocates_the_next():
    """Users differ in worth and in what compute adds; the log's gains are noisy draws around that."""
    draw, users, costs = np.random.default_rng(0), 40, np.array([1.0, 2.0, 4.0, 8.0])
    worth, rate = draw.gamma(0.7, 1.4, (users, 1)), draw.uniform(0.1, 1.0, (users, 1))
    expected = worth * (1 - np.exp(-rate * costs))
    config = value.Config((Categorical("user", users, 8),), len(costs), hidden=(16,), scale=float(expected.mean()))

    def period(requests):
        user = draw.integers(0, users, requests).astype(np.int32)
        gain = expected[user] * draw.exponential(1, (requests, 1))
        return value.Batch({"user": user}, gain.astype(np.float32), np.full(gain.shape, True), np.ones(requests))

    earlier, later = period(1500), period(1500)
    optimizer = optax.adam(0.05)
    params = value.init(jax.random.key(0), config)
    moments = optimizer.init(params)

    @jax.jit
    def step(params, moments):
        (loss, _), gradient = jax.value_and_grad(value.loss, has_aux=True)(params, earlier, config)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(params, updates), moments, loss

    for _ in range(80):
        params, moments, _ = step(params, moments)
    estimates = np.asarray(apply(params, later, config))
    assert (np.diff(estimates, axis=1) >= 0).all()
    truth, blind = expected[later.features["user"]], np.tile(earlier.gain.mean(axis=0), (1500, 1))
    errors = [np.square(guess - truth).mean() for guess in (estimates, blind)]
    assert errors[0] < 0.2 * errors[1]
    known, guessed, same = (replay.replay(later.gain, costs, 2, estimates=e) for e in (None, estimates, blind))
    assert known.gain_equal_compute_pct > guessed.gain_equal_compute_pct > same.gain_equal_compute_pct
    assert guessed.gain_equal_compute_pct > 3
    assert known.compute_saved_pct > guessed.compute_saved_pct > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ()}, "features is empty"),
        ({"actions": 0}, "actions is 0, must be at least 1"),
        ({"dense": -1}, "dense is -1"),
        ({"hidden": ()}, r"hidden is \(\), must be widths"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"start": (1.0, 2.0)}, r"start is \(1.0, 2.0\), must be \(\) or 5 finite mean gains"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": np.where(np.arange(8)[:, None] == 3, np.inf, BATCH.gain)}, "gain: inf at row 3"),
        ({"gain": BATCH.gain[:, 1:]}, r"gain: shape \(8, 4\), must be \(8, 5\)"),
        ({"observed": BATCH.observed.astype(np.float32)}, "observed: must be bool"),
        ({"weight": BATCH.weight - 2}, "weight: -1.0 at row 0 must be at least 0"),
        ({"dense": None}, "dense: missing, config.dense asks for 2"),
        ({"dense": BATCH.dense * np.nan}, "dense: nan at row 0"),
    ],
)
def test_wrong_batches_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        value.check(BATCH.replace(**change), CONFIG)

"""The ranking model of ADS: equation 13, what it shares with the plain model, domains, bad batches, training."""

import functools
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ads_examples import BATCH, CONFIG, apply, drawn

import ads_jax
from rec_core import embedding, training
from rec_core.embedding import UNKNOWN, Categorical
from rec_core.features import vocabulary_from_values
from rec_core.ranking import ctr
from rec_core.sharding import make_mesh, put_batch


def dice(s, alpha):
    centered = s - s.mean(axis=-1, keepdims=True)
    p = 1 / (1 + np.exp(-centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-6)))
    return p * s + (1 - p) * alpha * s


@pytest.mark.portable
def test_equation_13_by_hand():
    """With a context feature that is not the domain, and s from equations 2-12 as they are written."""
    config = replace(CONFIG, context_features=(Categorical("hour", 24, 4),))
    hour = np.array([3, 20, 3, 11, 7, 0], np.int32)
    batch, params = replace(BATCH, context={**BATCH.context, "hour": hour}), drawn(config)
    tables, head, inside = params["tables"], params["net"]["head"], params["net"]["interest"]
    target, sequence = tables["item"][BATCH.target["item"]], tables["item"][BATCH.sequence["item"]]
    e_u = tables["user"][BATCH.user["user"]]
    bucket = (BATCH.context["active_days"][:, None] >= np.array([1.0, 7.0])).sum(1)
    e_d = np.concatenate([tables["scenario"][BATCH.context["scenario"]], tables["active_days"][bucket]], axis=1)

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def second(p, hidden):  # ours: the parameters over the number of inputs
        return dense(p, np.maximum(hidden, 0)) / len(p["kernel"])

    def generated(p):
        return second(p["second"], dense(p["first"], e_d))

    psrg, pcrg = inside["psrg"], inside["pcrg"]
    w_private = 1 / (1 + np.exp(-generated(psrg["weight"]).reshape(6, 4, 4)))  # (2)
    w_generated = config.eta * psrg["w_shared"] / 4 * w_private  # (3)
    personal = np.einsum("boi,bti->bto", w_generated, sequence) + generated(psrg["bias"])[:, None]  # (4), (5)
    hidden = dense(pcrg["first_domain"], e_d) + target @ pcrg["first_target"]["kernel"]
    queries = second(pcrg["second"], hidden).reshape(6, 2, 4) + target[:, None]  # (6), (7)
    asked = queries[:, (5 - np.arange(6)) // config.items]  # of each behaviour its chunk's, the newest chunk first
    q, k, v = (
        np.einsum("btd,dhw->bhtw", x, inside["unit"][name]["kernel"])
        for name, x in (("query", asked), ("key", personal), ("value", personal))
    )
    weight = np.exp((q * k).sum(-1) / np.sqrt(4)) * batch.mask[:, None]  # (8)-(12), two heads of width 4
    weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-30)
    s = np.einsum("bht,bhtw->bhw", weight, v).reshape(6, 8)
    np.testing.assert_array_equal(s[0], 0)
    x = np.concatenate([s, e_u, target, tables["hour"][hour], e_d], axis=1)
    h = dice(x @ head["mlp_0"]["kernel"] + head["mlp_0"]["bias"], head["dice_0"]["alpha"])
    wanted = h @ head["logit"]["kernel"] + head["logit"]["bias"]
    logits = apply(params, batch, config)
    assert logits.shape == (6, 2)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
    loss, aux = ads_jax.objective(params, logits, batch, config)
    p = 1 / (1 + np.exp(-np.asarray(wanted, np.float64)))
    entropy = -(BATCH.label * np.log(p) + (1 - BATCH.label) * np.log(1 - p))
    np.testing.assert_allclose(loss, entropy.mean(), rtol=1e-4)
    np.testing.assert_allclose(aux["clicked"], (BATCH.label.sum(), 12), rtol=1e-6)


def test_a_new_model_ranks_as_the_plain_one():
    plain = ctr.Config(**{field.name: getattr(CONFIG, field.name) for field in fields(ctr.Config)})
    params = jax.jit(ads_jax.init, static_argnums=1)(jax.random.key(0), CONFIG)
    inside = params["net"]["interest"]
    assert set(inside) == {"psrg", "pcrg", "unit"}
    same = {**params, "net": {**params["net"], "interest": inside["unit"]}}
    np.testing.assert_allclose(
        apply(params, BATCH, CONFIG), jax.jit(ctr.apply, static_argnums=2)(same, BATCH, plain), rtol=1e-5, atol=1e-6
    )


def through_interest(params, config, scenario):
    """The interests' part in the logits, with the head's own view of the domain held fixed."""
    module, tables = config.make_interest(), params["tables"]
    target, sequence = tables["item"][BATCH.target["item"]], tables["item"][BATCH.sequence["item"]]
    e_d = np.asarray(embedding.embed(tables, config.domain_features, {**BATCH.context, "scenario": scenario}))
    return np.asarray(module.apply({"params": params["net"]["interest"]}, target, sequence, BATCH.mask, e_d))


def test_the_control_has_the_capacity_and_no_domain():
    """E_D held constant: as many parameters, and the same interest in every domain; with E_D it differs."""
    control, params = replace(CONFIG, constant=True), drawn(CONFIG)
    assert jax.tree.map(np.shape, drawn(control)) == jax.tree.map(np.shape, params)
    here, there = (np.full(6, scenario, np.int32) for scenario in (0, 2))
    np.testing.assert_array_equal(*(through_interest(params, control, x) for x in (here, there)))
    moved = np.abs(through_interest(params, CONFIG, here) - through_interest(params, CONFIG, there)).max(axis=1)
    assert moved[0] == 0 and (moved[1:] > 1e-3).all()  # the new user has no sequence to see otherwise


@pytest.mark.parametrize("left", ["psrg", "pcrg"])
def test_ablations_by_config(left):
    both = {"psrg": False, "pcrg": False}
    bare = jax.eval_shape(functools.partial(ads_jax.init, config=replace(CONFIG, **both)), jax.random.key(0))
    assert set(bare["net"]["interest"]) == {"unit"}
    one = jax.eval_shape(
        functools.partial(ads_jax.init, config=replace(CONFIG, **both | {left: True})), jax.random.key(0)
    )
    assert set(one["net"]["interest"]) == {"unit", left}


def test_training_moves_touched_rows_alone_and_rare_ids_share_one():
    """Ids seen once are dropped from the table: they train the row of the unknown, and new ids are read from it."""
    draw = np.random.default_rng(0)
    raw = np.concatenate([draw.integers(0, 8, 60) * 1000, [-7, -8, -9]])  # eight frequent values and three rare
    vocabulary = vocabulary_from_values(raw, min_count=2)
    assert vocabulary.size == 10 and set(vocabulary.encode([-7, -8, 12345])) == {UNKNOWN}
    size = 16  # a multiple of 8 devices; ids from 10 on are nobody's
    config = replace(CONFIG, item_features=(Categorical("item", size, 4),), tasks=1)
    item = vocabulary.encode(raw[-16:])
    batch = ads_jax.Batch(
        target={"item": item},
        sequence={"item": vocabulary.encode(draw.choice(raw[:60], (16, 6)))},
        mask=np.ones((16, 6), bool),
        user={"user": draw.integers(2, 10, 16).astype(np.int32)},
        context={"scenario": draw.integers(0, 3, 16).astype(np.int32), "active_days": np.full(16, 2, np.float32)},
        label=(item % 2).astype(np.float32),
        weight=np.ones(16, np.float32),
    )
    ads_jax.check(batch, config)
    before = jax.jit(ads_jax.init, static_argnums=1)(jax.random.key(0), config)
    settings = training.TrainConfig(steps=12, learning_rate=0.03, sparse_tables=True, weight_decay=0.1, log_every=1)
    done = training.fit(ads_jax, config, settings, iter([batch] * 12), params=before)
    touched = ads_jax.touched(batch, config)
    for name, table in before["tables"].items():
        rows, moved = np.unique(touched[name]), np.asarray(done.params["tables"][name])
        left = np.setdiff1d(np.arange(len(table)), rows)
        np.testing.assert_array_equal(moved[left], np.asarray(table)[left], err_msg=name)
        assert (moved[rows] != np.asarray(table)[rows]).any(axis=1).all(), name
    assert UNKNOWN in touched["item"] and (np.unique(touched["active_days"]) == [1]).all()
    assert done.history[-1]["loss"] < 0.8 * done.history[0]["loss"]

    # A step of all, then one of the first example alone: rows that only the others read have moments, and keep them.
    mesh, one = make_mesh(), jax.tree.map(lambda x: np.repeat(x[:1], 16, axis=0), batch)
    step = training.make_step(ads_jax, config, settings, mesh)
    state = training.init_state(ads_jax, config, settings, jax.tree.map(jnp.copy, before))
    held, now = (jax.device_get(state := step(state, put_batch(x, mesh))[0]) for x in (batch, one))
    idle = set()
    for name, ids in ads_jax.touched(one, config).items():
        rows = np.unique(ids)
        left = np.setdiff1d(np.arange(len(before["tables"][name])), rows)
        old, new = ({"value": x.params["tables"][name], **x.opt_state["tables"][name]} for x in (held, now))
        for part in ("value", "mu", "nu"):
            np.testing.assert_array_equal(new[part][left], old[part][left], err_msg=f"{name}, {part}")
            assert (new[part][rows] != old[part][rows]).any(axis=1).all(), (name, part)
        if (old["mu"][left] != 0).any() and (old["nu"][left] != 0).any():
            idle.add(name)
    assert idle == {"item", "user", "scenario"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length is 0, must be at least 1"),
        ({"items": 0}, "items is 0, must be at least 1"),
        ({"eta": 0.0}, r"eta is 0\.0, must be above 0 and finite"),
        ({"eta": np.inf}, r"eta is inf, must be above 0 and finite"),
        ({"domain_features": ()}, "domain_features is empty; the plug-in generates from at least one"),
        ({"interest": "dinn"}, "interest is 'dinn'"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_bad_batches_are_named_and_hard_ones_are_defined():
    for context, message in (
        ({"scenario": np.full(6, 3, np.int32)}, r"domain\['scenario'\]: id 3 at row 0 is outside \[0, 3\)"),
        ({"active_days": np.full(6, np.nan, np.float32)}, r"domain\['active_days'\]: nan at row 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ads_jax.check(replace(BATCH, context={**BATCH.context, **context}), CONFIG)
    with pytest.raises(ValueError, match=r"mask: 6 slots, config\.length is 5; raise it"):
        ads_jax.check(BATCH, replace(CONFIG, length=5))
    lists = replace(BATCH, mask=(~BATCH.mask).tolist())
    with pytest.raises(ValueError, match=r"padding after a behaviour at row \d, and config\.arranged is True"):
        ads_jax.check(lists, replace(CONFIG, arranged=True))
    short = replace(BATCH, mask=BATCH.mask[:, 1:])
    for function in (ads_jax.apply, ads_jax.loss):  # their shapes are looked at, also under jit
        with pytest.raises(ValueError, match=r"sequence\['item'\]: shape \(6, 6\), must be \(6, 5\)"):
            jax.eval_shape(functools.partial(function, config=CONFIG), drawn(CONFIG), short)
    nobody = replace(BATCH, mask=np.zeros_like(BATCH.mask))
    ads_jax.check(nobody, CONFIG)
    assert CONFIG.length % CONFIG.items != 0  # the oldest chunk is short in all tests here
    assert np.isfinite(apply(drawn(CONFIG), nobody, CONFIG)).all()

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ctr_examples import BATCH, CONFIG, DOMAINS, PARAMS, PLACED, PLAIN, WHERE, random_params, request

from rec_core import embedding
from rec_core.embedding import Categorical
from rec_core.interest import INTEREST
from rec_core.interest.can import parameters
from rec_core.ranking import ctr
from rec_core.ranking.gates import FRNet
from rec_core.ranking.networks import NETWORKS, Network

loss_and_gradient = jax.jit(jax.value_and_grad(ctr.loss, has_aux=True), static_argnums=2)
apply = jax.jit(ctr.apply, static_argnames=("config", "train"))


def dice(s, alpha):
    centered = s - s.mean()
    p = 1 / (1 + np.exp(-centered / np.sqrt((centered**2).mean() + 1e-6)))
    return p * s + (1 - p) * alpha * s


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def numpy_logit(params, batch, row):
    """The model of `example`, one impression at a time, without the code under test."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    tables, net = params["tables"], params["net"]

    def hashed(name, spec, raw):
        return tables[name][np.asarray(embedding.indices(spec, raw))].sum(0)

    def item(raw):
        return np.concatenate([tables["item"][raw["item"]], hashed("brand", CONFIG.item_features[1], raw)])

    user = {name: x[row] for name, x in batch.user.items()}
    target = {name: x[row] for name, x in batch.target.items()}
    bucket = sum(user["activity"] >= cut for cut in (0.0, 1.0, 2.0))
    e_u = np.concatenate([tables["user"][user["user"]], tables["activity"][bucket]])
    cross = hashed("user_x_brand", CONFIG.context_features[1], user | target)
    e_o = np.concatenate([tables["hour"][batch.context["hour"][row]], cross])
    q, interest, unit = item(target), 0.0, net["interest"]
    for t in np.flatnonzero(batch.mask[row]):
        k = item({name: x[row, t] for name, x in batch.sequence.items()})
        x = np.concatenate([q, k, q - k, q * k]) @ unit["kernel_0"] + unit["bias_0"]
        x = dice(dense(unit["dense_1"], dice(x, unit["dice_0"]["alpha"])), unit["dice_1"]["alpha"])
        interest = interest + dense(unit["score"], x) * k
    extra = dense(net["head"]["dense"], np.sign(batch.dense[row]) * np.log1p(np.abs(batch.dense[row])))
    x = np.concatenate([interest, e_u, q, e_o, extra])
    for i in range(2):
        x = dice(dense(net["head"][f"mlp_{i}"], x), net["head"][f"dice_{i}"]["alpha"])
    return dense(net["head"]["logit"], x)[0]


@pytest.mark.portable
def test_logits_are_those_of_an_independent_din():
    ctr.check(BATCH, CONFIG)
    expected = [numpy_logit(PARAMS, BATCH, row) for row in range(8)]
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(apply(PARAMS, BATCH, CONFIG), expected, rtol=1e-4, atol=1e-5)


def test_loss_is_weighted_cross_entropy_and_padding_changes_nothing():
    logits = np.asarray(apply(PARAMS, BATCH, CONFIG), np.float64)
    losses = np.log1p(np.exp(logits)) - BATCH.label * logits
    weight = np.array([1, 2, 0, 1, 0, 0, 3, 1], np.float32)
    batch = dataclasses.replace(BATCH, weight=weight)
    (value, aux), gradient = loss_and_gradient(PARAMS, batch, CONFIG)
    np.testing.assert_allclose(value, (losses * weight).sum() / 8, rtol=1e-5)
    np.testing.assert_allclose(aux["loss"], ((losses * weight).sum(), 8), rtol=1e-5)
    np.testing.assert_allclose(aux["clicked"], ((BATCH.label * weight).sum(), 8), rtol=1e-6)
    np.testing.assert_allclose(aux["predicted"], ((weight / (1 + np.exp(-logits))).sum(), 8), rtol=1e-5)
    padding = weight[:, None] == 0
    other = dataclasses.replace(batch, dense=np.where(padding, 1e6, BATCH.dense).astype(np.float32))
    other = dataclasses.replace(other, label=np.where(padding[:, 0], 1 - BATCH.label, BATCH.label))
    jax.tree.map(np.testing.assert_array_equal, loss_and_gradient(PARAMS, other, CONFIG), ((value, aux), gradient))


def test_candidates_of_a_request_are_scored_as_one_by_one():
    draw, candidates = np.random.default_rng(1), 5
    target = {name: draw.integers(2, 30, (8, candidates)).astype(np.int32) for name in BATCH.target}
    extra = draw.normal(size=(8, candidates, 3)).astype(np.float32)
    request = dataclasses.replace(BATCH, target=target, dense=extra)
    many = jax.jit(ctr.score, static_argnames=("config", "chunk"))(PARAMS, request, CONFIG, chunk=2)
    assert many.shape == (8, candidates)
    for c in range(candidates):
        one = dataclasses.replace(BATCH, target={k: v[:, c] for k, v in target.items()}, dense=extra[:, c])
        np.testing.assert_allclose(many[:, c], apply(PARAMS, one, CONFIG), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"target\['item'\]: shape \(8,\), must be \(8, C\)"):
        ctr.score(PARAMS, BATCH, CONFIG)


@pytest.mark.parametrize("interest", ["dien", "mimn", "eta"])
def test_behaviors_are_encoded_once_for_all_candidates_of_a_request(monkeypatch, interest):
    config = dataclasses.replace(CONFIG, interest=interest, interest_options=())
    target = {name: np.stack([values, values[::-1]], axis=1) for name, values in BATCH.target.items()}
    request = dataclasses.replace(BATCH, target=target)
    params = jax.eval_shape(functools.partial(ctr.init, config=config), jax.random.key(0))
    member, encoded = INTEREST[interest], []

    class Counted(member):
        def encode(self, *arguments, **options):
            encoded.append(self)
            return super().encode(*arguments, **options)

    monkeypatch.setitem(INTEREST, interest, Counted)
    assert jax.eval_shape(functools.partial(ctr.score, config=config, chunk=1), params, request).shape == (8, 2)
    assert len(encoded) == 1
    if interest == "eta":
        found = random_params(config)
        alone = ctr.apply(found, BATCH, config)
        np.testing.assert_allclose(ctr.score(found, request, config)[:, 0], alone, rtol=1e-4, atol=1e-5)


def test_scoring_does_not_repeat_the_sequence():
    config = ctr.Config(
        item_features=(Categorical("item", 1000, 32),), hidden=(8,), interest_options=(("hidden", (4,)),)
    )
    length, candidates = 1024, 256

    def temporaries(candidates, chunk):
        batch = ctr.Batch(
            target={"item": np.zeros((1, candidates), np.int32)},
            sequence={"item": np.zeros((1, length), np.int32)},
            mask=np.ones((1, length), bool),
            label=np.zeros(1, np.float32),
            weight=np.ones(1, np.float32),
        )
        params = jax.eval_shape(lambda: ctr.init(jax.random.key(0), config))
        lowered = jax.jit(lambda p, b: ctr.score(p, b, config, chunk=chunk)).lower(params, batch)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    repeated = candidates * length * 32 * 4
    assert length * 32 * 4 < temporaries(candidates, 8) < repeated / 8


def test_touched_rows_are_the_rows_of_the_gradient():
    touched = jax.jit(ctr.touched, static_argnums=1)(BATCH, CONFIG)
    gradient = loss_and_gradient(PARAMS, BATCH, CONFIG)[1]["tables"]
    assert touched.keys() == gradient.keys() == {"user", "activity", "item", "brand", "hour", "user_x_brand"}
    for name, g in gradient.items():
        moved = np.flatnonzero(np.abs(g).max(-1) > 0)
        assert moved.size and np.isin(moved, touched[name]).all()
    rows = jax.jit(lambda tables: {n: embedding.gather_rows(tables[n], ids) for n, ids in touched.items()})(
        PARAMS["tables"]
    )
    sparse = apply(PARAMS | {"tables": rows}, BATCH, CONFIG)
    np.testing.assert_allclose(sparse, apply(PARAMS, BATCH, CONFIG), rtol=1e-6)


def test_the_order_of_the_behaviours_does_not_matter():
    shuffled = dataclasses.replace(
        BATCH, sequence={k: v[:, ::-1] for k, v in BATCH.sequence.items()}, mask=BATCH.mask[:, ::-1]
    )
    plain = random_params(PLAIN)
    assert "interest" not in plain["net"]
    for params, config in ((plain, PLAIN), (PARAMS, CONFIG)):
        np.testing.assert_allclose(apply(params, shuffled, config), apply(params, BATCH, config), rtol=1e-4, atol=1e-5)


def test_several_tasks_and_new_users():
    config = dataclasses.replace(PLAIN, tasks=2, dense=0, hidden=(4,))
    label = np.stack([BATCH.label, 1 - BATCH.label], 1)
    batch = dataclasses.replace(BATCH, label=label, dense=None, mask=np.zeros_like(BATCH.mask))
    ctr.check(batch, config)
    params = random_params(config)
    logits = np.asarray(apply(params, batch, config), np.float64)
    assert logits.shape == (8, 2) and np.isfinite(logits).all()
    value, aux = ctr.objective(params, logits, batch, config)
    np.testing.assert_allclose(value, (np.log1p(np.exp(logits)) - label * logits).mean(), rtol=1e-5)
    assert aux["loss"][1] == 16


def test_dropout_needs_a_key_and_acts_in_training_only():
    config, params = dataclasses.replace(PLAIN, dropout=0.5), random_params(PLAIN)
    with pytest.raises(ValueError, match="needs a key"):
        ctr.apply(params, BATCH, config, train=True)
    dropped = apply(params, BATCH, config, key=jax.random.key(1), train=True)
    np.testing.assert_array_equal(dropped, apply(params, BATCH, config, key=jax.random.key(1), train=True))
    assert np.abs(dropped - apply(params, BATCH, config, key=jax.random.key(2), train=True)).max() > 1e-3
    np.testing.assert_array_equal(apply(params, BATCH, config, key=jax.random.key(1)), apply(params, BATCH, PLAIN))


def test_bfloat16_gives_float32_logits_close_by():
    half = apply(PARAMS, BATCH, dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, apply(PARAMS, BATCH, CONFIG), atol=0.1)


class Spy(Network):
    """A network that gives a part of what it was told: part 0 is x, 1 the fields, 2 the domain, 3 its id."""

    part: int = 0

    @property
    def needs(self):
        return ("fields",) if self.part == 1 else ()

    def logits(self, inputs, deterministic):
        values = (inputs.x, inputs.fields, inputs.domain, inputs.domain_id)[self.part]
        return jnp.pad(values.reshape(len(values), -1).astype(jnp.float32), ((0, 0), (0, self.tasks)))[:, : self.tasks]


def test_a_network_is_told_all_parts_side_by_side_and_as_fields(monkeypatch):
    monkeypatch.setitem(NETWORKS, "spy", Spy)
    config = dataclasses.replace(DOMAINS, network="spy", tasks=60, dense_width=6)
    params, told = random_params(dataclasses.replace(config, network_options=(("part", 1),))), []
    for part in range(4):
        told.append(
            np.asarray(ctr.apply(params, PLACED, dataclasses.replace(config, network_options=(("part", part),))))
        )
    tables, dense_layer = params["tables"], params["net"]["head"]["dense"]

    def embed(specs, fields):
        return np.asarray(embedding.embed(tables, specs, fields))

    sequence, mask = embed(CONFIG.item_features, BATCH.sequence), BATCH.mask[..., None]
    e_d = embed(DOMAINS.domain_features, WHERE)
    parts = [
        (sequence * mask).sum(1) / mask.sum(1),
        embed(CONFIG.user_features, BATCH.user),
        embed(CONFIG.item_features, BATCH.target),
        embed(CONFIG.context_features, PLACED.fields),
        e_d,
        dense(dense_layer, np.sign(BATCH.dense) * np.log1p(np.abs(BATCH.dense))),
    ]
    x = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(told[0], np.pad(x, ((0, 0), (0, 60 - x.shape[1]))), rtol=1e-4, atol=1e-5)
    fields = np.concatenate([*parts[:-1], dense(params["net"]["head"]["field_5"], parts[-1])], axis=1)  # 6 wide, made 8
    assert fields.shape == (8, 48)
    np.testing.assert_allclose(told[1], np.pad(fields, ((0, 0), (0, 12))), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(told[2][:, :8], e_d, rtol=1e-6)
    np.testing.assert_array_equal(told[3][:, 0], WHERE["scenario"])

    gated = dataclasses.replace(config, gate="frnet", gate_options=(("hidden", 5),))
    found = random_params(gated)
    shown = np.asarray(ctr.apply({**found, "tables": tables}, PLACED, gated))
    # The same tables, other layers behind them.
    own = found["net"]["head"]
    last = dense(own["field_5"], dense(own["dense"], np.sign(BATCH.dense) * np.log1p(np.abs(BATCH.dense))))
    refined = FRNet(hidden=5).apply({"params": own["frnet"]}, np.concatenate([*parts[:-1], last], 1).reshape(8, 12, 4))
    np.testing.assert_allclose(shown[:, :48], np.asarray(refined).reshape(8, 48), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"spy"}))
def test_every_network_serves_in_the_place_of_the_mlp(name):
    config = dataclasses.replace(DOMAINS, network=name, hidden=(8, 8), tasks=2)
    params = jax.eval_shape(functools.partial(ctr.init, config=config), jax.random.key(0))
    assert jax.eval_shape(functools.partial(ctr.apply, config=config), params, PLACED).shape == (8, 2)


@pytest.mark.parametrize(
    "change",
    [{"network": "star"}, {"gate": "frnet"}, {"gate": "pepnet", "tasks": 2}, {"interest": "can", "pooled": True}],
    ids=["star", "frnet", "pepnet", "pooled"],
)
def test_candidates_are_scored_as_one_by_one_with_networks_and_gates(change):
    config = dataclasses.replace(DOMAINS, hidden=(6, 4), **change)
    params = random_params(config)
    scenario = np.random.default_rng(2).integers(0, 3, (8, 3)).astype(np.int32)  # the candidate's; activity the user's
    asked = request(PLACED, 3, scenario=scenario)
    many = np.asarray(jax.jit(ctr.score, static_argnames=("config", "chunk"))(params, asked, config, chunk=2))
    assert np.std(many) > 1e-3
    for c in range(3):
        context = {**asked.context, "scenario": scenario[:, c]}
        target = {k: v[:, c] for k, v in asked.target.items()}
        one = dataclasses.replace(PLACED, target=target, context=context)
        np.testing.assert_allclose(many[:, c], apply(params, one, config), rtol=1e-4, atol=1e-5)


def test_the_mean_of_the_behaviours_stands_beside_the_interest():
    """Beside the average, which is that mean, the first layer's rows for the two may as well be added up."""
    beside = dataclasses.replace(PLAIN, pooled=True)
    params, wide = random_params(beside), embedding.width(PLAIN.item_features)
    head = params["net"]["head"]
    kernel = head["mlp_0"]["kernel"]
    layer = {**head["mlp_0"], "kernel": np.concatenate([kernel[:wide] + kernel[wide : 2 * wide], kernel[2 * wide :]])}
    net = {**params["net"], "head": {**head, "mlp_0": layer}}
    wanted = apply({**params, "net": net}, BATCH, PLAIN)
    np.testing.assert_allclose(apply(params, BATCH, beside), wanted, rtol=1e-4, atol=1e-5)


def test_the_domain_and_the_candidates_own_query_are_read_and_touched():
    size = parameters(8, (3,))
    config = dataclasses.replace(
        DOMAINS,
        interest="can",
        interest_options=(("hidden", (3,)), ("generate", False)),
        query_features=(Categorical("item", 30, size, table="co_action"),),
    )
    params = random_params(config)
    ctr.check(PLACED, config)
    logits = np.asarray(apply(params, PLACED, config))
    touched = ctr.touched(PLACED, config)
    assert touched.keys() == params["tables"].keys() > {"scenario", "active_days", "co_action"}
    rows = {name: embedding.gather_rows(jnp.asarray(params["tables"][name]), ids) for name, ids in touched.items()}
    np.testing.assert_allclose(apply({**params, "tables": rows}, PLACED, config), logits, rtol=1e-5)
    for table in ("scenario", "active_days", "co_action"):
        moved = {**params, "tables": {**params["tables"], table: params["tables"][table] + 0.5}}
        assert np.abs(apply(moved, PLACED, config) - logits).min() > 1e-5, table
    other = dataclasses.replace(DOMAINS, domain_field="", domains=0, domain_features=())
    assert {"scenario", "active_days"}.isdisjoint(random_params(other)["tables"])


def test_configs_are_hashable_and_examples_repeat():
    again, batch = ctr.example()
    assert hash(again) == hash(CONFIG) and again == CONFIG
    jax.tree.map(np.testing.assert_array_equal, batch, BATCH)

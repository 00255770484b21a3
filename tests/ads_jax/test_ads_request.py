"""Requests to the ranking model of ADS: candidates, what they share, memory, and what is wrong with one."""

import functools
from dataclasses import replace

import jax
import jax.extend.core
import numpy as np
import pytest
from ads_examples import BATCH, CONFIG, apply, asked, drawn, score

import ads_jax
from rec_core.embedding import Categorical
from rec_core.interest.can import parameters
from rec_core.ranking import ctr

CO_ACTION = replace(
    CONFIG,
    interest="can",
    interest_options=(("hidden", (3,)), ("orders", 2), ("generate", False)),
    query_features=(Categorical("item", 32, parameters(4, (3,)), table="co_action"),),
)


@pytest.mark.parametrize(
    ("config", "of_candidate"),
    [(CONFIG, False), (CONFIG, True), (CO_ACTION, False)],
    ids=["domain-of-request", "domain-of-candidate", "can"],
)
def test_candidates_of_a_request_get_the_numbers_of_each_alone(config, of_candidate):
    params = drawn(config)
    scenario = np.random.default_rng(5).integers(0, 3, (6, 3)).astype(np.int32)
    request = asked(**({"scenario": scenario} if of_candidate else {}))
    many = np.asarray(score(params, request, config, chunk=2))
    assert many.shape == (6, 3, 2) and np.std(many[:, :, 0], axis=1).min() > 1e-3
    for c in range(3):
        context = {name: x[:, c] if x.ndim == 2 else x for name, x in request.context.items()}
        one = replace(BATCH, target={"item": request.target["item"][:, c]}, context=context)
        np.testing.assert_allclose(many[:, c], apply(params, one, config), rtol=1e-4, atol=1e-5)


def test_a_request_encodes_its_sequence_once(monkeypatch):
    encoded, original = [], ads_jax.ADS.encode

    def counted(self, sequence, mask, domain, **options):
        encoded.append((sequence.shape, domain.shape))
        return original(self, sequence, mask, domain, **options)

    monkeypatch.setattr(ads_jax.ADS, "encode", counted)
    params = drawn(CONFIG)
    encoded.clear()
    jax.eval_shape(functools.partial(ads_jax.score, config=CONFIG), params, asked())
    assert encoded == [((6, 6, 4), (6, 8))]  # all requests, no candidates


@pytest.mark.parametrize("items", [10, 1])
@pytest.mark.parametrize("interest", ["din", "multi_head", "can"])
def test_memory_of_a_request_stays_below_one_array_of_all_queries(interest, items):
    candidates, length, d = 500, 1000, 16
    config = ads_jax.Config(
        item_features=(Categorical("item", 1000, d),),
        domain_features=(Categorical("scenario", 3, 8),),
        interest=interest,
        interest_options=(("hidden", (16, 8)),) if interest == "din" else (),
        hidden=(32,),
        length=length,
        items=items,
    )
    request = ads_jax.Batch(
        target={"item": np.zeros((1, candidates), np.int32)},
        sequence={"item": np.zeros((1, length), np.int32)},
        mask=np.ones((1, length), bool),
        context={"scenario": np.zeros(1, np.int32)},
        label=np.zeros(1, np.float32),
        weight=np.ones(1, np.float32),
    )
    params = jax.eval_shape(functools.partial(ads_jax.init, config=config), jax.random.key(0))
    compiled = score.lower(params, request, config).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * 4 * candidates * length * d


@pytest.mark.parametrize("items", [1, 2])
def test_keys_of_multi_head_are_made_for_each_chunk_of_candidates_and_values_never(items):
    """What `score` says is shared, seen in its program: which arrays [.., T, heads, width] products give, and where."""
    config = replace(CONFIG, interest_options=(("heads", 2), ("width", 3 if items == 1 else 12)), items=items)
    request, found = asked(), []

    def walk(program, inside):
        for step in program.eqns:
            if step.primitive.name == "dot_general":
                found.extend(inside for x in step.outvars if x.aval.shape == (6, 6, *heads))
            for inner in jax.extend.core.jaxprs_in_params(step.params):
                walk(inner, inside or step.primitive.name == "scan")

    heads = tuple(dict(config.interest_options).values())
    program = jax.make_jaxpr(functools.partial(ads_jax.score, config=config, chunk=1))(drawn(config), request)
    walk(program.jaxpr, False)
    assert found == ([True] if items == 1 else [])  # keys alone, in the loop over candidates


def put(array, index, value):
    array = array.copy()
    array[index] = value
    return array


SCENARIO = np.arange(18, dtype=np.int32).reshape(6, 3) % 3


@pytest.mark.parametrize("module", [ads_jax, ctr])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"target": {"item": put(asked().target["item"], (2, 1), 10**6)}},
         r"target\['item'\]: id 1000000 at row 2, position 1 is outside \[0, 32\)"),
        (lambda: {"target": BATCH.target}, r"target\['item'\]: shape \(6,\), must be \(6, C\) with at least one"),
        (lambda: {"target": {"item": np.zeros((6, 0), np.int32)}}, r"target\['item'\]: shape \(6, 0\), must be"),
        (lambda: {"target": {"item": np.zeros((5, 3), np.int32)}}, r"target\['item'\]: shape \(5, 3\), must be"),
        (lambda: {"target": {}}, "target: no field is there"),
        (lambda: {"user": {"user": SCENARIO}}, r"user\['user'\]: shape \(6, 3\), must be \(6,\)"),
        (lambda: {"sequence": {"item": put(BATCH.sequence["item"], (1, 4), -1)}}, r"sequence\['item'\]: id -1 at row"),
        ({"scenario": np.full(6, 99, np.int32)}, r"domain\['scenario'\]: id 99 at row 0 is outside \[0, 3\)"),
        ({"scenario": put(SCENARIO, (4, 2), 3)}, r"domain\['scenario'\]: id 3 at row 4, position 2 is outside"),
        ({"scenario": SCENARIO[:, :2]}, r"domain\['scenario'\]: shape \(6, 2\), must be \(6, 3\)"),
        ({"active_days": np.full(6, np.nan, np.float32)}, r"domain\['active_days'\]: nan at row 0"),
        ({"active_days": np.full((6, 3), np.inf, np.float32)}, r"domain\['active_days'\]: inf at row 0, position 0"),
        (lambda: {"time": np.full((6, 6), np.nan)}, "time: nan at row 0, position 0"),
        (lambda: {"mask": np.zeros((6, 0), bool)}, "at least one example and one slot"),
    ],
)  # fmt: skip
def test_bad_requests_are_named(module, change, message):
    bad = asked(**change) if isinstance(change, dict) else replace(asked(), **change())
    with pytest.raises(ValueError, match=message):
        module.check(bad, CONFIG, candidates=True)


@pytest.mark.parametrize("module", [ads_jax, ctr])
def test_good_requests_pass(module):
    for request in (asked(), asked(scenario=SCENARIO), asked(active_days=np.ones((6, 3), np.float32))):
        module.check(replace(request, label=None, weight=None), CONFIG, candidates=True)
        with pytest.raises(ValueError, match=r"target\['item'\]: shape \(6, 3\), must be \(6,\)"):
            module.check(request, CONFIG)
    with pytest.raises(ValueError, match="chunk is 0, must be at least 1"):
        module.score(drawn(CONFIG), asked(), CONFIG, chunk=0)


def test_a_request_to_the_click_model_may_cross_fields_of_user_and_candidate():
    config, batch = ctr.example(6)
    target = {name: np.stack([x, x[::-1]], axis=1) for name, x in batch.target.items()}
    request = replace(batch, target=target, label=None, weight=None)
    hour, dense = batch.context["hour"], batch.dense
    for change in ({}, {"context": {"hour": target["item"] % 24}}, {"dense": np.stack([dense, dense], axis=1)}):
        ctr.check(replace(request, **change), config, candidates=True)
    for change, message in (
        ({"context": {"hour": put(hour, 3, 24)}}, r"context\['hour'\]: id 24 at row 3 is outside \[0, 24\)"),
        ({"context": {"hour": np.stack([hour] * 3, axis=1)}}, r"context\['hour'\]: shape \(6, 3\), must be \(6, 2\)"),
        ({"context": {}}, "context: field 'hour' is missing"),
        (
            {"target": {**target, "brand": target["brand"][:, :1]}},
            r"target\['brand'\]: shape \(6, 1\), must be \(6, 2\)",
        ),
        ({"dense": np.stack([dense] * 3, axis=1)}, r"dense: shape \(6, 3, 3\), must be \(6, 2, 3\)"),
        ({"dense": np.full((6, 2, 3), np.nan)}, "dense: nan at row 0, position 0, 0"),
        ({"dense": None}, "dense: missing"),
    ):
        with pytest.raises(ValueError, match=message):
            ctr.check(replace(request, **change), config, candidates=True)

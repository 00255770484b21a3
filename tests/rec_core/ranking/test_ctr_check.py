"""What the click model refuses: configs, batches and requests."""

import dataclasses

import jax
import numpy as np
import pytest
from ctr_examples import BATCH, CONFIG, DOMAINS, PARAMS, PLACED, WHERE, request

from rec_core.embedding import Categorical
from rec_core.ranking import ctr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scenario": WHERE["scenario"] + 1}, r"domain\['scenario'\]: id 3 at row 2 is outside \[0, 3\)"),
        ({"active_days": np.full(8, np.inf, np.float32)}, r"domain\['active_days'\]: inf at row 0"),
        ({"active_days": np.full(8, np.nan, np.float32)}, r"domain\['active_days'\]: nan at row 0"),
        ({"scenario": WHERE["scenario"][:, None]}, r"domain\['scenario'\]: shape \(8, 1\), must be \(8,\)"),
        ({"scenario": None}, "context: field 'scenario' is missing"),
    ],
)
def test_check_names_what_is_wrong_with_a_domain(change, message):
    context = {name: value for name, value in {**PLACED.context, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        ctr.check(dataclasses.replace(PLACED, context=context), DOMAINS)
    more = dataclasses.replace(DOMAINS, domain_features=DOMAINS.domain_features[1:])
    if "shape" not in message and "scenario" in change:  # the id alone
        with pytest.raises(ValueError, match=message):
            ctr.check(dataclasses.replace(PLACED, context=context), more)


def spoil(part, name, index, value):
    fields = dict(getattr(BATCH, part))
    fields[name] = fields[name].copy()
    fields[name][index] = value
    return {part: fields}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("sequence", "item", (2, 1), 30), r"sequence\['item'\]: id 30 at row 2, position 1 is outside \[0, 30\)"),
        (spoil("target", "item", 3, -1), r"target\['item'\]: id -1 at row 3"),
        (spoil("user", "activity", 1, np.nan), r"user\['activity'\]: nan at row 1"),
        ({"context": {}}, "context: field 'hour' is missing"),
        ({"dense": None}, "dense: missing"),
        ({"dense": np.full((8, 3), np.inf)}, "dense: inf at row 0, position 0"),
        ({"label": np.full(8, 2.0)}, "label: 2.0 at row 0"),
        ({"weight": np.full(8, -1.0)}, "weight: -1.0 at row 0"),
        ({"mask": np.zeros((8, 0), bool)}, "at least one example and one slot"),
        ({"mask": BATCH.mask.astype(int)}, "mask: must be bool"),
        ({"time": np.full((8, 6), np.nan)}, "time: nan at row 0, position 0"),
    ],
)
def test_check_names_field_row_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        ctr.check(dataclasses.replace(BATCH, **change), CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": BATCH.label[:, None]}, r"labels have shape \(8, 1\), logits \(8,\); they must be the same"),
        ({"label": np.float32(1)}, r"labels have shape \(\), logits \(8,\)"),
        ({"weight": BATCH.weight[:1]}, r"weight has shape \(1,\), must be \(8,\)"),
        ({"mask": BATCH.mask[:, 1:]}, r"sequence\['item'\]: shape \(8, 6\), must be \(8, 5\)"),
        ({"mask": BATCH.mask[0]}, r"mask: shape \(6,\), must be \[B, T\]"),
        ({"time": BATCH.time[:, :2]}, r"time: shape \(8, 2\), must be \(8, 6\)"),
        ({"dense": BATCH.dense[:, :2]}, r"dense: shape \(8, 2\), must be \(8, 3\)"),
        ({"target": {}}, "target: field 'item' is missing"),
        ({"user": {**BATCH.user, "user": BATCH.user["user"][:4]}}, r"user\['user'\]: shape \(4,\), must be \(8,\)"),
        ({"context": {}}, "context: field 'hour' is missing"),
    ],
)
def test_arrays_that_do_not_go_together_are_refused_under_jit(change, message):
    with pytest.raises(ValueError, match=message):
        jax.jit(ctr.loss, static_argnums=2)(PARAMS, dataclasses.replace(BATCH, **change), CONFIG)


def test_requests_that_do_not_go_together_are_refused_under_jit():
    asked = request(BATCH, 3)
    for change, message in (
        ({"target": {}}, "target: no field is there"),
        ({"target": {**asked.target, "brand": BATCH.target["brand"]}}, r"target\['brand'\]: shape \(8,\), must be"),
        ({"context": {}}, "context: field 'hour' is missing"),
        ({"mask": BATCH.mask[:0]}, r"mask: shape \(0, 6\), must be \[B, T\] with at least one example"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.jit(ctr.score, static_argnums=2)(PARAMS, dataclasses.replace(asked, **change), CONFIG)


def test_an_interest_that_reads_time_is_given_time():
    config = dataclasses.replace(CONFIG, interest="twin", interest_options=(("cross", (4,)),))
    timeless = dataclasses.replace(BATCH, time=None)
    ctr.check(BATCH, config)
    ctr.check(timeless, CONFIG)
    for refuse in (ctr.check, lambda batch, config: ctr.apply({"tables": {}, "net": {}}, batch, config)):
        with pytest.raises(ValueError, match="time: missing; interest 'twin' reads ages of behaviours"):
            refuse(timeless, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_features": ()}, "item_features is empty"),
        ({"embedding_scale": float("nan")}, "embedding_scale is nan, must be at least 0 and finite"),
        (
            {"interest_options": (("heds", 2),)},
            r"interest_options names \['heds'\]; interest 'din' has \['hidden', 'so",
        ),
        (
            {
                "network": "star",
                "domain_features": DOMAINS.domain_features,
                "domain_field": "scenario",
                "domains": 3,
                "network_options": (("domains", 2),),
            },
            "network_options gives 2 domains, config.domains is 3; leave it out",
        ),
        ({"interest": "dinn"}, r"interest is 'dinn', must be one of \['average', '"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"tasks": 0}, "tasks is 0"),
        ({"hidden": ()}, "hidden is"),
        ({"network": "mlp"}, r"network is 'mlp', must be one of \['adasparse', '"),
        (
            {"network": "star", "domain_features": DOMAINS.domain_features, "network_options": (("domains", 3),)},
            "network is 'star', which reads the domain's id, and domain_field is",
        ),
        ({"network": "apg"}, "network is 'apg', which reads the domain, and domain_features is empty; give them"),
        (
            {"gate": "frnet", "context_features": (Categorical("hour", 24, 6),)},
            r"gate is 'frnet', which reads fields of one width, and the features' are \[4, 6\]",
        ),
        (
            {"network": "dcnv2", "network_options": (("layers", 3),)},
            r"network_options names \['layers'\]; network 'dcnv2' has \['cross', 'experts'",
        ),
        ({"gate": "frnet", "gate_options": (("heads", 2),)}, r"gate_options names \['heads'\]; gate 'frnet' has"),
        ({"gate": "gru"}, "gate is 'gru'"),
        ({"gate": "pepnet"}, "gate is 'pepnet', which reads the domain"),
        ({"gate": "pepnet", "network": "dcnv2"}, "gate is 'pepnet' with network 'dcnv2'; it gates the layers of 'dnn'"),
        ({"domains": 3}, "domain_field is '' and domains 3; give both or none"),
        ({"user_features": (Categorical("item", 30, 4),)}, r"\['item'\] are in user_features and item_features"),
        ({"user_features": (Categorical("user", 20, 4), Categorical("friend", 9, 4, table="user"))}, "table 'user'"),
    ],
)
def test_wrong_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)

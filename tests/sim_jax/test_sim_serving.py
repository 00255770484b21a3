"""Ranking from the tree: the model's own numbers, whatever the sizes, and nothing compiled twice."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import sim_jax
from rec_core.data.schema import EventLog
from rec_core.embedding import Categorical, Continuous
from sim_jax.serving import Ask, Buckets, ItemFields, Ranker, _packed, _unpacked
from sim_jax.tree_keys import ItemKeys
from sim_jax.tree_table import TreeTable

ITEMS = 40
CONFIG = sim_jax.Config(
    item_features=(Categorical("item", ITEMS, 4), Categorical("category", 8, 4)),
    user_features=(Categorical("age", 5, 2), Continuous("tenure", (1.0, 5.0), 2)),
    context_features=(Categorical("hour", 24, 2),),
    search="hard",
    top=3,
    exact_options=(("heads", 2), ("width", 4)),
    ages=(60.0, 600.0),
    age_width=2,
    short="din",
    short_options=(("hidden", (4,)),),
    hidden=(8,),
)
PARAMS = jax.jit(sim_jax.init, static_argnums=1)(jax.random.key(0), CONFIG)
RAW = np.arange(2, ITEMS) * 1000 + 7  # raw ids are not the model's
CATEGORY = (2 + np.arange(2, ITEMS) % 5).astype(np.int32)
FIELDS = ItemFields(RAW, {"item": np.arange(2, ITEMS), "category": CATEGORY})


def fields_of(ids):
    return {name: table[FIELDS.places(ids)] for name, table in FIELDS.tables().items()}


RNG = np.random.default_rng(0)
EVENTS = RNG.integers(0, ITEMS - 2, 60)
TIME = np.sort(RNG.integers(1000, 9000, 60))
LOG = EventLog(np.repeat([5, 9], 30), RAW[EVENTS], np.concatenate([TIME[::2], TIME[1::2]]), CATEGORY[EVENTS])
KEYS = ItemKeys.of(RAW, CATEGORY)
BUCKETS = Buckets(candidates=(4, 8), keys=(3, 6), recent=4)


def ask(candidates, user=5, time=6000, **changes):
    own = LOG.user == user
    recent = {"recent": LOG.item[own], "recent_time": LOG.time[own]}
    features = {"age": 3, "tenure": 2.5}
    return Ask(user, time, candidates, **recent, user_features=features, context={"hour": 7}, **changes)


def one_by_one(request, keys=KEYS):
    """Each candidate alone by `sim_jax.apply`, its behaviours found by a loop over the log."""
    scores = []
    known = np.isin(RAW, request.candidates)
    assert known.sum() > 0
    for position, candidate in enumerate(request.candidates):
        own = (LOG.user == request.user) & (LOG.time < request.time)
        newest = np.flatnonzero(own)[-4:]
        wanted = set(keys(np.array([candidate])).values.tolist())
        found = [i for i in np.flatnonzero(own) if wanted & set(keys(LOG.item[[i]]).values.tolist())][-3:]

        def pad(index, size):
            mask = np.arange(size) < len(index)
            fields = {name: np.zeros((1, size), np.int32) for name in ("item", "category")}
            for name, x in fields_of(LOG.item[index]).items():
                fields[name][0, : len(index)] = x
            return fields, mask[None]

        sequence, mask = pad(newest, 4)
        long, long_mask = pad(found, 3)
        age = np.zeros((1, 3), np.float32)
        age[0, : len(found)] = request.time - LOG.time[found]
        hour = np.broadcast_to(request.context["hour"], len(request.candidates))[position]
        batch = sim_jax.Batch(
            target=fields_of(np.array([candidate])),
            sequence=sequence,
            mask=mask,
            long=long,
            long_mask=long_mask,
            label=np.zeros(1, np.float32),
            weight=np.ones(1, np.float32),
            long_time=age,
            user={"age": np.array([3]), "tenure": np.array([request.user_features["tenure"]], np.float32)},
            context={"hour": np.array([hour])},
        )
        scores.append(float(APPLY(PARAMS, batch)[0]))
    return np.array(scores)


APPLY = jax.jit(lambda params, batch: sim_jax.apply(params, batch, replace(CONFIG, search="none")).logit)


@pytest.fixture(scope="module")
def ranker():
    made = Ranker(PARAMS, CONFIG, TreeTable.build(LOG), KEYS, FIELDS, buckets=BUCKETS)
    assert made.warm_up() == 4 == made._score._cache_size()
    return made


def test_a_request_gets_the_models_numbers_and_waits_for_no_compiler(ranker):
    for request in (
        ask(RAW[[0, 5, 7]]),
        ask(RAW[[1]], time=1000),  # before the first behaviour
        ask(RAW[[1, 2]], user=77),  # unknown user: no recent behaviours either
        ask(RAW[:8], user=9),  # more keys than the smaller size
        replace(ask(RAW[[3, 9, 4]]), context={"hour": np.array([1, 2, 23])}),
        ask(np.array([RAW[0], 123456])),  # an item that nobody knows: no key, the unknown item's vector
        replace(ask(RAW[np.arange(20) % 11]), context={"hour": np.arange(20)}),  # in parts
        replace(ask(RAW[[2, 6]]), user_features={"age": np.int64(3), "tenure": 7, "unread": 1.5}),  # of other types
    ):
        np.testing.assert_allclose(ranker.rank(request), one_by_one(request), rtol=1e-4, atol=1e-5)
    assert ranker.rank(ask(RAW[:0])).shape == (0,)
    assert ranker._score._cache_size() == 4


def test_a_request_is_handed_over_as_one_array(ranker, monkeypatch):
    handed, run = [], ranker._score
    monkeypatch.setattr(ranker, "_score", lambda held, *sent: handed.append((held, sent)) or run(held, *sent))
    ranker.rank(ask(RAW[[0, 5, 7]]))
    ((held, (words, form)),) = handed
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(held))  # on the device since the ranker was made
    assert type(words) is np.ndarray and words.dtype == np.int32
    assert not any(isinstance(x, np.ndarray | jax.Array) for x in jax.tree.leaves(form))


@pytest.mark.portable
def test_what_was_packed_is_unpacked():
    tree = {
        "ids": np.array([[3, -1], [2**31 - 1, 0]]),
        "floats": (np.float64(0.1), np.array([np.nan, -0.0, np.inf], np.float32)),
        "none": None,
        "empty": np.zeros((0, 2), np.float16),
        "flag": np.array(True),
    }
    words, form = _packed(tree)
    assert hash(form) == hash(_packed(jax.tree.map(np.zeros_like, tree))[1])
    found = jax.jit(_unpacked, static_argnames="form")(words, form)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.asarray(y, x.dtype)), found, tree)
    assert [x.dtype.name for x in jax.tree.leaves(found)] == ["float32", "int32", "float32", "float32", "int32"]
    assert np.signbit(found["floats"][1][1])


@pytest.mark.parametrize("gap", [1, 3, 1000])
def test_items_are_found_by_their_raw_ids_and_strangers_are_unknown(gap):
    ids = 5 + gap * np.array([0, 1, 3, 4])
    items = ItemFields(ids, {"item": np.array([7, 8, 9, 6])})
    asked = np.array([[ids[0], ids[3], ids[2]], [ids[1] + (gap > 1), 4, 10**15]])
    np.testing.assert_array_equal(items.tables()["item"][items.places(asked)], [[7, 6, 9], [1 if gap > 1 else 8, 1, 1]])


def test_several_keys_of_an_item_are_searched_together():
    keys = ItemKeys.of(np.append(RAW, RAW[::2]), np.append(CATEGORY, 2 + (CATEGORY[::2] + 1) % 5))
    tree = TreeTable.build(LOG, keys(LOG.item))
    ranker = Ranker(PARAMS, CONFIG, tree, keys, FIELDS, buckets=BUCKETS)
    request = ask(RAW[[0, 5, 8, 2]])
    np.testing.assert_allclose(ranker.rank(request), one_by_one(request, keys), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_served_is_refused():
    tree = TreeTable.build(LOG)
    with pytest.raises(ValueError, match='search is "soft", which no tree answers'):
        Ranker(PARAMS, replace(CONFIG, search="soft"), tree, KEYS, FIELDS)
    with pytest.raises(ValueError, match=r"the item features also read \['category'\]"):
        Ranker(PARAMS, CONFIG, tree, KEYS, ItemFields(RAW, {"item": np.arange(2, ITEMS)}))
    with pytest.raises(ValueError, match="candidates is"):
        Buckets(candidates=(8, 4))
    with pytest.raises(ValueError, match="item must rise"):
        ItemFields(RAW[::-1], {"item": RAW})
    with pytest.raises(TypeError, match=r"these are not: \[1\]\['age'\]$"):
        Ranker(PARAMS, CONFIG, tree, KEYS, FIELDS, buckets=BUCKETS).rank(
            replace(ask(RAW[:2]), user_features={"age": "3"})
        )
    with pytest.raises(ValueError, match="feature 'hour' reads field 'hour', which is missing"):
        Ranker(PARAMS, CONFIG, tree, KEYS, FIELDS, buckets=BUCKETS).rank(replace(ask(RAW[:2]), context={}))

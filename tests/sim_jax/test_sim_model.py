"""The SIM model: search then attention, its losses, and many candidates of a request."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sim_jax
from rec_core.interest import INTEREST
from sim_jax.exact import ExactSearch

SOFT, BATCH = sim_jax.example(batch_size=6, seed=3)
BATCH.long_mask[0, :-2] = False  # a user of two behaviours: fewer than a search keeps
HARD = replace(SOFT, search="hard")
apply = jax.jit(sim_jax.apply, static_argnames=("config", "train"))
PARAMS = {config: jax.jit(sim_jax.init, static_argnums=1)(jax.random.key(0), config) for config in (SOFT, HARD)}


def moved(batch, order):
    """The long sequences in another order of slots; what is asked of them must not change."""
    return batch.replace(
        long={name: x[:, order] for name, x in batch.long.items()},
        long_mask=batch.long_mask[:, order],
        long_time=batch.long_time[:, order],
    )


def test_the_exact_unit_is_the_papers_attention_by_hand():
    rng = np.random.default_rng(0)
    target, sequence = rng.normal(size=(2, 3)), rng.normal(size=(2, 4, 3))
    mask = np.array([[True, True, False, True], [False] * 4])
    time = np.array([[10.0, 100.0, np.nan, 60.0], [0.0] * 4])  # buckets 0, 1, -, 1: a bound belongs to the older
    unit = ExactSearch("multi_head", (("heads", 2), ("width", 5)), ages=(60.0, 3600.0), age_width=2)
    params = unit.init(jax.random.key(1), *map(jnp.asarray, (target, sequence, mask, time)))
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    z = np.concatenate([sequence, weights["age"]["embedding"][[0, 1, 0, 1]][None].repeat(2, 0)], axis=-1)
    wanted = []
    for head in range(2):
        query = target @ weights["unit"]["query"]["kernel"][:, head]
        score = np.einsum("tw,w->t", z[0] @ weights["unit"]["key"]["kernel"][:, head], query[0]) / np.sqrt(5)
        attention = np.where(mask[0], np.exp(score), 0)
        wanted.append(attention / attention.sum() @ (z[0] @ weights["unit"]["value"]["kernel"][:, head]))
    got = unit.apply(params, *map(jnp.asarray, (target, sequence, mask, time)))
    np.testing.assert_allclose(got[0], np.concatenate(wanted), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got[1], 0)


@pytest.mark.parametrize("config", [SOFT, HARD], ids=["soft", "hard"])
def test_what_a_search_finds_and_nothing_else_is_read(config):
    position, found = sim_jax.find(PARAMS[config], BATCH, config)
    assert found.any() and (~found).any()

    def take(x):
        return np.where(found, np.take_along_axis(x, np.asarray(position), axis=1), 0)

    searched = BATCH.replace(
        long={name: take(x) for name, x in BATCH.long.items()},
        long_mask=np.asarray(found),
        long_time=take(BATCH.long_time),
    )
    given = replace(config, search="none")
    wanted = apply(PARAMS[config], BATCH, config).logit
    np.testing.assert_allclose(apply(PARAMS[config], searched, given).logit, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"reads the long sequence as it is"):
        sim_jax.find(PARAMS[config], searched, given)


def test_what_was_found_is_read_in_order_where_order_matters():
    config = replace(HARD, exact="mimn", exact_options=(("slots", 3), ("hidden", (4,))), short="din", age_width=0)
    params = jax.jit(sim_jax.init, static_argnums=1)(jax.random.key(1), config)
    given = BATCH.replace(  # the target's behaviours alone, left where they are: oldest first
        long_mask=BATCH.long_mask & (BATCH.long["category"] == BATCH.target["category"][:, None])
    )
    assert given.long_mask.sum(axis=1).max() in (2, 3), "some order to get wrong, and none left out by the search"
    wanted = apply(params, given, replace(config, search="none")).logit
    np.testing.assert_allclose(apply(params, BATCH, config).logit, wanted, rtol=1e-5, atol=1e-6)


def test_soft_search_takes_the_most_relevant():
    params, config = PARAMS[SOFT], SOFT
    position, found = sim_jax.find(params, BATCH, config)
    tables = jax.tree.map(np.asarray, params["tables"])

    def embed(fields):
        return np.concatenate([tables["item"][fields["item"]], tables["category"][fields["category"]]], axis=-1)

    w_a, w_b = (np.asarray(params["net"]["search"][name]) for name in ("w_a", "w_b"))
    r = np.einsum("btw,bw->bt", embed(BATCH.long) @ w_b, embed(BATCH.target) @ w_a)
    r = np.where(BATCH.long_mask, r, -np.inf)
    for row in range(6):
        count = min(3, BATCH.long_mask[row].sum())
        np.testing.assert_array_equal(found[row], np.arange(3) < count)
        np.testing.assert_allclose(r[row, position[row, :count]], np.sort(r[row])[::-1][:count], rtol=1e-4)


@pytest.mark.parametrize("config", [SOFT, replace(SOFT, search="none")], ids=["soft", "none"])
def test_padding_and_its_side_change_nothing(config):
    order = np.argsort(BATCH.long_mask, axis=1, kind="stable")[:, ::-1][0]  # row 0's padding to the other side
    params = PARAMS[SOFT]
    wanted = apply(params, BATCH, config).logit
    np.testing.assert_allclose(apply(params, moved(BATCH, order), config).logit, wanted, rtol=1e-5, atol=1e-6)
    filled = BATCH.replace(
        long={name: np.where(BATCH.long_mask, x, 5) for name, x in BATCH.long.items()},
        long_time=np.where(BATCH.long_mask, BATCH.long_time, np.nan),
    )
    np.testing.assert_allclose(apply(params, filled, config).logit, wanted, rtol=1e-5, atol=1e-6)


def test_losses_add_up_and_each_teaches_its_own():
    key = jax.random.key(0)
    config = replace(SOFT, search_weight=0.5, auxiliary_weight=0.25)

    def compute(params, weights):
        changed = replace(config, search_weight=weights[0], auxiliary_weight=weights[1])
        return sim_jax.loss(params, BATCH, changed, key=key)

    value = jax.jit(jax.value_and_grad(compute, has_aux=True), static_argnums=1)
    (loss, aux), whole = value(PARAMS[SOFT], (0.5, 0.25))
    parts = {name: float(total) / float(count) for name, (total, count) in aux.items()}
    assert set(parts) == {"loss", "search", "short_next_behavior", "predicted", "clicked"}
    wanted = parts["loss"] + 0.5 * parts["search"] + 0.25 * parts["short_next_behavior"]
    np.testing.assert_allclose(float(loss), wanted, rtol=1e-6)
    _, alone = value(PARAMS[SOFT], (0.0, 0.0))  # Loss_ESU: no gradient goes through the choice of the search
    for name in ("search", "search_click"):
        assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(alone["net"][name]))
        assert all((np.asarray(g) != 0).any() for g in jax.tree.leaves(whole["net"][name]) if g.size > 1)
    assert all((np.asarray(alone["tables"][name]) != 0).any() for name in ("item", "category", "user"))


def test_a_sample_is_read_by_the_auxiliary_task_alone():
    sampled = replace(SOFT, sample=2)
    outputs = [apply(PARAMS[SOFT], BATCH, sampled, key=jax.random.key(seed), train=True) for seed in (0, 1)]
    np.testing.assert_array_equal(outputs[0].logit, outputs[1].logit)
    assert (np.asarray(outputs[0].search) != np.asarray(outputs[1].search)).any()
    whole = apply(PARAMS[SOFT], BATCH, SOFT, key=jax.random.key(0), train=True)
    every = apply(PARAMS[SOFT], BATCH, replace(SOFT, sample=9), key=jax.random.key(0), train=True)
    np.testing.assert_allclose(every.search, whole.search, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="apply in training needs a key"):
        sim_jax.apply(PARAMS[SOFT], BATCH, sampled, train=True)


def test_dropout_follows_its_key():
    config = replace(SOFT, search="none", exact="", short="din", dropout=0.5)
    params = jax.jit(sim_jax.init, static_argnums=1)(jax.random.key(0), config)
    first, again, other = (apply(params, BATCH, config, key=jax.random.key(k), train=True).logit for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


def request_of(batch, candidates, config, key_of=None):
    """All rows of the batch as requests with the given rows' targets as candidates."""
    n = len(batch.weight)
    keep = {"sequence": batch.sequence, "mask": batch.mask, "user": batch.user, "context": batch.context}
    target = {name: np.broadcast_to(x[candidates], (n, len(candidates))) for name, x in batch.target.items()}
    place = np.zeros((n, len(candidates)), np.int32) if key_of is None else key_of
    keys = 1 if key_of is None else int(place.max()) + 1

    def by_key(x):  # the second key's sequence is the first's, turned by one user
        return np.stack([np.roll(x, i, axis=0) for i in range(keys)], axis=1)

    long = {name: by_key(x) for name, x in batch.long.items()}
    long_mask, long_time = by_key(batch.long_mask), by_key(batch.long_time)
    return sim_jax.Request(target, long=long, long_mask=long_mask, long_time=long_time, place=place, **keep)


@pytest.mark.parametrize("search", ["soft", "hard", "none"])
def test_candidates_of_a_request_get_the_numbers_of_each_alone(search):
    config = replace(SOFT, search=search)
    candidates = np.array([4, 0, 2])
    key_of = np.random.default_rng(0).integers(0, 2, (6, 3)).astype(np.int32) if search == "none" else None
    request = request_of(BATCH, candidates, config, key_of)
    scores = [
        np.asarray(jax.jit(partial(sim_jax.score, config=config, chunk=c))(PARAMS[SOFT], request)) for c in (2, 8)
    ]
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)
    for column in range(3):
        key = np.zeros(6, int) if key_of is None else key_of[:, column]
        rows = np.arange(6)
        single = BATCH.replace(
            target={name: x[:, column] for name, x in request.target.items()},
            long={name: x[rows, key] for name, x in request.long.items()},
            long_mask=request.long_mask[rows, key],
            long_time=request.long_time[rows, key],
        )
        wanted = apply(PARAMS[SOFT], single, config).logit
        np.testing.assert_allclose(scores[0][:, column], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exact", [*sorted(set(INTEREST) - {"dien"}), "search", ""])
def test_any_member_of_the_family_serves_as_the_exact_unit(exact):
    options = {"mimn": (("slots", 3),), "twin": (("top", 4),), "eta": (("top", 4),)}
    config = replace(
        SOFT,
        exact=exact,
        search="soft" if exact == "search" else "none",
        exact_options=options.get(exact, ()),
        short="din",
    )
    params = jax.eval_shape(partial(sim_jax.init, config=config), jax.random.key(0))
    output = jax.eval_shape(partial(sim_jax.apply, config=config, key=jax.random.key(0), train=True), params, BATCH)
    assert output.logit.shape == (6,)
    assert ("exact_utilisation" in output.auxiliary) == (exact == "mimn")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": "some"}, "search is 'some', must be one of"),
        ({"exact": "dien"}, "exact is 'dien', has an auxiliary loss"),
        ({"exact": "search", "search": "none"}, "set search to"),
        ({"exact": "", "short": "", "search": "none"}, "must name a module"),
        ({"exact": ""}, "set it to"),
        ({"search": "hard", "category": "brand"}, "category is 'brand', must be an item field"),
        ({"top": 0}, "top is 0, must be at least 1"),
        ({"ages": (3.0, 2.0)}, "ages is .*increasing"),
        ({"recall": 0.0}, r"recall is 0\.0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SOFT, **changes)


def test_bad_batches_are_named():
    for changes, message in (
        ({"negatives": None}, "negatives: missing"),
        ({"long_time": None}, "long_time: missing"),
        ({"long_mask": BATCH.long_mask[:3]}, "long_mask: 3 rows, must be 6"),
        ({"long_mask": BATCH.long_mask.astype(np.int32)}, "long_mask: must be bool"),
        ({"label": np.full(6, 2.0)}, r"label: 2\.0 at row 0 must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            sim_jax.check(BATCH.replace(**changes), SOFT)
    nobody = BATCH.replace(mask=np.zeros_like(BATCH.mask), long_mask=np.zeros_like(BATCH.long_mask))
    sim_jax.check(nobody, SOFT)
    assert np.isfinite(apply(PARAMS[SOFT], nobody, SOFT).logit).all()

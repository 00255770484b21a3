"""The synthetic world: determinism, exact effects of its dials, true probabilities, and errors."""

from dataclasses import replace

import numpy as np
import pytest

from rec_core.data.schema import EventLog, validate
from rec_core.data.world import World, blocks, generate, items_of, probability, truth_of, word

SMALL = World(
    users=120,
    items=160,
    categories=8,
    domains=3,
    styles=4,
    departments=3,
    mean_length=40.0,
    max_length=150,
    days=40.0,
    session_length=20.0,
)
COLUMNS = ("user", "item", "time", "category", "domain", "label", "probability")


@pytest.fixture(scope="module")
def world():
    return generate(SMALL)


def same(a: EventLog, b: EventLog, columns=COLUMNS) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in columns)


def joined(parts: list[EventLog]) -> EventLog:
    return EventLog(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS})


def auc(score: np.ndarray, label: np.ndarray) -> float:
    rank = np.argsort(np.argsort(score, kind="stable"), kind="stable")
    positive = label.astype(bool)
    n = positive.sum()
    return (rank[positive].sum() - n * (n - 1) / 2) / (n * (len(label) - n))


# --- determinism and division ---


def test_same_config_same_world_and_another_seed_another(world):
    assert same(generate(SMALL)[0], world[0])
    assert generate(SMALL)[1].text == world[1].text
    other = generate(replace(SMALL, seed=1))
    assert not np.array_equal(other[0].time[:100], world[0].time[:100])
    assert other[1].text != world[1].text


@pytest.mark.parametrize("block_users", [1, 7, 15, 1000])
def test_blocks_of_any_size_hold_the_same_users(world, block_users):
    config = replace(SMALL, users=15)
    parts = list(blocks(config, block_users))
    assert len(parts) == -(-15 // block_users)
    whole = world[0].take(world[0].user < 15)  # nor does the number of users in the world matter
    assert same(joined(parts), whole)


def test_processes_may_divide_the_users(world):
    parts = [part for a, b in ((0, 13), (13, 13), (13, 120)) for part in blocks(SMALL, 40, first_user=a, last_user=b)]
    assert same(joined(parts), world[0])


# --- form ---


def test_log_is_encoded_and_complete(world):
    log, items, _ = world
    validate(
        log, users=SMALL.users, items=SMALL.items + 2, categories=SMALL.categories + 1, domains=SMALL.domains + 1,
        encoded=True,
    )  # fmt: skip
    assert np.array_equal(np.unique(log.user), np.arange(SMALL.users))
    assert np.array_equal(items.item, np.arange(2, SMALL.items + 2))
    assert np.array_equal(np.unique(log.category), np.arange(1, SMALL.categories + 1))
    assert np.array_equal(np.unique(log.domain), np.arange(1, SMALL.domains + 1))
    assert np.array_equal(items.category[log.item - 2], log.category)
    assert len(items.text) == SMALL.items and all(len(text.split()) == 6 for text in items.text)


def test_times_increase_within_the_horizon_in_sessions(world):
    log = world[0]
    gap = np.diff(log.time)[log.user[1:] == log.user[:-1]]
    assert gap.min() >= 1
    assert log.time.max() - log.time.min() <= SMALL.days * 86_400
    assert 0.9 < np.mean(gap < 600) < 0.98, "one gap in session_length = 20 is between sessions"


def test_new_items_are_not_shown_before_they_are_born(world):
    log, _, truth = world
    start = truth.born.min()
    fresh = truth.born[log.item - 2] > start
    assert fresh.sum() > 100
    assert (log.time >= truth.born[log.item - 2]).all()


def test_lengths_follow_the_config(world):
    log = world[0]
    clicks = np.bincount(log.user, log.label)
    assert abs(clicks.mean() / SMALL.mean_length - 1) < 0.25
    impressions = np.bincount(log.user)
    assert impressions.min() >= SMALL.min_impressions
    assert impressions.max() <= round(SMALL.max_length / SMALL.click_rate)


def test_every_user_has_a_click_even_where_clicks_are_rare():
    config = replace(SMALL, click_rate=0.03, min_impressions=1, mean_length=1.0, max_length=2)
    log = generate(config)[0]
    assert np.bincount(log.user, log.label, config.users).min() >= 1
    assert same(joined(list(blocks(config, 11))), log), "users that were drawn again do not depend on their block"


# --- the true probability ---


@pytest.mark.parametrize("latent", [0.0, 0.5, 1.0])
def test_probability_is_calibrated(latent):
    log = generate(replace(SMALL, users=200, latent=latent))[0]
    p, label = log.probability.astype(np.float64), log.label
    assert p.min() > 0 and p.max() < 1

    def z(rows: np.ndarray) -> float:
        assert rows.sum() > 500
        return float((label[rows] - p[rows]).sum() / np.sqrt((p[rows] * (1 - p[rows])).sum()))

    assert abs(z(np.ones(len(p), bool))) < 3
    for d in range(1, SMALL.domains + 1):
        assert abs(z(log.domain == d)) < 3.5
    tenth = np.searchsorted(np.quantile(p, np.arange(0.1, 1, 0.1)), p)
    assert max(abs(z(tenth == i)) for i in range(10)) < 4
    assert auc(p, label) > 0.6


@pytest.mark.parametrize("dial", ["long_term", "domain", "time", "latent"])
def test_click_rate_stays_over_the_range_of_a_dial(dial):
    for value in (0.0, 1.0):
        log = generate(replace(SMALL, **{dial: value}))[0]
        assert abs(log.probability.mean() - SMALL.click_rate) < 0.04


def test_history_alone_gives_the_probability_at_latent_zero(world):
    log, _, truth = world
    assert np.array_equal(truth.reachable_probability, log.probability)
    assert np.array_equal(probability(SMALL, log), log.probability)
    stranger = replace(log, user=log.user + 5_000)  # other hidden tastes, the same history
    assert np.array_equal(probability(SMALL, stranger), log.probability)


def test_hidden_taste_makes_it_unreachable():
    config = replace(SMALL, latent=1.0, users=40)
    log, _, truth = generate(config)
    assert truth.reachable_probability is None
    assert np.array_equal(probability(config, log), log.probability)
    stranger = replace(log, user=log.user + 5_000)
    assert np.abs(probability(config, stranger) - log.probability).mean() > 0.05
    # Only the time dial's T looks at clicks: without it the history has no part in p.
    still = replace(config, time=0.0)
    unclicked = replace(log, label=np.zeros_like(log.label))
    assert np.array_equal(probability(still, log), probability(still, unclicked))


def test_the_future_has_no_part_in_the_probability(world):
    log = world[0]
    place = np.arange(len(log)) - np.searchsorted(log.user, log.user)
    late = place >= 60
    changed = replace(
        log, label=np.where(late, 1 - log.label, log.label).astype(np.uint8),
        domain=np.where(late, 1, log.domain).astype(np.int32), time=log.time + late * 5_000,
    )  # fmt: skip
    p = probability(SMALL, changed)
    assert np.array_equal(p[~late], log.probability[~late])
    assert np.abs(p[late] - log.probability[late]).mean() > 0.01


# --- dials ---


def test_domains_are_labels_only_at_zero(world):
    config = replace(SMALL, domain=0.0)
    log = generate(config)[0]
    swapped = replace(log, domain=(log.domain % SMALL.domains + 1).astype(np.int32))
    assert np.array_equal(probability(config, swapped), log.probability)
    single = generate(replace(config, domains=1))[0]
    assert same(single, log, [name for name in COLUMNS if name != "domain"])
    swapped = replace(world[0], domain=(world[0].domain % SMALL.domains + 1).astype(np.int32))
    assert np.abs(probability(SMALL, swapped) - world[0].probability).mean() > 0.02


def test_times_matter_by_their_order_only_at_zero(world):
    config = replace(SMALL, time=0.0)
    log = generate(config)[0]

    def stretched(log: EventLog) -> EventLog:
        return replace(log, time=log.time[0] + (log.time - log.time.min()) * 3 + log.user)

    assert np.array_equal(probability(config, stretched(log)), log.probability)
    assert np.abs(probability(SMALL, stretched(world[0])) - world[0].probability).mean() > 0.02


def test_old_clicks_fade_at_long_term_zero_and_stay_at_one():
    def effect(long_term: float) -> float:
        config = replace(SMALL, long_term=long_term, time=0.0, users=40, mean_length=120.0)
        log = generate(config)[0]
        before = np.cumsum(log.label.astype(np.int64)) - log.label
        clicks = before - before[np.searchsorted(log.user, log.user)]
        left = np.bincount(log.user, log.label)[log.user] - clicks
        forgotten = replace(log, label=np.where(left > 60, 0, log.label).astype(np.uint8))
        # the last clicks of long users, 40 of them after what was forgotten: e^-2 of the short memory is left
        late = (left < 20) & (clicks > 100)
        assert late.sum() > 200
        return float(np.abs(probability(config, forgotten) - log.probability)[late].mean())

    assert effect(0.0) < 0.02
    assert effect(1.0) > 3 * effect(0.0)


def overlap(config: World) -> tuple[float, float]:
    """Mean number of words shared by two items of one category, and of two categories."""
    items = items_of(config)
    words = [set(text.split()) for text in items.text]
    a, b = np.triu_indices(len(words), 1)
    shared = np.array([len(words[i] & words[j]) for i, j in zip(a, b, strict=True)])
    alike = items.category[a] == items.category[b]
    return float(shared[alike].mean()), float(shared[~alike].mean())


def test_text_tells_nothing_at_zero_and_much_at_one(world):
    mute, told = overlap(replace(SMALL, text=0.0)), overlap(replace(SMALL, text=1.0))
    assert abs(mute[0] - mute[1]) < 0.03
    assert told[0] > told[1] + 0.5
    assert same(generate(replace(SMALL, text=0.0))[0], world[0]), "text has no effect on events"


def test_style_words_tell_the_hidden_style():
    config = replace(SMALL, text=1.0)
    items, truth = items_of(config), truth_of(config)
    words = [set(text.split()) for text in items.text]
    a, b = np.triu_indices(len(words), 1)
    category = items.category[a] == items.category[b]
    style = truth.style[a] == truth.style[b]
    shared = np.array([len(words[i] & words[j]) for i, j in zip(a, b, strict=True)])
    assert shared[category & style].mean() > shared[category & ~style].mean() + 0.5


def test_words_are_distinct():
    assert len({word(number) for number in range(20_000)}) == 20_000


# --- errors ---


@pytest.mark.parametrize(
    "field, value, rule",
    [
        ("users", 0, "at least 1"), ("users", 2.5, "integer"), ("users", True, "integer"), ("seed", -1, "0 to 2"),
        ("items", 31, "categories x styles"), ("styles", 1, "at least 2"), ("departments", 9, "at most categories"),
        ("domain", 1.5, "0 to 1"), ("time", -0.1, "0 to 1"), ("latent", float("nan"), "finite"),
        ("text", "high", "finite"), ("long_term", 2, "0 to 1"), ("click_rate", 0.9, ".02 to .6"),
        ("mean_length", 1e4, "max_length"), ("days", 0.01, "longest user"), ("days", 1e6, "29000"),
        ("session_length", 0.5, "at least 1"), ("epoch_days", 0.0, "above 0"), ("taste", 50, "0 to 5"),
    ],
)  # fmt: skip
def test_bad_config_names_field_value_and_rule(field, value, rule):
    with pytest.raises(ValueError, match=rf"World\.{field} = .*({rule})"):
        replace(SMALL, **{field: value})


def test_bad_divisions_and_logs_are_errors(world):
    log = world[0].take(world[0].user < 3)
    with pytest.raises(ValueError, match="users 5 to 500"):
        next(blocks(SMALL, first_user=5, last_user=500))
    with pytest.raises(ValueError, match="block_users = 0"):
        next(blocks(SMALL, 0))
    with pytest.raises(ValueError, match="item 162 in row 0"):
        probability(SMALL, replace(log, item=np.full_like(log.item, 162)))
    with pytest.raises(ValueError, match="domain 0 in row 0"):
        probability(SMALL, replace(log, domain=np.zeros_like(log.domain)))
    with pytest.raises(ValueError, match="label"):
        probability(SMALL, replace(log, label=None))
    with pytest.raises(ValueError, match="sort the log"):
        probability(SMALL, log.take(np.concatenate([np.arange(len(log)), [0]])))

"""Sequences, samples and sampled negatives: no sample reads a behaviour that is not strictly older."""

from pathlib import Path

import numpy as np
import pytest

from rec_core.data import samples as views
from rec_core.data.schema import DataError, EventLog, Items
from rec_core.data.writer import write


def dataset(folder: Path, events: list[tuple], *, label=True, rating=False, category=True):
    """(user, item, time, label) rows -> a prepared dataset."""
    user, item, time, taken = (np.array(column, np.int64) for column in zip(*events, strict=True))
    log = EventLog(
        user=user,
        item=item,
        time=time,
        label=taken.astype(np.uint8) if label else None,
        rating=taken.astype(np.float32) * 3 + 1 if rating else None,
    )
    ids = np.arange(2, int(item.max()) + 1)
    items = Items(ids, (1 + ids % 3).astype(np.int32) if category else None)
    return write([log], items, folder / "prepared", meta={"source": {}, "options": {}})


EVENTS = [
    (0, 2, 100, 1),
    (0, 3, 100, 0),
    (0, 4, 200, 1),
    (0, 5, 200, 1),
    (0, 2, 90_000, 0),
    (1, 6, 50, 0),
    (1, 3, 60, 1),
]


def views_of(data):
    category = views.item_category(data, until=10**9)
    sequences = views.behaviors(data, category)
    return category, sequences, views.samples(data, sequences, category)


def test_impressions_give_sequences_of_positives(tmp_path):
    category, sequences, made = views_of(dataset(tmp_path, EVENTS))
    np.testing.assert_array_equal(sequences.offsets, [0, 3, 4])
    np.testing.assert_array_equal(sequences.columns["item"], [2, 4, 5, 3])
    np.testing.assert_array_equal(sequences.columns["category"], category[[2, 4, 5, 3]])
    assert "feedback" not in sequences.columns
    # Behaviours at the sample's own second are not its history, nor is the sample itself.
    np.testing.assert_array_equal(made.end - made.start, [0, 0, 1, 1, 3, 0, 0])


def test_ratings_give_sequences_of_all_with_feedback(tmp_path):
    _, sequences, made = views_of(dataset(tmp_path, EVENTS, rating=True))
    np.testing.assert_array_equal(sequences.columns["feedback"], [1, 2, 1, 1, 2, 2, 1])
    np.testing.assert_array_equal(made.end - made.start, [0, 0, 2, 2, 4, 0, 1])
    # First of a user, same second, 100 s, same second, a day; first, 10 s.
    np.testing.assert_array_equal(sequences.columns["gap"], [1, 2, 3, 2, 7, 1, 2])
    assert sequences.columns["gap"].max() < views.GAPS


def test_history_is_the_newest_oldest_first(tmp_path):
    _, sequences, made = views_of(dataset(tmp_path, EVENTS, rating=True))
    index, mask = sequences.history(made.start[[4, 5]], made.end[[4, 5]], 3)
    np.testing.assert_array_equal(sequences.columns["item"][index[0]], [3, 4, 5])
    np.testing.assert_array_equal(mask, [[True] * 3, [False] * 3])


def test_no_sample_reads_what_is_not_older(tmp_path):
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(0, 20, 600))
    time = rng.integers(0, 60, 600)
    order = np.lexsort((time, user))
    rows = list(zip(user, rng.integers(2, 30, 600), time[order], rng.integers(0, 2, 600), strict=True))
    # Users must be consecutive from 0.
    _, sequences, made = views_of(dataset(tmp_path, rows))
    owner = np.repeat(np.arange(sequences.users), np.diff(sequences.offsets))
    for i in range(len(made)):
        mine = owner == made.user[i]
        older = mine & (sequences.columns["time"] < made.time[i])
        np.testing.assert_array_equal(np.flatnonzero(older), np.arange(made.start[i], made.end[i]))


def test_a_source_without_categories_gets_popularity_classes(tmp_path):
    rows = [(0, item, t, 1) for t, item in enumerate([2] * 8 + [3] * 4 + [4] * 2 + [5] * 2)]
    data = dataset(tmp_path, rows, category=False)
    category = views.item_category(data, until=10**9, buckets=2)
    np.testing.assert_array_equal(category[2:], [1, 2, 2, 2])
    later_only = views.item_category(data, until=8, buckets=2)  # events from 8 on must not count
    np.testing.assert_array_equal(later_only[2:], [1, 2, 2, 2])
    assert (views.item_category(data, until=0, buckets=4)[2:] == 1).all()  # nothing known yet: one class


def test_sampled_negatives_are_unseen_and_as_popular(tmp_path):
    rng = np.random.default_rng(1)
    share = 1 / np.arange(1, 101)
    share = np.minimum(share, 0.05)
    item = 2 + rng.choice(100, 4000, p=share / share.sum())
    user = np.repeat(np.arange(2000), 2)  # short histories: hardly anything is ruled out because it was seen
    rows = list(zip(user, item, np.tile([0, 1000], 2000), np.ones(4000, int), strict=True))
    category, _, positives = views_of(dataset(tmp_path, rows, label=False))
    both = views.add_negatives(positives, category, ratio=2, seed=0)
    assert both.label.mean() == pytest.approx(1 / 3)
    seen = set(zip(positives.user.tolist(), positives.item.tolist(), strict=True))
    negative = both.label == 0
    assert not seen & set(zip(both.user[negative].tolist(), both.item[negative].tolist(), strict=True))
    np.testing.assert_array_equal(both.category, category[both.item])
    # A negative keeps its positive's history.
    assert (both.end - both.start).tolist().count(0) == 3 * 2000
    count = np.bincount(positives.item, minlength=102)
    popularity = count[both.item[negative]].mean() / count[both.item[~negative]].mean()
    assert 0.9 < popularity < 1.02  # a uniform draw would give count[2:].mean() / ..., clearly less
    assert count[2:].mean() / count[both.item[~negative]].mean() < 0.8


def test_samples_whose_user_has_seen_everything_are_counted(tmp_path):
    rows = [(0, 2, 0, 1), (0, 3, 1, 1), (0, 4, 2, 1), (1, 2, 0, 1)]
    category, _, positives = views_of(dataset(tmp_path, rows, label=False))
    lines: list[str] = []
    both = views.add_negatives(positives, category, seed=0, log=lines.append)
    assert lines == ["negatives: 3 of 4 samples left out: no unseen item in their month"]
    np.testing.assert_array_equal(both.user, [1, 1])


def test_without_a_positive_event_the_remedy_is_named(tmp_path):
    data = dataset(tmp_path, [(0, 2, 0, 0), (0, 3, 1, 0)])
    with pytest.raises(DataError, match="no event is positive; lower the threshold"):
        views.behaviors(data, views.item_category(data, until=10))

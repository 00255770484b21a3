"""prepare: ids, order, filters and labels against a plain Python reference; nothing is lost without being counted."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_core.data.prepare import describe, prepare
from rec_core.data.readers import Source, UserFeatures
from rec_core.data.records import open_dataset
from rec_core.data.schema import FIRST_ITEM, UNKNOWN, DataError, EventLog, Items, Ragged

EVENT = st.tuples(st.integers(-3, 12), st.integers(-5, 9), st.integers(0, 6))  # user, item, time: many ties


def make_source(events: list[tuple[int, int, int]], **changes: object) -> Source:
    user, item, time = np.array(events, np.int64).reshape(-1, 3).T.copy()
    rating = np.arange(len(user), dtype=np.float32)  # tells events apart
    raw_items = np.unique(item)
    fields = {"log": EventLog(user, item, time, rating=rating), "items": Items(raw_items), "name": "made"} | changes
    return Source(**fields)


@given(
    st.lists(EVENT, min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 5)),
    st.integers(1, 20),
    st.integers(1, 3),
)
def test_prepare_equals_a_plain_reference(
    tmp_path_factory: pytest.TempPathFactory,
    events: list,
    min_item_count: int,
    min_user_events: int,
    max_events: int | None,
    block_events: int,
    shards: int,
) -> None:
    histories: dict[int, list] = {}
    for row, (user, item, time) in enumerate(events):
        histories.setdefault(user, []).append((time, row, item))
    kept = {u: sorted(h)[-(max_events or len(h)) :] for u, h in sorted(histories.items()) if len(h) >= min_user_events}
    counts = Counter(item for _, item, _ in events)
    ranked = [item for item in sorted(counts, key=lambda i: (-counts[i], i)) if counts[item] >= min_item_count]
    ids = {item: FIRST_ITEM + n for n, item in enumerate(ranked)}
    out = tmp_path_factory.mktemp("prepared") / "set"
    options = {"min_item_count": min_item_count, "min_user_events": min_user_events, "max_events": max_events}

    def run() -> object:
        return prepare(
            make_source(events), out, **options, block_events=block_events, shards=shards, log=lambda _: None
        )

    if not kept:
        with pytest.raises(DataError, match="no user is left"):
            run()
        assert not out.exists()
        return
    run()
    dataset = open_dataset(out)
    columns = dataset.columns()
    expected = [(n, ids.get(item, UNKNOWN), time, row) for n, h in enumerate(kept.values()) for time, row, item in h]
    assert list(zip(*(columns[c].tolist() for c in ("user", "item", "time", "rating")), strict=True)) == expected
    assert dataset.users == len(kept) and dataset.items == FIRST_ITEM + len(ranked) and dataset.events == len(expected)
    assert np.diff(dataset.offsets).tolist() == [len(h) for h in kept.values()]
    assert dataset.vocabulary["user"].tolist() == list(kept) and dataset.vocabulary["item"].tolist() == ranked
    report = dataset.meta["report"]
    assert report["items_too_rare_for_an_id"] == len(counts) - len(ranked)
    assert report["events_of_these_items"] == sum(e[1] == UNKNOWN for e in expected)
    lost = len(events) - len(expected)
    assert report["events_of_these_users_left_out"] + report["events_truncated"] == lost
    assert report["users_below_min_user_events_left_out"] == len(histories) - len(kept)
    back = sum(
        time < before
        for u in histories
        for before, time in zip([e[2] for e in events if e[0] == u], [e[2] for e in events if e[0] == u][1:])
    )
    assert report["rows_back_in_time_that_were_sorted"] == back


EVENTS = [(5, 30, 1), (5, 20, 1), (3, 20, 2), (5, 20, 0), (3, 10, 9)]


def test_side_tables_follow_the_ids(tmp_path: Path) -> None:
    ragged = Ragged(np.array([0, 2, 3, 3]), np.array([1, 2, 2], np.int32))
    items = Items(np.array([10, 20, 77]), np.array([1, 2, 1], np.int32), ragged, ["ten", "twenty", "never"])
    features = UserFeatures(np.array([3, 4]), {"age": np.array([6, 7], np.int32)}, {"age": 8})
    source = make_source(EVENTS, items=items, user_features=features, category_names=("", "a", "b"))
    dataset = prepare(source, tmp_path / "set", log=lambda _: None)
    table = dataset.item_table
    assert dataset.vocabulary["item"].tolist() == [20, 10, 30]  # 20 is the most frequent, then by raw id
    assert table.text == ["", "", "twenty", "ten", ""] and table.category.tolist() == [0, 0, 2, 1, 0]
    assert [table.categories.row(i).tolist() for i in range(5)] == [[], [], [2], [1, 2], []]
    assert dataset.columns(["category"])["category"].tolist() == [2, 1, 2, 0, 2]  # by item: events have none
    assert dataset.categories == 3 and dataset.meta["category_names"] == ["", "a", "b"]
    assert dataset.user_features["age"].tolist() == [6, 0] and dataset.meta["user_feature_sizes"] == {"age": 8}
    report = dataset.meta["report"]
    assert report["items_missing_in_the_side_table"] == 1 and report["items_of_the_side_table_without_events"] == 1
    assert report["users_of_the_side_table_without_events"] == 1


def test_string_ids_come_back_from_the_vocabulary(tmp_path: Path) -> None:
    log = EventLog(np.array([1, 0, 1]), np.array([0, 0, 1]), np.array([3, 2, 1]))
    source = make_source([], log=log, items=Items(np.arange(2)), user_names=["ann", "bob"], item_names=["é", "b"])
    dataset = prepare(source, tmp_path / "set", log=lambda _: None)
    assert dataset.vocabulary == {"user": ["ann", "bob"], "item": ["é", "b"]}
    assert dataset.columns(["item"])["item"].tolist() == [2, 3, 2]


def test_positive_by_rating_and_by_behavior(tmp_path: Path) -> None:
    rated = prepare(make_source(EVENTS), tmp_path / "rated", positive=2, log=lambda _: None)
    ratings = rated.columns(["rating", "label"])
    assert ratings["label"].tolist() == [r > 2 for r in ratings["rating"]] and 0 < ratings["label"].sum() < 5
    assert rated.meta["options"]["positive"] == 2 and rated.meta["positives"] == ratings["label"].sum()
    log = EventLog(*np.array(EVENTS).T.copy(), behavior=np.array([0, 1, 0, 0, 1], np.int32))
    source = make_source(EVENTS, log=log, behavior_names=("pv", "buy"))
    bought = prepare(source, tmp_path / "bought", positive=("buy",), log=lambda _: None)
    assert bought.columns(["label"])["label"].tolist() == bought.columns(["behavior"])["behavior"].tolist()
    viewed = prepare(source, tmp_path / "viewed", behaviors=("buy",), min_user_events=1, log=lambda _: None)
    assert viewed.events == 2 and viewed.users == 2
    log = EventLog(*np.array(EVENTS).T.copy(), behavior=np.array([0, 1, 0, 0, 0], np.int32))
    empty = prepare(make_source(EVENTS, log=log, behavior_names=("pv", "buy")), tmp_path / "e", behaviors=("buy",))
    assert empty.users == 1 and empty.meta["report"]["users_without_such_events_left_out"] == 1
    assert empty.meta["report"]["events_of_other_behaviors_left_out"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_item_count": 0}, "min_item_count=0"),
        ({"max_events": 0}, "max_events=0"),
        ({"positive": ["buy"]}, r"positive=\['buy'\]: source 'made' has no behaviors; its columns are user, item"),
        ({"positive": "buy"}, "a rating .* or a list of behaviors"),
        ({"behaviors": ["pv"]}, "has no behaviors"),
        ({"min_user_events": 4}, "no user is left of 2 with min_user_events=4.*longest history has 3"),
        ({"shards": 0}, "shards=0"),
    ],
)
def test_options_that_cannot_be_met(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(make_source(EVENTS), tmp_path / "set", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_source_with_a_fault_is_refused(tmp_path: Path) -> None:
    log = make_source(EVENTS).log
    log.rating[3] = np.nan
    with pytest.raises(DataError, match=r"source 'made': rating nan in row 3"):
        prepare(make_source(EVENTS, log=log), tmp_path / "set")
    with pytest.raises(DataError, match="no user is left"):
        prepare(make_source([]), tmp_path / "set")
    with pytest.raises(DataError, match="source 'made' has no ratings"):
        prepare(make_source(EVENTS, log=EventLog(log.user, log.item, log.time)), tmp_path / "set", positive=3)


def test_the_same_source_and_options_are_prepared_once(tmp_path: Path) -> None:
    lines: list[str] = []
    first = prepare(make_source(EVENTS), tmp_path / "set", log=lines.append)
    assert not any("reused" in line for line in lines)
    stamp = (tmp_path / "set" / "meta.json").stat()
    again = prepare(make_source(EVENTS), tmp_path / "set", log=lines.append)
    assert any("reused" in line for line in lines) and (tmp_path / "set" / "meta.json").stat().st_ino == stamp.st_ino
    assert again.meta == first.meta
    elsewhere = prepare(make_source(EVENTS), tmp_path / "other", log=lines.append)
    assert elsewhere.meta == first.meta  # byte for byte: the checksum and every file's are in it
    with pytest.raises(DataError, match=r"holds a dataset with another options: .*'min_item_count': 2.*overwrite"):
        prepare(make_source(EVENTS), tmp_path / "set", min_item_count=2)
    with pytest.raises(DataError, match="another source"):
        prepare(make_source([*EVENTS, (1, 1, 1)]), tmp_path / "set")
    changed = prepare(make_source(EVENTS), tmp_path / "set", min_item_count=2, overwrite=True)
    assert changed.items == FIRST_ITEM + 1 and sorted(p.name for p in tmp_path.iterdir()) == ["other", "set"]


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="exists and is not a prepared dataset"):
            prepare(make_source(EVENTS), tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_the_report_says_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    dataset = prepare(make_source(EVENTS), tmp_path / "set", name="mine", max_events=2, log=lambda _: None)
    text = "\n".join(describe(dataset))
    assert "mine: 2 users, 3 items, 4 events" in text and "truncated: 1 events (20.0%) of 1 users" in text
    assert "median 2" in text and "max 2" in text and "rows back in time that were sorted: 1" in text

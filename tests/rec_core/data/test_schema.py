"""The event log refuses what it must, and says where."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from rec_core.data import DataError, EventLog, Items, Ragged, validate
from rec_core.data.schema import DTYPES, LAST_TIME, concatenate


def make_log(**changes: np.ndarray | None) -> EventLog:
    columns = {
        "user": [0, 0, 1, 1],
        "item": [2, 3, 1, 2],
        "time": [10, 10, 5, 20],
        "category": [1, 0, 2, 1],
        "rating": [1.0, 5.0, 3.5, 4.0],
        "label": [0, 1, 1, 0],
        "probability": [0.0, 1.0, 0.5, 0.25],
    }
    log = EventLog(**{name: np.array(values, DTYPES[name]) for name, values in columns.items()})
    return replace(log, **changes)


def test_a_right_log_passes_in_both_forms() -> None:
    validate(make_log())
    validate(make_log(), encoded=True, users=2, items=4, categories=3)
    empty = make_log().take(slice(0, 0))
    validate(empty, encoded=True, users=0, items=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item": np.array([2, 3, 1], np.int64)}, r"column 'item' has 3 rows and 'user' has 4"),
        ({"rating": np.ones(4)}, r"column 'rating' must be a NumPy array float32\[n\], found float64"),
        ({"label": [0, 1, 1, 0]}, r"column 'label' must be a NumPy array uint8\[n\], found list"),
        ({"time": np.array([1, 2, -3, 4])}, r"log: time -3 in row 2 \(user 1, item 1, time -3\)"),
        ({"time": np.array([1, LAST_TIME + 1, 3, 4])}, r"time 4133980800 in row 1 .*milliseconds"),
        ({"rating": np.array([1, np.nan, np.inf, 2], np.float32)}, r"rating nan in row 1 .*\(2 such rows\)"),
        ({"label": np.array([0, 1, 2, 0], np.uint8)}, r"label 2 in row 2"),
        ({"probability": np.array([0, 1, 0.5, np.nan], np.float32)}, r"probability nan in row 3"),
    ],
)
def test_faults_are_named_by_column_and_row(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        validate(make_log(**changes), where="log")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item": np.array([2, 3, 0, 2])}, r"item 0 in row 2 .*encoded ids of 'item' lie in 1 \.\. 3"),
        ({"item": np.array([2, 3, 4, 2])}, r"item 4 in row 2 .*lie in 1 \.\. 3"),
        ({"user": np.array([0, 0, 1, 2])}, r"user 2 in row 3 .*lie in 0 \.\. 1"),
        ({"user": np.array([-1, 0, 1, 1])}, r"user -1 in row 0"),
        ({"category": np.array([1, 0, 3, 1], np.int32)}, r"category 3 in row 2 .*lie in 0 \.\. 2"),
        ({"user": np.array([0, 1, 0, 1])}, r"user 0 in row 2 .*sorted by user"),
        ({"time": np.array([10, 9, 5, 20])}, r"time 9 in row 1 .*must not go backwards"),
    ],
)
def test_an_encoded_log_has_ids_in_range_and_sorted_events(changes: dict, message: str) -> None:
    validate(make_log(**changes))  # as a raw log each of them is fine
    with pytest.raises(DataError, match=message):
        validate(make_log(**changes), encoded=True, users=2, items=4, categories=3)


def test_concatenate_refuses_logs_with_other_columns() -> None:
    log = make_log()
    both = concatenate([log, log])
    assert len(both) == 8 and np.array_equal(both.rating[4:], log.rating)
    with pytest.raises(DataError, match="different columns"):
        concatenate([log, replace(log, rating=None)])


def test_side_tables_take_rows_and_minus_one_is_nothing() -> None:
    ragged = Ragged(np.array([0, 2, 2, 5]), np.array([7, 8, 1, 2, 3], np.int32))
    items = Items(np.array([10, 11, 12]), np.array([7, 0, 1], np.int32), ragged, ["a", "b", "c"])
    taken = items.take(np.array([2, -1, 0, 1, 2]), np.arange(5))
    assert taken.category.tolist() == [1, 0, 7, 0, 1]
    assert [taken.categories.row(i).tolist() for i in range(5)] == [[1, 2, 3], [], [7, 8], [], [1, 2, 3]]
    assert taken.text == ["c", "", "a", "b", "c"]


def test_the_schema_imports_no_heavy_package() -> None:
    heavy = "('polars', 'grain', 'array_record', 'jax')"
    code = f"import sys, rec_core.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

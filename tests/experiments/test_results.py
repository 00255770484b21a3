"""The form of results: what goes in comes back, and what breaks the form is named."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import results

FIELDS = {
    "experiment": "probe",
    "command": "python -m experiments probe",
    "commit": "unknown",
    "device": {"kind": "cpu", "count": 1, "device_memory_gib": None},
    "versions": {"python": "3.12.0"},
    "seeds": (0, 1),
    "started": "2025-01-31T12:00:00+00:00",
    "seconds": 1.5,
    "rows": ({"system": "DIN", "auc": 0.7, "done": True, "note": None}, {"system": 'a "b" <é>', "steps": 3}),
    "figures": {"auc": 0.7, "steps": 3},
}


def made(**changes):
    return results.Result(**{**FIELDS, **changes})


def test_what_is_written_is_read_back(tmp_path: Path):
    path = results.write(tmp_path / "new" / "folder" / "r.json", made())
    assert results.read(path) == made()
    assert list(path.parent.iterdir()) == [path]
    assert set(json.loads(path.read_text(encoding="utf-8"))) == set(FIELDS)


finite = st.floats(allow_nan=False, allow_infinity=False)
cells = st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), finite, st.text(max_size=20))


@given(
    rows=st.lists(st.dictionaries(st.text(min_size=1, max_size=8), cells, max_size=4), max_size=4),
    figures=st.dictionaries(st.text(min_size=1, max_size=8), finite, max_size=4),
)
def test_any_flat_rows_and_finite_figures_survive(tmp_path_factory, rows, figures):
    path = tmp_path_factory.mktemp("any") / "r.json"
    result = made(rows=tuple(rows), figures=figures)
    results.write(path, result)
    assert results.read(path) == result


def test_array_scalars_become_numbers(tmp_path: Path):
    result = made(
        seeds=(np.int64(3),), rows=({"a": np.float32(0.5), "b": np.bool_(True)},), figures={"loss": jnp.float32(0.25)}
    )
    assert result.seeds == (3,) and result.rows == ({"a": 0.5, "b": True},) and result.figures == {"loss": 0.25}
    assert type(result.rows[0]["b"]) is bool
    assert results.read(results.write(tmp_path / "r.json", result)) == result


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -np.inf, jnp.float32("nan")])
def test_a_figure_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match="figure 'gain_auc'"):
        made(figures={"auc": 0.7, "gain_auc": bad})
    with pytest.raises(ValueError, match=r"rows\[1\], column 'auc'"):
        made(rows=({"auc": 0.5}, {"auc": bad}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"figures": {"auc": "high"}}, "figure 'auc' is 'high'; it must be a number"),
        ({"figures": {"auc": True}}, "figure 'auc' is True"),
        ({"rows": ({"curve": [1, 2]},)}, r"rows\[0\], column 'curve' is a list"),
        ({"rows": ([1],)}, r"rows\[0\] is a list"),
        ({"rows": {"a": 1}}, "rows is a dict; expected a list"),
        ({"seeds": ("zero",)}, "seeds holds 'zero'"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"started": "yesterday"}, "started is 'yesterday'"),
        ({"command": ""}, "command is ''"),
    ],
)
def test_a_field_that_breaks_the_form_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        made(**change)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[: len(text) // 2], r"r\.json:\d+: not JSON"),
        (lambda text: text.replace('"seeds"', '"seed"'), "lacks seeds"),
        (lambda text: text.replace('"seconds": 1.5', '"seconds": 1.5, "by": "hand"'), "unknown fields by"),
        (lambda text: text.replace('"auc": 0.7', '"auc": NaN'), "NaN"),
        (lambda text: text.replace('"steps": 3', '"steps": "three"'), "figure 'steps' is 'three'"),
        (lambda text: "[1]", "holds a list"),
    ],
)
def test_a_damaged_file_is_an_error_with_its_path(tmp_path: Path, edit, message):
    path = results.write(tmp_path / "r.json", made())
    text = path.read_text(encoding="utf-8")
    assert edit(text) != text
    path.write_text(edit(text), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        results.read(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file"):
        results.read(tmp_path / "none.json")
    (tmp_path / "r.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"r\.json"):
        results.read(tmp_path / "r.json")


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path, monkeypatch):
    path = results.write(tmp_path / "r.json", made())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        results.write(path, made(seconds=2.0))
    assert results.read(path).seconds == 1.5
    assert list(tmp_path.iterdir()) == [path]


def test_record_fills_in_where_and_with_what():
    started = results.begin()
    result = results.record("probe", started=started, seeds=range(2), rows=[{"a": 1}], figures={"a": 1})
    assert result.seeds == (0, 1) and result.seconds >= 0
    assert datetime.fromisoformat(result.started).tzinfo == UTC
    assert result.device["kind"] and result.device["count"] == 8 and result.device["processor"]
    assert {"python", "jax", "jaxlib", "flax", "optax", "grain", "userscale"} <= set(result.versions)
    assert result.command.startswith("python ") and sys.executable not in result.command
    with pytest.raises(ValueError, match="time zone"):
        results.record("probe", started=datetime(2025, 1, 1), seeds=(), rows=(), figures={})


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_commit_says_dirty_and_is_unknown_outside_git(tmp_path: Path, monkeypatch):
    package = tmp_path / "experiments"
    (package / "results").mkdir(parents=True)
    source = Path(shutil.copy(results.__file__, package / "results.py"))
    monkeypatch.setattr(results, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.commit() == "unknown"
    git(tmp_path, "init", "-q")
    assert results.commit() == "unknown"  # nothing committed; also an installed copy inside another repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert results.commit() == head
    (package / "results" / "probe.json").write_text("{}")
    assert results.commit() == head, "a result must not make the tree it was measured on dirty"
    (tmp_path / "new.py").write_text("")
    assert results.commit() == head + "+dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert results.commit() == "unknown"


def test_compare_sets_figures_side_by_side(tmp_path: Path):
    a = made(figures={"auc": 0.5, "zero": 0.0, "old": 1.0})
    b = dataclasses.replace(a, figures={"auc": 0.75, "zero": 1.0, "new": 2.0})
    rows = {row["figure"]: row for row in results.compare(a, results.write(tmp_path / "b.json", b))}
    assert list(rows) == ["auc", "zero", "old", "new"]
    assert rows["auc"] == {"figure": "auc", "a": 0.5, "b": 0.75, "difference": 0.25, "ratio": 1.5}
    assert rows["zero"]["ratio"] is None and rows["zero"]["difference"] == 1.0
    assert rows["old"]["b"] is None and rows["old"]["difference"] is None and rows["new"]["a"] is None

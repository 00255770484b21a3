"""The benchmark of the kernels of target attentions in small: what it compares, what it refuses to time."""

import numpy as np
import pytest

from experiments import interest_bench, results
from experiments.interest_bench import InterestBench
from experiments.steps import timing
from rec_core.interest import multi_head_gpu


def test_kernels_are_compared_with_xla_and_timed_beside_it(tmp_path, capsys):
    made = interest_bench.run(InterestBench(quick=True, out=tmp_path))
    assert results.read(tmp_path / "result.json") == made
    assert set(made.figures) == {
        f"small_{attention}_speedup_40{case}" for attention in ("mha", "can") for case in ("", "_chunks")
    } | {"small_can_speedup_40_each"}
    for case in {row["case"] for row in made.rows}:
        rows = {row["contender"]: row for row in made.rows if row["case"] == case}
        assert list(rows) == ["XLA", "as taken", "16/1/1"]
        assert rows["XLA"]["speedup"] == 1 and rows["XLA"]["off"] == 0
        for row in rows.values():
            assert row["off"] < interest_bench.OFF and row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert rows["as taken"]["off"] > 0, "the kernels' numbers are XLA's to the bit: it was not the kernels that ran"
    assert "MHA, 40 behaviours, 4 queries, a map" in (tmp_path / "report.html").read_text() + capsys.readouterr().out


def test_what_is_off_is_not_timed(tmp_path, monkeypatch):
    right = multi_head_gpu.attend

    def off(sequence, mask, linear, queries, value, tuning):
        return (1.0 if tuning == multi_head_gpu.DEFAULT._replace(interpret=True) else 1.05) * right(
            sequence, mask, linear, queries, value, tuning
        )

    monkeypatch.setattr(multi_head_gpu, "attend", off)
    config = InterestBench(**vars(InterestBench(quick=True)) | interest_bench.QUICK)
    rows = interest_bench.measure(config, interest_bench.Case("MHA", 40, 1))
    assert [("ms" in row, "reason" in row) for row in rows] == [(True, False), (True, False), (False, True)]
    assert rows[2]["reason"].startswith("off by 0.0")

    compiled = timing.compile_all

    def failed(lower, log):
        found = compiled(lower, log=log)
        return found | {("as taken", "both"): timing.Program(None, "no room")}

    monkeypatch.setattr(timing, "compile_all", failed)
    rows = interest_bench.measure(config, interest_bench.Case("MHA", 40, 1))
    assert "ms" in rows[0] and [row.get("reason", "")[:7] for row in rows] == ["", "no room", "off by "]
    assert interest_bench.distance(np.array([1.0, np.nan]), np.ones(2)) == np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ("64/4",)}, "give block/warps/stages"),
        ({"shapes": ("64/x/1",)}, "give block/warps/stages"),
        ({"lengths": (205,)}, "of whole chunks of 10"),
        ({"lengths": ()}, "give at least one"),
        ({"repeats": 0}, "repeats is 0"),
        ({"attentions": ("DIN",)}, r"attentions is \('DIN',\); give some of"),
        ({"items": 5}, "items is 5: below 8"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        InterestBench(**change)


def test_where_kernels_do_not_run_that_is_said(tmp_path):
    with pytest.raises(ValueError, match="want an NVIDIA GPU"):
        interest_bench.run(InterestBench(out=tmp_path))

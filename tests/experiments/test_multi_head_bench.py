"""The benchmark of the multi-head kernels in small: what it compares, what it refuses to time."""

import numpy as np
import pytest

from experiments import multi_head_bench, results
from experiments.multi_head_bench import MultiHeadBench
from experiments.steps import timing
from rec_core.interest import multi_head_gpu


def test_kernels_are_compared_with_xla_and_timed_beside_it(tmp_path, capsys):
    made = multi_head_bench.run(MultiHeadBench(quick=True, out=tmp_path))
    assert results.read(tmp_path / "result.json") == made
    assert set(made.figures) == {"small_speedup_40", "small_speedup_40_mapped"}
    for mapped in (True, False):
        rows = {row["contender"]: row for row in made.rows if row["mapped"] == mapped}
        assert list(rows) == ["XLA", "as taken", "16/1/1"]
        assert rows["XLA"]["speedup"] == 1 and rows["XLA"]["off"] == 0
        for row in rows.values():
            assert row["off"] < multi_head_bench.OFF and row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert rows["as taken"]["off"] > 0, "the kernels' numbers are XLA's to the bit: it was not the kernels that ran"
    assert "40 behaviours, 4 queries, a map" in (tmp_path / "report.html").read_text() + capsys.readouterr().out


def test_what_is_off_is_not_timed(tmp_path, monkeypatch):
    right = multi_head_gpu.attend

    def off(sequence, mask, linear, queries, value, tuning):
        return (1.0 if tuning == multi_head_gpu.DEFAULT._replace(interpret=True) else 1.05) * right(
            sequence, mask, linear, queries, value, tuning
        )

    monkeypatch.setattr(multi_head_gpu, "attend", off)
    config = MultiHeadBench(**vars(MultiHeadBench(quick=True)) | multi_head_bench.QUICK)
    rows = multi_head_bench.measure(config, multi_head_bench.Case(40, 1, False))
    assert [("ms" in row, "reason" in row) for row in rows] == [(True, False), (True, False), (False, True)]
    assert rows[2]["reason"].startswith("off by 0.0")

    compiled = timing.compile_all

    def failed(lower, log):
        found = compiled(lower, log=log)
        return found | {("as taken", "both"): timing.Program(None, "no room")}

    monkeypatch.setattr(timing, "compile_all", failed)
    rows = multi_head_bench.measure(config, multi_head_bench.Case(40, 1, False))
    assert "ms" in rows[0] and [row.get("reason", "")[:7] for row in rows] == ["", "no room", "off by "]
    assert multi_head_bench.distance(np.array([1.0, np.nan]), np.ones(2)) == np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ("64/4",)}, "give block/warps/stages"),
        ({"shapes": ("64/x/1",)}, "give block/warps/stages"),
        ({"lengths": (205,)}, "of whole chunks of 10"),
        ({"lengths": ()}, "give at least one"),
        ({"repeats": 0}, "repeats is 0"),
        ({"items": 5}, "items is 5: below 8"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadBench(**change)


def test_where_kernels_do_not_run_that_is_said(tmp_path):
    with pytest.raises(ValueError, match="want an NVIDIA GPU"):
        multi_head_bench.run(MultiHeadBench(out=tmp_path))

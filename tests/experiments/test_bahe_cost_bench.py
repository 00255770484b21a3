"""The cost of BAHE: a quick run says all that a full one does."""

import pytest

from experiments import bahe_cost, results
from experiments.bahe_cost import BaheCost


def test_a_quick_run_writes_rows_figures_and_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bahe_cost, "CASES", {n: bahe_cost.CASES[n] for n in ("LLM-CTR", "+ BA")})
    monkeypatch.setitem(bahe_cost.QUICK, "lengths", (32,))
    outcome = bahe_cost.run(BaheCost(quick=True, out=tmp_path))
    assert results.read(tmp_path / "result.json") == outcome
    encoding, llm, ba = outcome.rows
    assert encoding["tokens_per_s"] > 0 and encoding["mfu"] is None
    assert (llm["what"], ba["what"]) == ("LLM-CTR", "+ BA") and llm["behaviors"] == ba["behaviors"] == 3
    assert llm["peak_gib"] > 0 < ba["peak_gib"] and llm["table_ms"] == 0 < ba["table_ms"]
    assert ba["total_ms"] == ba["ms"] + ba["table_ms"] and llm["forward_gflop"] > ba["forward_gflop"]
    assert set(outcome.figures) == {
        "small_encode_tokens_per_s", "small_speedup_32", "small_memory_ratio_32",
    }  # fmt: skip
    assert outcome.figures["small_speedup_32"] == llm["total_ms"] / ba["total_ms"]
    assert "<svg" in (tmp_path / "report.html").read_text() and "trained through" not in capsys.readouterr().out


def test_figures_have_the_names_that_are_quoted():
    rows = [{"what": "encoding", "tokens_per_s": 5.0, "mfu": 0.5}]
    for length in (1024, 2048):
        for ms, name in enumerate(bahe_cost.CASES, start=1):
            rows.append({"what": name, "length": length, "ms": ms, "total_ms": 2 * ms, "peak_gib": 3 * ms})
    rows[-1] = {"what": "+ BA, trained through", "length": 2048, "reason": "out of the device's memory"}
    found = bahe_cost.summarize(rows, small=False)
    assert found["speedup_1024"] == found["memory_ratio_2048"] == 0.25 and found["speedup_1024_through"] == 1 / 6
    assert {"speedup_2048", "speedup_2048_fp", "speedup_2048_abe_through", "encode_mfu"} <= set(found)
    assert "speedup_2048_through" not in found


@pytest.mark.parametrize("change", [{"batch": 0}, {"lengths": (16,)}, {"distinct_per_sample": -1.0}])
def test_settings_say_what_is_wrong(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        BaheCost(**change)

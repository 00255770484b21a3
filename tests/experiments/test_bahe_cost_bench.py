"""The cost of BAHE: a quick run says all that a full one does."""

import pytest

import bahe_jax
from bahe_jax import language_model
from experiments import bahe_cost, readme_sections, results
from experiments.bahe_cost import BaheCost
from experiments.steps import bahe_counts
from experiments.steps.bahe_train import Measured
from experiments.steps.timing import Program
from rec_core.transformer import TransformerConfig


def test_a_quick_run_writes_rows_figures_and_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bahe_cost, "CASES", {n: bahe_cost.CASES[n] for n in ("LLM-CTR", "+ BA")})
    monkeypatch.setitem(bahe_cost.QUICK, "lengths", (32,))
    outcome = bahe_cost.run(BaheCost(quick=True, out=tmp_path))
    assert results.read(tmp_path / "result.json") == outcome
    encoding, *counted, llm, ba = outcome.rows
    assert {row["what"] for row in counted} == {"complexity"} and {row["varied"] for row in counted} == {"M", "H"}
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


def test_a_case_that_was_cut_off_is_measured_alone_and_joined(tmp_path, monkeypatch):
    taken = iter(range(40, 0, -10))  # milliseconds
    monkeypatch.setitem(bahe_cost.QUICK, "lengths", (32,))
    monkeypatch.setattr(bahe_cost, "encoding_speed", lambda *_, **__: 1e6)
    monkeypatch.setattr(bahe_cost.timing, "compile_all", lambda lower: {key: Program(call=key) for key in lower})
    monkeypatch.setattr(bahe_cost, "measure", lambda *_, **__: Measured(ms := next(taken), ms, ms, ms))
    paths = []
    for name, only in (("a", ("LLM-CTR", "+ FP")), ("b", ("LLM-CTR", "+ BA"))):
        bahe_cost.run(BaheCost(quick=True, only=only, out=tmp_path / name))
        paths.append(tmp_path / name / "result.json")
    first, second = map(results.read, paths)
    assert [row["what"] for row in second.rows] == ["encoding", "LLM-CTR", "+ BA"]
    outcome = bahe_cost.run(BaheCost(joined=tuple(paths), out=tmp_path))
    assert outcome.figures == dict(second.figures) | dict(first.figures)  # ratios in one run
    assert {"small_speedup_32_fp", "small_speedup_32"} <= set(outcome.figures)
    assert [bahe_cost.name_of(row) for row in outcome.rows[-2:]] == ["LLM-CTR, another run", "+ BA, another run"]
    assert "+ BA, another run, 32 tokens" in (tmp_path / "report.html").read_text()
    ours, text = outcome.rows[-1], readme_sections.bahe_cost(outcome)
    assert (
        f"| + BA, another run | {ours['ms']:.1f} [" in text and f"| {outcome.figures['small_speedup_32']:.2f} |" in text
    )
    with pytest.raises(ValueError, match="only has"):
        BaheCost(only=("+ BAHE",))


def test_operations_grow_as_counted():
    """The compiler's are the exact count's, with all pairs of a row, rows of whole eights, and elementwise work."""
    transformer = TransformerConfig(
        width=64, layers=2, heads=2, kv_heads=1, head_width=32, hidden=96, attention="reference"
    )
    model = bahe_jax.Config(language_model.Config("llama", vocabulary=50, transformer=transformer, tied=True), 2)
    rows = bahe_counts.rows(model, {"llm_ctr": "LLM-CTR", "ba": "+ BA"}, {"M": (5, 21), "H": (0.2, 3.2)})
    for row in rows:
        slots = -(-(6 * row["M"] + 1) * (5 if row["setting"] == "LLM-CTR" else 1) // 8) * 8
        every, layers = slots**2 * 4 * 64 / 1e9, 2 if row["setting"] == "LLM-CTR" else 1
        assert row["exact_gflop"] < row["compiler_gflop"] < 1.15 * (row["exact_gflop"] + layers * every)
    size = {(row["setting"], row["varied"], row[row["varied"]]): row for row in rows}
    a, b = size["+ BA", "H", 0.2], size["+ BA", "H", 3.2]
    exact, compiled = (b[name] - a[name] for name in ("exact_gflop", "compiler_gflop"))  # of texts of five tokens
    assert exact < compiled < 1.15 * exact
    a, b = size["LLM-CTR", "M", 5], size["LLM-CTR", "M", 21]
    assert b["papers_pairs"] / a["papers_pairs"] == pytest.approx(4.2**2)  # nothing in it grows linearly
    assert 4.2 < b["exact_gflop"] / a["exact_gflop"] < 8


@pytest.mark.parametrize("change", [{"batch": 0}, {"lengths": (16,)}, {"distinct_per_sample": -1.0}])
def test_settings_say_what_is_wrong(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        BaheCost(**change)

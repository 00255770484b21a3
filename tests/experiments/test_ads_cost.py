"""The cost of ADS: a small run says all that a full one does, and what is timed is what is said."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from experiments import ads_cost, results
from experiments.ads_cost import AdsCost
from experiments.steps import ads_scale, ads_step, timing
from experiments.steps.ads_step import Variant
from experiments.steps.timing import Program
from rec_core.sharding import make_mesh, put_batch

FIGURES = {"overhead_chunk10_pct", "dense_overhead_chunk10_pct", "memory_overhead_chunk10_pct", "step_ms_chunk10"}


@pytest.fixture(scope="module")
def programs():
    """The whole step alone and in chunks, compiled once for all tests."""
    both = (Variant("MHA", 20, None), Variant("MHA", 20, 10))
    return {v: timing.compiled(partial(ads_step.lower_whole, ads_scale.TINY, v, make_mesh())) for v in both}


def test_a_small_run_writes_rows_figures_and_a_report(programs, tmp_path, monkeypatch, capsys):
    def compile_all(lower, *, log):
        return {
            key: programs[key[1]] if key[0] == "whole step" else timing.compiled(make) for key, make in lower.items()
        }

    monkeypatch.setattr(timing, "compile_all", compile_all)
    monkeypatch.setattr(ads_cost, "variants", lambda attention, length: tuple(programs))
    outcome = ads_cost.run(AdsCost(quick=True, out=tmp_path))
    assert results.read(tmp_path / "result.json").rows == outcome.rows
    assert {f"small_{name}" for name in FIGURES} | {"small_request_p99_ms_6"} <= set(outcome.figures)
    rows = {(row["what"], row["model"]): row for row in outcome.rows}
    assert len(rows) == 6
    for what in ("whole step", "dense part"):
        alone, ads = rows[what, "alone"], rows[what, "ADS, chunks of 10"]
        assert ads["memory_gib"] > alone["memory_gib"] and ("gflop" in ads) == (what == "dense part")
        assert "overhead_pct" not in alone and ads["overhead_pct_low"] <= ads["overhead_pct"]
    assert rows["dense part", "ADS, chunks of 10"]["gflop"] > rows["dense part", "alone"]["gflop"]
    asked = rows["request", "ADS, chunks of 10"]
    assert 0 < asked["p50_ms"] <= asked["p99_ms"] and asked["candidates"] == 6
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert "whole step: MHA, 20 behaviours" in capsys.readouterr().out


@pytest.mark.parametrize("attention", ["MHA", "DIN", "CAN"])
def test_operations_grow_with_behaviors_and_with_queries(attention):
    alone, longer, chunked, unchunked = (
        ads_step.dense_gflop(ads_scale.TINY, Variant(attention, length, items))
        for length, items in ((20, None), (40, None), (20, 10), (20, 1))
    )
    assert alone < chunked < unchunked and alone < longer < 2 * alone


def test_contenders_share_tables_and_a_lost_one_costs_a_row(programs):
    """A contender that the device refuses takes the tables with it: the others get new ones, and it a reason."""
    alone, chunked = programs

    def refused(state, batch):
        jax.tree.map(lambda x: x.delete(), state)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    unchunked = Variant("MHA", 20, 1)
    those = {alone: programs[alone], unchunked: Program(refused), chunked: programs[chunked]}
    rows, ms = ads_step.measure_whole(ads_scale.TINY, those, steps=1, repeats=2)
    assert [row["model"] for row in rows] == ["alone", "ADS, unchunked", "ADS, chunks of 10"]
    assert rows[1]["reason"].startswith("out of the device's memory") and "ms" not in rows[1]
    assert set(ms) == {"alone", "ADS, chunks of 10"} and all(len(x) == 2 for x in ms.values())
    assert rows[2]["overhead_pct"] == pytest.approx(np.median(100 * (ms["ADS, chunks of 10"] / ms["alone"] - 1)))


def test_a_step_moves_the_touched_rows_and_the_net(programs):
    variant = Variant("MHA", 20, 10)
    module, config = ads_scale.model(ads_scale.TINY, "MHA", 20, 10)
    host = ads_scale.make_batch(ads_scale.TINY, 20)
    module.check(host, config)
    state = ads_scale.make_state(module, config, make_mesh())
    before = jax.tree.map(np.array, state.params)
    state, ms = ads_step.timed_steps(programs[variant], state, [put_batch(host, make_mesh())], 2)
    assert ms > 0 and int(state.step) == 2
    touched = np.unique(module.touched(host, config)["item"])
    moved = (np.asarray(state.params["tables"]["item"]) != before["tables"]["item"]).any(axis=1)
    assert moved.any() and set(np.flatnonzero(moved)) <= set(touched)
    assert (
        np.asarray(state.params["net"]["head"]["mlp_0"]["kernel"]) != before["net"]["head"]["mlp_0"]["kernel"]
    ).any()


def test_devices_are_compared_by_examples_a_second(programs):
    variant = Variant("MHA", 20, 10)
    batch = ads_scale.TINY.batch
    two = timing.compiled(partial(ads_step.lower_whole, ads_scale.TINY, variant, make_mesh(2), 2 * batch))
    cases = {
        "one device": (programs[variant], 1, batch),
        "fixed batch a device": (two, 2, 2 * batch),
        "fixed global batch": (Program(None, "out of the device's memory: x"), 2, batch),
    }
    rows, ms = ads_step.measure_devices(ads_scale.TINY, variant, cases, steps=1, repeats=2)
    assert [row["case"] for row in rows] == list(cases) and rows[0]["speedup"] == 1
    assert rows[1]["speedup"] == pytest.approx(2 * np.median(ms["one device"] / ms["fixed batch a device"]))
    assert rows[2]["reason"] == "out of the device's memory: x" and rows[2]["batch"] == batch


def test_what_is_left_out_says_so_and_figures_are_of_whole_cases_only():
    rows = []
    for length, ms in ((200, 4.0), (1000, 8.0)):
        for i, variant in enumerate(ads_cost.variants("MHA", length)):
            row = variant.row("whole step") | {"ms": ms + i, "memory_gib": 10.0 + i, "temporaries_gib": 1.0 + i}
            rows.append(row | ({"overhead_pct": 3.0 * i} if i else {}))
            if length == 1000:
                rows.append(variant.row("request") | {"p50_ms": ms, "p99_ms": 2 * ms + i, "candidates": 500})
    two = Variant("MHA", 200, 10).row("devices") | {"case": "fixed batch a device", "speedup": 1.9, "devices": 2}
    rows += [two, two | {"speedup": 3.5, "devices": 4}]
    rows.append(Variant("DIN", 200, 1).row("whole step") | {"ms": 9.0, "overhead_pct": 12.5})
    rows.append(Variant("MHA", 200, 1).row("dense part") | {"reason": "out of memory"})
    found = ads_cost.summarize(rows, small=False)
    assert found["overhead_chunk10_pct"] == 3 and found["overhead_full_pct"] == 6
    assert found["din_overhead_full_pct"] == 12.5 and "din_overhead_chunk10_pct" not in found
    assert found["memory_overhead_chunk10_pct"] == pytest.approx(10) and found["two_gpu_speedup"] == 1.9
    assert found["4_gpu_speedup"] == 3.5
    assert found["request_p99_ms_500"] == 17 and "dense_overhead_full_pct" not in found


def test_what_two_machines_measured_is_one_result(tmp_path):
    row = {"what": "whole step", "attention": "MHA", "length": 200, "model": "alone", "ms": 4.0, "memory_gib": 1.0}
    own = [row | {"temporaries_gib": 0.5}, row | {"model": "ADS, chunks of 10", "overhead_pct": 7.0}]
    two = [row | {"what": "devices", "case": "fixed batch a device", "speedup": 1.5, "devices": 2}]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    parts = zip(paths, (own, two), ({"step_ms_chunk10": 4.0}, {"two_gpu_speedup": 1.5}))
    for path, rows, found in parts:
        made = results.record("ads_cost", started=results.begin(), seeds=[0], rows=rows, figures=found)
        results.write(path, made)
    outcome = ads_cost.run(AdsCost(joined=tuple(paths), out=tmp_path))
    assert outcome.figures["overhead_chunk10_pct"] == 7.0, "made of the rows, though the files have it not"
    assert outcome.figures["step_ms_chunk10"] == 4.0 and outcome.figures["two_gpu_speedup"] == 1.5
    first, _, second = results.read(tmp_path / "result.json").rows
    assert "measured_on" not in first and second["speedup"] == 1.5
    assert second["measured_on"].startswith("8 x ") and second["commit"] == made.commit
    other = tmp_path / "c.json"
    results.write(other, replace(made, experiment="dcaf"))
    with pytest.raises(ValueError, match="is a result of dcaf"):
        results.join([paths[0], other], "ads_cost")


def test_after_the_limit_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(ads_cost._Measured, "left", lambda self: 0.0)
    outcome = ads_cost.run(AdsCost(quick=True, out=tmp_path, parts=("step",)))
    assert len(outcome.rows) == 6 and not outcome.figures
    assert all(str(row["reason"]).startswith("not begun: the limit of 500 s") for row in outcome.rows)


def test_compiling_side_by_side_gives_each_its_own_program_or_the_reason():
    def refuse():
        raise jax.errors.JaxRuntimeError("INTERNAL: no such instruction\nmore")

    lower = {n: partial(jax.jit(lambda x, n=n: x + n).lower, 1.0) for n in (1, 2)}
    programs = timing.compile_all(lower | {"bad": refuse}, log=lambda _: None)
    assert [float(programs[n].call(1.0)) for n in (1, 2)] == [2, 3]
    assert programs["bad"].reason == "the device refused it: INTERNAL: no such instruction more"
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not a row
        timing.compile_all({0: lambda: 1 / 0}, log=lambda _: None)


CASE = {"what": "whole step", "attention": "MHA", "length": 1000, "model": "ADS, chunks of 10"}


def filed(path, rows, command="python -m experiments ads-cost", **figures):
    made = results.record(
        "ads_cost", started=results.begin(), seeds=[0], rows=rows, figures=figures, command=command, seconds=1.0
    )
    return results.write(path, made)


def test_figures_are_of_what_the_rows_say_and_the_first_result_keeps_its_own(tmp_path):
    """Sizes other than the defaults of the command that joins them; the second has them too."""
    asked = {"what": "request", "candidates": 50, "p99_ms": 3.0, "p50_ms": 2.0}
    a = filed(tmp_path / "a.json", [CASE | {"overhead_pct": 7.0}, CASE | asked], overhead_chunk10_pct=7.0)
    b = [row | {"length": 200} for row in (CASE | {"overhead_pct": 1.0}, CASE | asked | {"p99_ms": 9.0})]
    b = filed(tmp_path / "b.json", [*b, CASE | {"attention": "DIN", "overhead_pct": 4.0}])
    found = ads_cost.run(AdsCost(joined=(a, b), out=tmp_path)).figures
    assert found["overhead_chunk10_pct"] == 7 and found["din_overhead_chunk10_pct"] == 4
    assert found["request_p99_ms_50"] == 3 and "request_p99_ms_500" not in found


def test_what_was_joined_is_joined_with_more_and_nothing_is_there_twice(tmp_path):
    own, other = CASE | {"ms": 2.0}, CASE | {"attention": "DIN", "ms": 3.0, "measured_on": "2 x H200", "commit": "c"}
    new = filed(tmp_path / "new.json", [CASE | {"length": 50, "ms": 1.0}, CASE | {"reason": "not begun"}])
    old = filed(tmp_path / "old.json", [own, other | {"command": "before"}])
    *_, mine, theirs = ads_cost.run(AdsCost(joined=(new, old), out=tmp_path / "out")).rows
    assert mine["command"] == "python -m experiments ads-cost" and theirs["command"] == "before"
    assert theirs["measured_on"] == "2 x H200" and mine["measured_on"].startswith("8 x ")
    again = filed(tmp_path / "again.json", [own])
    said = (
        r"what 'whole step', attention 'MHA', length 1000, model 'ADS, chunks of 10' is in .*old\.json and in .*again"
    )
    with pytest.raises(ValueError, match=said):
        ads_cost.run(AdsCost(joined=(new, old, again), out=tmp_path / "out"))
    for name, quick in (("figure", {"small_step_ms": 1.0}), ("command", {"command": "ads-cost --quick"})):
        small = filed(tmp_path / f"{name}.json", [CASE | {"length": 20}], **quick)
        with pytest.raises(ValueError, match=rf"old\.json and .*{name}\.json, one is of a quick run"):
            ads_cost.run(AdsCost(joined=(old, small), out=tmp_path / "out"))


def test_each_panel_says_what_it_shows(tmp_path):
    columns = {"overhead_pct": 1.0, "temporaries_gib": 1.0, "p99_ms": 1.0}
    rows = [CASE | columns | {"what": what} for what in ("whole step", "dense part", "request")]
    page = ads_cost.page(results.read(filed(tmp_path / "a.json", rows)))
    assert page.count("Medians over repeats") == 2
    assert page.count("As the compiler counts them") == page.count("From ids on the host") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"parts": ("steps",)},
        {"attentions": ()},
        {"repeats": 0},
        {"lengths": (0,)},
        {"limit": float("nan")},
        {"joined": ()},
    ],
)
def test_settings_say_what_is_wrong(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        AdsCost(**change)


def test_more_devices_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="devices is 99, there are 8"):
        ads_cost.run(AdsCost(quick=True, out=tmp_path, devices=99))

"""The attention benchmark: counts and masks are right, a wrong or failing rival is named and never quoted."""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import attention_bench, attention_cases, attention_report, attention_rivals, results
from experiments.__main__ import main
from experiments.attention_bench import AttentionBench
from experiments.attention_cases import CASES, Case, Errors
from experiments.attention_rivals import Contender, Missing
from experiments.attention_timing import Ceilings, Pass, compile_calls, compile_pass, measure
from rec_core.attention.api import IMPLEMENTATIONS, Implementation
from rec_core.attention.reference import range_attention_reference

CAUSAL = Case("causal_a", 2, 2, 1, 8, (24,), backward=True)
PACKED = Case("packed_a", 2, 2, 2, 8, (9, 1, 14))
GROUPED = Case("grouped_a_q128", 2, 4, 2, 8, (17,), queries=6)
CACHED = Case("cached_a_q128", 2, 4, 2, 8, (17,), queries=6, cached=True)
KINDS = (CAUSAL, PACKED, GROUPED, CACHED)
TOP = Ceilings(tflops=0.1, gb_per_s=10.0)


@pytest.mark.parametrize("case", [case.small() for case in CASES], ids=lambda case: case.name)
def test_pairs_are_what_the_mask_shows(case):
    assert attention_cases.visible(case).sum() == case.pairs


def test_work_of_a_case_counted_by_hand():
    case = Case("hand", 3, 4, 2, 8, (2, 3))
    assert case.pairs == 3 + 6
    assert case.flops("forward") == 4 * 8 * 9 * 3 * 4
    assert case.flops("backward") == 2.5 * case.flops("forward")
    cached = Case("hand", 3, 4, 2, 8, (5,), queries=2, cached=True)
    # q and out: 2 rows of 4 heads; k and v: 5 rows of 2 heads; own keys and values: 2 rows of 2 heads; bf16.
    assert cached.bytes(2) == 3 * 8 * 2 * (2 * 2 * 4 + 2 * 5 * 2 + 2 * 2 * 2)


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_ranges_of_the_inputs_are_the_mask(case):
    inputs, _ = attention_cases.make(case, 0, "float32")
    key, row = np.arange(case.prefix + case.queries), np.arange(case.rows) + case.keys * case.cached
    for start, end in zip(np.asarray(inputs.k_start), np.asarray(inputs.k_end)):
        seen = (key >= start[:, None]) & (key < end[:, None]) | (key == row[:, None])
        np.testing.assert_array_equal(seen, attention_cases.visible(case))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "kv_heads divides heads"),
        ({"segments": ()}, "1 or more"),
        ({"segments": (3, 4), "queries": 2}, "rows of one segment"),
        ({"cached": True}, "has queries and no backward"),
    ],
)
def test_a_case_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CAUSAL, **change)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_the_small_shape_keeps_the_kind_of_mask(name):
    (full,), (small,) = (
        [c for c in attention_cases.select([name], small=size) if c.name == name] for size in (False, True)
    )
    assert (full.kind, full.width, full.directions) == (small.kind, small.width, small.directions)
    assert full.heads // full.kv_heads == small.heads // small.kv_heads
    assert small.pairs * small.heads * small.batch <= max(full.pairs * full.heads * full.batch / 16, 10_000)


def test_every_figure_has_its_case():
    directions = {case.name: case.directions for case in CASES}
    assert all(direction in directions[name] for name, direction in attention_report.FIGURES.values())


def test_the_check_finds_one_wrong_row_and_a_nan():
    rng = np.random.default_rng(0)
    expected = rng.normal(size=(1, 4096, 2, 64))
    assert attention_cases.wrong(attention_cases.errors(expected * (1 + 1e-3), expected), "bfloat16", "forward") is None
    for fault in (lambda x: -x, lambda x: np.nan * x, lambda x: 0 * x):
        found = expected.copy()
        found[0, 1234, 1] = fault(found[0, 1234, 1])
        reason = attention_cases.wrong(attention_cases.errors(found, expected), "bfloat16", "forward")
        assert reason is not None and reason.startswith("wrong: error")


def test_no_error_passes_where_zero_is_expected():
    assert attention_cases.errors(np.full((2, 3), 2.0), np.zeros((2, 3))).error > 1


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_joined_calls_of_a_rival_that_knows_no_ranges(case):
    """`decomposed` on a plain attention with its log-sum-exp is the same attention."""
    if case.kind in ("causal", "packed"):
        rival = attention_rivals._plain_jax(case)
    else:

        def attend(q, k, v, *, causal):
            end = jnp.broadcast_to(jnp.arange(1, q.shape[1] + 1) if causal else k.shape[1], q.shape[:2])
            return range_attention_reference(q, k, v, 0 * end, end, None, None, scale=q.shape[-1] ** -0.5)

        rival = attention_rivals.decomposed("joined", case, attend)
    draw = attention_cases.make(case, 3, "float32")
    out = rival.join(rival.function(*rival.prepare(draw[0])))
    assert attention_cases.check(case, "float32", "forward", draw, [out]).worst_row < 1e-5


def test_the_check_of_gradients_tells_them_apart():
    draw = attention_cases.make(CAUSAL, 0, "float32")
    function = functools.partial(_xla, CAUSAL)
    dq, dk, dv = jax.vjp(lambda q, k, v: function(q, k, v, *draw[0][3:]), *draw[0][:3])[1](draw[1])
    check = functools.partial(attention_cases.check, CAUSAL, "float32", "backward", draw)
    assert attention_cases.wrong(check([dq, dk, dv]), "float32", "backward") is None
    assert attention_cases.wrong(check([dq, dv, dk]), "float32", "backward") is not None


def _xla(case, *arguments):
    return attention_cases.attend(attention_cases.Inputs(*arguments), "xla")


@pytest.mark.portable
def test_a_program_makes_every_call_even_on_equal_arguments():
    x = jnp.arange(6.0).reshape(2, 3)
    one, three = (compile_calls(lambda x: jnp.sin(x) @ x.T, (x,), calls) for calls in (1, 3))
    assert three.run.as_text().count(" dot(") == 3 * one.run.as_text().count(" dot(") > 0  # type: ignore[attr-defined]
    for result, factor in zip(three.run([(x,), (2 * x,), (3 * x,)]), (1, 2, 3)):
        np.testing.assert_allclose(result, jnp.sin(factor * x) @ (factor * x).T, rtol=1e-6)
    times = measure(three, [(x,), (2 * x,)], repeats=3)
    assert 0 < times.ms_low <= times.ms <= times.ms_high and times.repeats == 3


@pytest.mark.portable
def test_a_backward_program_starts_from_residuals():
    compiled = compile_pass(lambda x, y, z, w: x * y * z * w, (jnp.ones(4),) * 4, 2, backward=True)
    arguments = [tuple(i + jnp.arange(4.0) + j for j in range(4)) for i in range(2)]
    sets = compiled.sets(arguments, [jnp.ones(4)] * 2)
    for (x, y, z, w), (dx, dy, dz) in zip(arguments, compiled.program.run(sets)):
        for found, expected in ((dx, y * z * w), (dy, x * z * w), (dz, x * y * w)):
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def child(program: str, limit: float = 60.0) -> tuple[list[dict], str]:
    """What a child with this program comes to; it finds the spec {"case": "causal_a"} on its first line of input."""
    command = [sys.executable, "-c", "import json, sys, time\n" + program]
    with attention_rivals.children({"torch flash": {"case": "causal_a"}}, limit, command) as (only,):
        only.ready()
        return only.results()


def test_a_child_waits_to_be_let_at_the_device():
    rows, trouble = child(
        "spec = json.loads(input()); print('talk of a library'); print(json.dumps({'ready': True}), flush=True)\n"
        "print(json.dumps({'asked': input()} | spec))"
    )
    assert (rows, trouble) == ([{"asked": "go", "case": "causal_a"}], "")


@pytest.mark.parametrize(
    ("program", "limit", "trouble"),
    [
        ("print('{}'); sys.stdout.flush(); time.sleep(60)", 0.5, "stopped after 0 s"),
        ("print('{\"ready\": 1}', flush=True); print('{}', flush=True); time.sleep(60)", 1.0, "stopped after 1 s"),
        ("print('{}'); sys.exit('device on fire')", 60.0, "ended with status 1: device on fire"),
        ("print('{}', flush=True); import os; os.kill(os.getpid(), 11)", 60.0, "ended with status -11: no message"),
    ],
)
def test_a_child_that_hangs_or_crashes_keeps_its_rows_and_has_a_reason(program, limit, trouble):
    rows, said = child(program, limit)
    assert rows == [{}] and said.startswith(trouble.replace("0 s", "")), said


def test_no_child_outlives_an_error():
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(KeyError), attention_rivals.children({"a": {}, "b": {}}, 60.0, sleeper) as found:
        raise KeyError
    assert all(one.process.poll() is not None for one in found)


def test_rows_of_a_child_are_judged_and_what_is_lacking_is_named():
    got = [
        {"case": "causal_a", "direction": "forward", "implementation": "torch flash", "ms": 2.0, "ms_low": 1.0}
        | {"ms_high": 3.0, "repeats": 3, "error": 1e-3, "worst_row": 1e-2, "version": "2"},
        {"case": "causal_a", "direction": "backward", "implementation": "torch flash", "ms": 2.0, "ms_low": 1.0}
        | {"ms_high": 3.0, "repeats": 3, "error": "nan", "worst_row": "nan", "version": "2"},
    ]
    program = f"print('{{}}'); input(); print({json.dumps(got[0])!r}); print({json.dumps(got[1])!r})"
    command = [sys.executable, "-c", program]
    with attention_rivals.children({"torch flash": {}}, 60.0, command) as (only,):
        only.ready()
        rows = list(attention_bench._from_child(only, [CAUSAL, CACHED], "bfloat16", TOP))
    good, nan, lacking = rows
    assert good["tflops"] == pytest.approx(CAUSAL.flops("forward") / 2.0 / 1e9)
    assert good["of_product"] == pytest.approx(good["tflops"] / TOP.tflops) and good["version"] == "2"
    assert nan["reason"].startswith("wrong") and nan.get("ms") is None
    assert (lacking["case"], lacking["reason"]) == ("cached_a_q128", "gave no result")


def measured(case: str, name: str, ms: float, **more: object) -> dict:
    return {"case": case, "direction": "forward", "implementation": name, "ms": ms, "tflops": 1 / ms} | more


def test_figures_quote_the_chosen_one_and_the_best_rival():
    rows = [
        measured("causal_a", "fast", 1.0, side="ours", chosen=False),
        measured("causal_a", "served", 2.0, side="ours", chosen=True),
        measured("causal_a", "slow rival", 8.0, side="rival", chosen=False),
        measured("causal_a", "rival", 4.0, side="rival", chosen=False),
        measured("causal_a", "wrong rival", 1.0, side="rival", chosen=False) | {"ms": None, "reason": "wrong"},
        measured("cached_b_q128", "served", 2.0, side="ours", chosen=True),
        measured("packed_b", "rival", 4.0, side="rival", chosen=False),
    ]
    assert attention_report.summarize(rows, small=False) == {
        "causal_fwd_d64": 0.5,
        "causal_fwd_d64_rival": 0.25,
        "cached_b_ms": 2.0,
        "packed_fwd_b_rival": 0.25,
    }
    assert (rows[1]["rival_name"], rows[1]["speedup"]) == ("rival", 2.0)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, results.Result]:
    """A run over tiny cases with an implementation that cannot serve, one that fails and one that is wrong, and a rival
    that is wrong."""
    folder = tmp_path_factory.mktemp("bench")

    def fails(*arguments, scale):
        raise RuntimeError("does not\ncompile")

    def lies(q, k, v, *rest, scale):
        return jnp.zeros_like(q), jnp.zeros(q.shape[:3])

    def rivals(case, direction):
        wrong = Contender("wrong rival", lambda q, k, v, *_: q)
        return [attention_rivals._plain_jax(case), wrong, Missing("absent rival", "not installed")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cases, "CASES", (CAUSAL, CACHED))
        patch.setattr(attention_bench, "ceilings", lambda dtype, repeats, small: TOP)
        patch.setattr(attention_bench, "jax_rivals", rivals)
        patch.setattr(attention_rivals.importlib.util, "find_spec", lambda name: None)
        patch.setitem(IMPLEMENTATIONS, "fails", Implementation(lambda call: None, fails))
        patch.setitem(IMPLEMENTATIONS, "lies", Implementation(lambda call: None, lies))
        patch.setitem(IMPLEMENTATIONS, "unfit", Implementation(lambda call: "needs a warp", lies))
        return folder, attention_bench.run(AttentionBench(repeats=3, out=folder))


def test_a_run_measures_what_is_right_and_says_why_of_the_rest(outcome):
    _, result = outcome
    rows = {(row["implementation"], row["direction"]): row for row in result.rows if row["case"] == "causal_a"}
    assert set(rows) == {
        (name, direction)
        for name in (*IMPLEMENTATIONS, "fails", "lies", "unfit", "jax.nn xla", "wrong rival", "absent rival", "torch")
        for direction in ("forward", "backward")
    }
    assert {name for (name, _), row in rows.items() if row.get("ms") is not None} == {"xla", "reference", "jax.nn xla"}
    for row in rows.values():
        assert (row.get("ms") is None) == ("reason" in row)
    assert [rows["xla", "forward"]["chosen"], rows["reference", "forward"]["chosen"]] == [True, False]
    assert rows["fails", "forward"]["reason"] == "RuntimeError: does not compile"
    assert str(rows["lies", "backward"]["reason"]).startswith("wrong: error")
    assert str(rows["wrong rival", "forward"]["reason"]).startswith("wrong: error")
    assert rows["unfit", "forward"]["reason"] == "needs a warp"
    assert rows["torch", "backward"]["reason"] == "PyTorch is not installed"


def test_the_figures_of_a_run_come_from_its_rows_and_two_runs_compare(outcome):
    folder, result = outcome
    names = ["causal_fwd_d64", "causal_bwd_d64", "cached_a_ms"]
    assert set(result.figures) == {f"small_{name}{end}" for name in names for end in ("", "_rival")}
    row = next(row for row in result.rows if row.get("figure") == "small_cached_a_ms")
    assert result.figures["small_cached_a_ms"] == row["ms"]
    assert row["gb_per_s"] == pytest.approx(CACHED.small().bytes(4) / row["ms"] / 1e6)
    assert row["rival_name"] == "jax.nn xla"
    assert all(line["ratio"] == 1 for line in results.compare(folder / "result.json", result))


def test_the_report_shows_each_case(outcome):
    folder, _ = outcome
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "xla *" in page and "needs a warp" in page and "http" not in page.replace("http://www.w3.org", "")


def test_two_results_compare_on_the_command_line(outcome, capsys):
    folder, _ = outcome
    assert main(["compare", str(folder / "result.json"), str(folder / "result.json")]) == 0
    assert "small_causal_bwd_d64_rival" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "diagonal"], "only='diagonal' names no case; the cases are causal_a,"),
        (["--repeats", "2"], "repeats is 2; give 3 or more"),
        (["--implementations", "cuda"], "implementations names 'cuda'; there are mosaic_gpu, "),
        (["--limit", "0"], "limit is 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message, capsys):
    try:
        status = main(["attention-bench", *arguments])
    except SystemExit as error:  # refused while the settings are made
        status = error.code
    assert status
    assert message in " ".join(capsys.readouterr().err.split())


def test_errors_take_the_worst_of_both_ends():
    """A fault in the last batch row is seen, though the first is right."""
    draw = attention_cases.make(CAUSAL, 0, "float32")
    out = np.array(_xla(CAUSAL, *draw[0]))
    assert attention_cases.check(CAUSAL, "float32", "forward", draw, [out]) < Errors(1e-5, 1e-5)
    out[-1, 5] *= -1
    assert attention_cases.check(CAUSAL, "float32", "forward", draw, [out]).worst_row > 0.5


def test_a_pass_without_backward_runs_on_the_arguments():
    assert Pass(compile_calls(jnp.negative, (jnp.ones(2),), 1)).sets([(1,)], [2]) == [(1,)]

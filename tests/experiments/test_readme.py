"""README quotes what was measured, and says nothing of places that are not the reader's."""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import (
    ads_chunks,
    ads_cost,
    attention_report,
    bahe_cost,
    bahe_text,
    bahe_text_models,
    readme,
    readme_summary,
    results,
    sim_lifelong,
    statistics,
)
from experiments.attention_cases import CASES
from experiments.attention_timing import Ceilings

ROOT = Path(__file__).parents[2]
PARTS = {name: write for writers in readme.SYSTEMS.values() for name, write in writers.items()}
RESULTS = sorted((ROOT / "experiments" / "results").glob("*.json"))


def test_the_measured_parts_are_made_from_the_results():
    assert readme.section() in (ROOT / "README.md").read_text(), "run `python -m experiments readme`"
    assert readme.everything() == (ROOT / "experiments" / "RESULTS.md").read_text(), (
        "run `python -m experiments readme`"
    )


def test_every_claim_of_the_summary_was_measured():
    missing = [claim.what for claim in readme_summary.CLAIMS if claim.line(results.read(path_of(claim))) is None]
    assert not missing
    lines = readme.section().split("\n\n")[1].split("\n")
    assert len(lines) == 2 + len(readme_summary.CLAIMS) + 1  # and range attention's


def path_of(claim):
    return ROOT / "experiments" / "results" / f"{claim.file}.json"


def test_a_claim_says_what_was_measured_where(tmp_path):
    rows = [{"data": "world", "difference": "a - b", "mean": -0.02, "low": -0.03, "high": -0.01}]
    rows.append({"what": "devices", "measured_on": "2 x H"})
    rows += [{"data": "joined", "device": "H", "seed": seed} for seed in (5, 6)]
    found = {"faster": 1.25, "gain": 3.0, "gain_low": -1.0, "gain_high": 7.0}
    result = written(tmp_path, "ads_cost", rows, found)
    claim = partial(readme_summary.Claim, "ADS", "ads_cost", "what")
    on, file = "H, 3 seeds", "`ads_cost.json`"
    assert claim("faster", 1, at_least=1.3, part="devices").line(result) == [
        "ADS", "what", "1.2", "1.3: missed", "2 x H, 3 seeds", file,
    ]  # fmt: skip
    assert claim("faster", 1, at_most=1.25).line(result) == ["ADS", "what", "1.2", "1.25: reached", on, file]
    assert claim("gain", 1).line(result) == ["ADS", "what", "+3.0 [-1.0, +7.0] (0)", "", on, file]
    for far, said in ((6.9, "missed"), (7, "reached")):
        goal = f"within {far} of 0: {said}"
        assert claim("gain", 1, within=far).line(result) == ["ADS", "what", "+3.0 [-1.0, +7.0] (0)", goal, on, file]
    assert claim(("world", "a - b"), published="+1").line(result) == [
        "ADS", "what", "-0.0200 [-0.0300, -0.0100] (lost)", "published +1", on, file,
    ]  # fmt: skip
    alone = written(tmp_path, "ads_cost", [{"what": "devices"}], found)  # of one machine, joined to nothing
    assert claim("faster", 1, part="devices").line(alone)[4] == "1 x NVIDIA H100 80GB HBM3, 3 seeds"
    assert claim("faster", 1, data="joined").line(result)[4] == "H, 2 seeds"
    assert claim("faster", 1, data="world").line(result)[4] == "1 x NVIDIA H100 80GB HBM3, 3 seeds"
    assert claim(("ml-1m", "a - b")).line(result) is None and claim("slower").line(result) is None


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_has_the_form_and_came_from_a_commit(path):
    result = results.read(path)
    assert result.figures and result.rows
    assert re.fullmatch(r"[0-9a-f]{40}", result.commit), "measure with a clean tree"
    assert not re.search(r"(^|\s)(/|\.\./)", result.command), f"{result.command}: a path of one machine only"


def test_the_examples_of_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["answers"].shape[1:] == (2, names["config"].width)
    assert names["interest"].shape == names["item"].shape


def written(folder, name, rows, figures, **changes):
    """A result file in `folder` with what an experiment writes there."""
    values = {
        "experiment": name, "command": f"python -m experiments {name}", "commit": "c" * 40,
        "device": {"kind": "NVIDIA H100 80GB HBM3", "count": 1}, "versions": {"jax": "0.11.2"}, "seeds": (0, 1, 2),
        "started": "2025-01-31T12:00:00+00:00", "seconds": 61.4, "rows": tuple(rows), "figures": figures,
    }  # fmt: skip
    outcome = results.Result(**values | changes)
    results.write(folder / f"{name}.json", outcome)
    return outcome


def spread(mean, low, high, name=""):
    """A mean with its interval, as rows have it."""
    return {name or "mean": mean, f"{name}_low" if name else "low": low, f"{name}_high" if name else "high": high}


def sim_lifelong_result():
    models = list(sim_lifelong.FIGURES.values())
    rows: list[dict[str, Any]] = [
        {"data": data, "model": model, "seed": seed, "test_auc": 0.6 + 0.01 * number + 0.001 * seed}
        for data in ("world", "ml-1m")
        for number, model in enumerate(models)
        for seed in range(3)
    ]
    for data, shift in (("world", 0.02), ("ml-1m", -0.02)):
        for a, b in sim_lifelong.ORDER:
            rows.append({"data": data, "difference": f"{b} - {a}"} | spread(shift, shift - 0.01, shift + 0.01))
    for days in (0.0, 14.0):
        for model in ("DIEN", "SIM soft, time"):
            row = {"data": "world", "hit_at_10": 0.25, "model": model, "days_from": days}
            rows.append(row | {"clicks": 1500, "low": 0.24, "high": 0.26})
    figures = {"oracle_auc": 0.7496, "recall_hard_of_soft": 0.24, "recall_same_category": 0.25}
    figures |= {"recall_eta_of_exact": 0.5, "recall_sdim_of_exact": 0.125}
    return rows, figures | {"long_term_hit_dien": 0.2, "long_term_hit_sim": 0.3}


def ads_multidomain_result():
    rows = [{"data": "world, domain 0", "model": "DIN", "seed": 0, "test_auc": 0.6}]
    by_seed = {"base": "DNN", "interval": "t", "imp": 2.5, "imp_low": 1.5, "imp_high": 3.5}
    rows.append({"data": "world, domain 0", "model": "DIN"} | by_seed)
    for data in ("world, domain 0", "world, domain 0.4", "ml-1m"):
        for attention, middle in (("DIN", 0.003), ("MHA", 0.0), ("CAN", -0.003)):
            for key, base in (
                ("", f"{attention} + PEPNet"),
                ("_over_alone", attention),
                ("_over_constant_domain", "c"),
            ):
                row = {"data": data, "comparison": attention.lower() + key, "model": f"{attention} + ADS", "base": base}
                row |= spread(middle, middle - 0.001, middle + 0.001, "auc_difference")
                rows.append(row | spread(10 * middle, 10 * middle - 0.01, 10 * middle + 0.01, "imp"))
    return rows, spread(0.0001, -0.0004, 0.0006, "gain_at_zero_domain_dial")


def steps_of_ads(attention, length, overheads):
    """Rows of a whole step, its dense part and a request."""
    rows = []
    for model, more in overheads.items():
        shared = {"attention": attention, "length": length, "model": model}
        timed = {"ms": 10 + more / 10, "ms_low": 9.0, "ms_high": 12.0}
        timed |= {} if model == "alone" else spread(more, more - 1, more + 1, "overhead_pct")
        counted = {"memory_gib": 8 * (1 + more / 100), "temporaries_gib": 2 * (1 + more / 100)}
        rows.append({"what": "whole step"} | shared | timed | counted)
        rows.append({"what": "dense part"} | shared | timed | counted | {"gflop": 500.0})
        rows.append({"what": "request"} | shared | counted | {"candidates": 500, "p50_ms": 1.5, "p99_ms": 2.25})
    return rows


def ads_cost_result():
    rows = steps_of_ads("MHA", 200, {"alone": 0, "ADS, chunks of 10": 5.0, "ADS, unchunked": 12.0})
    rows += steps_of_ads("DIN", 200, {"alone": 0, "ADS, chunks of 10": 1.5, "ADS, unchunked": 8.0})
    rows += steps_of_ads("DIN", 1000, {"alone": 0, "ADS, chunks of 10": 2.0})
    rows.append(
        {"what": "whole step", "attention": "DIN", "length": 1000, "model": "ADS, unchunked", "reason": "no room"}
    )
    for case, speedup in (("fixed batch a device", 1.95), ("fixed global batch", 1.7)):
        origin = {"measured_on": "2 x H", "commit": 40 * "e", "command": "ads-cost --devices 2"}
        row = {"what": "devices", "attention": "MHA", "length": 200, "model": "m", "case": case, "speedup": speedup}
        rows.append(row | origin | {"devices": 2})
    return rows, ads_cost.summarize(rows, small=False)


def ads_chunks_result():
    config = ads_chunks.AdsChunks(items=(10, 1))
    rows, gains = [], {}
    for number, variant in enumerate(config.variants):
        made = steps_of_ads("MHA", 200, {variant.name: 6.0 * number})[:2]
        rows += [row | {"items": variant.items, "parameters": 1_234_567} for row in made]
        rows += [variant.row("AUC") | {"items": variant.items, "seed": s, "test_auc": 0.65} for s in range(3)]
        if variant.items:
            gains[variant.name] = statistics.Interval(0.002, -0.001, 0.005, 0.95, "")
    return rows, ads_chunks.summarize(config, rows, gains)


def bahe_text_result():
    points = bahe_text_models.plan(bahe_text_models.BaheText(amazon=Path("amazon")))
    figures = {"popularity_auc": 0.61, "amazon_popularity_auc": 0.62, "dnn_both_auc_d": 0.7}
    rows = []
    for number, point in enumerate(points):
        data, key = point.data, point.figure.split("_auc")[0]
        figures[point.figure] = 0.7 + number / 1e4
        if point.downstream or point.setting == "dnn":
            figures[f"{key}_auc_d"] = 0.72
        dnn, own = f"{'amazon_' * (data == 'amazon')}dnn", {"data": data} | spread(0.01, 0.005, 0.015) | {"seeds": 3}
        if point.setting == "dnn":
            continue
        if (rival := point.like(point.setting if point.variation else "llm_ctr")) != point.name:
            rows.append(own | {"difference": f"{point.name} - {rival}"})
        if not point.variation:
            rows.append(own | {"difference": f"{point.name} - {dnn}", "seeds": 1})
        for label in bahe_text.WITHOUT.values() if point.downstream else ():
            rows.append(own | {"difference": f"AUC_d: DNN with answers of {point.name} - {label}"})
    return rows, figures


def bahe_cost_result():
    rows: list[dict[str, Any]] = [
        {"what": "encoding", "tokens_per_s": 1_500_000.0, "tflops": 240.0, "mfu": 0.2425, "texts": 1_000_000}
    ]
    for length in (1024, 2048):
        for divisor, name in enumerate(bahe_cost.CASES, start=2):
            row = {"what": name, "length": length, "batch": 16, "behaviors": 50, "ms": 400 / divisor, "ms_low": 50.0}
            row |= {"ms_high": 300.0, "peak_gib": 90 / divisor, "table_ms": 0.0, "total_ms": 400 / divisor}
            rows.append(row)
    rows[-1] = {"what": "+ BA, trained through", "length": 2048, "batch": 16, "behaviors": 50, "reason": "no room"}
    return rows, bahe_cost.summarize(rows, small=False)


def attention_result():
    top = Ceilings(tflops=700.0, gb_per_s=2800.0)
    rows: list[dict[str, Any]] = []
    for case, direction in attention_report.passes(CASES):
        for name, side, ms in (
            ("mosaic_gpu", "ours", 1.0),
            ("cudnn", "rival", 0.9 if case.name == "causal_b" else 1.25),
        ):
            values = {"ms": ms, "ms_low": 0.9 * ms, "ms_high": 1.1 * ms, "repeats": 5, "version": "9"}
            rows.append(
                attention_report.row(case, direction, name, side, values, "bfloat16", top, chosen=side == "ours")
            )
    figures = attention_report.summarize(rows, small=False)
    return [{"case": "ceiling", "implementation": "matrix product", "tflops": 700.0}, *rows], figures


MADE = {
    "sim_lifelong": sim_lifelong_result, "ads_multidomain": ads_multidomain_result, "ads_chunks": ads_chunks_result,
    "ads_cost": ads_cost_result, "bahe_text": bahe_text_result, "bahe_cost": bahe_cost_result,
    "interest_bench": lambda: (
        [{"case": "CAN", "contender": x, "ms": ms} for x, ms in (("XLA", 2.0), ("as taken", 1.5), ("32/1/1", 1.0))]
        + [{"case": "MHA", "contender": "XLA", "reason": "no room"}],
        {},
    ),
    "bahe_encode": lambda: ([{"texts": 9}], {"encoded_texts": 3883, "encoded_tokens": 40_000, "tokens_per_s": 1e6}),
    "attention_h100": attention_result,
}  # fmt: skip


def assert_well_formed(text):
    """Tables of one width with lines in them, set off by empty lines; nothing that was not measured is printed."""
    for block in text.split("\n\n"):
        if "|" in block:
            rows = block.split("\n")
            assert all(row.startswith("| ") and row.endswith(" |") for row in rows), block
            assert len({row.count("|") for row in rows}) == 1 and len(rows) > 2
        else:
            assert block.startswith("Command: ") or max(map(len, block.split("\n"))) <= 120
    assert not re.search(r"\b(None|nan|inf)\b", text)


SAID = {
    "sim_lifelong": (
        "(1 x NVIDIA H100 80GB HBM3, 3 seeds)",
        "| DIN | 0.6010 (0.6000 to 0.6020) | 0.6010 (0.6000 to 0.6020) |",
        "| oracle | 0.7496 |  |",
        "| SIM soft - SIM hard | +0.0200 [+0.0100, +0.0300] | -0.0200 [-0.0300, -0.0100] (lost) |",
        "hard search finds 24.0 % of what soft search finds, 25.0 % of that has the target's category, ETA finds",
        "Beyond 14 days: DIEN 0.200, SIM soft, time 0.300.",
        "| 14 | 1,500 | 0.250 [0.240, 0.260] | 0.250 [0.240, 0.260] |",
    ),
    "ads_multidomain": (
        "| world, domain 0.4 | DIN | DIN + PEPNet | +0.03 [+0.02, +0.04] | +0.0030 [+0.0020, +0.0040] |",
        "| MovieLens-1M | MHA | MHA + PEPNet | +0.00 [-0.01, +0.01] (0) | +0.0000 [-0.0010, +0.0010] (0) |",
        "| -0.0030 [-0.0040, -0.0020] (lost) |",
        "over the attention alone is +0.0001 [-0.0004, +0.0006] (0) (goal: within 0.0005 of zero, missed): means over",
        "| DIN over DNN | +2.50 [+1.50, +3.50] |",
        "along the dial: DIN +0.0030 at 0, +0.0030 at 0.4; MHA +0.0000 at 0,",
    ),
    "ads_chunks": (
        "Behaviours that share a query of ADS on MHA (",
        "| alone | 0.6500 |  | 1,234,567 | 500 | 2.00 | 10.00 |  |",
        "| 10 | 0.6500 | +0.0020 [-0.0010, +0.0050] (0) | 1,234,567 | 500 | 2.12 | 10.60 | +6.0 [+5.0, +7.0] |",
    ),
    "ads_cost": (
        "| MHA | 200 | alone | 10.00 |  |  |  | 1.50 / 2.25 |",
        "| MHA | 200 | ADS, chunks of 10 | 10.50 | +5.0 [+4.0, +6.0] | +5.0 [+4.0, +6.0] | +5.0 | 1.50 / 2.25 |",
        "MHA at 200 behaviours: +5.0 % of a step in chunks of 10 (goal: the published +3.6 or less, missed)",
        "+12.0 % unchunked (goal: +15 or less, reached); around DIN +1.5 and +8.0 %",
        "1.95 times one GPU's speed by two (2 x H) with a batch each (goal: 1.9 or more, reached); 1.70 times by two",
        "On 2 x H: `ads-cost --devices 2` (commit eeeeeeeeeeee).",
        "A request has 500 candidates.",
        "Not measured: whole step DIN 1000 ADS, unchunked (no room).",
    ),
    "bahe_text": (
        "(popularity alone: MovieLens-1M 0.6100, Amazon 0.6200)",
        "| MovieLens-1M, 256 tokens | 0.7000 | 0.7017 | 0.7013 | 0.7009 | 0.7001 |",
        "| MovieLens-1M, AUC_d | 0.7200 | 0.7200 | 0.7200 | 0.7200 | 0.7200 |",
        "| Amazon, 256 tokens | 0.7023 | 0.7027 | 0.7026 | 0.7025 | 0.7024 |",
        "| MovieLens-1M, 2,048 tokens | +0.0100 [+0.0050, +0.0150], 1 seed | +0.0100 [+0.0050, +0.0150] |",
        "| Amazon, less a DNN's on all samples | +0.0100 [+0.0050, +0.0150] |",
        "| + BA, split at 3/4 in place of 1/2 | MovieLens-1M, 1,024 tokens | +0.0100 [+0.0050, +0.0150] |",
    ),
    "bahe_cost": (
        "| 2,048 | LLM-CTR | 200.0 [50.0, 300.0] |  |  | 45.0 |  |",
        "| 1,024 | + BA | 80.0 [50.0, 300.0] |  | 2.50 (3.9: missed) | 18.0 | 2.50 (4.5: missed) |",
        "| 1,024 | + ABE | 100.0 [50.0, 300.0] |  | 2.00 (1.8: reached) | 22.5 | 2.00 (1.9: reached) |",
        "encodes 1,500,000 tokens a second, 24.2 % of the device's peak",
        "Not measured: + BA, trained through 2048 (no room).",
    ),
    "interest_bench": ("| CAN | 2.000 | 1.500 | 1.000 (32/1/1) |",),
    "bahe_encode": ("3,883 texts, 40,000 tokens, 1,000,000 tokens a second",),
    "attention_h100": (
        "Range attention (mosaic_gpu)",
        "jax 0.11.2; bfloat16, median [least, most] of 5 rounds; a matrix product reached 700 TFLOP/s",
        "| causal forward: B2 H16/16 D128, users of 8192 tokens | 550 [500, 611] | 611 [555, 679] cudnn 9 | 0.90 (sl",
        "128 query tokens | 1.0000 [0.9000, 1.1000] | 1.2500 [1.1250, 1.3750] cudnn 9 | 1.25 |",
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_part_says_what_its_file_holds_and_what_was_missed(name, tmp_path):
    text = PARTS[name](written(tmp_path, name, *MADE[name]()))
    assert_well_formed(text)
    flat = " ".join(text.split())
    for said in (*SAID[name], f"Command: `python -m experiments {name}` (61 s, commit cccccccccccc; `{name}.json`)."):
        assert " ".join(said.split()) in flat, said


@pytest.mark.parametrize("name", MADE)
def test_what_a_run_left_out_is_left_out_of_the_tables(name, tmp_path):
    """A file with some of the rows and figures, or with none, still makes a part, and its tables have no holes."""
    rows, figures = MADE[name]()
    for seed in range(12):
        rng, share = np.random.default_rng(seed), seed / 12
        kept = {key for key in {re.sub("_(low|high)", "", key): 0 for key in figures} if rng.random() < share}
        some = {key: value for key, value in figures.items() if re.sub("_(low|high)", "", key) in kept}
        text = PARTS[name](written(tmp_path, name, [row for row in rows if rng.random() < share], some))
        assert_well_formed(text)
        assert f"`{name}.json`" in text and (share or "| --- |" not in text)


def test_figures_of_small_sizes_are_not_quoted(tmp_path):
    for name in MADE:
        _, figures = MADE[name]()
        small = {f"small_{key}": 123.456 for key in figures}
        assert "123.4" not in PARTS[name](written(tmp_path, name, [], small))


def test_parts_appear_with_their_files_and_in_order(tmp_path):
    for path in RESULTS:
        if path.stem.startswith("quickstart"):
            shutil.copy(path, tmp_path)
    before = readme.everything(tmp_path)
    for name, make in MADE.items():
        assert f"`{name}.json`" not in before
        written(tmp_path, name, *make())
    after = readme.everything(tmp_path)
    places = [after.index(f"`{name}.json`") for name in PARTS if name in MADE]
    assert places == sorted(places)
    assert after.startswith(before) and "\n\n\n" not in after and after.endswith("\n")
    assert {row.split("|")[1].strip() for row in readme.section(tmp_path).split("\n") if row.startswith("| ")} == {
        "system", "---", "LUM", "SIM", "ADS", "BAHE", "attention",
    }  # fmt: skip

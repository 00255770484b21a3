"""RESULTS.md, and the table of README.md between the two `figures` marks, written from the results themselves.

python -m experiments readme      # no number there is typed by hand
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import readme_ads, readme_sections, readme_summary, results
from experiments.readme_sections import (
    PAIRED,
    Values,
    command,
    data_name,
    device,
    difference,
    interval,
    joined,
    machine,
    prose,
    span,
    table,
)
from experiments.results import Result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
NAMES = {
    "quickstart_world": "synthetic world",
    "quickstart_world_h200": "synthetic world, all samples",
    "quickstart_ml1m": "MovieLens-1M",
    "quickstart_ml1m_h200": "MovieLens-1M, all samples",
    "quickstart_food": "Food.com, sampled negatives",
}


def section(folder: Path = RESULTS) -> str:
    """README's marked part, marks included, from the result files in `folder`."""
    return joined(BEGIN, readme_summary.summary(folder), END)


def everything(folder: Path = RESULTS) -> str:
    """RESULTS.md; a part appears when its file is there."""
    parts = []
    for title, writers in SYSTEMS.items():
        own = [_lum(folder)] if title == "LUM" else []
        for name, write in writers.items():
            if (folder / f"{name}.json").exists():
                own.append(write(results.read(folder / f"{name}.json")))
        parts += [f"## {title}", *own] if own else []
    return joined("# What was measured", prose(LEAD), *parts) + "\n"


def _lum(folder: Path) -> str:
    rows = [
        "| data | device, seeds | DIN | + LUM's answers | difference, 95 % interval | oracle |",
        "|---|---|---|---|---|---|",
    ]
    laws = ["| data | slope in ln P, 95 % interval | slope in ln L, 95 % interval |", "|---|---|---|"]
    commands = []
    for name, title in NAMES.items():
        result = results.read(folder / f"{name}.json")
        f = result.figures
        oracle = f"{f['oracle_auc']:.4f}" if "oracle_auc" in f else ""
        rows.append(
            f"| {title} | {device(result)} | {f['din_auc']:.4f} | {f['din_lum_auc']:.4f} | "
            f"{interval(f, 'gain_auc')} | {oracle} |"
        )
        laws.append(f"| {title} | {interval(f, 'size_law_slope')} | {interval(f, 'length_law_slope')} |")
        commands.append(f"- {title}: {command(result, name)}")
    lines = [
        "AUC of DIN on the last tenth of the time, without and with LUM's answers, on the same samples and seeds:",
        "",
        *rows,
        "",
        "Recall@10 of the next item, fitted over the sweep (at the longest length and the largest size):",
        "",
        *laws,
        "",
        "Commands:",
        "",
        *commands,
    ]
    return "\n".join(lines)


def _lifelong(result: Result) -> str:
    """SIM and its rivals: AUC, the published order in pairs, what the searches find, clicks of long-term interest."""
    f, rows = result.figures, result.rows
    auc: dict[Any, dict[Any, list[float]]] = {}
    for row in rows:
        if isinstance(value := row.get("test_auc"), int | float):
            auc.setdefault(row["model"], {}).setdefault(row["data"], []).append(value)
    data = list(dict.fromkeys(row["data"] for row in rows))
    titles = [data_name(name) for name in data]
    levels = [[str(model), *(_seeds(own.get(name, [])) for name in data)] for model, own in auc.items()]
    if "oracle_auc" in f:
        levels.append(["oracle", *(f"{f['oracle_auc']:.4f}" if name == "world" else "" for name in data)])
    pairs: dict[Any, Values] = {(row["data"], row["difference"]): row for row in rows if "difference" in row}
    order = [
        [what, *(difference(pairs.get((name, what))) for name in data)] for what in dict.fromkeys(x for _, x in pairs)
    ]
    # Of a reason the pair alone, which is what was measured; the text behind it is the report's.
    whys: dict[Any, Values] = {
        (row["data"], str(row["reason"]).partition(" (")[0]): row for row in rows if "reason" in row
    }
    reasons = [
        [what, *(difference(whys.get((name, what))) for name in data)] for what in dict.fromkeys(x for _, x in whys)
    ]
    searches = (
        ("recall_hard_of_soft", "hard search finds {} of what soft search finds"),
        ("recall_same_category", "{} of that has the target's category"),
        ("recall_eta_of_exact", "ETA finds {} of the nearest by cosine"),
        ("recall_sdim_of_exact", "SDIM finds {} of them"),
    )
    found = [text.format(f"{100 * f[name]:.1f} %") for name, text in searches if name in f]
    return joined(
        prose(
            "SIM and its rivals over whole histories, all with the same recent behaviours and head "
            f"({device(result)} seeds). AUC, mean of the seeds (least to most):"
        ),
        table(["model", *titles], levels),
        prose(f"The published order, in each pair first less second (AUC; {PAIRED}):" if order else ""),
        table(["pair", *titles], order),
        prose(
            "What may explain where ours differs: units that sum beside units with a softmax, which forgets how much "
            "there was; and one unit on what a search found beside the same on the whole (not the only difference of a "
            "pair):"
            if reasons
            else ""
        ),
        table(["pair", *titles], reasons),
        prose(f"On the synthetic world {', '.join(found)} (means over samples and seeds)." if found else ""),
        _long_term(result),
        f"Command: {command(result, 'sim_lifelong')}.",
    )


def _long_term(result: Result) -> str:
    """Clicks found, by days since the user's last behaviour in the category."""
    f = result.figures
    hits: dict[Any, Values] = {(row["days_from"], row["model"]): row for row in result.rows if "hit_at_10" in row}
    models = list(dict.fromkeys(str(model) for _, model in hits))
    lines = []
    for days in dict.fromkeys(days for days, _ in hits):
        there = [hits.get((days, model)) for model in models]
        clicks = next(row["clicks"] for row in there if row)
        cells = [f"{x['hit_at_10']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" if x else "" for x in there]
        lines.append([f"{days:g}", f"{clicks:,}", *cells])
    late = ""
    if hits and "long_term_hit_dien" in f and "long_term_hit_sim" in f:
        late = f" Beyond 14 days: {models[0]} {f['long_term_hit_dien']:.3f}, {models[-1]} {f['long_term_hit_sim']:.3f}."
    rows: list[Any] = [row for row in result.rows if "long_term" in row]
    late += "".join(f" {row['long_term']}: {span(row['mean'], row['low'], row['high'], 3)}." for row in rows)
    text = (
        "Clicks of the synthetic world found in the top 10 of 100 candidates, by days (from) since the user's last "
        f"behaviour in the category (95 % intervals by bootstrap over users and seeds).{late}"
    )
    return joined(prose(text if lines else ""), table(["days", "clicks", *models], lines))


def _seeds(values: Sequence[float]) -> str:
    """Mean, least and most of the seeds."""
    if len(values) < 2:
        return f"{values[0]:.4f}" if values else ""
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def _serving(result: Result) -> str:
    """SIM's behaviour tree, and what was measured of ranking and training on an accelerator."""
    f = result.figures
    wanted = (
        ("tree of 10 M events built, s", "build_10m_s", "30 or less", ".1f"),
        (
            "a day of 1 M events appended, 2.1 a (user, category), thousands a second",
            "append_events_per_s",
            "800",
            ".0f",
        ),
        ("look-up of 20 categories of 10,000 events, LMDB, p99, ms", "lookup_p99_ms_lmdb", "0.5 or less", ".2f"),
        ("the same, a local Redis", "lookup_p99_ms_redis", "3 or less", ".2f"),
        ("`rank` of 100 candidates, 10,000 behaviours, p99, ms", "rank_p99_ms_10k", "5 or less", ".2f"),
        (
            "training step at 10,000 by search, batch 1,024, over that of full length, times",
            "train_speedup_10k",
            "20",
            ".1f",
        ),
        ("the same, batch 256", "train_speedup_10k_batch_256", "", ".1f"),
    )
    thousand = {"append_events_per_s": 1e-3}
    elsewhere = sorted({str(row["device"]) for row in result.rows if "device" in row})
    lines = [
        f"SIM's behaviour tree ({result.device.get('processor')}, {result.device.get('cores')} cores"
        + (f"; ranking and training on {', '.join(elsewhere)}):" if elsewhere else "):"),
        "",
        "| what | measured | goal |",
        "|---|---|---|",
        *(
            f"| {title} | {f[name] * thousand.get(name, 1):{form}} | {goal} |"
            for title, name, goal, form in wanted
            if name in f
        ),
        "",
        f"Command: {command(result, 'sim_serving')}.",
    ]
    return "\n".join(lines)


def _dcaf(result: Result) -> str:
    """DCAF's replay."""
    f = result.figures
    shown = (
        ("gain at equal compute", "gain_equal_compute_pct", "3.7"),
        ("the same, chosen by estimates", "gain_equal_compute_estimated_pct", ""),
        ("compute saved at equal gain", "compute_saved_pct", "49"),
        ("the same, chosen by estimates", "compute_saved_estimated_pct", "25 (online)"),
    )
    lines = [
        f"DCAF on logs of synthetic worlds, whose true gains are known ({device(result)} worlds; %, 95 %",
        "t-intervals). A gain is the clicks that ranking adds to the page. True gains are an upper bound: nobody has",
        "them before the compute is spent. Published figures are of the authors' log. Against one action for all:",
        "the cheapest with 95 % of the best gain, or the one that gains the most for its cost:",
        "",
        "| | against the cheapest of nearly the best | against the most gain for its cost | published |",
        "|---|---|---|---|",
        *(
            f"| {title} | {interval(f, name, 1)} | {interval(f, name + '_lean', 1)} | {published} |"
            for title, name, published in shown
        ),
        "",
        f"The multiplier of 1 M requests x 20 actions takes {f['multiplier_1m_s']:.2f} s; its allocation is within",
        f"{f['dual_gap_pct']:.3f} % of the exact linear relaxation. Through three times the traffic and the loss of",
        f"half the capacity {f['surge_failure_pct']:.2g} % of the settled requests fail",
        f"({f['surge_failure_uncontrolled_pct']:.0f} % without the controller). Command: {command(result, 'dcaf')}.",
    ]
    return "\n".join(lines)


def _attention(result: Result) -> str:
    """Range attention beside the best rival of the same run."""
    rows: Sequence[Values] = result.rows
    quoted = [row for row in rows if row.get("figure") in result.figures and "ms" in row]
    timed = {(row["case"], row["direction"], row["implementation"]): row for row in rows if "ms" in row}
    lines = []
    for row in quoted:
        in_ms = row["figure"].endswith("_ms")
        case = f"{row['case'].split('_')[0]} {row['direction']}{', ms' * in_ms}: {row['shape']}"
        rival = timed.get((row["case"], row["direction"], row.get("rival_name")))
        if rival is None:
            lines.append([case, _rate(row, in_ms), "", ""])
            continue
        name = " ".join(str(x) for x in (rival["implementation"], rival.get("version")) if x)
        slower = " (slower)" * (row["speedup"] < 1)
        lines.append([case, _rate(row, in_ms), f"{_rate(rival, in_ms)} {name}", f"{row['speedup']:.2f}{slower}"])
    units = (("a matrix product", "tflops", "TFLOP/s"), ("a copy", "gb_per_s", "GB/s"))
    ceilings = [
        f"; {what} reached {row[name]:,.0f} {unit}"
        for row in rows
        for what, name, unit in units
        if row["case"] == "ceiling" and name in row
    ]
    ours = ", ".join(dict.fromkeys(row["implementation"] for row in quoted))
    told = " or ".join(
        dict.fromkeys(f"{row['dtype']}, median [least, most] of {row['repeats']} rounds" for row in quoted)
    )
    return joined(
        prose(
            f"Range attention ({ours}) beside the fastest of the other implementations in the same run "
            f"({machine(result)}, jax {result.versions.get('jax')}; {told}{''.join(ceilings)}), TFLOP/s on unmasked "
            "pairs:"
            if quoted
            else ""
        ),
        table(["case", "range attention", "best rival", "times faster"], lines),
        f"Command: {command(result, 'attention_h100')}.",
    )


def _rate(row: Values, in_ms: bool) -> str:
    """A measurement with its spread; TFLOP/s follow the milliseconds."""
    if in_ms:
        return f"{row['ms']:.4f} [{row['ms_low']:.4f}, {row['ms_high']:.4f}]"
    work = row["tflops"] * row["ms"]
    return f"{row['tflops']:.0f} [{work / row['ms_high']:.0f}, {work / row['ms_low']:.0f}]"


SYSTEMS: dict[str, dict[str, Callable[[Result], str]]] = {
    "LUM": {},
    "SIM": {"sim_lifelong": _lifelong, "sim_serving": _serving},
    "DCAF": {"dcaf": _dcaf},
    "ADS": {
        "ads_multidomain": readme_ads.multidomain,
        "ads_chunks": readme_ads.chunks,
        "ads_cost": readme_ads.ads_cost,
        "interest_bench": readme_ads.interest_bench,
    },
    "BAHE": {
        "bahe_text": readme_sections.bahe_text,
        "bahe_text_76800": partial(readme_sections.bahe_text, name="bahe_text_76800"),
        "bahe_cost": readme_sections.bahe_cost,
        "bahe_encode": readme_sections.bahe_encode,
    },
    "Range attention": {"attention_h100": _attention},
}
LEAD = (
    "Written from the files in `results/` by `python -m experiments readme`. Each part names its command, commit, "
    "device and seeds. (0): the interval contains zero. (lost): the interval of a gain lies below zero."
)


def update(root: Path = ROOT) -> None:
    """Writes RESULTS.md, and puts README's section in place of the one that is there."""
    results.write_atomically(root / "experiments" / "RESULTS.md", everything())
    text = (root / "README.md").read_text()
    before, rest = text.split(BEGIN, 1)
    results.write_atomically(root / "README.md", before + section() + rest.split(END, 1)[1])

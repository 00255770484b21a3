"""The measured part of README.md, written from the results themselves: no number there is typed by hand.

python -m experiments readme      # rewrites what stands between the two `figures` marks
"""

from pathlib import Path

from experiments import results

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
    """The marked part, marks included, from the result files in `folder`."""
    parts = [part for part in (_lum(folder), _serving(folder), _dcaf(folder)) if part]
    return "\n".join([BEGIN, "", *(line for part in parts for line in [*part, ""]), END])


def _lum(folder: Path) -> list[str]:
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
            f"| {title} | {_device(result)} | {f['din_auc']:.4f} | {f['din_lum_auc']:.4f} | "
            f"{_interval(f, 'gain_auc')} | {oracle} |"
        )
        laws.append(f"| {title} | {_interval(f, 'size_law_slope')} | {_interval(f, 'length_law_slope')} |")
        commands.append(f"- {title}: {_command(result, name)}")
    return [
        "AUC of DIN on the last tenth of the time, without and with LUM's answers, on the same samples and seeds:",
        "",
        *rows,
        "",
        "Recall@10 of the next item, fitted over the sweep (at the longest length and the largest size):",
        "",
        *laws,
        "",
        "An interval that contains zero (0) shows nothing. Commands, results in `experiments/results/`:",
        "",
        *commands,
    ]


def _serving(folder: Path) -> list[str]:
    """SIM's behaviour tree, once it is measured, and what was measured of ranking and training on an accelerator."""
    if not (folder / "sim_serving.json").exists():
        return []
    result = results.read(folder / "sim_serving.json")
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
        ("training step at 10,000 by search, times faster than over the full length", "train_speedup_10k", "20", ".1f"),
    )
    thousand = {"append_events_per_s": 1e-3}
    elsewhere = sorted({str(row["device"]) for row in result.rows if "device" in row})
    return [
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
        f"Command: {_command(result, 'sim_serving')}.",
    ]


def _dcaf(folder: Path) -> list[str]:
    """DCAF's replay, once it is measured."""
    if not (folder / "dcaf.json").exists():
        return []
    result = results.read(folder / "dcaf.json")
    f = result.figures
    shown = (
        ("gain at equal compute", "gain_equal_compute_pct", "3.7"),
        ("the same, chosen by estimates", "gain_equal_compute_estimated_pct", ""),
        ("compute saved at equal gain", "compute_saved_pct", "49"),
        ("the same, chosen by estimates", "compute_saved_estimated_pct", "25 (online)"),
    )
    return [
        f"DCAF on logs of synthetic worlds, whose true gains are known ({_device(result)} worlds; %, 95 %",
        "t-intervals). A gain is the clicks that ranking adds to the page. True gains are an upper bound: nobody has",
        "them before the compute is spent. Published figures are of the authors' log. Against one action for all:",
        "the cheapest with 95 % of the best gain, or the one that gains the most for its cost:",
        "",
        "| | against the cheapest of nearly the best | against the most gain for its cost | published |",
        "|---|---|---|---|",
        *(
            f"| {title} | {_interval(f, name, 1)} | {_interval(f, name + '_lean', 1)} | {published} |"
            for title, name, published in shown
        ),
        "",
        f"The multiplier of 1 M requests x 20 actions takes {f['multiplier_1m_s']:.2f} s; its allocation is within",
        f"{f['dual_gap_pct']:.3f} % of the exact linear relaxation. Through three times the traffic and the loss of",
        f"half the capacity {f['surge_failure_pct']:.2g} % of the settled requests fail",
        f"({f['surge_failure_uncontrolled_pct']:.0f} % without the controller). Command: {_command(result, 'dcaf')}.",
    ]


def _device(result: results.Result) -> str:
    return f"{result.device.get('count', 1)} x {result.device.get('kind')}, {len(result.seeds)}"


def _command(result: results.Result, name: str) -> str:
    return f"`{result.command}` ({result.seconds:.0f} s, commit {result.commit[:12]}; `{name}.json`)"


def update(path: Path = ROOT / "README.md") -> None:
    """Puts the section in place of the one that is there."""
    text = path.read_text()
    before, rest = text.split(BEGIN, 1)
    results.write_atomically(path, before + section() + rest.split(END, 1)[1])


def _interval(figures: dict[str, float], name: str, digits: int = 4) -> str:
    """The figure with its interval, which its name opens."""
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    zero = " (0)" if low <= 0 <= high else ""
    return f"{figures[name]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{zero}"

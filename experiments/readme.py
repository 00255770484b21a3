"""The measured part of README.md, written from the results themselves: no number there is typed by hand.

python -m experiments readme      # rewrites what stands between the two `figures` marks
"""

from pathlib import Path

from experiments import results

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
NAMES = {
    "quickstart_world": "synthetic world",
    "quickstart_world_h200": "synthetic world, all samples",
    "quickstart_ml1m": "MovieLens-1M",
    "quickstart_ml1m_h200": "MovieLens-1M, all samples",
    "quickstart_food": "Food.com, sampled negatives",
}


def section(folder: Path = ROOT / "experiments" / "results") -> str:
    """The marked part, marks included, from the result files in `folder`."""
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
        device = f"{result.device.get('count', 1)} x {result.device.get('kind')}, {len(result.seeds)}"
        rows.append(
            f"| {title} | {device} | {f['din_auc']:.4f} | {f['din_lum_auc']:.4f} | "
            f"{_interval(f, 'gain_auc')} | {oracle} |"
        )
        laws.append(f"| {title} | {_interval(f, 'size_law_slope')} | {_interval(f, 'length_law_slope')} |")
        commands.append(
            f"- {title}: `{result.command}` ({result.seconds:.0f} s, commit {result.commit[:12]}; `{name}.json`)"
        )
    return "\n".join(
        [
            BEGIN,
            "",
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
            "",
            END,
        ]
    )


def update(path: Path = ROOT / "README.md") -> None:
    """Puts the section in place of the one that is there."""
    text = path.read_text()
    before, rest = text.split(BEGIN, 1)
    results.write_atomically(path, before + section() + rest.split(END, 1)[1])


def _interval(figures: dict[str, float], name: str) -> str:
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    zero = " (0)" if low <= 0 <= high else ""
    return f"{figures[name]:+.4f} [{low:+.4f}, {high:+.4f}]{zero}"

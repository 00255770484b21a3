"""How README writes a measurement, and its parts on ADS, BAHE and range attention (the others: `readme.py`).

A part takes the content of its result file and gives markdown. What a run left out (a model, a length, a data
set) is left out of its tables. An interval that contains zero is marked (0), a difference below zero (lost), a goal
reached or missed.
"""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.results import Result

type Values = Mapping[str, Any]

# The goals of ADS: % more of a step in chunks of 10 (published) and unchunked; two GPUs over one; and how far from zero
# the whole interval of a gain may reach where domains do not differ.
CHUNK10_PCT, UNCHUNKED_PCT, TWO_GPUS, AT_ZERO = 3.6, 15.0, 1.9, 0.0005
PAIRED = "paired, 95 % intervals by bootstrap over users and seeds"
# BAHE (arXiv 2403.19347): length -> setting -> GPU hours and GB of LLM-CTR over those of the setting.
PUBLISHED_COST = {
    1024: {"+ FP": (1.1, 1.2), "+ ABE": (1.8, 1.9), "+ BA": (3.9, 4.5)},
    2048: {"+ FP": (1.1, 1.1), "+ ABE": (2.2, 2.0), "+ BA": (5.7, 6.0)},
}
SETTINGS = {"dnn": "DNN, no text", "llm_ctr": "LLM-CTR", "fp": "+ FP", "abe": "+ ABE", "bahe": "+ BA"}
PUBLISHED_AUC = {
    "1,024 tokens": ("", ".7161", ".7143", ".7150", ".7132"),
    "2,048 tokens": ("", ".7276", ".7326", ".7332", ".7309"),
    "AUC_d": (".7219", ".7323", ".7369", ".7372", ".7352"),
}
VARIATIONS = {
    "last": "last state in place of the mean",
    "split_quarter": "split at 1/4 in place of 1/2",
    "split_three_quarters": "split at 3/4 in place of 1/2",
    "random": "random weights in place of pre-trained",
}
ALL_SAMPLES = "DNN, the language model's samples too"
RIVALS = {"DNN": "less a DNN's without", ALL_SAMPLES: "less a DNN's on all samples"}
TITLES = {
    "world": "synthetic world",
    "ml-1m": "MovieLens-1M",
    "ml1m": "MovieLens-1M",
    "amazon": "Amazon",
    "taobao": "Taobao, a slice",
}


def machine(result: Result, data: str = "") -> str:
    """Number and kind of the devices; where runs are kept, of those that trained them (on `data`)."""
    of = [row for row in result.rows if not data or row.get("data") == data]
    trained = sorted({str(row["device"]) for row in of if row.get("device")})
    if trained:
        return " and ".join(trained)
    return f"{result.device.get('count', 1)} x {result.device.get('kind')}"


def seeds(result: Result, data: str) -> int:
    """How many seeds were trained on `data`; of the whole result where rows do not say."""
    return len({row["seed"] for row in result.rows if "seed" in row and row.get("data") == data}) or len(result.seeds)


def device(result: Result) -> str:
    """The machine and the number of seeds."""
    return f"{machine(result)}, {len(result.seeds)}"


def command(result: Result, name: str) -> str:
    """What was typed, how long it took, the commit, and the result's file."""
    return f"`{result.command}` ({result.seconds:.0f} s, commit {result.commit[:12]}; `{name}.json`)"


def span(mean: float, low: float, high: float, digits: int = 4) -> str:
    """A value with its interval."""
    zero = " (0)" if low <= 0 <= high else ""
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{zero}"


def gain(mean: float, low: float, high: float, digits: int = 4) -> str:
    """A difference that was to be positive, with its interval."""
    return span(mean, low, high, digits) + (" (lost)" if high < 0 else "")


def interval(values: Values, name: str, digits: int = 4) -> str:
    """The figure with its interval, which its name opens."""
    return span(values[name], values[f"{name}_low"], values[f"{name}_high"], digits)


def difference(row: Values | None, name: str = "", digits: int = 4) -> str:
    """A gain of a row: mean, low, high, or those that open with `name`; nothing where it was not measured."""
    if row is None or (name or "mean") not in row:
        return ""
    low, high = (row[f"{name}_{end}" if name else end] for end in ("low", "high"))
    return gain(row[name or "mean"], low, high, digits)


def verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table; nothing where there are no lines."""
    rows = [heading, ["---"] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else ""


def prose(text: str) -> str:
    """Text in lines of README's width."""
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def joined(*blocks: str) -> str:
    """Paragraphs and tables with an empty line between, empty ones left out."""
    return "\n\n".join(block for block in blocks if block)


def data_name(data: Any) -> str:
    """A data set's name for the reader."""
    return TITLES.get(str(data), str(data))


def bahe_text(result: Result, name: str = "bahe_text") -> str:
    """AUC of the settings by length, of rankers with their answers, and what was varied; `name` is the file's."""
    f, rows = result.figures, result.rows
    gains: dict[Any, Values] = {(row["data"], row["difference"]): row for row in rows if "difference" in row}
    auc, less, later = [], [], []

    def cells(data: str, pairs: Iterable[str]) -> list[str]:
        return [_seeded(gains.get((data, pair)), result) for pair in pairs]

    for own, data in (("", "ml1m"), ("amazon_", "amazon")):
        found = [re.fullmatch(own + r"(?:llm_ctr|fp|abe|bahe)_auc_(\d+)", name) for name in f]
        for length in sorted({int(match[1]) for match in found if match}):
            place = f"{data_name(data)}, {length:,} tokens"
            own_auc = [f"{own}{key}_auc_{length}" for key in list(SETTINGS)[1:]]
            auc.append([place, *(figure(f, name, ".4f") for name in (f"{own}dnn_auc", *own_auc))])
            llm, *others = [f"{own}{key}_{length}" for key in list(SETTINGS)[1:]]
            pairs = [f"{llm} - {own}dnn", *(f"{name} - {llm}" for name in others), f"{others[-1]} - {own}dnn"]
            less.append([place, *cells(data, pairs)])
            for rival, said in RIVALS.items():
                pairs = [f"AUC_d: DNN with answers of {name} - {rival}" for name in (llm, *others)]
                later.append([f"{data_name(data)}, {said}", *cells(data, pairs)])
        names = [f"{own}{key}_auc_d" for key in SETTINGS]
        auc.append([f"{data_name(data)}, AUC_d", *(figure(f, name, ".4f") for name in names)])
        all_samples = figure(f, f"{own}dnn_both_auc_d", ".4f")
        auc.append([f"{data_name(data)}, AUC_d on all samples", all_samples, "", "", "", ""])
    auc, less, later = (_filled(lines) for lines in (auc, less, later))
    if auc:
        auc += [[f"published, {what}", *values] for what, values in PUBLISHED_AUC.items()]
    popular = (("ml1m", "popularity_auc"), ("amazon", "amazon_popularity_auc"))
    levels = [f"{data_name(data)} {f[name]:.4f}" for data, name in popular if name in f]
    known = f" (popularity alone: {', '.join(levels)})" if levels else ""
    learned = f" on {f['train_samples']:,.0f} samples" if "train_samples" in f else ""
    heading = ["LLM-CTR - DNN", "+ FP - LLM-CTR", "+ ABE - LLM-CTR", "+ BA - LLM-CTR", "+ BA - DNN"]
    return joined(
        prose(
            f"BAHE's settings on real texts, the same part of one language model trained in each{learned} "
            f"({device(result)} seeds). AUC_d is of a DNN that learns from later samples, with a setting's answers. "
            f"Published figures are of other data. AUC{known}:"
        ),
        table(["", *SETTINGS.values()], auc),
        prose(f"Differences ({PAIRED}):" if less else ""),
        table(["AUC", *heading], less),
        table(["AUC_d with the answers of", *list(SETTINGS.values())[1:]], later),
        _variations(gains, result),
        f"Command: {command(result, name)}.",
    )


def _variations(gains: Mapping[Any, Values], result: Result) -> str:
    """What changes with pooling, split and weights."""
    lines = []
    for (data, what), row in gains.items():
        match = re.fullmatch(r"(([a-z_]+)_(\d+))_(\w+) - (\w+)", what)
        if match and match[1] == match[5] and match[2] in SETTINGS and match[4] in VARIATIONS:
            setting = f"{SETTINGS[match[2]]}, {VARIATIONS[match[4]]}"
            changed = span(row["mean"], row["low"], row["high"]) + _fewer(row, result)
            lines.append([setting, f"{data_name(data)}, {int(match[3]):,} tokens", changed])
    return table(["one thing changed", "", "AUC"], lines)


def bahe_cost(result: Result) -> str:
    """Time and memory of a training step beside LLM-CTR's and the paper's; the speed of encoding."""
    f, rows = result.figures, [*result.rows]
    steps: list[Values] = [row for row in rows if "ms" in row]
    base = {(row["length"], row.get("command")): row for row in steps if row["what"] == "LLM-CTR"}
    lines = []
    for row in steps:
        low, ratios = base.get((row["length"], row.get("command"))), ["", ""]  # of the same run
        if low is not None and low is not row:
            published = PUBLISHED_COST.get(row["length"], {}).get(row["what"], (None, None))
            pairs = zip(("total_ms", "peak_gib"), published, strict=True)
            ratios = [_ratio(low[name] / row[name], goal) for name, goal in pairs]
        ms = f"{row['ms']:.1f} [{row['ms_low']:.1f}, {row['ms_high']:.1f}]"
        built = f"{row['table_ms']:.2f}" if row["table_ms"] else ""
        what = row["what"] + ", another run" * ("measured_on" in row)
        lines.append([f"{row['length']:,}", what, ms, built, ratios[0], f"{row['peak_gib']:.1f}", ratios[1]])
    batch = " or ".join(dict.fromkeys(str(row["batch"]) for row in steps))
    encoding = ""
    if "encode_tokens_per_s" in f:
        mfu = f", {100 * f['encode_mfu']:.1f} % of the device's peak (MFU)" if "encode_mfu" in f else ""
        encoding = f"The frozen lower half encodes {f['encode_tokens_per_s']:,.0f} tokens a second{mfu}."
    heading = ["tokens", "setting", "step, ms", "table's share, ms", "times faster", "peak, GiB", "times smaller"]
    return joined(
        prose(
            f"A training step of BAHE's settings ({machine(result)}; batch {batch}; median [least, most] of the "
            "repeats; memory as compiled). Times faster and smaller than LLM-CTR, the step's share of building the "
            "table counted; in brackets the paper's GPU hours and memory. Trained through: the lower half too, on the "
            "batch's distinct behaviours:"
            if steps
            else ""
        ),
        table(heading, lines),
        prose(encoding),
        missing(rows, ("what", "length")),
        f"Command: {command(result, 'bahe_cost')}.",
        *elsewhere(rows),
    )


def bahe_encode(result: Result) -> str:
    """The catalogue that was encoded."""
    f = result.figures
    what = (("encoded_texts", "texts"), ("encoded_tokens", "tokens"), ("tokens_per_s", "tokens a second after a start"))
    said = ", ".join(f"{f[name]:,.0f} {unit}" for name, unit in what if name in f)
    return joined(
        prose(f"A catalogue into BAHE's table ({machine(result)}): {said}." if said else ""),
        f"Command: {command(result, 'bahe_encode')}.",
    )


def _ratio(value: float, published: float | None) -> str:
    return f"{value:.2f}" + ("" if published is None else f" ({published:.1f}: {verdict(value >= published)})")


def _seeded(row: Values | None, result: Result) -> str:
    return "" if row is None else difference(row) + _fewer(row, result)


def _fewer(row: Values, result: Result) -> str:
    """How many seeds, where they are not the result's."""
    seeds = row.get("seeds", len(result.seeds))
    return "" if seeds == len(result.seeds) else f", {seeds} seed{'s' * (seeds != 1)}"


def figure(figures: Mapping[str, float], name: str, form: str) -> str:
    return f"{figures[name]:{form}}" if name in figures else ""


def _filled(lines: Iterable[list[str]]) -> list[list[str]]:
    """Lines that have more than their name."""
    return [line for line in lines if any(line[1:])]


def elsewhere(rows: Iterable[Values]) -> list[str]:
    """The commands of rows that another run measured."""
    runs = dict.fromkeys((row["measured_on"], row["command"], row["commit"]) for row in rows if "measured_on" in row)
    return [f"On {where}: `{typed}` (commit {str(commit)[:12]})." for where, typed, commit in runs]


def missing(rows: Iterable[Values], names: Sequence[str]) -> str:
    """What could not be measured, by its reason."""
    where: dict[str, list[str]] = {}
    for row in rows:
        if "reason" in row:
            where.setdefault(row["reason"], []).append(" ".join(str(row[name]) for name in names))
    said = [f"{', '.join(places)} ({reason})" for reason, places in where.items()]
    return prose(f"Not measured: {'; '.join(said)}." if said else "")

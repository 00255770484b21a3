"""ADS and its rivals over several domains: what does it gain, does the gain come from the domain, and what is capacity?

Shows, on synthetic worlds whose domains differ by a dial from not at all to fully and whose true click probability is
known (and on MovieLens-1M and Taobao's behaviours where their folders are named): AUC over seeds, overall and by
domain, of MLR, DNN, DeepFM, xDeepFM, DCNv2, MaskNet, DFFM, APG, AdaSparse, STAR and PLE over the pooled sequence, and
of DIN, multi-head attention and CAN alone, with FRNet, with PEPNet, with ADS, with ADS without PCRG, and with ADS whose
generators read ones in the domain's place (its capacity alone). An attention alone is ADS without both generators.
Differences of AUC and Imp (ADS, arXiv 2502.05523, equation 14) with paired intervals: over users and seeds between ADS
and its rivals, over seeds of every model over DNN, or over its attention alone.

    python -m experiments ads-multidomain                       # for an accelerator
    python -m experiments ads-multidomain --quick               # five models on two cores, a minute or two
    python -m experiments ads-multidomain --ml-1m PATH/ml-1m --taobao PATH
    python -m experiments ads-multidomain --no-report --only DIN 'DIN + ADS'   # a share of the models

Every model has the same features, all of one width, E_D and each behaviour's position among them, and the same layers
where its paper has an MLP; it has one trial for each of the same pairs of learning rates, of net and tables, and final
runs of one epoch and of three, and takes the best of either by validation AUC; the rival that ADS is compared with is
chosen by validation AUC too. CAN has the mean of the behaviours beside it, since a co-action unit tells only what
target and behaviours are together. The test period is scored once, by the final runs that were taken. MovieLens-1M
names no domains: the candidate's category (its first genre) serves, as the paper has it on Taobao's data. All data are
split by time, in tenths (eight, one, one), without filters. The paper's protocol on Taobao (seven days against the
rest; users of 200 interactions and 10 positives, items of 10 interactions) would leave 96 of the 929 users of our
slice, and 1,173 of its 94,475 events.

Models that are done are kept for one commit, so that several processes, each with an accelerator, may train a share of
them in one folder (after one of them has made the worlds: `--no-report --only MLR`), and another makes the report of
all. What several machines measured, each on some of the data, is one result by `--joined A.json B.json`. On two H200
with two processes each, making and compiling took 135 s for the worlds and 110 s for MovieLens, and each of the four 85
to 100 s then; on two cores the slice of Taobao took an hour.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments import figures, report, results, statistics
from experiments.ads_multidomain_models import ATTENTIONS, QUICK, AdsMultidomain, train_all
from experiments.ads_multidomain_rows import compared_in, dial_of, measure, summarize
from experiments.datasets import Data, load, make_world
from experiments.progress import table
from experiments.results import Row
from experiments.settings import in_small
from experiments.statistics import Interval
from experiments.steps.multidomain import Impressions, make_impressions
from experiments.steps.problem import Problem, make_problem

METHOD = "paired bootstrap over users and seeds"
PAIRED = f"95 %, {METHOD}"
PUBLISHED = (
    "Published on Taobao's data, where the text does not say whether Imp or differences of AUC: attention over DNN "
    "+0.54 % (DIN), +0.23 % (multi-head), +0.17 % (CAN); ADS over the second best +0.47 %, +0.20 %, +0.20 %. These are "
    "other data: a comparison of orders, not of numbers."
)


def run(config: AdsMultidomain) -> results.Result | None:
    """Trains and measures everything, prints the tables, writes `out`/result.json and `out`/report.html."""
    if config.quick:
        config = in_small(config, QUICK, together=("dials", "main"))
    results.make_folder(config.out)
    if config.joined:
        joined = results.join(config.joined, "ads_multidomain", apart=("data",))
        return _finish(replace(joined, figures=dict(joined.figures) | summarize(joined.rows, config)), config)
    started, rows, outcome = results.begin(), [], None
    for data in _all_data(config):
        done = train_all(data, config)
        if config.report:
            rows += measure(done, config)
            found, seeds = summarize(rows, config), range(config.seeds)
            outcome = results.record("ads_multidomain", started=started, seeds=seeds, rows=rows, figures=found)
            results.write(config.out / "result.json", outcome)  # what is there if the next data set's time runs out
    return outcome and _finish(outcome, config)


def world_name(dial: float, users: int = AdsMultidomain.users) -> str:
    of = "" if users == AdsMultidomain.users else f" of {users:,} users"
    return f"world{of}, domain {dial:g}"


def _all_data(config: AdsMultidomain) -> Iterable[Impressions]:
    def make(problem: Problem, name: str) -> Impressions:
        data = make_impressions(
            problem,
            name=name,
            train=config.train_samples,
            test=config.test_samples,
            length=config.length,
            width=config.width,
        )
        print(
            f"{data.name}: {len(data.train):,} training, {len(data.valid):,} validation and {len(data.test):,} test "
            f"samples; {len(np.unique(data.domain))} domains ({data.domain_name})",
            flush=True,
        )
        return data

    prepared = config.out / "prepared"
    for dial in config.dials:
        dataset = make_world(config.world(dial), prepared / f"domain-{dial:g}")
        yield make(make_problem(dataset), world_name(dial, config.users))
    for source, folder in (("ml-1m", config.ml_1m), ("taobao", config.taobao)):
        if folder is not None:
            found: Any = source
            yield make(make_problem(load(Data(data=found, data_dir=folder, prepared=prepared))), source)


def _finish(outcome: results.Result, config: AdsMultidomain) -> results.Result:
    """Writes the result and the report, and prints the tables."""
    rows, compared = outcome.rows, compared_in(outcome.rows)
    results.write(config.out / "result.json", outcome)
    chosen: list[Row] = []
    by_data: dict[str, Row] = {}
    panels: list[report.Panel] = []
    findings: list[report.Finding] = []
    for data in dict.fromkeys(str(row["data"]) for row in rows):
        own = [row for row in rows if row["data"] == data]
        seeds = [row for row in own if "seed" in row]
        by_model = {str(row["model"]): row for row in seeds}
        imps = {str(row["model"]): row for row in own if "interval" in row}
        auc = {name: _over_seeds([row for row in seeds if row["model"] == name]) for name in by_model}
        for name, row in by_model.items():
            x = auc[name]
            mean, low, high = (x.mean, x.low, x.high) if isinstance(x, Interval) else (x, None, None)
            line: Row = {"data": data, "model": name, "AUC": mean, "low": low, "high": high}
            line |= {key: row.get(key) for key in ("learning_rate", "table_rate", "parameters")}
            line["epochs"] = f"{row['epochs']:g}"
            over = imps.get(name, {})
            line |= {"over": over.get("base"), "Imp, %": over.get("imp")}
            chosen.append(line | {f"Imp {end}": over.get(f"imp_{end}") for end in ("low", "high")})
            by_data.setdefault(name, {"model": name})[data] = mean
        shown: dict[str, Any] = {"samples": _samples(own), "seeds": len({row["seed"] for row in seeds})}
        oracle = next((float(row["oracle_auc"] or 0) for row in own if "oracle_auc" in row), None)
        bars = figures.auc_bars(auc, oracle=oracle, title=f"AUC on {data}")
        text = "Test samples of the last tenth of the time."
        several = any(isinstance(value, Interval) for value in auc.values())
        interval = "95 %, t over seeds" if several else ""
        panels.append(report.Panel(f"AUC on {data}", bars, text, **shown, interval=interval))
        gains = {f"{row['model']} - {row['base']}": _interval(row) for (at, _), row in compared.items() if at == data}
        if gains:
            points = figures.differences(gains, title=f"Gains on {data}", x_label="difference of AUC, paired")
            shown["interval"] = PAIRED
            panels.append(report.Panel(f"Gains on {data}", points, "The first model less the second.", **shown))
        for row in (compared[data, key] for key in map(str.lower, ATTENTIONS) if (data, key) in compared):
            findings.append(report.difference(f"{data}: {row['model']} - {row['base']}", _interval(row)))
    print(table(chosen))
    for finding in findings:
        print(finding.text)
    text = report.page(
        outcome, "ADS and its rivals over several domains", headline=[*by_data.values()],
        panels=_dial_panel(compared) + panels, findings=findings,
        tables={"As chosen in validation": chosen, "Everything measured": rows},
        lead="AUC of the test period, mean over seeds. The same features, widths, trials and seeds for every model. "
        + PUBLISHED,
    )  # fmt: skip
    path = report.write(config.out / "report.html", text)
    print(f"report: {path}   result: {config.out / 'result.json'}   {outcome.seconds:.0f} s", flush=True)
    return outcome


def _column(rows: Iterable[Row], name: str) -> list[float]:
    return [float(row[name] or 0) for row in rows]


def _interval(row: Row) -> Interval:
    mean, low, high = (float(row[f"auc_difference{part}"] or 0) for part in ("", "_low", "_high"))
    return Interval(mean, low, high, 0.95, METHOD)


def _over_seeds(rows: Sequence[Row]) -> Interval | float:
    """The mean AUC with its interval; of one seed its AUC, which has none."""
    values = np.array(_column(rows, "test_auc"))
    return statistics.across_seeds(values) if len(values) > 1 else float(values[0])


def _samples(rows: Iterable[Row]) -> int | None:
    """Of the test period."""
    return next((int(row["samples"] or 0) for row in rows if row.get("domain") == "all"), None)


def _dial_panel(compared: Mapping[tuple[str, str], Row]) -> list[report.Panel]:
    """ADS over the attention alone, and over its own control, along the dial: of the worlds that most settings have."""
    curves, bands = {}, {}
    worlds = Counter(data.partition(", ")[0] for data in {data for data, _ in compared} if dial_of(data) is not None)
    world = max(worlds, key=worlds.__getitem__, default="")
    for attention in ATTENTIONS:
        for end, label in (("over_alone", "alone"), ("over_constant_domain", "constant E_D")):
            found = {
                dial: row
                for (data, key), row in compared.items()
                if key == f"{attention.lower()}_{end}"
                and data.startswith(f"{world}, ")
                and (dial := dial_of(data)) is not None
            }
            if len(found) > 1:
                own, name = [found[dial] for dial in sorted(found)], f"{attention}: ADS over {label}"
                mean, low, high = (np.array(_column(own, f"auc_difference{part}")) for part in ("", "_low", "_high"))
                curves[name], bands[name] = (np.array(sorted(found)), mean), (low, high)
    if not curves:
        return []
    svg = figures.lines(
        curves, bands=bands, title="Gain along the domain dial", x_label="how much the world's domains differ",
        y_label="difference of AUC, paired",
    )  # fmt: skip
    text = "At 0 the domains do not differ: what is gained there is capacity."
    return [report.Panel("Gain along the domain dial", svg, text, interval=PAIRED)]

"""ADS and its rivals over several domains: what does it gain, does the gain come from the domain, and what is capacity?

Shows, on synthetic worlds whose domains differ by a dial from not at all to fully and whose true click probability is
known (and on MovieLens-1M and Taobao's behaviours where their folders are named): AUC over seeds, overall and by
domain, of MLR, DNN, DeepFM, xDeepFM, DCNv2, MaskNet, DFFM, APG, AdaSparse, STAR and PLE over the pooled sequence, and
of DIN, multi-head attention and CAN alone, with FRNet, with PEPNet, with ADS, with ADS without PCRG, and with ADS whose
generators read ones in the domain's place (its capacity alone). An attention alone is ADS without both generators.
Differences of AUC and Imp (ADS, arXiv 2502.05523, equation 14) with paired intervals.

    python -m experiments ads-multidomain                       # for an accelerator
    python -m experiments ads-multidomain --quick               # five models on two cores, a minute or two
    python -m experiments ads-multidomain --ml-1m PATH/ml-1m --taobao PATH
    python -m experiments ads-multidomain --no-report --only DIN 'DIN + ADS'   # a share of the models

Every model has the same features, all of one width, E_D and each behaviour's position among them, and the same layers
where its paper has an MLP; it has one trial for each of the same pairs of learning rates, of net and tables, and final
runs of one epoch and of three, and takes the best of either by validation AUC; the rival that ADS is compared with is
chosen by validation AUC too. The test period is scored once, by the final runs that were taken. MovieLens-1M names no
domains: the candidate's category (its first genre) serves, as the paper has it on Taobao's data.

Models that are done are kept, so that several processes, each with an accelerator, may train a share of them in one
folder (after one of them has made the worlds: `--no-report --only MLR`), and another makes the report of all. On two
H200 each half of the models took 60 to 75 s a world, and as long again for the first, to be compiled.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from experiments import figures, report, results, statistics
from experiments.ads_multidomain_models import ATTENTIONS, QUICK, AdsMultidomain, Outcome, rivals, train_all
from experiments.datasets import Data, load, make_world
from experiments.progress import table
from experiments.statistics import Interval
from experiments.steps.multidomain import Impressions, make_impressions
from experiments.steps.problem import Problem, make_problem
from rec_core import metrics

Pairs = dict[str, tuple[str, str]]
SHOWN_DOMAINS = 10  # the largest of them; the mean over all is shown beside
PUBLISHED = (
    "Published on Taobao's data, where the text does not say whether Imp or differences of AUC: attention over DNN "
    "+0.54 % (DIN), +0.23 % (multi-head), +0.17 % (CAN); ADS over the second best +0.47 %, +0.20 %, +0.20 %. These are "
    "other data: a comparison of orders, not of numbers."
)


def run(config: AdsMultidomain) -> results.Result | None:
    """Trains and measures everything, prints the tables, writes `out`/result.json and `out`/report.html."""
    if config.quick:
        config = AdsMultidomain(**(vars(config) | QUICK | ({"only": config.only} if config.only else {})))
    config.out.mkdir(parents=True, exist_ok=True)
    started = results.begin()
    outcomes = [train_all(data, config) for data in _all_data(config)]
    return _publish(config, outcomes, started) if config.report else None


def world_name(dial: float) -> str:
    return f"world, domain {dial:g}"


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
        yield make(make_problem(dataset), world_name(dial))
    for source, folder in (("ml-1m", config.ml_1m), ("taobao", config.taobao)):
        if folder is not None:
            found: Any = source
            yield make(make_problem(load(Data(data=found, data_dir=folder, prepared=prepared))), source)


def gain(done: Outcome, a: str, b: str, resamples: int) -> Callable[[], Interval]:
    """What gives AUC of model b minus AUC of model a on the test period, paired over users and seeds."""
    data = done.data
    return partial(
        statistics.auc_difference,
        data.label[data.test], done.tuned[a].test, done.tuned[b].test, data.user[data.test], resamples=resamples,
    )  # fmt: skip


def imp_of(difference: Interval, base: float) -> Interval:
    """A difference of AUC over a base as Imp, in %; the base's own spread is not part of the interval."""

    def imp(x: float) -> float:
        return metrics.imp(base + x, base)

    low, high = imp(difference.low), imp(difference.high)
    per_seed = tuple(map(imp, difference.per_seed))
    return replace(difference, mean=imp(difference.mean), low=low, high=high, per_seed=per_seed)


def best_rival(done: Outcome, attention: str) -> str | None:
    """The rival on this attention with the best validation AUC; None where none was trained."""
    there = [name for name in rivals(attention) if name in done.tuned]
    return max(there, key=done.valid_auc.__getitem__) if there else None


def domain_rows(done: Outcome, name: str) -> list[results.Row]:
    """AUC within the largest domains that have both classes, means over seeds; and the mean over all domains, weighted
    by impressions (domain "all")."""
    data, logits = done.data, done.tuned[name].test
    label, domain = data.label[data.test], data.domain[data.test]
    found, counts = np.unique(domain, return_counts=True)
    rows: list[results.Row] = []
    for value in found[np.argsort(-counts, kind="stable")]:
        there = domain == value
        if len(rows) < SHOWN_DOMAINS and 0 < label[there].mean() < 1:
            auc = np.mean([metrics.auc(label[there], row[there]) for row in logits])
            rows.append({"domain": str(value), "auc": float(auc), "samples": int(there.sum())})
    grouped = np.mean([metrics.gauc(domain, label, row).value for row in logits])
    rows.append({"domain": "all", "auc": float(grouped), "samples": len(label)})
    return [{"data": data.name, "model": name, **row} for row in rows]


def _publish(config: AdsMultidomain, outcomes: list[Outcome], started: Any) -> results.Result:
    rows: list[results.Row] = []
    numbers: dict[str, float] = {}
    panels: list[report.Panel] = []
    findings: list[report.Finding] = []
    headline: list[dict[str, Any]] = []
    by_dial: dict[str, dict[float, Interval]] = {}
    pairs = {done.data.name: _pairs(done) for done in outcomes}
    measured = _intervals(outcomes, pairs, config)
    for done in outcomes:
        data = done.data
        labels, users = data.label[data.test], data.user[data.test]
        intervals = {name: measured[data.name, "", name] for name in done.tuned}
        for name, tuned in done.tuned.items():
            shared: results.Row = {"data": data.name, "model": name, **tuned.best}
            shared |= {"parameters": done.parameters[name], "valid_auc": done.valid_auc[name]}
            shared["device"] = done.trained_on[name]
            rows += [shared | {"seed": i, "test_auc": auc} for i, auc in enumerate(intervals[name].per_seed)]
            rows += domain_rows(done, name)
            headline.append(
                {"data": data.name, "model": name, "AUC": intervals[name].mean, "low": intervals[name].low}
                | {"high": intervals[name].high, **tuned.best, "parameters": done.parameters[name]}
            )
        oracle = None if data.probability is None else metrics.auc(labels, data.probability[data.test])
        main = data.name == world_name(config.main)
        compared = _compare(data.name, pairs[data.name], measured, rows, numbers if main else {})
        if main and oracle is not None:
            numbers["oracle_auc"] = oracle
        if data.name == world_name(0.0):
            _at_zero(compared, numbers)
        for dial in (dial for dial in config.dials if data.name == world_name(dial)):
            for what, value in compared.items():
                by_dial.setdefault(what, {})[dial] = value
        rivals = [pairs[data.name][key] for key in map(str.lower, ATTENTIONS) if key in pairs[data.name]]
        findings += [report.difference(f"{data.name}: {b} - {a}", compared[f"{b} - {a}"]) for a, b in rivals]
        counts: dict[str, Any] = {"samples": len(labels), "users": len(np.unique(users)), "seeds": config.seeds}
        shown = {"interval": "95 %, bootstrap over users and seeds", **counts}
        bars = figures.auc_bars(intervals, oracle=oracle, title=f"AUC on {data.name}")
        panels.append(report.Panel(f"AUC on {data.name}", bars, "Test samples of the last tenth of the time.", **shown))
        if compared:
            points = figures.differences(compared, title=f"Gains on {data.name}", x_label="difference of AUC, paired")
            panels.append(report.Panel(f"Gains on {data.name}", points, "The second model less the first.", **shown))
    panels = _dial_panel(by_dial, config) + panels
    outcome = results.record("ads_multidomain", started=started, seeds=range(config.seeds), rows=rows, figures=numbers)
    results.write(config.out / "result.json", outcome)
    print(table(headline))
    for finding in findings:
        print(finding.text)
    text = report.page(
        outcome, "ADS and its rivals over several domains", headline=headline, panels=panels, findings=findings,
        tables={"Everything measured": rows},
        lead="The same features, widths, trials and seeds for every model. " + PUBLISHED,
    )  # fmt: skip
    path = report.write(config.out / "report.html", text)
    print(f"report: {path}   result: {config.out / 'result.json'}   {outcome.seconds:.0f} s", flush=True)
    return outcome


def _intervals(
    outcomes: list[Outcome], pairs: dict[str, Pairs], config: AdsMultidomain
) -> dict[tuple[str, str, str], Interval]:
    """By data, base and model: AUC, for which the base is "", and differences of AUC. None waits for another."""
    asked: dict[tuple[str, str, str], Callable[[], Interval]] = {}
    for done in outcomes:
        data = done.data
        for name, tuned in done.tuned.items():
            given = data.label[data.test], tuned.test, data.user[data.test]
            asked[data.name, "", name] = partial(statistics.auc_interval, *given, resamples=config.resamples)
        for a, b in pairs[data.name].values():
            asked[data.name, a, b] = gain(done, a, b, config.resamples)
    return statistics.together(asked)


def _pairs(done: Outcome) -> Pairs:
    """The comparisons of one data set, by key: the base and what is compared with it, where both were trained."""
    wanted: dict[str, tuple[str | None, str]] = {}
    for attention in ATTENTIONS:
        key, ads = attention.lower(), f"{attention} + ADS"
        wanted[key] = best_rival(done, attention), ads
        wanted[f"{key}_over_alone"] = attention, ads
        wanted[f"{key}_over_constant_domain"] = f"{ads}, E_D constant", ads
        wanted[f"{key}_pcrg"] = f"{ads} without PCRG", ads
        wanted[f"{key}_over_dnn"] = "DNN", attention
    return {key: (a, b) for key, (a, b) in wanted.items() if a is not None and a in done.tuned and b in done.tuned}


def _compare(
    data: str,
    pairs: Pairs,
    measured: dict[tuple[str, str, str], Interval],
    rows: list[results.Row],
    numbers: dict[str, float],
) -> dict[str, Interval]:
    """The comparisons of one data set by what is subtracted; their rows, and the figures of the main one."""
    for key, (a, b) in pairs.items():
        difference, base = measured[data, a, b], measured[data, "", a].mean
        values = {"auc_difference": difference}
        if base > 0.5:  # below, Imp is not defined
            values["imp"] = imp_of(difference, base)
        row: results.Row = {"data": data, "comparison": key, "model": b, "base": a}
        for name, value in values.items():
            parts = {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
            row |= parts
            numbers.update({f"{key}_{part}": x for part, x in parts.items()})
        rows.append(row)
    return {f"{b} - {a}": measured[data, a, b] for a, b in pairs.values()}


def _at_zero(compared: dict[str, Interval], numbers: dict[str, float]) -> None:
    """Where domains do not differ: ADS over the attention alone, and over its own control, which has its capacity; the
    mean over attentions, and the widest ends."""
    for name, control in (("domain_dial", ""), ("over_constant_domain", " + ADS, E_D constant")):
        pairs = (f"{attention} + ADS - {attention}{control}" for attention in ATTENTIONS)
        found = [compared[pair] for pair in pairs if pair in compared]
        if found:
            numbers[f"gain_at_zero_{name}"] = float(np.mean([value.mean for value in found]))
            numbers[f"gain_at_zero_{name}_low"] = min(value.low for value in found)
            numbers[f"gain_at_zero_{name}_high"] = max(value.high for value in found)


def _dial_panel(by_dial: dict[str, dict[float, Interval]], config: AdsMultidomain) -> list[report.Panel]:
    """ADS over the attention alone, and over its own control, along the dial."""
    curves, bands = {}, {}
    for attention in ATTENTIONS:
        for base in (attention, f"{attention} + ADS, E_D constant"):
            found = by_dial.get(f"{attention} + ADS - {base}", {})
            if len(found) > 1:
                x, values = np.array(list(found)), list(found.values())
                label = f"{attention}: ADS over {'alone' if base == attention else 'constant E_D'}"
                curves[label] = (x, np.array([value.mean for value in values]))
                bands[label] = (np.array([v.low for v in values]), np.array([v.high for v in values]))
    if not curves:
        return []
    svg = figures.lines(
        curves, bands=bands, title="Gain along the domain dial", x_label="how much the world's domains differ",
        y_label="difference of AUC, paired",
    )  # fmt: skip
    text = "At 0 the domains do not differ: what is gained there is capacity."
    shown: dict[str, Any] = {"interval": "95 %, bootstrap over users and seeds", "seeds": config.seeds}
    return [report.Panel("Gain along the domain dial", svg, text, **shown)]

"""What `ads-multidomain` makes of trained models: AUC, overall and by domain, and what each gains over another."""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from experiments import statistics
from experiments.ads_multidomain_models import ATTENTIONS, AdsMultidomain, Outcome, rivals
from experiments.results import Row
from experiments.statistics import Interval
from rec_core import metrics

Pairs = dict[str, tuple[str, str]]
SHOWN_DOMAINS = 10  # the largest of them; the mean over all is shown beside


def gain(done: Outcome, a: str, b: str, resamples: int) -> Callable[[], Interval]:
    """What gives AUC of model b minus AUC of model a on the test period, paired over users and seeds."""
    data = done.data
    return partial(
        statistics.auc_difference,
        data.label[data.test], done.tuned[a].test, done.tuned[b].test, data.user[data.test], resamples=resamples,
    )  # fmt: skip


def imp_of(difference: Interval, base: float) -> Interval:
    """A difference of AUC over a base above .5 as Imp, in %; the base's own spread is not part of the interval.

    `metrics.imp` of base and difference, whose interval may reach further than AUCs do.
    """
    scale = 100 / (base - 0.5)
    per_seed = tuple(scale * x for x in difference.per_seed)
    low, high = scale * difference.low, scale * difference.high
    return replace(difference, mean=scale * difference.mean, low=low, high=high, per_seed=per_seed)


def best_rival(done: Outcome, attention: str) -> str | None:
    """The rival on this attention with the best validation AUC; None where not all of them were trained."""
    all_of = rivals(attention)
    return max(all_of, key=done.valid_auc.__getitem__) if done.tuned.keys() >= set(all_of) else None


def domain_rows(done: Outcome, name: str) -> list[Row]:
    """AUC within the largest domains that have both classes, means over seeds; and the mean over all of them, weighted
    by impressions (domain "all"; its samples are those of the test period, left out are domains of one class)."""
    data, logits = done.data, done.tuned[name].test
    label, domain = data.label[data.test], data.domain[data.test]
    by_seed = [metrics.auc_by_group(domain, label, row) for row in logits]
    rows: list[Row] = [
        {"domain": str(value), "auc": float(np.mean([found[value][0] for found in by_seed])), "samples": samples}
        for value, (_, samples) in list(by_seed[0].items())[:SHOWN_DOMAINS]
    ]
    grouped = [metrics.gauc(domain, label, row) for row in logits]
    whole = {"samples": len(label), "samples_left_out": int(grouped[0].impressions_left_out)}
    rows.append({"domain": "all", "auc": float(np.mean([found.value for found in grouped])), **whole})
    return [{"data": data.name, "model": name, **row} for row in rows]


def measure(done: Outcome, config: AdsMultidomain) -> list[Row]:
    """The rows of one data set: of every model its AUC by seed and by domain, of every comparison the difference and
    Imp, and the AUC of the true probability where it is known."""
    data, pairs = done.data, _pairs(done)
    label = data.label[data.test]
    rows: list[Row] = []
    if data.probability is not None:
        rows.append({"data": data.name, "oracle_auc": metrics.auc(label, data.probability[data.test])})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        of_models = list(pool.map(partial(_model_rows, done), done.tuned))
    auc = {
        name: float(np.mean([row["test_auc"] for row in found if "seed" in row]))
        for name, found in zip(done.tuned, of_models, strict=True)
    }
    jobs = {pair: gain(done, *pair, config.resamples) for pair in pairs.values()}
    for end in ("over_alone", "over_constant_domain"):
        own = [pairs[key] for attention in ATTENTIONS if (key := f"{attention.lower()}_{end}") in pairs]
        if len(own) == len(ATTENTIONS):
            pairs[f"all_{end}"] = all_of = _for_all(own[0][0]), _for_all(own[0][1])
            jobs[all_of] = partial(
                statistics.mean_auc_difference,
                label, [(done.tuned[a].test, done.tuned[b].test) for a, b in own], data.user[data.test],
                resamples=config.resamples,
            )  # fmt: skip
    differences = statistics.together(jobs)
    for found in of_models:
        rows += found
    for key, (a, b) in pairs.items():
        row: Row = {"data": data.name, "comparison": key, "model": b, "base": a, "samples": len(label)}
        rows.append(row | _gained(differences[a, b], auc.get(a, 0)))
    return [*rows, *over_seeds(rows)]


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Of one data set: each model over its attention alone, all else over DNN, by seed: the difference of AUC, and Imp,
    which is relative to the base's mean."""
    auc: dict[str, list[float]] = {}
    for row in rows:
        if "seed" in row:
            auc.setdefault(str(row["model"]), []).append(float(row["test_auc"] or 0))
    found: list[Row] = []
    for name, own in auc.items():
        base = name.split(" + ")[0] if " + " in name else "DNN"
        if base == name or base not in auc or len(own) < 2:
            continue
        difference = statistics.across_seeds(np.subtract(own, auc[base]))
        row = {"data": rows[0]["data"], "model": name, "base": base, "interval": difference.method}
        found.append(row | _gained(difference, float(np.mean(auc[base]))))
    return found


def _gained(difference: Interval, base: float) -> Row:
    """Columns of a difference of AUC over a base, and of Imp, which is not defined over an AUC of .5 or less."""
    values = {"auc_difference": difference} | ({"imp": imp_of(difference, base)} if base > 0.5 else {})
    return {
        f"{name}{end}": number
        for name, value in values.items()
        for end, number in (("", value.mean), ("_low", value.low), ("_high", value.high))
    }


def _for_all(name: str) -> str:
    """The name of a model for all attentions: "mean of all + ADS" for "DIN + ADS"."""
    return "mean of all" + name.removeprefix(next(iter(ATTENTIONS)))


def _model_rows(done: Outcome, name: str) -> list[Row]:
    data, tuned = done.data, done.tuned[name]
    shared: Row = {"data": data.name, "model": name, **tuned.best, "parameters": done.parameters[name]}
    shared |= {"valid_auc": done.valid_auc[name], "device": done.trained_on[name]}
    auc = [metrics.auc(data.label[data.test], logits) for logits in tuned.test]
    tried: list[Row] = [
        {"data": data.name, "model": name, "trial": i, "learning_rate": net, "table_rate": tables, "valid_auc": value}
        for i, ((net, tables), value) in enumerate(zip(tuned.rates.tolist(), tuned.trials.tolist(), strict=True))
    ]
    tried += [
        {"data": data.name, "model": name, "epochs": number, "valid_auc": value}
        for number, value in zip(tuned.epochs.tolist(), tuned.lengths.tolist(), strict=True)
    ]
    seeds: list[Row] = [shared | {"seed": i, "test_auc": value} for i, value in enumerate(auc)]
    return tried + seeds + domain_rows(done, name)


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


def dial_of(data: str) -> float | None:
    """The setting of a world's dial, by its name; None for real data."""
    return float(name[1]) if (name := re.fullmatch(r"world.*, domain ([\d.]+)", data)) else None


def compared_in(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """The comparisons, by data and key."""
    return {(str(row["data"]), str(row["comparison"])): row for row in rows if "comparison" in row}


def summarize(rows: Sequence[Row], config: AdsMultidomain) -> dict[str, float]:
    """The figures: comparisons of the first world at the main setting; and where domains do not differ, ADS over the
    attention alone, and over its own control, which has its capacity: the mean over all attentions, on the data with
    most samples."""
    compared = compared_in(rows)
    found: dict[str, Any] = {}
    main = next((data for data, _ in compared if dial_of(data) == config.main), None)
    for (data, key), row in compared.items():
        if data == main and not key.startswith("all_"):
            found |= {f"{key}_{name}": value for name, value in row.items() if name.startswith(("auc_", "imp"))}
    for row in rows:
        if row["data"] == main and "oracle_auc" in row:
            found["oracle_auc"] = row["oracle_auc"]
    for name, end in (("domain_dial", "over_alone"), ("over_constant_domain", "over_constant_domain")):
        there = [row for (data, key), row in compared.items() if key == f"all_{end}" and dial_of(data) == 0]
        if there:
            most = max(there, key=lambda row: int(row["samples"] or 0))
            for part in ("", "_low", "_high"):
                found[f"gain_at_zero_{name}{part}"] = most[f"auc_difference{part}"]
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}

"""What README says of the measurements in one table; `RESULTS.md` has all of them with their commands."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from experiments import results
from experiments.readme_sections import (
    AT_ZERO,
    CHUNK10_PCT,
    TWO_GPUS,
    UNCHUNKED_PCT,
    Values,
    gain,
    machine,
    seeds,
    table,
    verdict,
)
from experiments.results import Result


@dataclass(frozen=True)
class Claim:
    """A line of the table.

    Attributes:
      system: as README names it. file: the result's, without its ending.
      what: is measured.
      value: the figure's name; or the data and the name of a difference among the rows.
      digits: behind the point.
      at_least, at_most, within: the goal, where there is one; of the whole interval, how far from 0 it may reach.
      published: what the authors report, of their data.
      part: of the rows, that another machine measured.
      data: whose runs say device and seeds; without it, those of the whole result.
    """

    system: str
    file: str
    what: str
    value: str | tuple[str, str]
    digits: int = 4
    at_least: float | None = None
    at_most: float | None = None
    within: float | None = None
    published: str = ""
    part: str = ""
    data: str = ""

    def line(self, result: Result) -> list[str] | None:
        """Its cells; None where the result does not have it."""
        f, name, goal = result.figures, self.value, f"published {self.published}" * bool(self.published)
        if isinstance(name, tuple):
            pairs: list[Values] = [row for row in result.rows if (row.get("data"), row.get("difference")) == name]
            if not pairs:
                return None
            said = gain(pairs[0]["mean"], pairs[0]["low"], pairs[0]["high"], self.digits)
        elif name not in f:
            return None
        else:
            said = f"{f[name]:.{self.digits}f}"
            if f"{name}_low" in f:
                said = gain(f[name], f[f"{name}_low"], f[f"{name}_high"], self.digits)
            if self.at_least is not None:
                goal = f"{self.at_least:g}: {verdict(f[name] >= self.at_least)}"
            if self.at_most is not None:
                goal = f"{self.at_most:g}: {verdict(f[name] <= self.at_most)}"
            if self.within is not None:
                reach = max(abs(f[f"{name}_low"]), abs(f[f"{name}_high"]))
                goal = f"within {self.within:g} of 0: {verdict(reach <= self.within)}"
        runs = f", {number} seeds" if (number := seeds(result, self.data)) > 1 else ""
        part = next((row for row in result.rows if self.part and row.get("what") == self.part), {})
        where = str(part.get("measured_on") or machine(result, self.data)) + runs
        return [self.system, self.what, said, goal, where, f"`{self.file}.json`"]


_LUM = "AUC that LUM's answers add to DIN, "
_ADS = "AUC of ADS on {0} less the best rival's on {0}, world with domain dial .4"
_DIAL, _ZERO = "world, domain 0.4", "world of 16,000 users, domain 0"
_MORE = "a training step with ADS on multi-head attention, % more, "
_ANSWERS = ("ml1m", "AUC_d: DNN with answers of bahe_1024 - DNN")
CLAIMS = (
    Claim("LUM", "quickstart_ml1m", _LUM + "MovieLens-1M", "gain_auc"),
    Claim("LUM", "quickstart_ml1m_h200", _LUM + "MovieLens-1M, all samples", "gain_auc"),
    Claim("LUM", "quickstart_world", _LUM + "synthetic world", "gain_auc"),
    Claim("LUM", "quickstart_food", _LUM + "Food.com", "gain_auc"),
    Claim("SIM", "sim_lifelong", "AUC, SIM hard - MIMN, synthetic world", ("world", "SIM hard - MIMN")),
    Claim("SIM", "sim_lifelong", "AUC, SIM hard - MIMN, MovieLens-1M", ("ml-1m", "SIM hard - MIMN")),
    Claim("SIM", "sim_serving", "ranking 100 candidates over 10,000 behaviours, p99, ms", "rank_p99_ms_10k", 1,
          at_most=5),
    Claim("SIM", "sim_serving", "training at 10,000 by search, times faster than in full", "train_speedup_10k", 1,
          at_least=20),
    Claim("DCAF", "dcaf", "clicks gained at equal compute, true gains known, %", "gain_equal_compute_pct", 1,
          published="3.7"),
    Claim("DCAF", "dcaf", "the same, gains estimated", "gain_equal_compute_estimated_pct", 1),
    Claim("DCAF", "dcaf", "requests that fail through 3 times the traffic on half the servers, %", "surge_failure_pct",
          1),
    Claim("ADS", "ads_multidomain", _ADS.format("CAN"), "can_auc_difference", data=_DIAL),
    Claim("ADS", "ads_multidomain", _ADS.format("multi-head"), "mha_auc_difference", data=_DIAL),
    Claim("ADS", "ads_multidomain", _ADS.format("DIN"), "din_auc_difference", data=_DIAL),
    Claim("ADS", "ads_multidomain", "AUC of ADS less the attention alone's where domains do not differ, mean of "
          "three", "gain_at_zero_domain_dial", within=AT_ZERO, data=_ZERO),
    Claim("ADS", "ads_multidomain", "the same less that of ADS without the domain", "gain_at_zero_over_constant_domain",
          within=AT_ZERO, data=_ZERO),
    Claim("ADS", "ads_cost", "a training step with ADS on multi-head attention, chunks of 10, ms (4,096 x 200)",
          "step_ms_chunk10", 2),
    Claim("ADS", "ads_cost", _MORE + "chunks of 10", "overhead_chunk10_pct", 1, at_most=CHUNK10_PCT),
    Claim("ADS", "ads_cost", _MORE + "unchunked", "overhead_full_pct", 1, at_most=UNCHUNKED_PCT),
    Claim("ADS", "ads_cost", "the same on DIN, chunks of 10", "din_overhead_chunk10_pct", 1, at_most=CHUNK10_PCT),
    Claim("ADS", "ads_cost", "the same on DIN, unchunked", "din_overhead_full_pct", 1, at_most=UNCHUNKED_PCT),
    Claim("ADS", "ads_cost", "the same on CAN, chunks of 10", "can_overhead_chunk10_pct", 1, at_most=CHUNK10_PCT),
    Claim("ADS", "ads_cost", "the same on CAN, unchunked", "can_overhead_full_pct", 1, at_most=UNCHUNKED_PCT),
    Claim("ADS", "ads_cost", "two GPUs over one, a batch each", "two_gpu_speedup", 2, at_least=TWO_GPUS,
          part="devices"),
    Claim("BAHE", "bahe_cost", "training step, times faster than LLM-CTR, 1,024 tokens", "speedup_1024", 1,
          at_least=3.9),
    Claim("BAHE", "bahe_cost", "the same, 2,048 tokens", "speedup_2048", 1, at_least=5.7),
    Claim("BAHE", "bahe_cost", "memory, times smaller, 1,024 tokens", "memory_ratio_1024", 1, at_least=4.5),
    Claim("BAHE", "bahe_cost", "the same, 2,048 tokens", "memory_ratio_2048", 1, at_least=6),
    Claim("BAHE", "bahe_cost", "times faster, lower layers trained too, 2,048 tokens", "speedup_2048_through", 1),
    Claim("BAHE", "bahe_text", "AUC, + BA - LLM-CTR, MovieLens-1M, 1,024 tokens", ("ml1m", "bahe_1024 - llm_ctr_1024"),
          published="-.0029"),
    Claim("BAHE", "bahe_text", "the same, 2,048 tokens", ("ml1m", "bahe_2048 - llm_ctr_2048"), published="+.0033"),
    Claim("BAHE", "bahe_text", "AUC of + BA, 1,024 tokens, 9,600 training samples", "bahe_auc_1024"),
    Claim("BAHE", "bahe_text_76800", "the same, 76,800 training samples", "bahe_auc_1024"),
    Claim("BAHE", "bahe_text", "AUC of a ranker with + BA's answers, less without", _ANSWERS, published="+.0133"),
    Claim("BAHE", "bahe_text_76800", "the same, 76,800 training samples", _ANSWERS, published="+.0133"),
)  # fmt: skip


def summary(folder: Path) -> str:
    """The table, of the result files in `folder`."""
    names = dict.fromkeys(claim.file for claim in CLAIMS)
    there = {name: results.read(path) for name in names if (path := folder / f"{name}.json").exists()}
    lines = [line for claim in CLAIMS if claim.file in there and (line := claim.line(there[claim.file]))]
    return table(["system", "what", "measured [95 %]", "goal", "device", "file"], lines + _attention(folder))


def _attention(folder: Path) -> list[list[str]]:
    path = folder / "attention_h100.json"
    if not path.exists():
        return []
    result = results.read(path)
    f = result.figures
    ratios = sorted(
        f[f"{name}_rival"] / f[name] if name.endswith("_ms") else f[name] / f[f"{name}_rival"]
        for name in f
        if f"{name}_rival" in f
    )
    if not ratios:
        return []
    what = f"range attention, times the fastest rival's speed, {len(ratios)} cases, least / median / most"
    said = f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}"
    return [["attention", what, said, "1", machine(result), f"`{path.name}`"]]

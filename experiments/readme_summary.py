"""What README says of the measurements in one table; `RESULTS.md` has all of them with their commands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments import results
from experiments.readme_sections import Values, gain, machine, table, verdict
from experiments.results import Result


@dataclass(frozen=True)
class Claim:
    """A line of the table.

    Attributes:
      system: as README names it. file: the result's, without its ending.
      what: is measured.
      value: the figure's name; or the data and the name of a difference among the rows.
      form: of the number.
      goal: what it is held against. reached: whether a number reaches it; None for a figure that is merely published.
      part: of the rows, that another machine measured.
    """

    system: str
    file: str
    what: str
    value: str | tuple[str, str]
    form: str = "+.4f"
    goal: str = ""
    reached: Callable[[float], bool] | None = None
    part: str = ""

    def line(self, result: Result) -> list[str] | None:
        """Its cells; None where the result does not have it."""
        f, goal = result.figures, self.goal
        if isinstance(self.value, tuple):
            data, name = self.value
            pairs: list[Values] = [row for row in result.rows if row.get("difference") == name]
            row = next((row for row in pairs if row["data"] == data), None)
            said = "" if row is None else gain(row["mean"], row["low"], row["high"])
        elif self.value not in f:
            said = ""
        elif f"{self.value}_low" in f and self.form.startswith("+"):
            digits = int(self.form[2:-1])
            said = gain(f[self.value], f[f"{self.value}_low"], f[f"{self.value}_high"], digits)
        else:
            said = f"{f[self.value]:{self.form}}"
        if not said:
            return None
        if self.reached is not None and isinstance(self.value, str):
            goal = f"{goal}: {verdict(self.reached(f[self.value]))}"
        seeds = f", {len(result.seeds)} seeds" if len(result.seeds) > 1 else ""
        other = next((row["measured_on"] for row in result.rows if self.part and row.get("what") == self.part), "")
        return [self.system, self.what, said, goal, str(other or machine(result)) + seeds, f"`{self.file}.json`"]


def _least(goal: float) -> Callable[[float], bool]:
    return lambda value: value >= goal


def _most(goal: float) -> Callable[[float], bool]:
    return lambda value: value <= goal


_LUM = "AUC that LUM's answers add to DIN, "
_ADS = "AUC of ADS on {} less the best rival's, world with domain dial .4"
_MORE = "a training step with ADS on multi-head attention, % more, "
CLAIMS = (
    Claim("LUM", "quickstart_ml1m", _LUM + "MovieLens-1M", "gain_auc"),
    Claim("LUM", "quickstart_ml1m_h200", _LUM + "MovieLens-1M, all samples", "gain_auc"),
    Claim("LUM", "quickstart_world", _LUM + "synthetic world", "gain_auc"),
    Claim("LUM", "quickstart_food", _LUM + "Food.com", "gain_auc"),
    Claim("SIM", "sim_lifelong", "AUC, SIM hard - MIMN, synthetic world", ("world", "SIM hard - MIMN")),
    Claim("SIM", "sim_lifelong", "AUC, SIM hard - MIMN, MovieLens-1M", ("ml-1m", "SIM hard - MIMN")),
    Claim("SIM", "sim_serving", "ranking 100 candidates over 10,000 behaviours, p99, ms", "rank_p99_ms_10k", ".1f", "5",
          _most(5)),
    Claim("SIM", "sim_serving", "training at 10,000 by search, times faster than in full", "train_speedup_10k", ".1f",
          "20", _least(20)),
    Claim("DCAF", "dcaf", "clicks gained at equal compute, true gains known, %", "gain_equal_compute_pct", "+.1f",
          "published 3.7"),
    Claim("DCAF", "dcaf", "the same, gains estimated", "gain_equal_compute_estimated_pct", "+.1f"),
    Claim("DCAF", "dcaf", "requests that fail through 3 times the traffic on half the servers, %", "surge_failure_pct",
          ".2g"),
    Claim("ADS", "ads_multidomain", _ADS.format("CAN"), "can_auc_difference"),
    Claim("ADS", "ads_multidomain", _ADS.format("multi-head"), "mha_auc_difference"),
    Claim("ADS", "ads_multidomain", _ADS.format("DIN"), "din_auc_difference"),
    Claim("ADS", "ads_cost", _MORE + "chunks of 10", "overhead_chunk10_pct", ".1f", "3.6", _most(3.6)),
    Claim("ADS", "ads_cost", _MORE + "unchunked", "overhead_full_pct", ".1f", "15", _most(15)),
    Claim("ADS", "ads_cost", "two GPUs over one, a batch each", "two_gpu_speedup", ".2f", "1.9", _least(1.9),
          "devices"),
    Claim("BAHE", "bahe_cost", "training step, times faster than LLM-CTR, 1,024 tokens", "speedup_1024", ".1f", "3.9",
          _least(3.9)),
    Claim("BAHE", "bahe_cost", "the same, 2,048 tokens", "speedup_2048", ".1f", "5.7", _least(5.7)),
    Claim("BAHE", "bahe_cost", "memory, times smaller, 1,024 tokens", "memory_ratio_1024", ".1f", "4.5", _least(4.5)),
    Claim("BAHE", "bahe_cost", "the same, 2,048 tokens", "memory_ratio_2048", ".1f", "6.0", _least(6.0)),
    Claim("BAHE", "bahe_cost", "times faster, lower layers trained too, 2,048 tokens", "speedup_2048_through", ".1f"),
    Claim("BAHE", "bahe_text", "AUC, + BA - LLM-CTR, MovieLens-1M, 1,024 tokens", ("ml1m", "bahe_1024 - llm_ctr_1024"),
          goal="published -.0029"),
    Claim("BAHE", "bahe_text", "the same, 2,048 tokens", ("ml1m", "bahe_2048 - llm_ctr_2048"), goal="published +.0033"),
    Claim("BAHE", "bahe_text", "AUC of + BA, 1,024 tokens, 9,600 training samples", "bahe_auc_1024", ".4f"),
    Claim("BAHE", "bahe_text_76800", "the same, 76,800 training samples", "bahe_auc_1024", ".4f"),
    Claim("BAHE", "bahe_text", "AUC of a ranker with + BA's answers, less without",
          ("ml1m", "AUC_d: DNN with answers of bahe_1024 - DNN"), goal="published +.0133"),
    Claim("BAHE", "bahe_text_76800", "the same, 76,800 training samples",
          ("ml1m", "AUC_d: DNN with answers of bahe_1024 - DNN"), goal="published +.0133"),
)  # fmt: skip


def summary(folder: Path) -> str:
    """The table, of the result files in `folder`."""
    lines = []
    for claim in CLAIMS:
        path = folder / f"{claim.file}.json"
        line = claim.line(results.read(path)) if path.exists() else None
        lines += [] if line is None else [line]
    lines += _attention(folder / "attention_h100.json")
    return table(["system", "what", "measured [95 %]", "goal", "device", "file"], lines)


def _attention(path: Path) -> list[list[str]]:
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
    said = f"{ratios[0]:.2f} / {ratios[len(ratios) // 2]:.2f} / {ratios[-1]:.2f}"
    return [["attention", what, said, "1", machine(result), f"`{path.name}`"]]

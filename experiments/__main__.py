"""`python -m experiments COMMAND`: every experiment, the preparation of data, and the comparison of results."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments import (
    ads_multidomain,
    ads_multidomain_models,
    attention_bench,
    attention_tune,
    bahe_cost,
    bahe_encode,
    data_bench,
    dcaf_replay,
    progress,
    quickstart,
    readme,
    results,
    sim_lifelong,
    sim_lifelong_models,
    sim_serving,
)
from experiments.datasets import Data, load


@dataclass(frozen=True)
class Prepare:
    """Prepare a dataset: counts, lengths, what was left out; training reads only what this writes."""

    data: Data


@dataclass(frozen=True)
class Compare:
    """The figures of two results side by side, with their ratios."""

    a: tyro.conf.Positional[Path]
    b: tyro.conf.Positional[Path]


@dataclass(frozen=True)
class Readme:
    """Rewrite the measured part of README.md from experiments/results."""


COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "quickstart": (quickstart.Quickstart, quickstart.run),
    "sim-lifelong": (sim_lifelong_models.SimLifelong, sim_lifelong.run),
    "sim-serving": (sim_serving.SimServing, sim_serving.run),
    "dcaf-replay": (dcaf_replay.DcafReplay, dcaf_replay.run),
    "ads-multidomain": (ads_multidomain_models.AdsMultidomain, ads_multidomain.run),
    "bahe-encode": (bahe_encode.BaheEncode, bahe_encode.run),
    "bahe-cost": (bahe_cost.BaheCost, bahe_cost.run),
    "attention-bench": (attention_bench.AttentionBench, attention_bench.run),
    "attention-tune": (attention_tune.AttentionTune, attention_tune.run),
    "data-bench": (data_bench.DataBench, data_bench.run),
    "prepare": (Prepare, lambda config: load(config.data)),
    "readme": (Readme, lambda config: readme.update()),
    "compare": (Compare, lambda config: print(progress.table(results.compare(config.a, config.b)))),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. What is wrong with the input is said in one line, and the exit status is 1."""
    try:
        config: Any = tyro.extras.subcommand_cli_from_dict(
            {name: settings for name, (settings, _) in COMMANDS.items()},
            prog="python -m experiments",
            description="userscale's experiments.",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes,),
        )
        next(run for settings, run in COMMANDS.values() if isinstance(config, settings))(config)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m experiments COMMAND`: every experiment, the preparation of data, and the comparison of results."""

import importlib
import sys
from typing import Any

import tyro

# Command -> its settings and its function. Imported when it is called: all of them together take seconds.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart.Quickstart", "quickstart.run"),
    "sim-lifelong": ("sim_lifelong_models.SimLifelong", "sim_lifelong.run"),
    "sim-serving": ("sim_serving.SimServing", "sim_serving.run"),
    "dcaf-replay": ("dcaf_replay.DcafReplay", "dcaf_replay.run"),
    "ads-multidomain": ("ads_multidomain_models.AdsMultidomain", "ads_multidomain.run"),
    "ads-chunks": ("ads_chunks.AdsChunks", "ads_chunks.run"),
    "ads-cost": ("ads_cost.AdsCost", "ads_cost.run"),
    "bahe-text": ("bahe_text_models.BaheText", "bahe_text.run"),
    "bahe-encode": ("bahe_encode.BaheEncode", "bahe_encode.run"),
    "bahe-cost": ("bahe_cost.BaheCost", "bahe_cost.run"),
    "attention-bench": ("attention_bench.AttentionBench", "attention_bench.run"),
    "attention-tune": ("attention_tune.AttentionTune", "attention_tune.run"),
    "interest-bench": ("interest_bench.InterestBench", "interest_bench.run"),
    "data-bench": ("data_bench.DataBench", "data_bench.run"),
    "prepare": ("tools.Prepare", "tools.prepare"),
    "readme": ("tools.Readme", "tools.write_readme"),
    "compare": ("tools.Compare", "tools.compare"),
}
PROGRAM = "python -m experiments"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. What is wrong with the input is said in one line, and the exit status is 1."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and given[0] in COMMANDS:
            settings, run = (_found(name) for name in COMMANDS[given[0]])
            config: Any = tyro.cli(
                settings, prog=f"{PROGRAM} {given[0]}", args=given[1:], config=(tyro.conf.OmitArgPrefixes,)
            )
            run(config)
        else:  # help, or what is no command: tyro says so
            everything = {name: _found(settings) for name, (settings, _) in COMMANDS.items()}
            tyro.extras.subcommand_cli_from_dict(
                everything, prog=PROGRAM, description="userscale's experiments.", args=given
            )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        return 1
    return 0


def _found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"experiments.{module}"), attribute)


if __name__ == "__main__":
    sys.exit(main())

"""The small commands: data prepared, two results compared, README's figures written."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import progress, readme, results
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


def prepare(config: Prepare) -> None:
    load(config.data)


def compare(config: Compare) -> None:
    print(progress.table(results.compare(config.a, config.b)))


def write_readme(config: Readme) -> None:
    readme.update()

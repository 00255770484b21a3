"""One seed's log for DCAF: a world, rankers trained on its first half, gains replayed on the two quarters after it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.datasets import make_world
from experiments.results import Row
from experiments.steps import dcaf_rankers, dcaf_requests
from experiments.steps.dcaf_requests import SHOWN, Requests
from experiments.steps.problem import Problem, make_problem
from rec_core import metrics
from rec_core.data.world import World

PERIODS = (0.5, 0.75)  # of the samples, by time: rankers learn before the first, the estimator before the second
_TEST = 20_000  # impressions of the last period that a ranker's AUC is taken on


@dataclass(frozen=True, eq=False)
class Log:
    """What is replayed, of the earlier and of the later period.

    Attributes:
      trained: rankers by name. requests, known: of each period; `known` from `dcaf_requests.features`.
      gains: `[N, J]` of each period, rankers first, then numbers of candidates.
      rows: what was measured of the world and the rankers.
    """

    seed: int
    problem: Problem
    trained: dict[str, dcaf_rankers.Trained]
    requests: tuple[Requests, Requests]
    known: tuple[Any, Any]
    gains: tuple[np.ndarray, np.ndarray]
    rows: list[Row]

    @property
    def first_stage(self) -> float:
        """Expected clicks of the first stage's page in the later period."""
        return float(self.requests[1].probability[:, :SHOWN].sum(axis=1).mean())


def make_log(
    world: World,
    folder: Path,
    *,
    rankers: Sequence[str],
    counts: Sequence[int],
    samples: int,
    batch_size: int,
    requests: tuple[int, int],
    seed: int,
) -> Log:
    """Generates the world in `folder`, trains the rankers on the newest `samples` of the first half in steps of
    `batch_size`, and replays `requests` of the two quarters after it."""
    problem = make_problem(make_world(world, folder, log=_silent), log=_silent)
    time = problem.samples.time
    cuts = [int(np.quantile(time, share)) for share in PERIODS]
    periods = list(zip(cuts, [cuts[1], int(time.max()) + 1], strict=True))
    chosen = [
        dcaf_requests.draw_samples(problem, count, *period, seed)
        for count, period in zip(requests, periods, strict=True)
    ]
    made = [
        dcaf_requests.make_requests(problem, world, sample, count=max(counts), known_before=cuts[0])
        for sample in chosen
    ]
    early = np.flatnonzero(time < cuts[0])
    early = np.sort(early[np.argsort(time[early], kind="stable")[-samples:]])
    later = np.flatnonzero(time >= cuts[1])
    asked = np.sort(np.random.default_rng(seed).choice(later, min(_TEST, len(later)), replace=False))
    label, shown = problem.samples.label[asked], problem.samples.item[asked][:, None]
    assert problem.samples.probability is not None  # a world's are known
    best = [float(np.sort(each.probability, axis=1)[:, -SHOWN:].sum(axis=1).mean()) for each in made]
    rows: list[Row] = [
        {
            "kind": "ranker",
            "seed": seed,
            "ranker": "oracle",
            "test_auc": metrics.auc(label, problem.samples.probability[asked]),
            "clicks_gained": best[1] - float(made[1].probability[:, :SHOWN].sum(axis=1).mean()),
        }
    ]
    tree = dcaf_rankers.make_tree(problem)
    trained: dict[str, dcaf_rankers.Trained] = {}
    gains: list[list[np.ndarray]] = [[], []]
    for name in rankers:
        trained[name] = dcaf_rankers.train(problem, name, early, tree, seed=seed, batch_size=batch_size)
        found = dcaf_rankers.score(problem, trained[name], asked, shown, rows=1024)[:, 0]
        for period, each in zip(gains, made, strict=True):
            logits = dcaf_rankers.score(problem, trained[name], each.sample, each.candidates)
            period.append(dcaf_requests.gains(each, logits, tuple(counts)))
        gained = float(gains[1][-1].mean(axis=0).max())
        rows.append(
            {
                "kind": "ranker",
                "seed": seed,
                "ranker": name,
                "test_auc": metrics.auc(label, found),
                "clicks_gained": gained,
            }
        )
        print(f"seed {seed}: {name} AUC {rows[-1]['test_auc']:.4f}, {gained:+.3f} clicks a page", flush=True)
    return Log(
        seed=seed,
        problem=problem,
        trained=trained,
        requests=(made[0], made[1]),
        known=(
            dcaf_requests.features(problem, made[0], known_before=cuts[0]),
            dcaf_requests.features(problem, made[1], known_before=cuts[0]),
        ),
        gains=(np.concatenate(gains[0], axis=1), np.concatenate(gains[1], axis=1)),
        rows=rows,
    )


def _silent(line: str) -> None:
    """Of several worlds' sizes nothing is said."""

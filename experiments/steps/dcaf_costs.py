"""What an action costs: seconds of the compiled model, measured here and now on requests of the log.

A call takes host arrays of a request and waits for the logits. What the host does before (reading behaviours, asking
the tree) is not in it. The rounds go over all actions in turn, so that what else the machine does falls on all alike.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from experiments.steps.dcaf_rankers import Trained, distinct_keys, jitted_score, request
from experiments.steps.dcaf_requests import Requests
from experiments.steps.problem import Problem

_SETS = 8  # different requests that the calls go through
_SECONDS = 0.01  # that the calls of an action take in a round, at the least


@dataclass(frozen=True, eq=False)
class Costs:
    """Seconds a request of J actions: the median over rounds, and the quartiles."""

    seconds: Float[np.ndarray, " J"]
    low: Float[np.ndarray, " J"]
    high: Float[np.ndarray, " J"]


def measure(
    problem: Problem,
    trained: Mapping[str, Trained],
    requests: Requests,
    counts: Sequence[int],
    *,
    batch: int,
    rounds: int,
) -> Costs:
    """Costs of every ranker at each number of candidates, rankers first, in calls of `batch` requests."""
    jobs = [(ranker, n) for ranker in trained.values() for n in counts]
    with ThreadPoolExecutor(2) as pool:
        ready = list(pool.map(lambda job: _compile(problem, job[0], job[1], requests, batch), jobs))
    calls = [max(1, round(_SECONDS / time_calls(*each, 1))) for each in ready]
    found = (
        np.array([[time_calls(*each, n) for each, n in zip(ready, calls, strict=True)] for _ in range(rounds)]) / batch
    )
    low, middle, high = np.quantile(found, [0.25, 0.5, 0.75], axis=0)
    return Costs(middle, low, high)


def _compile(problem: Problem, trained: Trained, n: int, requests: Requests, batch: int) -> tuple[Any, list[Any]]:
    """The compiled score at n candidates, and what it is called with."""
    keys = distinct_keys(problem, requests.candidates[:, :n])
    places = np.random.default_rng(0).integers(0, len(requests), (_SETS, batch))
    asked = [
        request(problem, trained, requests.sample[rows], requests.candidates[rows, :n], keys=keys) for rows in places
    ]
    compiled = jitted_score(trained.ranker.model).lower(trained.params, asked[0], trained.config).compile()
    jax.block_until_ready(compiled(trained.params, asked[0]))
    return compiled, [(trained.params, each) for each in asked]


def time_calls(compiled: Any, sets: Sequence[Any], calls: int) -> float:
    """Seconds a call, over `calls` calls one after another."""
    began = time.perf_counter()
    for i in range(calls):
        jax.block_until_ready(compiled(*sets[i % len(sets)]))
    return (time.perf_counter() - began) / calls

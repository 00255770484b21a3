"""A request's candidates scored: latency from ids on the host to scores on the host, and the compiler's memory."""

import itertools
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.results import Row
from experiments.steps import ads_scale, timing
from experiments.steps.ads_scale import Sizes
from experiments.steps.ads_step import Variant
from experiments.steps.timing import GIB, Program
from rec_core import embedding
from rec_core.sharding import make_mesh

_DIFFERENT = 16  # requests that are asked in turn
_WARM = 20


def lower_score(sizes: Sizes, variant: Variant, candidates: int, chunk: int) -> Any:
    """`score` of one user's candidates, `chunk` at a time, lowered."""
    module, config = ads_scale.model(sizes, variant.attention, variant.length, variant.items)
    request = ads_scale.make_batch(sizes, variant.length, batch=1, candidates=candidates)
    params = ads_scale.abstract_state(module, config).params
    return jax.jit(partial(module.score, config=config, chunk=chunk)).lower(params, request)


def measure_requests(
    sizes: Sizes, programs: Mapping[Variant, Program], *, candidates: int, requests: int
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Rows of the latency of one user's request for variants of one attention and length; and milliseconds.

    Each request is asked of every variant before the next one is made; tables are shared.
    """
    first, mesh = next(iter(programs)), make_mesh()
    asked = [
        ads_scale.make_batch(sizes, first.length, batch=1, candidates=candidates, seed=i) for i in range(_DIFFERENT)
    ]
    tables: Any = None
    params: dict[str, Any] = {}
    for variant in programs:
        module, config = ads_scale.model(sizes, variant.attention, variant.length, variant.items)
        state = ads_scale.make_state(module, config, mesh, tables)
        own, tables = ads_scale.split_state(state)
        params[variant.name] = {**own.params, "tables": tables[0]}
    jax.block_until_ready(params)
    queues = {variant: itertools.cycle(asked) for variant in programs}

    def run(variant: Variant) -> float:
        request = next(queues[variant])
        began = time.perf_counter()
        scores = np.asarray(programs[variant].call(params[variant.name], request))
        ms = 1000 * (time.perf_counter() - began)
        if not np.isfinite(scores).all():
            raise RuntimeError("a timed request gave a score that is not finite")
        return ms

    there = {variant.name: partial(run, variant) for variant, program in programs.items() if program.call is not None}
    ms, failed = timing.in_turn(there, requests + _WARM)
    ms = {name: found[_WARM:] for name, found in ms.items()}
    query = embedding.width(config.query_features or config.item_features)
    literal = candidates * first.length * query * np.dtype(jax.numpy.dtype(sizes.dtype)).itemsize / GIB
    rows = []
    for variant, program in programs.items():
        row = variant.row("request") | {"candidates": candidates}
        if variant.name not in ms:
            rows.append(row | {"reason": program.reason or failed[variant.name]})
            continue
        row |= {f"p{q}_ms": float(np.percentile(ms[variant.name], q)) for q in (50, 99)} | program.counts()
        if "temporaries_gib" in row:
            row["temporaries_over_all_queries"] = float(row["temporaries_gib"] or 0) / literal
        rows.append(row)
    return rows, ms

"""Step 2: what LUM knows of every user at many moments, by group query, kept in the knowledge store."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import lum_jax
from experiments.progress import Progress
from experiments.steps.pretrain import columns, lum_batch
from experiments.steps.problem import ANY, Problem
from lum_jax.knowledge import KnowledgeStore, KnowledgeTable
from rec_core.checkpoint import fingerprint
from rec_core.data import packing
from rec_core.data.samples import LIKED, Behaviors
from rec_core.store import open_store

EARLY = (1, 2, 4)  # behaviours after which a new user's first answers are made
_TIME_BITS = 33


@dataclass(frozen=True, eq=False)
class Knowledge:
    """Step 2's result: the users' answers o_q and the items' embeddings e_i of the same model."""

    answers: KnowledgeTable
    items: np.ndarray  # [items, width]


@dataclass(frozen=True, eq=False)
class Moments:
    """As-of moments, sorted by (user, as_of): what is known rests on the behaviours before `end`, all older."""

    user: np.ndarray
    as_of: np.ndarray
    end: np.ndarray

    def newest(self, user: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Index of the newest moment of `user` at or before `time`, -1 for none."""
        key = (self.user << _TIME_BITS) | self.as_of
        place = np.searchsorted(key, (user.astype(np.int64) << _TIME_BITS) | time, side="right") - 1
        return np.where((place >= 0) & (self.user[place] == user), place, -1)


def moments(sequences: Behaviors, every: int) -> Moments:
    """A moment one second after a user's behaviours number 1, 2, 4 and each `every`-th: what is older is then fixed."""
    lengths = np.diff(sequences.offsets)
    number = np.arange(len(sequences)) - np.repeat(sequences.offsets[:-1], lengths) + 1
    chosen = np.flatnonzero((number % every == 0) | np.isin(number, EARLY))
    user = np.repeat(np.arange(sequences.users, dtype=np.int64), lengths)[chosen]
    as_of = sequences.columns["time"][chosen].astype(np.int64) + 1
    new = np.concatenate([[True], (user[1:] != user[:-1]) | (as_of[1:] != as_of[:-1])])[: len(user)]
    user, as_of = user[new], as_of[new]
    return Moments(user, as_of, sequences.before(user, as_of))


def looked_up(problem: Problem, known: Moments) -> tuple[np.ndarray, np.ndarray]:
    """(moment, category) pairs that the samples ask for at their newest moment: their own category, and ANY.

    A server would enumerate all categories; those that no sample asks for are left out here, which changes nothing.
    """
    newest = known.newest(problem.samples.user, problem.samples.time)
    has = newest >= 0
    size = int(problem.category.max()) + 1
    pairs = np.unique(np.concatenate([newest[has] * size + problem.samples.category[has], newest[has] * size + ANY]))
    return pairs // size, pairs % size


@dataclass(frozen=True, eq=False)
class Calls:
    """Questions laid out for jitted calls of one shape: task t reads packed row `row[t]` and holds up to Q questions.

    Attributes:
      row: packed row of each task.
      question: questions in the order in which they are asked.
      task, slot: where each of them stands.
    """

    row: np.ndarray
    question: np.ndarray
    task: np.ndarray
    slot: np.ndarray


def lay_out(row: np.ndarray, questions_a_task: int) -> Calls:
    """Tasks of at most `questions_a_task` questions of one packed row; `row` is each question's."""
    order = np.argsort(row, kind="stable")
    row = row[order]
    slot = (np.arange(len(row)) - np.searchsorted(row, row)) % questions_a_task
    return Calls(row[slot == 0], order, np.cumsum(slot == 0) - 1, slot)


def ask(
    problem: Problem,
    params: Any,
    config: lum_jax.Config,
    *,
    store: str,
    max_length: int,
    every: int = 8,
    rows_a_call: int = 32,
    questions_a_row: int = 128,
) -> Knowledge:
    """Answers for all moments that the samples look up, through the knowledge store.

    A user's history is cut in windows of `max_length` behaviours that overlap by half; a moment is asked in the first
    window that reaches it, so its answer rests on the newest `max_length / 2` to `max_length` behaviours before it (all
    of them, for a user with no more).

    Args:
      store: where the answers go, as `rec_core.store.open_store` takes it.
      max_length: behaviours of a prefix.
      every: behaviours from one moment of a user to the next.
      rows_a_call, questions_a_row: shape of one jitted call.
    """
    sequences = problem.behaviors
    known = moments(sequences, every)
    moment, category = looked_up(problem, known)
    half = max(1, max_length // 2)
    before = known.end - sequences.offsets[known.user]
    begin = np.maximum(0, -(-(before - max_length) // half)) * half
    start, window = np.unique(sequences.offsets[known.user] + begin, return_inverse=True)
    user = np.empty(len(start), np.int64)
    user[window] = known.user
    length = np.minimum(max_length, sequences.offsets[user + 1] - start).astype(np.int32)
    windows = packing.Windows(user, start, length)
    plan = packing.pack(length, max_length)
    segment = np.empty(len(windows), np.int32)
    segment[plan.order] = 1 + np.arange(len(windows)) - np.repeat(plan.starts[:-1], np.diff(plan.starts))

    calls = lay_out(plan.row[window[moment]], questions_a_row)
    moment, category = moment[calls.question], category[calls.question]
    given = columns(problem)
    answer = jax.jit(lum_jax.query, static_argnums=3)
    shape = (rows_a_call, questions_a_row)
    tasks = len(calls.row)
    with open_store(store) as opened, Progress(tasks, "LUM querying", unit="answers") as progress:
        kept = KnowledgeStore(opened, version=version(params), width=config.width)
        for first in range(0, tasks, rows_a_call):
            rows = np.resize(calls.row[first : first + rows_a_call], rows_a_call)  # the last call repeats rows
            part = slice(*np.searchsorted(calls.task, [first, first + rows_a_call]))
            at = calls.task[part] - first, calls.slot[part]
            queries = lum_jax.Queries(
                condition=asked_conditions(problem, shape, at, category[part]),
                segment_ids=_put(shape, at, segment[window[moment[part]]]),
                limit=_put(shape, at, (before - begin)[moment[part]]),
            )
            vectors = answer(params, lum_batch(packing.gather(plan, windows, given, rows)), queries, config)
            about = moment[part]
            kept.write(known.user[about], category[part], known.as_of[about], np.asarray(vectors, np.float32)[at])
            progress.update(min(first + rows_a_call, tasks), count=len(about))
        items = np.arange(sequences.sizes["item"])
        kept.write_items(items, np.asarray(item_embeddings(problem, params, config), np.float32))
        return Knowledge(kept.snapshot(), kept.read_items(items)[0])


def asked_conditions(problem: Problem, shape: tuple, at: Any, category: np.ndarray) -> dict[str, np.ndarray]:
    """What would this user *like* in this category? Other conditions are left open."""
    conditions = {name: np.full(shape, ANY, np.int32) for name in problem.conditions}
    conditions["category"] = _put(shape, at, category)
    if "feedback" in conditions:
        conditions["feedback"] = np.full(shape, LIKED, np.int32)
    return conditions


def item_embeddings(problem: Problem, params: Any, config: lum_jax.Config) -> jax.Array:
    """e_i of every item id, `[items, width]`."""
    ids = np.arange(problem.behaviors.sizes["item"], dtype=np.int32)
    return lum_jax.item_embeddings(params, {"item": ids, "category": problem.category}, config)


def version(params: Any) -> str:
    """Names a model by its parameters, so that two models' vectors are never taken for one's."""
    return hashlib.sha256(json.dumps(fingerprint(params), sort_keys=True).encode()).hexdigest()[:16]


def _put(shape: tuple, at: Any, values: np.ndarray) -> np.ndarray:
    array = np.zeros(shape, np.int32)
    array[at] = values
    return array

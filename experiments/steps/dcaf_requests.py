"""A log of requests on the synthetic world: what the first stage found for each, and what it is truly worth.

A request stands in the place of an impression: its user, second and domain, with the behaviours that are strictly
older. The first stage is what a system has at no cost: of the items that exist by then the `count` highest of

    (1 + the user's clicks in the item's category so far) * (1 + the item's clicks before the requests' periods)

The world knows the probability that each of them is clicked, if it is shown there: equation (3) of
`rec_core.data.world` at the state that the user's clicks have left. So what a page is worth is known without a click.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from experiments.steps.problem import Problem
from rec_core.data import world_process
from rec_core.data.schema import FIRST_ITEM
from rec_core.data.world import World, truth_of
from rec_core.data.world_catalogue import DAY, catalogue, keys

SHOWN = 10  # items of a page
_PART = 512  # requests whose items are ranked at a time


@dataclass(frozen=True, eq=False)
class Requests:
    """N requests with C candidates each, in the first stage's order.

    Attributes:
      sample: int64[N], the impressions in whose places they stand: indices of `Problem.samples`.
      candidates: int32[N, C], item ids. scores: float32[N, C], the first stage's, never rising.
      probability: float64[N, C], the world's true click probabilities.
    """

    sample: np.ndarray
    candidates: np.ndarray
    scores: np.ndarray
    probability: np.ndarray

    def __len__(self) -> int:
        return len(self.sample)


def draw_samples(problem: Problem, count: int, begin: int, end: int, seed: int) -> Int[np.ndarray, " N"]:
    """`count` impressions with a history, of seconds `begin` up to `end`, at random, in the log's order."""
    samples = problem.samples
    inside = (samples.time >= begin) & (samples.time < end) & (samples.end > samples.start)
    found = np.flatnonzero(inside)
    if len(found) < count:
        raise ValueError(
            f"{count} requests were asked for of a period with {len(found)} impressions; lower requests or raise users"
        )
    return np.sort(np.random.default_rng([seed, begin]).choice(found, count, replace=False))


def make_requests(
    problem: Problem, world: World, sample: Int[np.ndarray, " N"], *, count: int, known_before: int
) -> Requests:
    """The first stage's candidates for the requests at `sample`, with their true probabilities.

    Args:
      count: candidates of a request. known_before: the second before which items' clicks are counted.
    """
    candidates, scores = first_stage(problem, world, sample, count=count, known_before=known_before)
    return Requests(sample, candidates, scores, true_probability(problem, world, sample, candidates))


def first_stage(
    problem: Problem, world: World, sample: Int[np.ndarray, " N"], *, count: int, known_before: int
) -> tuple[Int[np.ndarray, "N C"], Float[np.ndarray, "N C"]]:
    """Item ids and scores of each request's candidates, best first, of equals the lower id; see the module's text."""
    clicks, _ = item_counts(problem, known_before)
    born = np.zeros(len(clicks), np.int64)
    items = FIRST_ITEM + np.arange(world.items)
    born[items] = truth_of(world).born
    fewest = int((born[items] <= problem.samples.time[sample].min()).sum())
    if fewest < count:
        raise ValueError(f"candidates is {count}, but only {fewest} items exist at the first request; raise items")
    mine = category_clicks(problem, sample)
    found, scores = [], []
    for first in range(0, len(sample), _PART):
        part = slice(first, first + _PART)
        score = (1.0 + mine[part][:, problem.category[items]]) * (1.0 + clicks[items])
        score[born[items] > problem.samples.time[sample[part], None]] = -1.0
        best = np.argsort(-score, axis=1, kind="stable")[:, :count]
        found.append(items[best].astype(np.int32))
        scores.append(np.take_along_axis(score, best, axis=1).astype(np.float32))
    return np.concatenate(found), np.concatenate(scores)


def item_counts(problem: Problem, until: int) -> tuple[np.ndarray, np.ndarray]:
    """Clicks and impressions of each item id before second `until`, int64[items] each."""
    samples, size = problem.samples, len(problem.category)
    early = samples.time < until
    shown = np.bincount(samples.item[early], minlength=size)
    return np.bincount(samples.item[early & (samples.label == 1)], minlength=size), shown


def category_clicks(problem: Problem, sample: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N categories"]:
    """The user's clicks in each category before each request."""
    start, end = problem.samples.start[sample], problem.samples.end[sample]
    length = end - start
    row = np.repeat(np.arange(len(sample)), length)
    place = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length) + np.repeat(start, length)
    size = int(problem.category.max()) + 1
    flat = row * size + problem.behaviors.columns["category"][place]
    return np.bincount(flat, minlength=len(sample) * size).reshape(-1, size).astype(np.float64)


def true_probability(
    problem: Problem, world: World, sample: Int[np.ndarray, " N"], items: Int[np.ndarray, "N C"]
) -> Float[np.ndarray, "N C"]:
    """The world's probability of a click on each item, if it were shown in the place of the impression `sample`.

    All users' clicks are replayed once, and the log-odds taken wherever a request stands: so the cost is that of
    generating the log without its draws, however long the histories. Raises ValueError for an impression twice.
    """
    samples, cat = problem.samples, catalogue(world)
    if len(np.unique(sample)) != len(sample):
        raise ValueError("sample holds an impression twice; a request stands in the place of one")
    first = np.flatnonzero(np.diff(samples.user, prepend=-1))
    users, count = samples.user[first], np.diff(np.append(first, len(samples.user)))
    inside = np.empty(world.items + FIRST_ITEM, np.int64)
    inside[cat.item_id] = np.arange(world.items)
    where = world_process.steps(count)

    def by_step(column: np.ndarray) -> np.ndarray:
        out = np.empty_like(column)
        out[where.place] = column
        return out

    item, domain = by_step(inside[samples.item]), by_step(samples.domain.astype(np.int64) - 1)
    time, label = by_step(samples.time.astype(np.int64)), by_step(samples.label)
    person = np.empty(len(users), np.uint64)
    person[where.rank] = keys(world.seed, users)
    place = where.place[sample]
    order = np.argsort(place)
    cuts = np.searchsorted(place[order], where.bounds)
    intercept, state = world_process.intercept(world), world_process.State(world, len(users))
    width = items.shape[1]
    found = np.empty(items.shape)
    for step, (begin, end) in enumerate(zip(where.bounds[:-1], where.bounds[1:], strict=True)):
        asked = order[cuts[step] : cuts[step + 1]]
        if len(asked):
            rows = np.repeat(place[asked] - begin, width)
            at = np.repeat(place[asked], width)
            z = world_process.logit(
                world, state, person[rows], rows, inside[items[asked]].ravel(), domain[at], time[at]
            )
            limited = np.clip(intercept + z, -world_process.MAX_LOGIT, world_process.MAX_LOGIT)
            found[asked] = (1.0 / (1.0 + np.exp(-limited))).reshape(-1, width)
        hit = np.flatnonzero(label[begin:end])
        if len(hit):
            j = item[begin:end][hit]
            state.record(hit, cat.category[j], cat.style[j], domain[begin:end][hit], time[begin:end][hit])
    return found


def gains(
    requests: Requests, logits: Float[np.ndarray, "N C"], counts: tuple[int, ...]
) -> Float[np.ndarray, "N counts"]:
    """What ranking is worth: expected clicks on the page beyond those on the first stage's own.

    With n of `counts` candidates scored, the page is the `SHOWN` of the first n with the highest logits. Without any
    it is the first stage's first `SHOWN`, whatever ranking costs: what is counted is what the compute buys.
    """
    base = requests.probability[:, :SHOWN].sum(axis=1)
    found = []
    for n in counts:
        if not SHOWN < n <= logits.shape[1]:
            raise ValueError(f"{n} candidates: must be above the {SHOWN} shown and at most {logits.shape[1]}")
        page = np.argsort(-logits[:, :n], axis=1, kind="stable")[:, :SHOWN]
        found.append(np.take_along_axis(requests.probability, page, axis=1).sum(axis=1) - base)
    return np.stack(found, axis=1)


def features(problem: Problem, requests: Requests, *, known_before: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What is known of a request before any ranker has run: fields for tables, and floats `[N, F]`.

    Activity (clicks, click rate, clicks of the last day and week, time since the last and since the first), breadth
    (categories, their entropy), the first stage's scores, and the candidates' click rates in the log before
    `known_before` (by item, and by category in the domain), with what the page would gain by sorting the first 20, 50
    and all of them by the items' alone.
    """
    samples, behaviors, sample = problem.samples, problem.behaviors, requests.sample
    start, end, time = samples.start[sample], samples.end[sample], samples.time[sample]
    clicked = behaviors.columns["time"]
    first = np.searchsorted(samples.user, samples.user[sample])
    length = (end - start).astype(np.float64)
    mine = category_clicks(problem, sample)
    share = mine / np.maximum(mine.sum(axis=1, keepdims=True), 1.0)
    scores = np.log(np.maximum(requests.scores, 1.0)).astype(np.float64)
    clicks, shown = item_counts(problem, known_before)
    rate = ((clicks + 5.0) / (shown + 20.0))[requests.candidates]
    tilt = _domain_rates(problem, known_before)[samples.domain[sample][:, None], problem.category[requests.candidates]]
    own = np.take_along_axis(share, problem.category[requests.candidates].astype(np.int64), axis=1)
    page = rate[:, :SHOWN].sum(axis=1)
    everything = requests.candidates.shape[1]
    better = [
        -np.sort(-rate[:, :n], axis=1)[:, :SHOWN].sum(axis=1) - page
        for n in sorted({min(n, everything) for n in (2 * SHOWN, 5 * SHOWN, everything)})
    ]
    recent = [end - behaviors.before(samples.user[sample], time - days * DAY) for days in (1, 7)]
    floats = [
        np.log(length),
        (length + 1.0) / (sample - first + 4.0),
        *(np.log1p(np.minimum(n, length)) for n in recent),
        np.log1p(time - clicked[end - 1]),
        np.log1p(time - clicked[start]),
        (mine > 0).sum(axis=1),
        -(share * np.log(np.maximum(share, 1e-9))).sum(axis=1),
        share.max(axis=1),
        scores[:, 0],
        scores[:, 0] - scores[:, SHOWN - 1],
        scores[:, SHOWN - 1] - scores[:, -1],
        page,
        rate.mean(axis=1),
        rate.std(axis=1),
        tilt[:, :SHOWN].mean(axis=1),
        tilt.mean(axis=1),
        own[:, :SHOWN].mean(axis=1),
        own.mean(axis=1),
        own.std(axis=1),
        *better,
    ]
    fields = {"hour": (time % DAY // 3600).astype(np.int32), "domain": samples.domain[sample].astype(np.int32)}
    return fields, np.stack(floats, axis=1).astype(np.float32)


def _domain_rates(problem: Problem, until: int) -> Float[np.ndarray, "domains categories"]:
    """Click rate of each category in each domain before second `until`, a little towards that of the whole log."""
    samples, categories = problem.samples, int(problem.category.max()) + 1
    early = samples.time < until
    cell = samples.domain[early].astype(np.int64) * categories + samples.category[early]
    size = (int(samples.domain.max()) + 1) * categories
    shown = np.bincount(cell, minlength=size)
    clicks = np.bincount(cell, weights=samples.label[early], minlength=size)
    mean = float(samples.label[early].mean())
    return ((clicks + 20.0 * mean) / (shown + 20.0)).reshape(-1, categories)

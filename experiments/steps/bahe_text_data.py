"""A data set as a language model over textual behaviours reads it: texts, kinds of behaviour, and who learns from what.

The labelled samples are cut by time in three: the language model learns from the oldest, the downstream ranker from
later ones, with the answers of a model that has not seen their labels, and the test samples are the problem's own.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

import bahe_jax
from bahe_jax.encode import Tokens
from experiments.steps.problem import Problem
from rec_core.data.records import Dataset
from rec_core.data.samples import DISLIKED, LIKED
from rec_core.data.schema import DataError

LATELY = 90 * 86_400  # seconds
FEEDBACK_KINDS = ("Liked:", "Disliked:", "Most recent:")
TIME_KINDS = ("Chosen lately:", "Chosen before:")


@dataclass(frozen=True, eq=False)
class TextProblem:
    """Texts and samples.

    Attributes:
      problem: the data set; its samples are those that are used, in the order of `train`, `rank` and `test`.
      texts: of each item id, and behind them the headings of the kinds of behaviour; `catalogue` has their tokens.
      kinds: the headings; each sequence begins with its own, so that one long text tells where the next one starts.
      tokens: K, tokens of a behaviour, the mean rounded up.
      cut: share of the behaviours whose text is longer than the limit, and so cut.
      train, rank, test: indices of the samples that the language model learns from, the downstream ranker learns from,
        and both are tested on; each period is later than the one before.
      moment: a number for each (user, time): samples of one moment have one history.
    """

    problem: Problem
    texts: tuple[str, ...]
    catalogue: bahe_jax.Catalogue
    kinds: tuple[str, ...]
    tokens: int
    cut: float
    train: Int[np.ndarray, " n"]
    rank: Int[np.ndarray, " m"]
    test: Int[np.ndarray, " k"]
    moment: Int[np.ndarray, " samples"]

    @property
    def popularity(self) -> Float[np.ndarray, " samples"]:
        """Events of each sample's item before the test and validation periods: what needs neither text nor user."""
        columns, items = self.problem.behaviors.columns, self.problem.behaviors.sizes["item"]
        before = columns["item"][columns["time"] < self.problem.train_end]
        return np.bincount(before, minlength=items)[self.problem.samples.item].astype(np.float64)

    @property
    def known_user(self) -> Bool[np.ndarray, " samples"]:
        """Whether the sample's user has behaviours in the training period."""
        sequences, user = self.problem.behaviors, self.problem.samples.user
        first = np.minimum(sequences.offsets[user], len(sequences) - 1)
        has = np.diff(sequences.offsets)[user] > 0
        return has & (sequences.columns["time"][first] < self.problem.train_end)


def item_texts(dataset: Dataset) -> list[str]:
    """The text of each item id: its title and, where the data have them, all its categories (films: genres).

    Raises:
      DataError: items without texts.
    """
    table = dataset.item_table
    if table.text is None or not any(table.text):
        raise DataError(f"{dataset.path}: its items have no text; a language model needs data whose items have one")
    if table.categories is None:
        return list(table.text)
    names = dataset.meta["category_names"]
    rows = (table.categories.row(item) for item in range(len(table.text)))
    named = (", ".join(names[category] for category in row) for row in rows)
    return [f"{text} {said}".strip() for text, said in zip(table.text, named, strict=True)]


def make_texts(
    problem: Problem,
    texts: list[str],
    tokenizer: Tokens,
    *,
    limit: int,
    train: int,
    rank: int,
    test: int,
    rank_share: float,
) -> TextProblem:
    """Texts as tokens, and the samples, each part evenly taken from its period.

    Args:
      texts: of each item id (`item_texts`).
      limit: most tokens of a text; each ends with a line break.
      train, rank, test: most samples of each.
      rank_share: of the training period's samples, the newest, that the downstream ranker's are taken from; the
        language model's are strictly older.

    Raises:
      DataError: a part without samples.
    """
    samples, splits = problem.samples, problem.splits
    order = splits["train"][np.argsort(samples.time[splits["train"]], kind="stable")]
    bound = samples.time[order[min(len(order) - 1, round((1 - rank_share) * len(order)))]] if len(order) else 0
    older = samples.time[order] < bound
    parts = [_evenly(order[older], train), _evenly(order[~older], rank), _evenly(splits["test"], test)]
    for name, part in zip(("train", "rank", "test"), parts, strict=True):
        if not len(part):
            raise DataError(f"{problem.name}: no samples in the period of {name!r}; give more events")
    chosen = samples.take(np.concatenate(parts))
    first = np.cumsum([0, *map(len, parts)])
    index = [np.arange(a, b) for a, b in pairwise(first)]
    kinds = FEEDBACK_KINDS if "feedback" in problem.behaviors.columns else TIME_KINDS
    lines = tuple(f"{text}\n" for text in (*texts, *kinds))
    encoded = tokenizer.encode(lines, limit)
    catalogue = bahe_jax.catalogue(encoded)
    behaved = problem.behaviors.columns["item"]
    whole = np.array([len(text) for text in tokenizer.encode(lines, limit + 1)])
    moment = np.unique(np.stack([chosen.user.astype(np.int64), chosen.time]), axis=1, return_inverse=True)[1]
    return TextProblem(
        problem=replace(problem, samples=chosen),
        texts=lines,
        catalogue=catalogue,
        kinds=kinds,
        tokens=int(np.ceil(catalogue.lengths[behaved].mean())),
        cut=float((whole[behaved] > limit).mean()),
        train=index[0],
        rank=index[1],
        test=index[2],
        moment=moment.reshape(-1),
    )


@lru_cache(maxsize=8)  # every seed of every point of a length asks for the same
def sequences_of(texts: TextProblem, length: int) -> Int[np.ndarray, "samples N M"]:
    """Rows of the catalogue that each sample's sequences hold, oldest first, -1 for none.

    A text of `length` tokens has room for M behaviours of the mean length in each kind, the newest; of longer ones as
    many as fit an equal share of what headings and item leave, so that no text is longer than `length`.

    Raises:
      ValueError: a length without room for one behaviour of the longest in each kind.
    """
    lengths, kinds = texts.catalogue.lengths, len(texts.kinds)
    headings = len(lengths) - kinds + np.arange(kinds)
    longest = texts.catalogue.tokens.shape[1]
    room = (length - longest - int(lengths[headings].sum())) // kinds
    if room < longest:
        raise ValueError(
            f"a text of {length} tokens has room for {room} in each of {kinds} kinds, and one behaviour may have "
            f"{longest}: give longer texts, or a lower limit"
        )
    most = bahe_jax.behaviors_that_fit(length, kinds, texts.tokens)
    found = np.stack([_newest(texts.problem, *kind, most) for kind in _kinds(texts.problem)], axis=1)
    used = np.where(found >= 0, lengths[np.maximum(found, 0)], 0)
    found = np.where(used[..., ::-1].cumsum(axis=-1)[..., ::-1] <= room, found, -1)
    heading = np.broadcast_to(headings[:, None], (*found.shape[:2], 1))
    return np.concatenate([heading, found], axis=2).astype(np.int32)


def _kinds(problem: Problem) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each kind the places of its behaviours, rising, and for each sample the first and one past the last place
    that it may read: behaviours strictly older than the sample."""
    samples, sequences = problem.samples, problem.behaviors
    everything = np.arange(len(sequences))
    if "feedback" in sequences.columns:
        feedback = sequences.columns["feedback"]
        of = [np.flatnonzero(feedback == LIKED), np.flatnonzero(feedback == DISLIKED), everything]
        return [(places, samples.start, samples.end) for places in of]
    lately = np.clip(sequences.before(samples.user, np.maximum(samples.time - LATELY, 0)), samples.start, samples.end)
    return [(everything, lately, samples.end), (everything, samples.start, lately)]


def _newest(
    problem: Problem, places: np.ndarray, start: np.ndarray, end: np.ndarray, most: int
) -> Int[np.ndarray, "samples most"]:
    """Items of the newest `most` of `places` in [start, end), the newest in the last slot; -1 before them."""
    first, last = np.searchsorted(places, start), np.searchsorted(places, end)
    at, mask = problem.behaviors.history(first, last, most)
    if not len(places):
        return np.full(at.shape, -1)
    return np.where(mask, problem.behaviors.columns["item"][places[at]], -1)


def _evenly(index: np.ndarray, count: int) -> np.ndarray:
    return index[np.unique(np.linspace(0, len(index) - 1, min(count, len(index))).astype(int))] if len(index) else index

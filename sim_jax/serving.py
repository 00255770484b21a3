"""Ranking a request: distinct second keys -> behaviour tree -> one jitted call for all candidates (SIM, arXiv
2006.05639, its section on serving).

Shapes are filled up to a few bucket sizes, each compiled when the ranker is warmed up, so that no request waits for the
compiler. Search is the tree's, so the model is one of `Config.search` "hard" or "none", whose parameters are the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Float32, Int

from rec_core import embedding
from rec_core.data.schema import Ragged
from rec_core.embedding import UNKNOWN
from sim_jax.batch import Request
from sim_jax.config import Config
from sim_jax.model import score
from sim_jax.tree_blocks import Found
from sim_jax.tree_keys import Distinct, ItemKeys, distinct, union

type Fields = dict[str, np.ndarray]


class Tree(Protocol):
    """What is asked of the index: a `BehaviorTree`, or a `TreeTable`."""

    def lookup(self, users: Int[np.ndarray, "B"], keys: Ragged, k: int, before: int) -> Found: ...


@dataclass(frozen=True)
class Ask:
    """A request: `candidates` of a raw user id at `time` (seconds); no behaviour at or after it is read.

    Attributes:
      recent, recent_time: the recent behaviours, raw item ids and their times, oldest first.
      user_features: fields of the model's user features, a number each. context: likewise, or one a candidate.
      dense: float features of the candidates, `[C, F]`, if the model has some.
    """

    user: int
    time: int
    candidates: Int[np.ndarray, " C"]
    recent: Int[np.ndarray, " S"]
    recent_time: Int[np.ndarray, " S"]
    user_features: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    dense: np.ndarray | None = None


@dataclass(frozen=True)
class Buckets:
    """The compiled sizes: candidates of a call, sequences of distinct keys among them; and of the recent behaviours."""

    candidates: tuple[int, ...] = (128, 512)
    keys: tuple[int, ...] = (32, 128)
    recent: int = 50

    def __post_init__(self) -> None:
        for name, least in (("candidates", 1), ("keys", 2)):
            sizes = getattr(self, name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < least:
                raise ValueError(
                    f"sim_jax.serving.Buckets: {name} is {sizes}, must be rising sizes of at least {least}"
                )
        if self.recent < 1:
            raise ValueError(f"sim_jax.serving.Buckets: recent is {self.recent}, must be at least 1")


@dataclass(frozen=True, eq=False)
class ItemFields:
    """The model's item fields by raw item id; an unknown item has the id that is kept for it in every field."""

    item: Int[np.ndarray, " m"]  # rising
    fields: Fields  # each [m]

    def __post_init__(self) -> None:
        if (np.diff(self.item) <= 0).any():
            raise ValueError("ItemFields: item must rise, each id once; sort it and the fields with it")
        wrong = [name for name, x in self.fields.items() if np.shape(x) != np.shape(self.item)]
        if wrong or not len(self.item):
            raise ValueError(f"ItemFields: {wrong or 'item'} must have a value for each of {len(self.item)} items")

    def __call__(self, ids: Int[np.ndarray, "..."]) -> Fields:
        place = np.minimum(np.searchsorted(self.item, ids), len(self.item) - 1)
        known = self.item[place] == ids
        return {name: np.where(known, x[place], UNKNOWN).astype(np.int32) for name, x in self.fields.items()}


class Ranker:
    """Scores candidates by a trained SIM and a behaviour tree.

    Args:
      params, config: of `sim_jax`; `config.search` "hard" or "none".
      tree: filed under `keys`, as raw ids.
      keys: the second keys of an item. One that has several gets the newest `config.top` behaviours of them all.
      items: the model's fields of an item; the behaviours' are those of their items, since a tree holds ids and times.

    Raises:
      ValueError: a soft search, or an item feature that `items` does not give.
    """

    def __init__(
        self,
        params: Any,
        config: Config,
        tree: Tree,
        keys: ItemKeys,
        items: ItemFields,
        *,
        buckets: Buckets | None = None,
    ) -> None:
        if config.search == "soft":
            raise ValueError(
                'search is "soft", which no tree answers: call sim_jax.score with the user\'s whole sequence, or serve '
                "a model of hard search"
            )
        missing = [name for name in embedding.fields(config.item_features) if name not in items.fields]
        if missing:
            raise ValueError(f"items gives {sorted(items.fields)}; the item features also read {missing}")
        self.config, self.tree, self.keys, self.items = config, tree, keys, items
        self.buckets = buckets or Buckets()
        self._params = jax.device_put(params)
        model = replace(config, search="none")
        self._score: Callable[..., Any] = jax.jit(partial(score, config=model, chunk=max(self.buckets.candidates)))

    def warm_up(self) -> int:
        """Compiles every pair of sizes and returns how many there are. Until then first requests wait."""
        c = self.config
        scalar = {name: 0 for name in embedding.fields(c.user_features)}
        rest = {name: 0 for name in embedding.fields(c.context_features) if name not in scalar}
        item = int(self.items.item[0])
        sizes = [(n, m) for n in self.buckets.candidates for m in self.buckets.keys]
        for n, m in sizes:
            dense = np.zeros((n, c.dense), np.float32) if c.dense else None
            ask = Ask(0, 0, np.full(n, item), np.zeros(0, int), np.zeros(0, int), scalar, rest, dense)
            empty = Found(np.zeros((m - 1, c.top), int), np.zeros((m - 1, c.top), int), np.zeros(m - 1, np.int32))
            self._call(ask, empty, np.zeros(n, int))
        return len(sizes)

    def rank(self, ask: Ask) -> Float32[np.ndarray, " C"]:
        """The candidates' logits, in their order. Of more candidates or keys than the largest sizes, part by part.

        Raises:
          ValueError: fields that the model reads are missing. StoreError: the tree's store failed.
        """
        candidates = np.asarray(ask.candidates)
        if not len(candidates):
            return np.zeros(0, np.float32)
        if len(candidates) > self.buckets.candidates[-1]:
            return self._in_halves(ask)
        asked = self.asked(ask)
        found = self.tree.lookup(np.array([ask.user]), asked.keys, self.config.top, ask.time)
        many = np.diff(asked.rows.offsets)
        if (many <= 1).all():
            place = np.full(len(candidates), len(found.count))  # without a key: the empty sequence after the others
            place[many == 1] = asked.rows.values
        else:
            found, place = union(found, asked.rows, self.config.top), np.arange(len(candidates))
        if len(found.count) >= self.buckets.keys[-1]:
            if len(candidates) == 1:
                raise ValueError(f"keys is {self.buckets.keys}: the largest size must be at least 2")
            return self._in_halves(ask)
        return self._call(ask, found, place)

    def asked(self, ask: Ask) -> Distinct:
        """The request's distinct second keys, and which of them are each candidate's."""
        return distinct(self.keys(np.asarray(ask.candidates)))

    def _in_halves(self, ask: Ask) -> Float32[np.ndarray, " C"]:
        n = len(ask.candidates)

        def part(x: Any, which: slice) -> Any:
            return x[which] if np.ndim(x) and len(x) == n else x

        halves = [
            replace(
                ask,
                candidates=ask.candidates[which],
                context={name: part(x, which) for name, x in ask.context.items()},
                dense=None if ask.dense is None else ask.dense[which],
            )
            for which in (slice(0, n // 2), slice(n // 2, n))
        ]
        return np.concatenate([self.rank(half) for half in halves])

    def _call(self, ask: Ask, found: Found, place: Int[np.ndarray, " C"]) -> Float32[np.ndarray, " C"]:
        """One call of the model, filled up to the sizes that hold it."""
        c, n = self.config, len(ask.candidates)
        size = next(size for size in self.buckets.candidates if size >= n)
        keys = next(size for size in self.buckets.keys if size > len(found.count))

        def fill(x: Any, length: int, axis: int = 0) -> np.ndarray:
            x = np.asarray(x)
            return np.pad(x, [(0, length - x.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)])

        recent = np.asarray(ask.recent)[np.asarray(ask.recent_time) < ask.time][-self.buckets.recent :]
        mask = np.zeros(self.buckets.recent, bool)
        mask[: len(recent)] = True
        long_mask = fill(found.mask, keys)
        age = np.where(found.mask, ask.time - found.time, 0).astype(np.float32)
        fields = embedding.fields(c.item_features)
        long, short, target = self.items(found.item), self.items(recent), self.items(ask.candidates)
        request = Request(
            target={name: fill(target[name], size)[None] for name in fields},
            sequence={name: fill(short[name], self.buckets.recent)[None] for name in fields},
            mask=mask[None],
            # The tree answers newest first; the model reads oldest first.
            long={name: fill(np.where(found.mask, long[name], 0), keys)[None, :, ::-1] for name in fields},
            long_mask=long_mask[None, :, ::-1],
            place=fill(place, size)[None].astype(np.int32),
            long_time=fill(age, keys)[None, :, ::-1],
            user={name: np.asarray(x)[None] for name, x in ask.user_features.items()},
            context={name: self._context(x, n, size) for name, x in ask.context.items()},
            dense=fill(ask.dense, size)[None] if c.dense else None,
        )
        scores: np.ndarray = np.asarray(self._score(self._params, request))[0, :n]
        return scores

    @staticmethod
    def _context(x: Any, n: int, size: int) -> np.ndarray:
        """One shape, so that one compiled call serves a number for all candidates and a number each."""
        x = np.broadcast_to(np.asarray(x), (n,))
        return np.pad(x, (0, size - n))[None]

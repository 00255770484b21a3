"""Ranking a request: distinct second keys -> behaviour tree -> one jitted call for all candidates (SIM, arXiv
2006.05639, its section on serving).

Shapes are filled up to a few bucket sizes, each compiled when the ranker is warmed up, so that no request waits for the
compiler. Search is the tree's, so the model is one of `Config.search` "hard" or "none", whose parameters are the same.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from rec_core import embedding
from rec_core.data.schema import Ragged
from rec_core.embedding import UNKNOWN
from sim_jax.batch import Request
from sim_jax.config import Config
from sim_jax.model import score
from sim_jax.tree_blocks import Found
from sim_jax.tree_keys import Distinct, ItemKeys, distinct, union

_GAPS = 8  # ids up to so many times the number of items are looked up directly


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
    fields: Mapping[str, np.ndarray]  # each [m]

    def __post_init__(self) -> None:
        if (np.diff(self.item) <= 0).any():
            raise ValueError("ItemFields: item must rise, each id once; sort it and the fields with it")
        wrong = [name for name, x in self.fields.items() if np.shape(x) != np.shape(self.item)]
        if wrong or not len(self.item):
            raise ValueError(f"ItemFields: {wrong or 'item'} must have a value for each of {len(self.item)} items")

    def tables(self) -> dict[str, Int32[np.ndarray, " m+1"]]:
        """Each field by place: the unknown item's first, then the items'."""
        return {name: np.concatenate([[UNKNOWN], x]).astype(np.int32) for name, x in self.fields.items()}

    def places(self, ids: Int[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
        """Where the items stand in `tables`."""
        if self._direct is not None:  # ids that leave few gaps: one access an id, where a search takes seventeen
            inside = ids - self.item[0]
            known = (inside >= 0) & (inside < len(self._direct))
            return np.where(known, self._direct.take(inside, mode="clip"), 0)
        place = np.minimum(np.searchsorted(self.item, ids), len(self.item) - 1)
        return np.where(self.item[place] == ids, place + 1, 0).astype(np.int32)

    @cached_property
    def _direct(self) -> Int32[np.ndarray, " span"] | None:
        span = int(self.item[-1]) - int(self.item[0]) + 1
        if span > _GAPS * len(self.item):
            return None
        direct = np.zeros(span, np.int32)
        direct[self.item - self.item[0]] = np.arange(1, len(self.item) + 1)
        return direct


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
        self._held = jax.device_put((params, items.tables()))
        self._dtypes = _dtypes((*config.user_features, *config.context_features))
        model = replace(config, search="none")
        scores = partial(_scores, config=model, chunk=self.buckets.candidates[-1])
        self._score: Callable[..., Any] = jax.jit(
            lambda held, sent, form: scores(*held, *_unpacked(sent, form)), static_argnames="form"
        )

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

        recent = np.asarray(ask.recent)[np.asarray(ask.recent_time) < ask.time][-self.buckets.recent :]
        sent = Sent(
            target=_filled(self.items.places(ask.candidates), size),
            place=_filled(place, size),
            recent=_filled(self.items.places(recent), self.buckets.recent),
            recent_count=np.int32(len(recent)),
            found=_filled(self.items.places(found.item), keys),
            found_age=_filled(ask.time - found.time, keys),
            found_count=_filled(found.count, keys),
        )
        user = {name: x[None] for name, x in self._read(ask.user_features)}
        context = {name: _filled(np.broadcast_to(x, n), size)[None] for name, x in self._read(ask.context)}
        dense = _filled(ask.dense, size)[None] if c.dense else None
        scores: np.ndarray = np.asarray(self._score(self._held, *_packed((sent, user, context, dense))))[:n]
        return scores

    def _read(self, features: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """The features that the model reads, each in the one dtype that was compiled for it."""
        for name, value in features.items():
            if name in self._dtypes:
                x = np.asarray(value)
                yield name, x.astype(self._dtypes[name]) if x.dtype.kind in "biuf" else x


def _dtypes(specs: Iterable[embedding.Feature]) -> dict[str, type[np.generic]]:
    """float32 for a field that some feature cuts into buckets, else int32."""
    parts = [part for spec in specs for part in (spec.of if isinstance(spec, embedding.Cross) else (spec,))]
    names = {part if isinstance(part, str) else part.name for part in parts}
    cut = {part.name for part in parts if isinstance(part, embedding.Continuous)}
    return {name: np.float32 if name in cut else np.int32 for name in names}


class Sent(NamedTuple):
    """Of items and behaviours, what goes to the device: places of items, which stand there as tables, and counts in
    the place of masks."""

    target: Int32[Any, " C"]
    place: Int32[Any, " C"]
    recent: Int32[Any, " S"]
    recent_count: Int32[Any, ""]
    found: Int32[Any, "n K"]  # newest first, as the tree answers
    found_age: Int32[Any, "n K"]  # seconds
    found_count: Int32[Any, " n"]


class Form(NamedTuple):
    """Of packed arrays."""

    structure: Any  # of the tree
    leaves: tuple[tuple[tuple[int, ...], str], ...]  # shape and dtype of each


def _scores(
    params: Any,
    tables: Mapping[str, Array],
    sent: Sent,
    user: Mapping[str, Array],
    context: Mapping[str, Array],
    dense: Array | None,
    *,
    config: Config,
    chunk: int,
) -> Float32[Array, " C"]:
    mask = jnp.arange(sent.recent.shape[0]) < sent.recent_count
    found_mask = jnp.arange(sent.found.shape[1]) < sent.found_count[:, None]

    def fields(place: Array, mask: Array | None = None) -> dict[str, Array]:
        found = {name: table[place] for name, table in tables.items()}
        return found if mask is None else {name: jnp.where(mask, x, embedding.PAD) for name, x in found.items()}

    def oldest_first(x: Array) -> Array:
        return x[None, :, ::-1]

    request = Request(
        target=jax.tree.map(lambda x: x[None], fields(sent.target)),
        sequence=jax.tree.map(lambda x: x[None], fields(sent.recent, mask)),
        mask=mask[None],
        long=jax.tree.map(oldest_first, fields(sent.found, found_mask)),
        long_mask=oldest_first(found_mask),
        place=sent.place[None],
        long_time=oldest_first(sent.found_age.astype(jnp.float32)),
        user=user,
        context=context,
        dense=dense,
    )
    return score(params, request, config, chunk=chunk)[0]


def _packed(tree: Any) -> tuple[Int32[np.ndarray, " n"], Form]:
    """The arrays of a tree in one, since a device is handed each on its own; floats as float32, integers as int32.

    Returns:
      Their words one after the other, and what `_unpacked` needs to know, which is the same for arrays of these shapes.

    Raises:
      TypeError: what is no number, as a feature that was not encoded.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(x) for x in leaves]
    if any(x.dtype.kind not in "biuf" for x in arrays):
        wrong = [jax.tree_util.keystr(at) for at, x in jax.tree.leaves_with_path(tree) if x.dtype.kind not in "biuf"]
        raise TypeError(f"a request's arrays must be numbers, its features encoded; these are not: {', '.join(wrong)}")
    arrays = [x.astype(np.float32 if x.dtype.kind == "f" else np.int32, copy=False) for x in arrays]
    words = np.concatenate([np.ravel(x).view(np.int32) for x in arrays])
    return words, Form(structure, tuple((x.shape, x.dtype.name) for x in arrays))


def _unpacked(words: Int32[Array, " n"], form: Form) -> Any:
    """The tree that was packed."""
    parts = jnp.split(words, np.cumsum([math.prod(shape) for shape, _ in form.leaves])[:-1])
    leaves = [
        jax.lax.bitcast_convert_type(part, np.dtype(dtype)).reshape(shape)
        for part, (shape, dtype) in zip(parts, form.leaves, strict=True)
    ]
    return jax.tree.unflatten(form.structure, leaves)


def _filled(x: Any, length: int) -> np.ndarray:
    """x with zeros up to a length; integers as int32."""
    x = np.asarray(x)
    filled = np.zeros((length, *x.shape[1:]), np.int32 if np.issubdtype(x.dtype, np.integer) else x.dtype)
    filled[: len(x)] = x
    return filled

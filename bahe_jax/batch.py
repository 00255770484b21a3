"""What the BAHE model reads, and how it is made on the host from a catalogue of texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Float, Int, Integer

from bahe_jax import language_model
from bahe_jax.config import Config
from rec_core.features import check_labels, check_not_nan, check_shape
from rec_core.transformer import TransformerConfig


@struct.dataclass
class Batch:
    """B impressions, NumPy on the host or JAX on a device: N sequences of up to M behaviours, oldest first.

    One batch of tokens serves all four settings. With `Config.lower` "table" the vectors take the tokens' place.
    """

    lengths: Int[Any, "B N M"]  # tokens of each behaviour, at most K; 0 where there is none, at any place
    item_length: Int[Any, "B"]
    label: Float[Any, "B"]  # clicked or not
    weight: Float[Any, "B"]  # 0 for padding
    ids: Int[Any, "B N M"] | None = None  # which text it is: equal ids are equal texts, encoded once
    item: Int[Any, "B"] | None = None
    tokens: Int[Any, "B N M K"] | None = None  # any valid token behind the text
    item_tokens: Int[Any, "B K"] | None = None
    states: Float[Any, "B N M *s"] | None = None  # from a table: [d] with "ba", [K, d] with "abe"; any float dtype
    item_states: Float[Any, "B *s"] | None = None
    dense: Float[Any, "B F"] | None = None  # features that are no text


@dataclass(frozen=True, eq=False)
class Catalogue:
    """H texts of up to K tokens; made by `catalogue`. A behaviour or item is its row here."""

    tokens: Int[np.ndarray, "H K"]
    lengths: Int[np.ndarray, " H"]

    def batch(
        self,
        sequences: Integer[np.ndarray, "B N M"],
        item: Integer[np.ndarray, " B"],
        label: Float[np.ndarray, " B"],
        weight: Float[np.ndarray, " B"] | None = None,
        *,
        dense: Float[np.ndarray, "B F"] | None = None,
        states: Float[np.ndarray, "H *s"] | None = None,
    ) -> Batch:
        """A batch from rows of the catalogue; -1 is no behaviour.

        Args:
          states: a table in the catalogue's order; the batch then has vectors in place of tokens (`with_states`).

        Raises:
          ValueError: a row that the catalogue does not have.
        """
        sequences, item = np.asarray(sequences), np.asarray(item)
        for name, rows, least in (("sequences", sequences, -1), ("item", item, 0)):
            wrong = np.argwhere((rows < least) | (rows >= len(self.lengths)))
            if len(wrong):
                at = tuple(int(i) for i in wrong[0])
                raise ValueError(f"{name}{list(at)} is {rows[at]}: must be from {least} to {len(self.lengths) - 1}")
        row = np.maximum(sequences, 0)
        if states is not None and len(states) != len(self.lengths):
            raise ValueError(f"states has {len(states)} rows and the catalogue {len(self.lengths)} texts: one each")
        batch = Batch(
            lengths=np.where(sequences < 0, 0, self.lengths[row]).astype(np.int32),
            item_length=self.lengths[item],
            label=np.asarray(label, np.float32),
            weight=np.ones(len(item), np.float32) if weight is None else np.asarray(weight, np.float32),
            ids=row.astype(np.int32),
            item=item.astype(np.int32),
            tokens=None if states is not None else self.tokens[row],
            item_tokens=None if states is not None else self.tokens[item],
            dense=dense,
        )
        return batch if states is None else with_states(batch, states)


def with_states(batch: Batch, states: Any) -> Batch:
    """The batch with the rows of a table, `[H, d]` or `[H, K, d]`, that its `ids` and `item` name, and no tokens.

    On the host the table is NumPy, mapped from disk too; on a device (before the step or in it) JAX. Any float dtype.
    """
    read = {"states": states[batch.ids], "item_states": states[batch.item]}
    new: Batch = batch.replace(tokens=None, item_tokens=None, **read)  # type: ignore[attr-defined]
    return new


def catalogue(texts: Sequence[Integer[np.ndarray, " _"]]) -> Catalogue:
    """Texts as token ids (`Tokenizer.encode`, whose limit is K) in one array, as wide as the longest.

    Raises:
      ValueError: no texts, or one without tokens, naming it.
    """
    lengths = np.array([len(text) for text in texts], np.int32)
    if not len(lengths) or lengths.min() < 1:
        which = f"text {int(np.argmin(lengths))} has no tokens" if len(lengths) else "there are no texts"
        raise ValueError(f"{which}: each needs one at least (Tokenizer.encode gives the end of text for an empty one)")
    tokens = np.zeros((len(lengths), lengths.max()), np.int32)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = np.concatenate([np.asarray(text) for text in texts])
    return Catalogue(tokens, lengths)


def behaviors_that_fit(text_length: int, sequences: int, tokens: int) -> int:
    """M, behaviours of each of N sequences in a text of so many tokens where a behaviour has K of them.

    Raises:
      ValueError: not one fits.
    """
    most = text_length // (sequences * tokens)
    if most < 1:
        raise ValueError(f"a text of {text_length} tokens cannot hold {sequences} behaviours of {tokens} tokens each")
    return most


def newest(histories: Sequence[Sequence[Integer[np.ndarray, " _"]]], most: int) -> Int[np.ndarray, "B N most"]:
    """The newest `most` behaviours of each history (users x N histories, oldest first), -1 behind shorter ones."""
    out = np.full((len(histories), len(histories[0]) if len(histories) else 0, most), -1, np.int32)
    for user, kinds in enumerate(histories):
        if len(kinds) != out.shape[1]:
            raise ValueError(f"histories[{user}] has {len(kinds)} sequences and the first user {out.shape[1]}")
        for kind, history in enumerate(kinds):
            kept = np.asarray(history)[max(0, len(history) - most) :]
            out[user, kind, : len(kept)] = kept
    return out


def check(batch: Batch, config: Config) -> None:
    """ValueError naming field, row and value for what would run and mean something else. Host side.

    Samples without any behaviour are legal: a new user.
    """
    shape = np.shape(batch.lengths)
    if len(shape) != 3 or shape[1] != config.sequences or 0 in shape:
        raise ValueError(f"lengths: shape {shape}, must be [B, sequences={config.sequences}, M], of one slot at least")
    size = shape[0]
    check_labels(batch.label, batch.weight, size)
    from_table = config.lower == "table"
    if from_table:
        most = _check_states(batch, config, shape)
    else:
        most = _check_tokens(batch, config, shape)
    _integers("lengths", batch.lengths, shape, 0, most)
    _integers("item_length", batch.item_length, (size,), 1, most)
    if config.by_behavior and not from_table:
        _integers("ids", batch.ids, shape, 0, 2**31 - 2)
        _integers("item", batch.item, (size,), 0, 2**31 - 2)
        _check_same(batch)
    used = np.sum(batch.lengths, axis=(1, 2)) + np.asarray(batch.item_length)
    if config.slots and used.max() > config.slots:
        raise ValueError(
            f"lengths: row {int(used.argmax())} has {used.max()} tokens with its item, more than slots={config.slots}: "
            "keep fewer of its newest behaviours, or set slots higher"
        )
    if config.dense and batch.dense is None:
        raise ValueError(f"dense: missing, config.dense asks for {config.dense} float features")
    if batch.dense is not None:
        check_shape("dense", batch.dense, (size, config.dense))
        check_not_nan("dense", batch.dense, finite=True)


def _check_states(batch: Batch, config: Config, shape: tuple[int, ...]) -> int:
    """Checks vectors of a table and gives the most tokens that a length may say."""
    if batch.states is None or batch.item_states is None:
        raise ValueError('states, item_states: missing; lower="table" reads vectors (see bahe_jax.table)')
    inner = np.shape(batch.item_states)[1:]
    right = (config.language_model.width,) if config.setting == "ba" else (*inner[:1], config.language_model.width)
    if inner != right:
        raise ValueError(f"item_states: shape {np.shape(batch.item_states)}, must be [B, {'K, ' * (len(right) > 1)}d]")
    check_shape("states", batch.states, (*shape, *inner))
    check_shape("item_states", batch.item_states, (shape[0], *inner))
    for name in ("states", "item_states"):
        check_not_nan(name, np.asarray(getattr(batch, name), np.float32), finite=True)
    return 2**31 - 2 if config.setting == "ba" else inner[0]


def _check_tokens(batch: Batch, config: Config, shape: tuple[int, ...]) -> int:
    """Checks token ids and gives K."""
    if batch.tokens is None or batch.item_tokens is None:
        raise ValueError(f"tokens, item_tokens: missing; lower={config.lower!r} reads tokens")
    length = np.shape(batch.tokens)[-1]
    most = config.language_model.vocabulary - 1
    _integers("tokens", batch.tokens, (*shape, length), 0, most)
    _integers("item_tokens", batch.item_tokens, (shape[0], length), 0, most)
    return length


def _integers(name: str, values: Any, shape: tuple[int, ...], least: int, most: int) -> None:
    if values is None:
        raise ValueError(f"{name}: missing; the configuration reads it")
    values = np.asarray(values)
    check_shape(name, values, shape)
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name}: must be integers, got {values.dtype}")
    wrong = np.argwhere((values < least) | (values > most))
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise ValueError(f"{name}{list(at)} is {values[at]}: must be from {least} to {most} ({len(wrong)} such)")


def _check_same(batch: Batch) -> None:
    """Equal ids must be equal texts: one of them is encoded for all."""
    item_tokens = np.asarray(batch.item_tokens)
    k = item_tokens.shape[1]
    ids = np.concatenate([np.asarray(batch.ids).ravel(), np.asarray(batch.item)])
    lengths = np.concatenate([np.asarray(batch.lengths).ravel(), np.asarray(batch.item_length)])
    tokens = np.concatenate([np.asarray(batch.tokens).reshape(-1, k), item_tokens])
    ids, lengths, tokens = (x[lengths > 0] for x in (ids, lengths, tokens))
    text = np.column_stack([lengths, np.where(np.arange(k) < lengths[:, None], tokens, 0)])
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    differs = np.flatnonzero((text != text[first[inverse]]).any(axis=1))
    if len(differs):
        raise ValueError(
            f"ids: {ids[differs[0]]} stands for two texts, token ids {text[first[inverse]][differs[0], 1:].tolist()} "
            f"and {text[differs[0], 1:].tolist()}: equal ids must be equal texts"
        )


def example(batch_size: int = 8, seed: int = 0) -> tuple[Config, Batch]:
    """A small config that trains through all layers, and a valid random batch whose samples share behaviours."""
    decoder = TransformerConfig(width=16, layers=2, heads=2, kv_heads=1, head_width=8, hidden=16)
    config = Config(
        language_model=language_model.Config("llama", vocabulary=32, transformer=decoder, tied=True),
        sequences=2,
        lower="full",
        pooling="attention",
        reduced=4,
        row=8,
        hidden=(8,),
        dense=2,
        dense_width=4,
    )
    draw, behaviors = np.random.default_rng(seed), 20
    texts = catalogue([draw.integers(0, 32, length) for length in draw.integers(1, 4, behaviors)] + [np.arange(3)])
    sequences = draw.integers(-1, behaviors, (batch_size, 2, 3))
    return config, texts.batch(
        sequences,
        draw.integers(0, behaviors, batch_size),
        draw.integers(0, 2, batch_size).astype(np.float32),
        dense=draw.normal(size=(batch_size, 2)).astype(np.float32),
    )

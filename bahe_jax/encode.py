"""Filling ABE's table: a whole catalogue of texts through the lower layers, in steps that survive a kill.

Texts are dealt to processes by their hash, and go in groups: tokenised, packed into rows of one shape (compiled once),
encoded, and stored in one transaction. A run that was killed goes on behind its last transaction: what is stored stays,
and nothing is stored twice.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from bahe_jax import lower
from bahe_jax.config import Config
from bahe_jax.table import Table
from bahe_jax.texts import Batch as Rows
from bahe_jax.texts import PackedTexts, pack_texts
from rec_core.sharding import path_name, put_batch
from rec_core.store import StoreError


class Tokens(Protocol):
    """What this needs from a `Tokenizer`, with its rules for empty, long and broken texts."""

    def encode(self, texts: Sequence[str], limit: int) -> list[Int[np.ndarray, " _"]]: ...
    def identity(self) -> str: ...


@dataclass(frozen=True)
class Progress:
    """How far a process is with its share.

    Attributes:
      done: distinct texts of the share that are in the table.
      total: distinct texts of the share.
      encoded: of these, by this call. tokens: theirs. seconds: since the call began, compilation included.
    """

    done: int
    total: int
    encoded: int
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens encoded a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def version(params: Mapping[str, Any], config: Config, tokenizer: Tokens, limit: int) -> str:
    """Names all that a table's numbers depend on: weights and shape of the lower layers and the token table, the split,
    the pooling, whether tokens or vectors are kept, the tokenizer and its limit. 32 hex digits.

    It reads every weight once. How the model is run (`attention`, `remat`) does not count, its dtype does.
    """
    used = {"tables": params["tables"], "net": {"lower": params["net"]["lower"]}}
    for name in ("lora", "pool"):
        if "lower" in params["net"].get(name, {}):
            used["net"][name] = params["net"][name]["lower"]
    model = dataclasses.asdict(config.language_model.running(attention=None, remat="none", dropout=0.0))
    model["transformer"].pop("layers")  # those above the split may change
    pooling = [config.pooling, "behind the first token"]
    said = {"split": config.lower_layers, "setting": config.setting, "pooling": pooling, "limit": limit}
    lora = dataclasses.asdict(config.lora) if config.lower == "lora" else None
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([model, said, lora, tokenizer.identity()], sort_keys=True).encode())
    for path, leaf in jax.tree.leaves_with_path(used):
        value = np.ascontiguousarray(leaf)
        digest.update(f"{path_name(path)} {value.dtype} {value.shape}".encode())
        digest.update(value.view(np.uint8).data if value.size else b"")
    return digest.hexdigest()


def encode(
    texts: Sequence[str],
    tokenizer: Tokens,
    params: Mapping[str, Any],
    config: Config,
    table: Table,
    *,
    limit: int,
    rows: int = 64,
    row_length: int = 512,
    group: int = 16384,
    process_index: int = 0,
    process_count: int = 1,
    mesh: Mesh | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Encodes those of `texts` that the table lacks, and stores them.

    Texts are data of any kind: an empty one is the end-of-text token, a longer one is cut behind `limit` tokens, broken
    Unicode is read as U+FFFD (`Tokenizer.encode`); each is stored under the text as it came.

    Args:
      texts: of behaviours and items, in any order, repeats allowed.
      tokenizer: gives token ids.
      params, config: the model, with its lower layers (`config.lower` other than "table").
      table: open for writing, of `version(params, config, tokenizer, limit)`.
      limit: most tokens of a text; for a table of states its `tokens`.
      rows, row_length: shape that is compiled. row_length is at least `limit`.
      group: texts a transaction; a kill costs at most the work of two.
      process_index, process_count: this process's share; the shares are disjoint whatever the order of `texts`.
      mesh: rows are split over its data axis; None: the default device.
      on_progress: called after each transaction.

    Returns:
      The last progress.

    Raises:
      StoreError: the table is of another version or kind.
      ValueError: arguments that do not fit.
    """
    began = time.perf_counter()
    _check(params, config, tokenizer, table, limit, row_length, min(rows, group), process_index, process_count)
    share = list(dict.fromkeys(texts))
    if process_count > 1:
        share = [text for text in share if table.key(text)[-1] % process_count == process_index]
    left = [share[place] for place in table.missing(share)]
    now = Progress(len(share) - len(left), len(share), 0, 0, time.perf_counter() - began)
    groups = [left[start : start + group] for start in range(0, len(left), group)]
    run = partial(
        encode_tokens, params=params, config=config, rows=rows, row_length=row_length, tokens=table.tokens, mesh=mesh
    )

    def store(part: list[str], tokens: list[Int[np.ndarray, " _"]], vectors: Float[np.ndarray, "n *s"]) -> int:
        lengths = np.array([len(text) for text in tokens])
        table.write(part, lengths, vectors)
        return int(lengths.sum())

    # While the device has a group, the next one's texts become tokens, and the last one's vectors are stored.
    with nullcontext() if mesh is None else jax.set_mesh(mesh), ThreadPoolExecutor(2) as beside:
        coming = [beside.submit(tokenizer.encode, part, limit) for part in groups[:1]]
        going: list[tuple[int, Future[int]]] = []

        def settle() -> None:
            nonlocal now
            texts, stored = going.pop()
            encoded, seen = now.encoded + texts, now.tokens + stored.result()
            now = Progress(now.done + texts, now.total, encoded, seen, time.perf_counter() - began)
            if on_progress is not None:
                on_progress(now)

        for number, part in enumerate(groups):
            tokens = coming.pop().result()
            coming += [beside.submit(tokenizer.encode, part, limit) for part in groups[number + 1 : number + 2]]
            vectors = run(tokens)
            if going:
                settle()
            going.append((len(part), beside.submit(store, part, tokens, vectors)))
        if going:
            settle()
    return now


def encode_tokens(
    texts: Sequence[Int[np.ndarray, " _"]],
    params: Mapping[str, Any],
    config: Config,
    *,
    rows: int = 64,
    row_length: int = 512,
    tokens: int = 0,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "n *s"]:
    """E[a] of texts as token ids, float32: `[n, d]`, or with `tokens` K the states `[n, K, d]`, zeros behind a text."""
    packed = pack_texts(texts, row_length)
    run = partial(_states if tokens else _pooled, config=config)
    shape = (tokens, config.language_model.width) if tokens else (config.language_model.width,)
    out = np.empty((len(texts), *shape), np.float32)
    waiting: list[tuple[np.ndarray, Array]] = []

    def fetch() -> None:
        numbers, found = waiting.pop(0)
        out[numbers] = np.asarray(found, np.float32)[: len(numbers)]

    for batch, numbers, place in _batches(packed, rows, row_length, tokens):
        batch = batch if mesh is None else put_batch(batch, mesh)
        waiting.append((numbers, run(params, batch, place)))
        if len(waiting) > 2:  # the device works while the host packs and copies
            fetch()
    while waiting:
        fetch()
    return out


def _batches(
    packed: PackedTexts, rows: int, row_length: int, tokens: int
) -> Iterator[tuple[Rows, np.ndarray, np.ndarray]]:
    """Rows in batches of one shape, the texts in each, and where each lies: `[texts]`, row and segment as one number,
    or `[texts, K]`, the place of each token, -1 behind the text."""
    most = max(row_length, rows * row_length // 4)  # texts of a batch
    ends = packed.plan.starts
    first = 0
    while first < packed.rows:
        last = min(first + rows, packed.rows)
        while ends[last] - ends[first] > most:
            last -= 1
        numbers = packed.plan.order[ends[first] : ends[last]]
        batch = packed.batch(np.arange(first, last))
        if last - first < rows:
            batch = jax.tree.map(lambda x: np.pad(x, [(0, rows - len(x)), (0, 0)]), batch)
        row = packed.plan.row[numbers] - first
        place: np.ndarray
        if tokens:
            place = np.full((most, tokens), -1)
            slot = (row * row_length + packed.plan.offset[numbers])[:, None] + np.arange(tokens)
            place[: len(numbers)] = np.where(np.arange(tokens) < packed.lengths[numbers, None], slot, -1)
        else:
            place = np.zeros(most, np.int64)
            place[: len(numbers)] = row * row_length + packed.segment[numbers] - 1
        yield batch, numbers, place.astype(np.int32)
        first = last


@partial(jax.jit, static_argnames="config")
def _pooled(params: Any, batch: Rows, place: Int[Array, " n"], config: Config) -> Float[Array, "n d"]:
    states = lower.encode_rows(params, batch, config)
    segment = jnp.arange(1, batch.tokens.shape[1] + 1)
    mask = batch.segment_ids[:, None] == segment[:, None]
    pooled = lower.pool_texts(params, states, mask, config)
    return pooled.reshape(-1, states.shape[-1])[place].astype(jnp.float32)  # here: the host is slow at it


@partial(jax.jit, static_argnames="config")
def _states(params: Any, batch: Rows, place: Int[Array, "n K"], config: Config) -> Float[Array, "n K d"]:
    states = lower.encode_rows(params, batch, config).reshape(-1, config.language_model.width)
    return jnp.where((place >= 0)[..., None], states[place], 0).astype(jnp.float32)


def _check(
    params: Mapping[str, Any],
    config: Config,
    tokenizer: Tokens,
    table: Table,
    limit: int,
    row_length: int,
    rows: int,
    process_index: int,
    process_count: int,
) -> None:
    if "lower" not in params["net"] or not config.by_behavior:
        raise ValueError(
            f'encode needs lower layers and setting "abe" or "ba", not lower={config.lower!r}, '
            f'setting={config.setting!r}: use the parameters and settings with lower="frozen"'
        )
    if not 1 <= limit <= row_length or rows < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"limit={limit}, row_length={row_length}, process {process_index} of {process_count}: need 1 <= limit <= "
            "row_length, rows and group of at least 1, and 0 <= process_index < process_count"
        )
    kept = limit if config.setting == "abe" else 0
    if (table.width, table.tokens) != (config.language_model.width, kept):
        raise StoreError(
            f"the table is of width {table.width} and tokens {table.tokens}, this model needs "
            f"{config.language_model.width} and {kept}"
        )
    wanted = version(params, config, tokenizer, limit)
    if table.version != wanted:
        raise StoreError(
            f"the table is of version {table.version!r}, and this model, split, pooling, tokenizer and limit make "
            f"{wanted!r}: vectors of two versions do not mix; open a table of this version"
        )

"""ABE's table: what the frozen lower layers made of each text, kept between runs (arXiv 2403.19347).

A table holds the vectors of one version: a fingerprint of the lower layers, the tokenizer, the pooling and the limit
on a text's tokens (`encode.version`). Vectors of two versions never mix: a table of another is refused, and the key of
a text is its hash under the version. Three places hold it and answer alike: a `rec_core.store` (LMDB, Redis, memory),
and an array in a folder that is mapped into memory (`table_arrays.py`), for training that gathers millions of rows.

    with open_table("array:behaviors", version=version, width=576) as table:
        encode(texts, tokenizer, params, config, table)      # only those that are not there
        states, lengths = table.rows(texts)                  # [H, 576], for `Catalogue.batch` or a device
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bahe_jax.table_arrays import ArrayRows, check_settings
from rec_core.store import Store, StoreError, open_store

DTYPES = ("float32", "float16", "bfloat16")
_SETTINGS = b"settings"


class Rows(Protocol):
    """What a table needs from a place: rows of one dtype by key, written in transactions."""

    name: str

    def get(self, keys: list[bytes]) -> tuple[np.ndarray, np.ndarray]: ...  # rows, and which were found
    def put(self, keys: list[bytes], rows: np.ndarray) -> None: ...
    def __len__(self) -> int: ...
    def close(self) -> None: ...


def open_table(
    address: str,
    *,
    version: str,
    width: int,
    tokens: int = 0,
    dtype: str = "float32",
    readonly: bool = False,
    part: int = 0,
) -> "Table":
    """Opens the table at `address`, and makes it if absent and not `readonly`.

    Args:
      address: "array:FOLDER" for a mapped array, else as `rec_core.store.open_store` takes it.
      version: from `encode.version`. A table of another one is refused.
      width: d.
      tokens: 0 for one vector a text ("ba"); K for the states of its up to K tokens ("abe").
      dtype: of the stored numbers; "float16" and "bfloat16" take half the room.
      part: array only: which part this process writes; no two processes write one part. All parts are read.

    Raises:
      rec_core.store.StoreError: absent, damaged, of another version, width, tokens or dtype, or its part is taken.
      ValueError: an argument that cannot be.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
    if width < 1 or tokens < 0 or not version:
        raise ValueError(f"width={width}, tokens={tokens}, version={version!r}: width at least 1, tokens 0, a version")
    settings = {"format": 1, "version": version, "width": width, "tokens": tokens, "dtype": dtype}
    entry = entry_dtype(width, tokens, dtype)
    if address.startswith("array:"):
        rows: Rows = ArrayRows(address.removeprefix("array:"), settings, entry, readonly=readonly, part=part)
    else:
        rows = _StoreRows(open_store(address, version=version, readonly=readonly), settings, entry)
    return Table(rows, version=version, width=width, tokens=tokens, dtype=dtype)


def entry_dtype(width: int, tokens: int, dtype: str) -> np.dtype[Any]:
    """A row as it is stored: the text's length in tokens, and the numbers (bfloat16 as the integers of its bits)."""
    stored = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[dtype]
    return np.dtype([("length", "<u4"), ("vector", stored, (tokens, width) if tokens else (width,))])


class Table:
    """An open table; made by `open_table`, closed by `close` or by leaving its `with` block."""

    def __init__(self, rows: Rows, *, version: str, width: int, tokens: int, dtype: str) -> None:
        self._rows, self.version, self.width, self.tokens, self.dtype = rows, version, width, tokens, dtype
        self._shape = (tokens, width) if tokens else (width,)
        self._digest = hashlib.blake2b(version.encode(), digest_size=32).digest()

    def key(self, text: str) -> bytes:
        """16 bytes: the text's hash under the version. Halves of surrogate pairs count as they are."""
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._digest, digest_size=16).digest()

    def missing(self, texts: Sequence[str]) -> list[int]:
        """The place of the first of each text that the table does not have."""
        return list(self._missing(texts).values())

    def _missing(self, texts: Sequence[str]) -> dict[bytes, int]:
        first: dict[bytes, int] = {}
        for place, text in enumerate(texts):
            first.setdefault(self.key(text), place)
        _, found = self._rows.get(list(first))
        return {key: place for (key, place), there in zip(first.items(), found.tolist(), strict=True) if not there}

    def write(
        self, texts: Sequence[str], lengths: Int[np.ndarray, " n"], vectors: Float[np.ndarray, "n *s"]
    ) -> int:  # fmt: skip
        """Stores vectors in one transaction: all or none, and safe once this returns.

        Texts that are there stay as they are; of equal ones the first counts. Returns how many were new.

        Args:
          lengths: tokens of each text, at least 1.
          vectors: `[n, d]`, or `[n, K, d]` of which rows behind the length are not read again.

        Raises:
          ValueError: shapes that do not fit, or a value that is not finite in the table's dtype, naming the text.
        """
        vectors, lengths = np.asarray(vectors, np.float32), np.asarray(lengths)
        if vectors.shape != (len(texts), *self._shape) or lengths.shape != (len(texts),):
            raise ValueError(
                f"vectors {vectors.shape} and lengths {lengths.shape}: must be {(len(texts), *self._shape)} and "
                f"({len(texts)},) for {len(texts)} texts"
            )
        if not len(texts):
            return 0
        if lengths.min() < 1 or (self.tokens and lengths.max() > self.tokens):
            raise ValueError(
                f"lengths are {lengths.min()} to {lengths.max()}: must be 1 to {self.tokens or 'any number'}"
            )
        with np.errstate(over="ignore"):
            stored = vectors.astype(jnp.dtype(self.dtype))
        bad = np.flatnonzero(~np.isfinite(stored).reshape(len(texts), -1).all(axis=1))
        if len(bad):
            raise ValueError(
                f"the vector of text {bad[0]} ({texts[bad[0]][:40]!r}) is not finite in {self.dtype} ({len(bad)} "
                'such): nothing was stored; with "float16" try "bfloat16", whose range is float32\'s'
            )
        absent = self._missing(texts)
        new = list(absent.values())
        rows = np.zeros(len(new), entry_dtype(self.width, self.tokens, self.dtype))
        rows["length"] = lengths[new]
        rows["vector"] = stored[new].view(np.uint16) if self.dtype == "bfloat16" else stored[new]
        if new:
            self._rows.put(list(absent), rows)
        return len(new)

    def read(self, texts: Iterable[str]) -> tuple[np.ndarray, Int[np.ndarray, " n"]]:
        """Vectors in the table's dtype, `[n, d]` or `[n, K, d]`, and lengths; zeros where a text is not there."""
        rows, _ = self._rows.get([self.key(text) for text in texts])
        vectors = np.ascontiguousarray(rows["vector"])
        if self.dtype == "bfloat16":
            vectors = vectors.view(jnp.bfloat16)
        return vectors, rows["length"].astype(np.int32)

    def rows(self, texts: Sequence[str]) -> tuple[np.ndarray, Int[np.ndarray, " n"]]:
        """`read` for a catalogue, all of whose texts must be there.

        Raises:
          rec_core.store.StoreError: a text that was not encoded, naming the first.
        """
        vectors, lengths = self.read(texts)
        absent = np.flatnonzero(lengths == 0)
        if len(absent):
            raise StoreError(
                f"{self._rows.name}: text {absent[0]} ({texts[absent[0]][:40]!r}) was not encoded ({len(absent)} such "
                f"of {len(texts)}): run encode first"
            )
        return vectors, lengths

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Closes the table; closing twice is harmless."""
        self._rows.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _StoreRows:
    """Rows in an ordered store, which this table has for itself."""

    def __init__(self, store: Store, settings: dict[str, Any], entry: np.dtype[Any]) -> None:
        self._store, self._entry, self.name = store, entry, store.name
        try:
            held = store.get([_SETTINGS])[0]
            if held is None and not store.readonly and store.count() == 0:
                held = json.dumps(settings).encode()
                store.put([(_SETTINGS, held)])
            if held is None:
                raise StoreError(f"{self.name}: holds no table of behaviours: it is empty, or something else wrote it")
            check_settings(self.name, json.loads(held), settings)
        except BaseException:
            store.close()
            raise

    def get(self, keys: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        rows, values = np.zeros(len(keys), self._entry), self._store.get([b"t" + key for key in keys])
        found = np.array([value is not None for value in values], bool)
        for key, value in zip(keys, values, strict=True):
            if value is not None and len(value) != self._entry.itemsize:
                raise StoreError(
                    f"{self.name}: entry {key.hex()} has {len(value)} bytes and {self._entry.itemsize} were expected: "
                    "it is damaged; make a new table"
                )
        if found.any():
            rows[found] = np.frombuffer(b"".join(value for value in values if value is not None), self._entry)
        return rows, found

    def put(self, keys: list[bytes], rows: np.ndarray) -> None:
        values = rows.view(f"V{self._entry.itemsize}").tolist()
        self._store.put(zip([b"t" + key for key in keys], values, strict=True))

    def __len__(self) -> int:
        return self._store.count() - 1

    def close(self) -> None:
        self._store.close()

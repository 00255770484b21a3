"""A store in a folder by LMDB, the embedded default: crash-safe, many processes at once."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from rec_core.store.base import Entry, Expected
from rec_core.store.lmdb_environment import environment, release


class LmdbBackend:
    def __init__(self, folder: Path, readonly: bool, map_size: int) -> None:
        self._held = environment(folder, readonly, map_size)

    def put(self, batch: dict[bytes, bytes]) -> None:
        pairs = _in_order(batch)

        def body(txn: Any) -> None:
            txn.cursor().putmulti(pairs)

        self._held.run(body, write=True)

    def put_if(self, batch: dict[bytes, bytes], expected: Expected, since: int | None) -> bool:
        pairs = _in_order(batch)

        def body(txn: Any) -> bool:
            cursor = txn.cursor()
            same = txn.id() - 1 == since  # the transaction before this one is the last that wrote
            if not same:
                held = expected()
                same = list(map(cursor.get, held)) == list(held.values())
            if same:
                cursor.putmulti(pairs)
            return same

        return self._held.run(body, write=True)

    def moment(self) -> int:
        return self._held.last_write()

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        # a cursor looks into the page it is on before it descends from the root: sorted keys take a quarter less
        return self._held.run(lambda txn: list(map(txn.cursor().get, keys)))

    def floors(self, keys: list[bytes], prefix_length: int, limit: int) -> list[list[Entry]]:
        def body(txn: Any) -> list[list[Entry]]:
            found = []
            with txn.cursor() as cursor:
                for key in keys:
                    prefix = key[:prefix_length]
                    near: list[Entry] = []
                    if cursor.set_range(key):  # the first key >= key
                        more = cursor.key() == key or cursor.prev()
                    else:
                        more = cursor.last()
                    while more and len(near) < limit and cursor.key().startswith(prefix):
                        near.append(cursor.item())
                        more = cursor.prev()
                    found.append(near)
            return found

        return self._held.run(body)

    def page(self, prefix: bytes, after: bytes | None, limit: int) -> list[Entry]:
        def body(txn: Any) -> list[Entry]:
            found: list[Entry] = []
            with txn.cursor() as cursor:
                more = cursor.set_range(after or prefix) if after or prefix else cursor.first()
                if more and after is not None and cursor.key() == after:
                    more = cursor.next()
                while more and len(found) < limit and cursor.key().startswith(prefix):
                    found.append(cursor.item())
                    more = cursor.next()
            return found

        return self._held.run(body)

    def delete(self, keys: list[bytes]) -> int:
        return self._held.run(lambda txn: sum(txn.delete(key) for key in keys), write=True)

    def count(self) -> int:
        return self._held.run(lambda txn: int(txn.stat(self._held.entries)["entries"]))

    def version(self) -> str | None:
        held = self._held.run(lambda txn: txn.get(b"version", db=self._held.header))
        return None if held is None else held.decode()

    def claim(self, version: str) -> str | None:
        held = self.version()
        if held is not None:
            return held

        def body(txn: Any) -> str | None:
            held = txn.get(b"version", db=self._held.header)  # another process may have been faster
            if held is not None:
                return str(held.decode())
            if txn.stat(self._held.entries)["entries"]:
                return None
            txn.put(b"version", version.encode(), db=self._held.header)
            return version

        return self._held.run(body, write=True)

    def durable(self) -> bool:
        flags = self._held.env.flags()
        return bool(flags["sync"] and flags["metasync"] and not flags["writemap"])

    def close(self) -> None:
        release(self._held)


def _in_order(batch: dict[bytes, bytes]) -> Collection[Entry]:
    """The pairs by rising key: in order the pages fill one after the other."""
    keys = list(batch)
    ordered = sorted(keys)
    return batch.items() if ordered == keys else [(key, batch[key]) for key in ordered]

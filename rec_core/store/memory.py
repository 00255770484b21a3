"""A store in a dictionary and a sorted list of its keys: for tests and single processes, gone with them."""

import bisect
import threading

from rec_core.store.base import Entry, Expected


class MemoryBackend:
    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._values: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []  # sorted
        self._version: str | None = None

    def put(self, batch: dict[bytes, bytes]) -> None:
        with self._lock:
            new = [key for key in batch if key not in self._values]
            self._values.update(batch)
            if len(new) < 32:
                for key in new:
                    bisect.insort(self._keys, key)
            else:
                self._keys.extend(new)
                self._keys.sort()

    def put_if(self, batch: dict[bytes, bytes], expected: Expected, since: int | None) -> bool:
        with self._lock:
            held = expected()
            same = self.get(list(held)) == list(held.values())
            if same:
                self.put(batch)
        return same

    def moment(self) -> None:
        return None  # comparing costs a dictionary's look-up

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        with self._lock:
            return [self._values.get(key) for key in keys]

    def floors(self, keys: list[bytes], prefix_length: int, limit: int) -> list[list[Entry]]:
        found = []
        with self._lock:
            for key in keys:
                at = bisect.bisect_right(self._keys, key)
                near = reversed(self._keys[max(at - limit, 0) : at])
                found.append([(k, self._values[k]) for k in near if k[:prefix_length] == key[:prefix_length]])
        return found

    def page(self, prefix: bytes, after: bytes | None, limit: int) -> list[Entry]:
        with self._lock:
            at = bisect.bisect_left(self._keys, prefix) if after is None else bisect.bisect_right(self._keys, after)
            near = self._keys[at : at + limit]
            return [(key, self._values[key]) for key in near if key.startswith(prefix)]

    def delete(self, keys: list[bytes]) -> int:
        with self._lock:
            gone = {key for key in keys if self._values.pop(key, None) is not None}
            self._keys = [key for key in self._keys if key not in gone] if gone else self._keys
        return len(gone)

    def count(self) -> int:
        with self._lock:
            return len(self._keys)

    def version(self) -> str | None:
        return self._version

    def claim(self, version: str) -> str | None:
        with self._lock:
            if self._version is None and not self._keys:
                self._version = version
            return self._version

    def durable(self) -> bool:
        return False

    def close(self) -> None:
        pass

"""A store in Redis, where many machines share it."""

import hashlib
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from rec_core.store.base import FORMAT, Entry, Expected, StoreError, without_password

_CHUNK = 1024
_LOST = "this batch was not acknowledged (all of it or nothing is stored: put it again)"

# One sorted set holds the keys (equal scores sort by bytes), one hash the values; a script reads both at one moment.
_FLOORS = """
local found = {}
for i = 3, #ARGV do
  local low = '-'
  if ARGV[1] ~= '0' then low = '[' .. string.sub(ARGV[i], 1, tonumber(ARGV[1])) end
  local near = {}
  for j, key in ipairs(redis.call('ZREVRANGEBYLEX', KEYS[1], '[' .. ARGV[i], low, 'LIMIT', 0, tonumber(ARGV[2]))) do
    near[2 * j - 1] = key
    near[2 * j] = redis.call('HGET', KEYS[2], key)
  end
  found[i - 2] = near
end
return found
"""
# The values that were read are compared by their SHA-1 ('': absent), so that they do not travel a second time.
_PUT_IF = """
local asked = tonumber(ARGV[1])
for i = 2, 2 * asked, 2 do
  local held = redis.call('HGET', KEYS[2], ARGV[i])
  if (held and redis.sha1hex(held) or '') ~= ARGV[i + 1] then return 0 end
end
for i = 2 * asked + 2, #ARGV, 2 do
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  redis.call('ZADD', KEYS[1], 0, ARGV[i])
end
return 1
"""
_PAGE = """
local found = {}
for i, key in ipairs(redis.call('ZRANGEBYLEX', KEYS[1], ARGV[1], ARGV[2], 'LIMIT', 0, tonumber(ARGV[3]))) do
  found[2 * i - 1] = key
  found[2 * i] = redis.call('HGET', KEYS[2], key)
end
return found
"""


def _after_prefix(prefix: bytes) -> bytes:
    """The upper bound, in ZRANGEBYLEX' form, of the keys that start with `prefix`."""
    head = prefix.rstrip(b"\xff")
    return b"(" + head[:-1] + bytes([head[-1] + 1]) if head else b"+"


class RedisBackend:
    """All keys of a store carry one hash tag, so a store lies on one node of a cluster."""

    def __init__(self, address: str, readonly: bool) -> None:
        self.name = without_password(address)
        try:
            url = urllib.parse.urlsplit(address)
            port = url.port or 6379
        except ValueError as error:
            raise ValueError(f"address {self.name!r}: {error}") from error
        match = re.fullmatch(r"/(\d+)/(.+)", url.path)
        if match is None or not url.hostname or url.query or url.fragment:
            raise ValueError(f"address {self.name!r}: expected the form redis://localhost:6379/0/name")
        base = "userscale:{" + match[2] + "}:"
        self._order, self._values, self._header = base + "keys", base + "values", base + "header"
        self._redis: Any = redis.Redis(
            host=url.hostname, port=port, db=int(match[1]), ssl=url.scheme == "rediss",
            username=urllib.parse.unquote(url.username) if url.username else None,
            password=urllib.parse.unquote(url.password) if url.password else None,
            socket_timeout=60, socket_connect_timeout=5, retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 2),
        )  # fmt: skip
        try:
            with self._errors():
                memory = self._redis.info("memory")
                if memory.get("maxmemory") and str(memory.get("maxmemory_policy", "")).startswith("allkeys"):
                    raise StoreError(
                        f"{self.name}: the server drops keys when memory is short (maxmemory-policy "
                        f"{memory['maxmemory_policy']}): set it to noeviction"
                    )
                if not readonly:
                    self._redis.hsetnx(self._header, "format", FORMAT)
                written = self._redis.hget(self._header, "format")
            if written is None:
                raise StoreError(f"{self.name}: there is no store to read: write it first, or check the name")
            if written != FORMAT:
                raise StoreError(f"{self.name}: has store format {written!r} and this code reads {FORMAT!r}")
        except BaseException:
            self._redis.close()
            raise

    @contextmanager
    def _errors(self, what: str = "cannot be read") -> Iterator[None]:
        try:
            yield
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise StoreError(f"{self.name}: {what}, the connection failed or was lost: {error}") from error
        except redis.RedisError as error:
            raise StoreError(f"{self.name}: {what}, the server refused: {error}") from error

    def put(self, batch: dict[bytes, bytes]) -> None:
        pairs = list(batch.items())
        with self._errors(_LOST), self._redis.pipeline(transaction=True) as pipe:
            for at in range(0, len(pairs), _CHUNK):
                part = dict(pairs[at : at + _CHUNK])
                pipe.hset(self._values, mapping=part)
                pipe.zadd(self._order, dict.fromkeys(part, 0))
            pipe.execute()

    def put_if(self, batch: dict[bytes, bytes], expected: Expected, since: int | None) -> bool:
        held = expected()
        said: list[bytes | int | str] = [len(held)]
        for key, value in held.items():
            said += (key, "" if value is None else hashlib.sha1(value).hexdigest())
        said += (x for pair in batch.items() for x in pair)
        with self._errors(_LOST):
            return bool(self._redis.eval(_PUT_IF, 2, self._order, self._values, *said))

    def moment(self) -> None:
        return None  # what a server has written is not counted in a way that clients could ask for

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        with self._errors(), self._redis.pipeline(transaction=False) as pipe:
            for at in range(0, len(keys), _CHUNK):
                pipe.hmget(self._values, keys[at : at + _CHUNK])
            return [value for part in pipe.execute() for value in part]

    def floors(self, keys: list[bytes], prefix_length: int, limit: int) -> list[list[Entry]]:
        with self._errors(), self._redis.pipeline(transaction=False) as pipe:
            for at in range(0, len(keys), _CHUNK):
                part = keys[at : at + _CHUNK]
                pipe.eval(_FLOORS, 2, self._order, self._values, prefix_length, limit, *part)
            return [self._pairs(near) for part in pipe.execute() for near in part]

    def page(self, prefix: bytes, after: bytes | None, limit: int) -> list[Entry]:
        low = b"(" + after if after is not None else b"[" + prefix if prefix else b"-"
        with self._errors():
            flat = self._redis.eval(_PAGE, 2, self._order, self._values, low, _after_prefix(prefix), limit)
        return self._pairs(flat)

    def _pairs(self, flat: list[Any]) -> list[Entry]:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        for key, value in pairs:
            if value is None:
                raise StoreError(f"{self.name}: key {key!r} has lost its value: something else wrote or evicted it")
        return pairs

    def delete(self, keys: list[bytes]) -> int:
        lost = "this delete was not acknowledged (all of it or nothing is done: delete again)"
        with self._errors(lost), self._redis.pipeline(transaction=True) as pipe:
            for at in range(0, len(keys), _CHUNK):
                pipe.zrem(self._order, *keys[at : at + _CHUNK])
                pipe.hdel(self._values, *keys[at : at + _CHUNK])
            return sum(pipe.execute()[1::2])

    def count(self) -> int:
        with self._errors():
            return int(self._redis.zcard(self._order))

    def version(self) -> str | None:
        with self._errors():
            held = self._redis.hget(self._header, "version")
        return None if held is None else held.decode()

    def claim(self, version: str) -> str | None:
        held = self.version()
        if held is None and self.count() == 0:
            with self._errors("the version was not acknowledged"):
                self._redis.hsetnx(self._header, "version", version)
            held = self.version()  # another process may have been faster
        return held

    def durable(self) -> bool:
        with self._errors():
            try:
                settings = self._redis.config_get("append*")
            except redis.ResponseError:  # many hosted servers do not tell
                return False
        return bool(settings.get("appendonly") == "yes" and settings.get("appendfsync") == "always")

    def close(self) -> None:
        self._redis.close()

"""Whole histories on the device: the form for training, where the search of a batch is one jitted gather.

The behaviours of all users lie there once, by time, with an index of the same by second key (the user behaviour tree as
arrays). A batch then names users and moments only; `history` gives everyone's newest T behaviours and `search` the
newest K of a key, strictly before the moment, in the form that `sim_jax.Batch` reads.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Int32

_STEPS = 32  # halvings of a range of 32-bit places


@struct.dataclass
class Resident:
    """Behaviours sorted by (user, time), and their places sorted by (user, key, time); times in seconds from `origin`.

    12 bytes a behaviour, beside its fields; 8 a (user, key) and 8 a user.
    """

    fields: dict[str, Int[Array, " n"]]
    time: Int32[Array, " n"]
    users: Int32[Array, " u+1"]  # user i has the places users[i] .. users[i + 1]
    by_key: Int32[Array, " n"]  # places by (user, key, time)
    key_time: Int32[Array, " n"]  # the times in that order
    pairs: Int32[Array, " u+1"]  # user i has the pairs pairs[i] .. pairs[i + 1]
    pair_key: Int32[Array, " p"]
    events: Int32[Array, " p+1"]  # pair j has the entries events[j] .. events[j + 1] of by_key
    origin: int = struct.field(pytree_node=False)

    def seconds(self, time: Any) -> Int[np.ndarray, " B"]:
        """Moments, seconds since 1970, as what `history` and `search` take. A ValueError where that is no int32."""
        found = np.asarray(time, np.int64) - self.origin
        if (np.abs(found) > np.iinfo(np.int32).max).any():
            raise ValueError(f"a time is more than 68 years from the first behaviour, at {self.origin}")
        return found.astype(np.int32)


class Found(NamedTuple):
    """Behaviours of each row, padded."""

    fields: dict[str, Int[Array, "B K"]]  # 0 in unused slots
    mask: Bool[Array, "B K"]
    age: Float[Array, "B K"]  # seconds from the behaviour to the moment


def resident(
    offsets: Int[np.ndarray, " u+1"],
    time: Int[np.ndarray, " n"],
    fields: Mapping[str, Int[np.ndarray, " n"]],
    *,
    key: Int[np.ndarray, " n"],
) -> Resident:
    """Behaviours of users 0, 1, ..., each user's together.

    Args:
      offsets: user i has the rows `offsets[i]` up to `offsets[i + 1]`.
      time: seconds, rising within a user.
      fields: what `sim_jax.Batch.long` holds, such as item and category.
      key: the second key, one a behaviour; 0 is none, and is not found by `search`.

    Raises:
      ValueError: times that fall, or arrays that do not go together, or too long for 32 bits.
    """
    offsets, time, key = (np.asarray(x, np.int64) for x in (offsets, time, key))
    n, users = len(time), len(offsets) - 1
    if users < 1 or offsets[0] != 0 or offsets[-1] != n or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets must rise from 0 to the {n} behaviours, one more than there are users")
    for name, column in {**fields, "key": key}.items():
        if np.shape(column) != (n,):
            raise ValueError(f"{name} has shape {np.shape(column)}, must be {(n,)} as time is")
    if n >= np.iinfo(np.int32).max or (n and int(time.max() - time.min()) > np.iinfo(np.int32).max):
        raise ValueError(f"{n} behaviours from {time.min()} to {time.max()}: places and seconds must fit 32 bits")
    user = np.repeat(np.arange(users), np.diff(offsets))
    falls = np.flatnonzero((np.diff(time) < 0) & (user[1:] == user[:-1]))
    if len(falls):
        raise ValueError(f"time falls from row {falls[0]} to the next, of user {user[falls[0]]}: sort by (user, time)")
    order = np.lexsort((np.arange(n), key, user))
    order = order[key[order] != 0]
    of_user, of_key = user[order], key[order]
    first = np.flatnonzero(np.append(True, (np.diff(of_user) != 0) | (np.diff(of_key) != 0))[: len(order)])
    origin = int(time.min()) if n else 0

    def put(x: Any) -> Array:
        return jnp.asarray(np.asarray(x), jnp.int32)

    return Resident(
        fields={name: put(column) for name, column in fields.items()},
        time=put(time - origin),
        users=put(offsets),
        by_key=put(order),
        key_time=put(time[order] - origin),
        pairs=put(np.searchsorted(of_user[first], np.arange(users + 1))),
        pair_key=put(of_key[first]),
        events=put(np.append(first, len(order))),
        origin=origin,
    )


def history(data: Resident, user: Int[Array, " B"], before: Int[Array, " B"], length: int) -> Found:
    """The newest `length` behaviours of each user strictly before a moment, oldest first, the newest in the last slot.

    Args:
      user: in [0, users). before: from `Resident.seconds`.
    """
    begin = data.users[user]
    return _newest(data, None, begin, _first_at(data.time, begin, data.users[user + 1], before), before, length)


def search(data: Resident, user: Int[Array, " B"], key: Int[Array, " B"], before: Int[Array, " B"], k: int) -> Found:
    """Hard search: the newest k behaviours of each user under a key, strictly before a moment; order as in `history`.

    A key that the user does not have, 0 among them, finds nothing.
    """
    pair = _first_at(data.pair_key, data.pairs[user], data.pairs[user + 1], key)
    last = data.pairs[user + 1]
    known = (pair < last) & (jnp.take(data.pair_key, pair, mode="clip") == key) & (key != 0)
    pair = jnp.where(known, pair, 0)
    begin = data.events[pair]
    end = _first_at(data.key_time, begin, jnp.where(known, data.events[pair + 1], begin), before)
    return _newest(data, data.by_key, begin, end, before, k)


def _first_at(
    values: Int[Array, " m"], begin: Int[Array, " B"], end: Int[Array, " B"], asked: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The first place of each sorted range [begin, end) whose value is not below what is asked, or its end."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        begin, end = bounds
        middle = begin + (end - begin) // 2
        below = (begin < end) & (jnp.take(values, middle, mode="clip") < asked)
        return jnp.where(below, middle + 1, begin), jnp.where((begin < end) & ~below, middle, end)

    found: Array = jax.lax.fori_loop(0, _STEPS, halve, (begin, end))[0]
    return found


def _newest(data: Resident, places: Array | None, begin: Array, end: Array, before: Array, length: int) -> Found:
    """The last `length` entries of each range, through `places` if these are entries of another order."""
    index = end[:, None] - length + jnp.arange(length)
    mask = index >= begin[:, None]
    index = jnp.where(mask, index, 0)
    place = index if places is None else jnp.take(places, index, mode="clip")

    def pick(x: Array) -> Array:
        return jnp.where(mask, jnp.take(x, place, mode="clip"), 0)

    age = jnp.where(mask, before[:, None] - jnp.take(data.time, place, mode="clip"), 0)
    return Found({name: pick(x) for name, x in data.fields.items()}, mask, age.astype(jnp.float32))

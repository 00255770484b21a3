"""Random numbers by hashing, and the synthetic world's global parameters (items, domains, categories).

Every random number of a user is a hash of (seed, user, what it is for, index), never the next one of a running
generator, so a user's history depends on the config and the user's number alone: not on blocks, shards or processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rec_core.data.world import World

DAY = 86_400
BIRTHS = 16  # new items enter at the starts of this many equal spans
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(h: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014)."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def draw(key: np.ndarray, stream: int, index: np.ndarray | int = 0) -> np.ndarray:
    """64 random bits for each (key, stream, index): uint64, the shape of `key` and `index` (< 2^40) broadcast."""
    counter = np.atleast_1d(index).astype(np.uint64) + np.uint64((stream << 40) + 1)
    return _mix(key + counter * _GOLDEN)


def uniform(key: np.ndarray, stream: int, index: np.ndarray | int = 0) -> np.ndarray:
    """Uniform in [0, 1), float64."""
    return (draw(key, stream, index) >> np.uint64(11)) * 2.0**-53


def normal(key: np.ndarray, stream: int, index: np.ndarray | int = 0) -> np.ndarray:
    """Standard normal by Box-Muller from the two halves of one draw, float64."""
    bits = draw(key, stream, index)
    radius = np.sqrt(-2.0 * np.log(((bits >> np.uint64(32)) + 0.5) * 2.0**-32))
    return radius * np.cos((bits & np.uint64(0xFFFFFFFF)) * (2.0 * np.pi * 2.0**-32))


def keys(seed: int, users: np.ndarray, salt: int = 0) -> np.ndarray:
    """One 64-bit key per user."""
    world = _mix(np.array([(seed * 1_000_003 + salt * 7_919 + 1) & (2**64 - 1)], np.uint64))
    return _mix(world + _mix(np.asarray(users).astype(np.uint64) + np.uint64(1)))


@dataclass(frozen=True)
class Catalogue:
    """Global parameters. Items are in internal order (category, style, birth); `item_id[j]` is the id of item j."""

    item_id: np.ndarray  # int64[items], a permutation of 2 .. items+1
    category: np.ndarray  # int32[items], from 0
    style: np.ndarray  # int32[items], from 0
    birth: np.ndarray  # int32[items], span 0 .. BIRTHS-1
    quality: np.ndarray  # float64[items]
    cumulative: np.ndarray  # float64[items + 1], cumulative popularity
    first: np.ndarray  # int64[groups], group = category * styles + style
    last: np.ndarray  # int64[BIRTHS, groups], one past the last item born
    category_cdf: np.ndarray  # float64[categories]
    domain_cdf: np.ndarray  # float64[domains]
    domain_category_cdf: np.ndarray  # float64[domains, categories]
    domain_bias: np.ndarray  # float64[domains]
    category_tilt: np.ndarray  # float64[domains, categories]
    style_tilt: np.ndarray  # float64[domains, groups]
    period: np.ndarray  # float64[categories], seconds to the next need
    phase: np.ndarray  # float64[categories], part of the day


@lru_cache(maxsize=8)
def catalogue(config: World) -> Catalogue:
    """Draws the global parameters from `config.seed`."""
    rng = np.random.Generator(np.random.Philox(key=[config.seed, 0x1A]))
    c, s, d = config.categories, config.styles, config.domains
    category_weight = rng.permutation(np.arange(1, c + 1) ** -0.7)
    # Each (category, style) has one item from the start; the others fall on categories in proportion to their weight.
    spare = config.items - c * s
    group = np.concatenate([
        np.arange(c * s),
        rng.choice(c, spare, p=category_weight / category_weight.sum()) * s + rng.integers(0, s, spare),
    ])  # fmt: skip
    birth = np.where(rng.random(config.items) < config.fresh, rng.integers(1, BIRTHS, config.items), 0)
    birth[: c * s] = 0
    order = np.lexsort((birth, group))
    group, birth = group[order], birth[order]
    first = np.searchsorted(group, np.arange(c * s))
    last = first + np.stack([np.bincount(group[birth <= b], minlength=c * s) for b in range(BIRTHS)])
    rank = rng.permutation(config.items)  # popularity does not follow birth: Zipf over a random order in each group
    place = np.empty(config.items, np.int64)
    by_rank = np.lexsort((rank, group))
    place[by_rank] = np.arange(config.items) - first[group[by_rank]]
    popularity = (place + 1.0) ** -config.zipf
    # Domains draw from generators of their own: at dial zero even their number changes nothing but the domain column.
    own = [np.random.Generator(np.random.Philox(key=[config.seed, 0xD000 + i])) for i in range(d)]
    domain_weight = np.arange(1, d + 1) ** -0.5
    domain_category = np.stack([g.permutation(np.arange(1, c + 1) ** -1.0) for g in own])

    def cdf(weight: np.ndarray) -> np.ndarray:
        return np.cumsum(weight, axis=-1) / weight.sum(axis=-1, keepdims=True)

    return Catalogue(
        item_id=rng.permutation(config.items) + 2,
        category=(group // s).astype(np.int32),
        style=(group % s).astype(np.int32),
        birth=birth.astype(np.int32),
        quality=rng.normal(0.0, config.quality, config.items),
        cumulative=np.concatenate([[0.0], np.cumsum(popularity)]),
        first=first,
        last=last,
        category_cdf=cdf(category_weight),
        domain_cdf=cdf(domain_weight),
        domain_category_cdf=cdf(domain_category),
        domain_bias=np.stack([g.normal(0.0, 0.4) for g in own]),
        category_tilt=np.stack([g.normal(0.0, 0.5, c) for g in own]),
        style_tilt=np.stack([g.normal(0.0, 0.5, c * s) for g in own]),
        period=DAY * np.exp(rng.uniform(np.log(0.5), np.log(20.0), c)),
        phase=rng.random(c),
    )

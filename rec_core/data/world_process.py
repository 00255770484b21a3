"""The synthetic world's process, vectorised over users: the equations are in `rec_core.data.world`.

The loop is over the event index; at each index all users that have such an event take their step at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from rec_core.data.world_catalogue import BIRTHS, DAY, catalogue, keys, normal, uniform

if TYPE_CHECKING:
    from rec_core.data.world import World

START = 1_577_836_800  # 2020-01-01 00:00 UTC; the world's clock starts here
MEMORY = 20.0  # clicks after which the short memory has faded by 1/e
RENORM = 256  # clicks after which the short memory's growing weights are scaled back (f32 would overflow near 1,700)
MAX_LOGIT = 8.0

# streams of the hash, one per kind of draw
(
    LENGTH, ARRIVAL, BREAK, GAP, BETWEEN, HOME, DOMAIN, SESSION_CATEGORY, SLOT, SLOT_FIXED, SLOT_VALUE, MIX, ANYWHERE,
    STYLE, POLICY, RECALL, ITEM, CLICK, TASTE, TASTE_NOW, TASTE_DOMAIN, TASTE_DEPARTMENT, DEPTH, PROPENSITY,
) = range(1, 25)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What does not depend on clicks, flat in (user, impression) order. `count` is int64[users]."""

    count: np.ndarray
    time: np.ndarray  # int64, seconds
    domain: np.ndarray  # int32, from 0
    category: np.ndarray  # int32, from 0


def _ragged(count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start of each user, user row of each event, index of each event within its user)."""
    start = np.concatenate([[0], np.cumsum(count)[:-1]])
    row = np.repeat(np.arange(len(count)), count)
    return start, row, np.arange(len(row)) - start[row]


def _epoch(config: World, time: np.ndarray) -> np.ndarray:
    return (time - START) // int(config.epoch_days * DAY)


def _pick(cdf: np.ndarray, u: np.ndarray) -> np.ndarray:
    return np.minimum(np.searchsorted(cdf, u, side="right"), len(cdf) - 1)


def plan(config: World, users: np.ndarray, attempt: int, most: int | None) -> Plan:
    """Draws lengths, sessions, times, domains and categories of `users`; `most` caps the impressions of each."""
    cat = catalogue(config)
    person, key = keys(config.seed, users), keys(config.seed, users, 1 + attempt)
    mu = np.log(config.mean_length) - 0.5 * config.spread**2
    length = np.clip(np.exp(mu + config.spread * normal(person, LENGTH)), 1, config.max_length)
    count = np.maximum(np.round(length / config.click_rate), config.min_impressions).astype(np.int64)
    count = count if most is None else np.minimum(count, most)
    start, row, k = _ragged(count)
    key_k = key[row]
    opens = (k == 0) | (uniform(key_k, BREAK, k) < 1.0 / config.session_length)
    session = np.cumsum(opens) - 1  # over all users
    owner = row[opens]
    number = np.arange(len(owner)) - session[start][owner]  # session number within its user
    # Gaps: seconds inside a session; between sessions, spacings of uniform points over what is left of the horizon.
    inside = np.where(opens, 0, np.floor(1.0 + 30.0 * np.exp(0.8 * normal(key_k, GAP, k))))
    spacing = -np.log1p(-uniform(key[owner], BETWEEN, number))
    arrival = 0.4 * config.days * DAY * uniform(person, ARRIVAL)
    total = np.bincount(owner, spacing, len(users)) + -np.log1p(-uniform(key, BETWEEN, 1 << 30))
    left = np.maximum(config.days * DAY - arrival - np.bincount(row, inside, len(users)), 60.0)
    between = np.floor(1.0 + spacing / total[owner] * left[owner])
    gap = inside
    gap[opens] = between
    elapsed = np.cumsum(gap)
    elapsed -= (elapsed[start] - gap[start])[row]
    time = (START + np.floor(arrival)[row] + elapsed).astype(np.int64)

    epoch = _epoch(config, time[opens])
    home = _pick(cat.domain_cdf, uniform(person, HOME))[owner]
    u = uniform(key[owner], DOMAIN, number)
    domain = np.where(u < 0.6, home, _pick(cat.domain_cdf, (u - 0.6) / 0.4))

    def session_category(which: int) -> np.ndarray:
        index = number * 2 + which
        slot = _pick(_slot_cdf(config.slots), uniform(key[owner], SLOT, index))
        fixed = uniform(person[owner], SLOT_FIXED, slot) < config.long_term
        value = uniform(person[owner], SLOT_VALUE, slot + config.slots * np.where(fixed, 0, epoch + 1))
        own = _pick(cat.category_cdf, value)
        u = uniform(key[owner], SESSION_CATEGORY, index)
        promoted = u < 0.5 * config.domain
        shown = own.copy()
        for d in range(config.domains):
            at = np.flatnonzero(promoted & (domain == d))
            shown[at] = _pick(cat.domain_category_cdf[d], u[at] / (0.5 * config.domain))
        return shown

    main, second = session_category(0), session_category(1)
    u = uniform(key_k, MIX, k)
    anywhere = _pick(cat.category_cdf, uniform(key_k, ANYWHERE, k))
    category = np.where(u < 0.75, main[session], np.where(u < 0.95, second[session], anywhere))
    return Plan(count, time, domain[session].astype(np.int32), category.astype(np.int32))


def _slot_cdf(slots: int) -> np.ndarray:
    weight = np.arange(2, slots + 2) ** -0.5
    return np.cumsum(weight) / weight.sum()


class State:
    """What the clicks so far leave behind, for `n` users: the sufficient statistics of the observed history.

    `evidence[cell]` is (clicks ever, clicks fading over `MEMORY` clicks), the latter stored times e^(clicks/MEMORY).
    Cells: (user, category, all domains or one, style or total), (user, department, style or total),
    (user, all domains or one).
    """

    def __init__(self, config: World, n: int):
        s, c, d = config.styles, config.categories, config.domains
        self.config = config
        self.by_category = np.zeros((n * c * (d + 1) * (s + 1), 2), np.float32)
        self.by_department = np.zeros((n * config.departments * (s + 1), 2), np.float32)
        self.by_user = np.zeros((n * (d + 1), 2), np.float32)
        self.last_time = np.full(n * c * (s + 1), -np.inf)
        self.last_style = np.full(n * c, -1, np.int32)
        self.last_click = np.zeros(n * c, np.int64)
        self.clicks = np.zeros(n, np.int64)
        self.renormed = np.zeros(n, np.int64)
        self.n = n

    def cells(self, rows: np.ndarray, c: np.ndarray, s: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, ...]:
        """Flat indices (all-domain style, its total, own-domain style, its total, department style, its total)."""
        w = self.config.styles + 1
        everywhere = (rows * self.config.categories + c) * (self.config.domains + 1) * w
        here = everywhere + (d + 1) * w
        group = (rows * self.config.departments + c % self.config.departments) * w
        return everywhere + s, everywhere + w - 1, here + s, here + w - 1, group + s, group + w - 1

    def record(self, rows: np.ndarray, c: np.ndarray, s: np.ndarray, d: np.ndarray, time: np.ndarray) -> None:
        """Adds one click for each of the (distinct) `rows`."""
        w = self.config.styles + 1
        self.clicks[rows] += 1
        age = self.clicks[rows] - self.renormed[rows]
        full = rows[age >= RENORM]
        if len(full):
            for table in (self.by_category, self.by_department, self.by_user):
                table.reshape(self.n, -1, 2)[full, :, 1] *= np.float32(np.exp(-RENORM / MEMORY))
            self.renormed[full] += RENORM
            age = self.clicks[rows] - self.renormed[rows]
        add = np.ones((len(rows), 2), np.float32)
        add[:, 1] = np.exp(age / MEMORY)
        a, b, e, f, g, h = self.cells(rows, c, s, d)
        for table, cells in ((self.by_category, (a, b, e, f)), (self.by_department, (g, h))):
            for cell in cells:
                table[cell] += add
        user = rows * (self.config.domains + 1)
        self.by_user[user] += add
        self.by_user[user + 1 + d] += add
        at = rows * self.config.categories + c
        self.last_time[at * w + s] = time
        self.last_time[at * w + w - 1] = time
        self.last_style[at] = s
        self.last_click[at] = self.clicks[rows]


def logit(
    config: World, state: State, person: np.ndarray, rows: np.ndarray, item: np.ndarray, d: np.ndarray, time: np.ndarray
) -> np.ndarray:
    """The click's log-odds without the intercept, float64[len(rows)], equations (3)-(6) of `rec_core.data.world`.

    `person`: key per row, `item`: internal item index, `d`: domain from 0, `time`: seconds.
    """
    cat = catalogue(config)
    c, s = cat.category[item], cat.style[item]
    z = cat.quality[item]
    if config.domain > 0:
        tilt = cat.domain_bias[d] + cat.category_tilt[d, c] + cat.style_tilt[d, c * config.styles + s]
        z = z + config.domain * tilt
    if config.latent < 1:
        observed = _observed(config, state, rows, c, s, d)
        z = z + (1.0 - config.latent) * observed
    if config.latent > 0:
        z = z + config.latent * _hidden(config, person, c, s, d, _epoch(config, time))
    if config.time > 0:
        w = config.styles + 1
        at = (rows * config.categories + c) * w
        since_style = time - state.last_time[at + s]
        since_category = np.maximum(time - state.last_time[at + w - 1], 1.0)
        need = np.exp(-0.5 * (np.log(since_category / cat.period[c]) / 0.7) ** 2)
        rhythm = np.cos(2 * np.pi * (time / DAY - cat.phase[c]))
        z = z + config.time * (-1.5 * np.exp(-since_style / 600.0) + 1.5 * need + 0.4 * rhythm)
    return z


def _observed(config: World, state: State, rows: np.ndarray, c: np.ndarray, s: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Equation (4): log lifts of the category in the user's clicks and of the style in the category's clicks."""
    cells = state.cells(rows, c, s, d)
    age = state.clicks[rows] - state.renormed[rows]
    fade = np.ones((len(rows), 2), np.float32)
    fade[:, 1] = np.exp(-age / MEMORY)
    share = np.float32(config.domain)
    one, table = np.float32(1), state.by_category
    user = rows * (config.domains + 1)
    style, total, everything = table[cells[0]], table[cells[1]], state.by_user[user]
    if config.domain > 0:
        style = (one - share) * style + share * table[cells[2]]
        total = (one - share) * total + share * table[cells[3]]
        everything = (one - share) * everything + share * state.by_user[user + 1 + d]
    spill = np.float32(config.spill)
    wide_style = style + spill * state.by_department[cells[4]]
    wide_total = total + spill * state.by_department[cells[5]]
    depth = np.log1p(fade * total) - np.log1p(fade * everything / np.float32(config.categories))
    taste = np.log1p(fade * wide_style) - np.log1p(fade * wide_total / np.float32(config.styles))
    both = np.float32(config.depth) * depth + np.float32(config.taste) * taste
    return config.long_term * both[:, 0].astype(np.float64) + (1.0 - config.long_term) * both[:, 1]


def _hidden(
    config: World, person: np.ndarray, c: np.ndarray, s: np.ndarray, d: np.ndarray, epoch: np.ndarray
) -> np.ndarray:
    """Equation (5): the user's unseen propensity, depth of interest and taste."""
    group = c * config.styles + s
    department = (c % config.departments) * config.styles + s
    cells = config.categories * config.styles
    apart = 0.5 * config.domain
    lasting = np.sqrt(1 - config.spill) * normal(person, TASTE, group)
    lasting += np.sqrt(config.spill) * normal(person, TASTE_DEPARTMENT, department)
    taste = np.sqrt(config.long_term) * lasting
    if config.long_term < 1:
        taste += np.sqrt(1 - config.long_term) * normal(person, TASTE_NOW, group + cells * epoch)
    if apart > 0:
        taste = np.sqrt(1 - apart) * taste + np.sqrt(apart) * normal(person, TASTE_DOMAIN, group + cells * d)
    depth = normal(person, DEPTH, c)
    return 0.3 * normal(person, PROPENSITY) + config.depth * depth + config.taste * taste


@dataclass(frozen=True)
class Steps:
    """Events of users of unequal counts, reordered so that step k's events of all active users are contiguous."""

    rank: np.ndarray  # place of each user, longest first
    place: np.ndarray  # step-major position of each (user, impression) event
    bounds: np.ndarray  # step k is bounds[k] .. bounds[k + 1]


def steps(count: np.ndarray) -> Steps:
    """Plans the loop over the event index for users with `count` events each."""
    order = np.argsort(-count, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(count))
    ended = np.bincount(count, minlength=count.max() + 1)
    active = len(count) - np.cumsum(ended)[:-1]
    bounds = np.concatenate([[0], np.cumsum(active)])
    _, row, k = _ragged(count)
    return Steps(rank, bounds[k] + rank[row], bounds)


def _by_step(where: Steps, column: np.ndarray) -> np.ndarray:
    out = np.empty_like(column)
    out[where.place] = column
    return out


def simulate(
    config: World, users: np.ndarray, intercept: float, *, attempt: int = 0, most: int | None = None
) -> dict[str, np.ndarray]:
    """Histories of `users` (int64[n], any numbers): columns in (user, time) order and `count` int64[n].

    item (internal index), time, category and domain (from 0), label, probability.
    """
    cat = catalogue(config)
    p = plan(config, users, attempt, most)
    where = steps(p.count)
    _, row, k = _ragged(p.count)
    key = keys(config.seed, users, 1 + attempt)[row]
    chance = {stream: _by_step(where, uniform(key, stream, k)) for stream in (STYLE, POLICY, RECALL, ITEM, CLICK)}
    time, domain, category = (_by_step(where, x) for x in (p.time, p.domain, p.category))
    span = np.minimum((time - START) * BIRTHS // int(config.days * DAY), BIRTHS - 1)
    person = np.empty(len(users), np.uint64)
    person[where.rank] = keys(config.seed, users)
    state, everyone = State(config, len(users)), np.arange(len(users))
    item = np.empty(len(time), np.int64)
    label = np.empty(len(time), np.uint8)
    probability = np.empty(len(time), np.float64)
    for begin, end in zip(where.bounds[:-1], where.bounds[1:], strict=True):
        now = slice(begin, end)
        rows, c, d, t = everyone[: end - begin], category[now], domain[now], time[now]
        at = rows * config.categories + c
        known = state.last_style[at]
        recent = state.clicks[rows] - state.last_click[at] < MEMORY
        recalled = (known >= 0) & (recent | (chance[RECALL][now] < config.long_term))
        repeat = recalled & (chance[POLICY][now] < config.policy)
        s = np.where(repeat, known, (chance[STYLE][now] * config.styles).astype(np.int64))
        group = c * config.styles + s
        stop = cat.last[span[now], group]
        low, high = cat.cumulative[cat.first[group]], cat.cumulative[stop]
        j = np.searchsorted(cat.cumulative, low + chance[ITEM][now] * (high - low), side="right") - 1
        j = np.minimum(j, stop - 1)
        z = intercept + logit(config, state, person[: end - begin], rows, j, d, t)
        chosen = 1.0 / (1.0 + np.exp(-np.clip(z, -MAX_LOGIT, MAX_LOGIT)))
        clicked = chance[CLICK][now] < chosen
        hit = np.flatnonzero(clicked)
        if len(hit):
            state.record(hit, c[hit], s[hit], d[hit], t[hit])
        item[now], label[now], probability[now] = j, clicked, chosen
    return {
        "count": p.count, "time": p.time, "category": p.category, "domain": p.domain, "item": item[where.place],
        "label": label[where.place], "probability": probability[where.place],
    }  # fmt: skip


def recompute(
    config: World, intercept: float, users: np.ndarray, count: np.ndarray, item: np.ndarray, domain: np.ndarray,
    time: np.ndarray, label: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Click probability of given histories, float64: what `simulate` drew from, from observed columns.

    `users` int64[n] and `count` int64[n] >= 1; the others flat in (user, time) order.
    """
    cat = catalogue(config)
    where = steps(count)
    item, domain, time, label = (_by_step(where, np.asarray(x)) for x in (item, domain, time, label))
    person = np.empty(len(users), np.uint64)
    person[where.rank] = keys(config.seed, users)
    state, everyone = State(config, len(users)), np.arange(len(users))
    probability = np.empty(len(item), np.float64)
    for begin, end in zip(where.bounds[:-1], where.bounds[1:], strict=True):
        j, d, t = item[begin:end], domain[begin:end], time[begin:end]
        z = intercept + logit(config, state, person[: end - begin], everyone[: end - begin], j, d, t)
        probability[begin:end] = 1.0 / (1.0 + np.exp(-np.clip(z, -MAX_LOGIT, MAX_LOGIT)))
        hit = np.flatnonzero(label[begin:end])
        if len(hit):
            state.record(hit, cat.category[j[hit]], cat.style[j[hit]], d[hit], t[hit])
    return probability[where.place]


@lru_cache(maxsize=8)
def intercept(config: World) -> float:
    """The intercept at which pilot users (numbers no world reaches) click at `config.click_rate`."""
    pilots = np.arange(128) + (1 << 40)
    value = float(np.log(config.click_rate / (1 - config.click_rate)))
    for _ in range(4):
        p = simulate(config, pilots, value, most=400)["probability"].mean()
        value += float(np.log(config.click_rate / (1 - config.click_rate)) - np.log(p / (1 - p)))
    return value

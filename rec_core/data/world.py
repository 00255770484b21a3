r"""A synthetic world with a known answer: users, items, domains, text, impressions and true click probabilities.

Sizes, dials and seed are `World`'s fields; the same config gives the same events whatever the number of blocks,
shards or processes. [x] is a dial in [0, 1]; at zero its effect is absent. All draws are independent.

**Items.** Item i has a category c(i) (sizes ~ Zipf .7), a style s(i) of `styles` within the category that no column
shows, a quality a_i ~ N(0, `quality`^2) and a popularity (rank)^-`zipf` within its (category, style). A share `fresh`
of the items enters at later times. Categories form `departments`; a style of one category resembles the style of the
same number in the other categories of its department. Ids carry no information. An item's text is a noise word, two
words for its category and three for its (department, style), shuffled; each of the five is such a word with
probability [text], else a noise word. The text has no effect on clicks: it tells what the item is.

**Impressions.** User u has about exp(N(.)) clicks (mean `mean_length`, log-deviation `spread`, at most `max_length`),
hence that many / `click_rate` impressions. Impressions come in sessions (geometric, mean `session_length`), seconds
to minutes apart inside, spread over the rest of the horizon of `days` between. A session has one domain (the user's
home domain with probability .6, else by domain size) and two categories:

    category = domain d's own Zipf law                        with probability [domain] / 2
             = slot k of the user's `slots`, k ~ (k + 1)^-.5  else                                           (1)

A slot's category is drawn by size, once for all time with probability [long_term], else anew every `epoch_days`. An
impression takes the first category with probability .75, the second with .20, any with .05; then

    style = that of the user's last click in the category   with probability `policy`                          (2)
          = uniform                                         else

(a last click that is not among the user's last 20 clicks is remembered with probability [long_term] only), and the
item by popularity among those of (category, style) that exist by then. So exposure sees observed clicks, not tastes.

**Clicks.** label ~ Bernoulli(p), with p recorded and

    logit p = b + a_i + [domain] (B_d + G_dc + H_dcs) + (1 - [latent]) O + [latent] U + [time] T             (3)

b is set by a pilot simulation (a pure function of the config) so that the mean click probability is near `click_rate`
at any dials. B, G, H ~ N(0, .4^2, .5^2, .5^2) are global. O is a function of the clicks so far: with n the user's
clicks, n_c those in category c, n_cs those in c's style s, and n'_cs = n_cs + `spill` * (clicks in style s anywhere
in c's department),

    O = `depth` * lift(n_c, n, categories) + `taste` * lift(n'_cs, n'_c, styles)
    lift(x, X, m) = log(1 + x) - log(1 + X / m)                                                               (4)

where in n, n_c and n_cs clicks in the impression's domain count 1 and others 1 - [domain]. O is [long_term] times (4)
of all clicks ever plus 1 - [long_term] times (4) of clicks weighted e^(-clicks since / 20). U is what nobody
observes, with all N standard normal and fixed for the user:

    U = .3 N_u + `depth` N_uc + `taste` V_ucsd,  V = sqrt(1 - [domain]/2) W + sqrt([domain]/2) N_ucsd
    W = sqrt([long_term]) (sqrt(1 - `spill`) N_ucs + sqrt(`spill`) N_u,department,s)
        + sqrt(1 - [long_term]) N_ucs,epoch                                                                   (5)

With Δ_s, Δ_c the seconds since the user's last click in the style and in the category, P_c the category's period
(half a day to 20 days, log-uniform) and φ_c its hour,

    T = -1.5 exp(-Δ_s / 600) + 1.5 exp(-(log(Δ_c / P_c) / .7)^2 / 2) + .4 cos(2 π (t / day - φ_c))            (6)

The logit is held within -8 .. 8, so that 0 < p < 1 also in float32.

**What is known of the answer.** The recorded p is the best any model could do that sees the hidden state: its AUC on
the labels is `oracle_auc`. At latent = 0, p is a function of columns of the log up to and including the impression
(users' earlier clicks, times, domains) and of global parameters only, so the same number is also reachable
(`Truth.reachable_probability`; `probability` recomputes it from the log). At latent > 0 no reachable number is given.
At latent = 0 and time = 0, times matter by their order only. Users without any click are drawn again, as logs of
clicks do not hold them.

The defaults were set on plain baselines alone, before any other system ran on this world: a DNN on the mean of the
history and DIN, for the click rate, the distance between the two and the distance to the oracle.

Nothing in it is a network, an attention or softmax over the history, an inner product or a generated weight. Labels
hang on comparisons of floating-point numbers, so worlds are identical on one platform and one NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from rec_core.data import world_catalogue, world_process
from rec_core.data.schema import EventLog, Items

_DIALS = ("long_term", "domain", "time", "text", "latent")
_STATE_BYTES = 1 << 28  # of a block's users
_BLOCK_EVENTS = 1 << 21  # impressions of a block, about; each takes some 150 bytes while it is made


@dataclass(frozen=True)
class World:
    """Sizes, dials and seed of a world; see the module's text for the symbols. Raises ValueError on a bad field."""

    users: int = 3_000
    items: int = 2_000
    categories: int = 32
    domains: int = 4
    styles: int = 4
    departments: int = 8
    mean_length: float = 120.0  # clicks of a user
    max_length: int = 512  # clicks aimed at for the longest user; the count itself is random
    min_impressions: int = 20
    click_rate: float = 0.25
    days: float = 120.0
    seed: int = 0
    # dials, 0 .. 1
    long_term: float = 0.8
    domain: float = 0.4
    time: float = 0.3
    text: float = 0.8
    latent: float = 0.0
    # constants of the process
    depth: float = 0.5
    taste: float = 1.0
    quality: float = 0.5
    spill: float = 0.5
    policy: float = 0.3
    zipf: float = 1.0
    fresh: float = 0.2
    spread: float = 0.7
    slots: int = 12
    session_length: float = 30.0  # impressions
    epoch_days: float = 15.0

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"World.{name} = {getattr(self, name)!r}: {rule}")

        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int":
                need(isinstance(value, int | np.integer) and not isinstance(value, bool), f.name, "must be an integer")
                need(0 <= value < 2**31, f.name, "must be from 0 to 2^31 - 1")
            else:
                number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
                need(number and bool(np.isfinite(value)), f.name, "must be a finite number")
        for name in ("users", "categories", "domains", "departments", "slots", "max_length", "min_impressions"):
            need(getattr(self, name) >= 1, name, "must be at least 1")
        for name in (*_DIALS, "spill", "policy", "fresh"):
            need(0 <= getattr(self, name) <= 1, name, "must be from 0 to 1 (0 removes the effect)")
        for name in ("depth", "taste", "quality", "zipf", "spread"):
            need(0 <= getattr(self, name) <= 5, name, "must be from 0 to 5")
        need(self.styles >= 2, "styles", "must be at least 2")
        need(self.departments <= self.categories, "departments", f"must be at most categories = {self.categories}")
        need(
            self.items >= self.categories * self.styles, "items",
            f"must be at least categories x styles = {self.categories * self.styles}, one for each; "
            "raise items or lower categories or styles",
        )  # fmt: skip
        need(0.02 <= self.click_rate <= 0.6, "click_rate", "must be from .02 to .6")
        need(
            1 <= self.mean_length <= self.max_length, "mean_length", f"must be from 1 to max_length = {self.max_length}"
        )
        need(self.session_length >= 1, "session_length", "must be at least 1 impression")
        need(self.epoch_days > 0, "epoch_days", "must be above 0")
        most = max(self.max_length / self.click_rate, self.min_impressions)
        least = most * 60 / (0.5 * world_catalogue.DAY)  # a minute an impression in half of the horizon
        need(least <= self.days <= 29_000, "days", f"must be from {least:.2f} (the longest user's time) to 29000")


@dataclass(frozen=True)
class Truth:
    """The world's answer. Item columns follow `Items.item`; categories and departments start at 1, styles at 0."""

    config: World
    intercept: float
    style: np.ndarray  # int32[items]
    department: np.ndarray  # int32[items]
    quality: np.ndarray  # float32[items]
    born: np.ndarray  # int64[items], seconds
    reachable_probability: np.ndarray | None  # float32[events], aligned with the log; None if latent > 0


def items_of(config: World) -> Items:
    """The item table of the world: ids 2 .. items + 1, category from 1, text."""
    cat = world_catalogue.catalogue(config)
    order = np.argsort(cat.item_id)
    return Items(
        item=cat.item_id[order].astype(np.int64),
        category=(cat.category[order] + 1).astype(np.int32),
        categories=None,
        text=_text(config, cat.category[order], cat.style[order]),
    )


def truth_of(config: World, log: EventLog | None = None) -> Truth:
    """What is hidden of the items, with the log's reachable probabilities where they are defined."""
    cat = world_catalogue.catalogue(config)
    order = np.argsort(cat.item_id)
    span = int(config.days * world_catalogue.DAY)
    return Truth(
        config=config,
        intercept=world_process.intercept(config),
        style=cat.style[order],
        department=cat.category[order] % config.departments + 1,
        quality=cat.quality[order].astype(np.float32),
        born=world_process.START + -(-cat.birth[order].astype(np.int64) * span // world_catalogue.BIRTHS),
        reachable_probability=log.probability if log is not None and config.latent == 0 else None,
    )


def generate(config: World) -> tuple[EventLog, Items, Truth]:
    """The whole world in memory. Impressions with labels; the clicked ones are the behaviour sequences."""
    parts = list(blocks(config))
    names = ("user", "item", "time", "category", "domain", "label", "probability")
    log = EventLog(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}, behavior=None, rating=None
    )
    return log, items_of(config), truth_of(config, log)


def blocks(
    config: World, block_users: int | None = None, *, first_user: int = 0, last_user: int | None = None
) -> Iterator[EventLog]:
    """Yields logs of consecutive whole users, `block_users` at a time, from `first_user` up to `last_user`.

    A user's events depend on the config and the user's number only, so processes may divide the users in any way.
    `block_users` None keeps a block's state within 256 MiB and its impressions near two million.
    """
    last_user = config.users if last_user is None else last_user
    if not 0 <= first_user <= last_user <= config.users:
        raise ValueError(f"users {first_user} to {last_user}: must lie within 0 to users = {config.users}, in order")
    if block_users is None:
        each = 8 * config.categories * (config.styles + 1) * (config.domains + 3)
        impressions = max(config.mean_length / config.click_rate, config.min_impressions)
        block_users = max(1, int(min(_STATE_BYTES / each, _BLOCK_EVENTS / impressions)))
    if block_users < 1:
        raise ValueError(f"block_users = {block_users}: must be at least 1")
    for begin in range(first_user, last_user, block_users):
        yield _block(config, np.arange(begin, min(begin + block_users, last_user)))


def _block(config: World, users: np.ndarray) -> EventLog:
    intercept = world_process.intercept(config)
    attempts, todo = [], np.arange(len(users))
    for attempt in range(1000):
        made = world_process.simulate(config, users[todo], intercept, attempt=attempt)
        row = np.repeat(np.arange(len(todo)), made["count"])
        good = np.bincount(row, made["label"], len(todo)) > 0
        keep = good[row]
        attempts.append({"row": todo[row[keep]], **{k: v[keep] for k, v in made.items() if k != "count"}})
        todo = todo[~good]
        if not len(todo):
            break
    else:
        raise ValueError(
            f"users {users[todo][:5].tolist()} drew no click in 1000 tries: raise click_rate or min_impressions"
        )
    columns = {name: np.concatenate([part[name] for part in attempts]) for name in attempts[0]}
    if len(attempts) > 1:
        order = np.argsort(columns["row"], kind="stable")
        columns = {name: column[order] for name, column in columns.items()}
    return EventLog(
        user=users[columns["row"]].astype(np.int64),
        item=world_catalogue.catalogue(config).item_id[columns["item"]].astype(np.int64),
        time=columns["time"],
        category=(columns["category"] + 1).astype(np.int32),
        domain=(columns["domain"] + 1).astype(np.int32),
        behavior=None,
        rating=None,
        label=columns["label"],
        probability=columns["probability"].astype(np.float32),
    )


def probability(config: World, log: EventLog) -> np.ndarray:
    """True click probability of each event of a log of this world's users and items, float32[n].

    Equation (3) recomputed from user, item, time, domain and label; the log may be altered (other domains, times,
    labels) or cut, as long as each user's events are together and in order. Raises ValueError on ids out of range.
    """
    if log.label is None or log.domain is None:
        raise ValueError("the log needs the columns label and domain; this one has none")
    for name, low, high in (("item", 2, config.items + 1), ("domain", 1, config.domains)):
        column = getattr(log, name)
        bad = np.flatnonzero((column < low) | (column > high))
        if len(bad):
            raise ValueError(f"{name} {column[bad[0]]} in row {bad[0]}: must be from {low} to {high}")
    if not len(log.user):
        return np.zeros(0, np.float32)
    first = np.flatnonzero(np.concatenate([[True], log.user[1:] != log.user[:-1]]))
    if len(np.unique(log.user)) != len(first):
        raise ValueError("a user's events are in several places: sort the log by user and time")
    cat = world_catalogue.catalogue(config)
    inside = np.empty(config.items + 2, np.int64)
    inside[cat.item_id] = np.arange(config.items)
    return world_process.recompute(
        config, world_process.intercept(config), log.user[first], np.diff(np.append(first, len(log.user))),
        inside[log.item], log.domain - 1, log.time, log.label,
    ).astype(np.float32)  # fmt: skip


def word(number: int) -> str:
    """A pronounceable word of two or more syllables, one for each number from 0."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    out = ""
    while number or len(out) < 4:
        number, digit = divmod(number, len(syllables))
        out += syllables[digit]
    return out


def _text(config: World, category: np.ndarray, style: np.ndarray) -> list[str]:
    """Six words an item: see the module's text. 4 words tell a category, 4 a (department, style), 200 nothing."""
    rng = np.random.Generator(np.random.Philox(key=[config.seed, 0x7E]))
    n = len(category)
    department = (category % config.departments).astype(np.int64) * config.styles + style
    about = np.stack([category.astype(np.int64)] * 2 + [config.categories + department] * 3, axis=1)
    telling = 200 + about * 4 + rng.integers(0, 4, about.shape)
    noise = rng.integers(0, 200, (n, 6))
    said = np.where(rng.random(about.shape) < config.text, telling, noise[:, 1:])
    numbers = rng.permuted(np.concatenate([noise[:, :1], said], axis=1), axis=1)
    # 7919 is prime and not a factor of 70^k: neighbouring meanings get unlike words.
    vocabulary = [word(k * 7919 % 4900) for k in range(4900)] if numbers.max() < 4900 else None
    spell = vocabulary.__getitem__ if vocabulary else word
    return [" ".join(map(spell, row)) for row in numbers.tolist()]

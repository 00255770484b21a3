"""The choice that DCAF makes for each request (arXiv 2006.09684, section 4): pure functions on the device.

Request i takes the action `argmax_j (Q_ij - lambda q_j)` among those that its limits allow, Q the gain and q the cost
of an action, and none where no such value is above 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SKIP = -1  # the choice of no action: it costs and gains nothing
_UNROLL = 32  # actions that one pass over the requests compares


def choose(
    gains: Float[Any, "N J"],
    costs: Float[Any, " J"],
    multiplier: float | Float[Array, ""],
    *,
    floor: float | Float[Array, ""] | Float[Array, " N"] = 0.0,
    cap: float | Float[Array, ""] | Float[Array, " N"] = jnp.inf,
) -> Int[Array, " N"]:
    """The action of each request, `SKIP` for none. Of equal values the cheaper goes first, then the first.

    Allowed are the actions with `floor <= q_j <= cap`. Skipping is an action of gain 0 and cost 0, so a floor above 0
    forbids it: such a request is served even at a negative value. Where no action lies between the limits the cap
    wins: the floor comes down to the dearest cost that the cap allows (0, a skip, if there is none), so the controller
    may move both freely. A NaN gain is never chosen (its request is skipped if no other action is allowed); the
    host-side functions of `multiplier` and `replay` raise on one.

    Args:
      gains: Q_ij, of any sign and in any order; nothing is assumed of how they grow with cost.
      costs: q_j, at least 0, in any order and unit.
      multiplier: lambda, finite and at least 0, gain per unit of cost.
      floor, cap: limits of a request's cost, in the unit of `costs`; one for all or one a request.
    """
    return choose_by_action(jnp.asarray(gains, jnp.float32).T, costs, multiplier, floor=floor, cap=cap)


def choose_by_action(
    gains: Float[Array, "J N"],
    costs: Float[Any, " J"],
    multiplier: float | Float[Array, ""],
    *,
    floor: float | Float[Array, ""] | Float[Array, " N"] = 0.0,
    cap: float | Float[Array, ""] | Float[Array, " N"] = jnp.inf,
) -> Int[Array, " N"]:
    """`choose` for gains with actions leading, ten times as fast on a CPU: for calls again and again on one log."""
    costs = jnp.asarray(costs, jnp.float32)
    if gains.ndim != 2 or costs.shape != gains.shape[:1]:
        raise ValueError(f"gains of {gains.shape[::-1]} [N, J] and costs of {costs.shape} must agree on the J actions")
    cap = jnp.asarray(cap, jnp.float32)
    dearest = jnp.max(jnp.where(costs <= cap[..., None], costs, 0.0), axis=-1)
    floor = jnp.minimum(jnp.asarray(floor, jnp.float32), dearest)

    def better(best: tuple[Array, Array, Array], action: tuple[Array, Array, Array]) -> tuple[Any, None]:
        best_value, best_cost, best_action = best
        number, cost, gain = action
        value = gain - multiplier * cost
        take = (value > best_value) | ((value == best_value) & (cost < best_cost))
        take &= (floor <= cost) & (cost <= cap)
        pairs = ((value, best_value), (cost, best_cost), (number, best_action))
        return tuple(jnp.where(take, new, old) for new, old in pairs), None

    requests = gains.shape[1]
    skip = jnp.broadcast_to(floor <= 0, requests)
    # -inf, not absent: under a floor the value of every action may overflow to -inf, and the cheapest must still win.
    start = (jnp.where(skip, 0.0, -jnp.inf), jnp.where(skip, 0.0, jnp.inf), jnp.full(requests, SKIP, jnp.int32))
    actions = (jnp.arange(len(costs), dtype=jnp.int32), costs, gains)
    (_, _, chosen), _ = jax.lax.scan(better, start, actions, unroll=min(_UNROLL, len(costs)))
    return chosen


def taken(values: Float[Any, "N J"] | Float[Any, " J"], action: Int[Array, " N"]) -> Float[Array, " N"]:
    """What each request's action is worth, or costs: its entry of `values`, 0 for a skip."""
    values = jnp.asarray(values)
    index = jnp.maximum(action, 0)
    found = values[index] if values.ndim == 1 else jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]
    return jnp.where(action == SKIP, 0, found)


def dither(limit: float | Float[Array, ""], costs: Float[Any, " J"], uniform: Float[Array, " N"]) -> Float[Array, " N"]:
    """A limit for each request, at one of the actions' costs (or 0), whose mean over requests is the limit asked for.

    Costs are steps, and a limit between two of them would act like the lower: a controller that needs the mean of both
    would swing between them for ever. So a share of the requests gets the upper one.

    Args:
      limit: at least 0; above the dearest action it is that action's cost.
      costs: q_j. uniform: independent draws from [0, 1). The same draws for floor and cap keep the floor below the cap.
    """
    levels = jnp.concatenate([jnp.zeros(1), jnp.sort(jnp.asarray(costs, jnp.float32))])
    limit = jnp.minimum(jnp.asarray(limit, jnp.float32), levels[-1])
    lower = jnp.max(jnp.where(levels <= limit, levels, 0.0))
    upper = jnp.min(jnp.where(levels > limit, levels, levels[-1]))
    share = (limit - lower) / jnp.where(upper > lower, upper - lower, 1.0)
    return jnp.where(uniform < share, upper, lower)

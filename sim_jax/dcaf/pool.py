"""A pool of servers with one queue, first come, first served, and a deadline.

A request fails if it is answered after its deadline. One that has waited past the deadline at the beginning of a tick
is dropped and costs nothing more. Times are exact within a tick, by Lindley's recursion for the pool as a whole: it
does `capacity` a second, while each request, once its turn comes, takes one server, of a fixed speed, for
`cost / speed` seconds. A capacity that is lost is servers that are lost.
"""

import numpy as np
from jaxtyping import Float


class Pool:
    """The queue and its servers: `arrive`, then `run`, tick by tick. Seconds, and cost a second for one server."""

    def __init__(self, tick: float, deadline: float, speed: float) -> None:
        self.tick, self.deadline, self.speed = tick, deadline, speed
        self.waiting = np.zeros((3, 0))  # arrival, cost that is left, gain; oldest first
        self.whole = np.zeros(0)  # the cost that a request came with

    def arrive(
        self, arrival: Float[np.ndarray, " n"], cost: Float[np.ndarray, " n"], gain: Float[np.ndarray, " n"]
    ) -> None:
        """Requests of the coming tick, by rising time of arrival (seconds), with their cost and gain."""
        self.waiting = np.concatenate([self.waiting, np.stack([arrival, cost, gain])], axis=1)
        self.whole = np.concatenate([self.whole, cost])

    def run(self, now: float, capacity: float) -> dict[str, float]:
        """One tick from `now` (seconds) at so much cost a second; the entries of `simulator.Trace` that it measures."""
        fresh = now - self.waiting[0] <= self.deadline
        dropped = int((~fresh).sum())
        arrival, cost, gain = self.waiting[:, fresh]
        whole = self.whole[fresh]
        # finish_k = max(arrival_k, finish_(k-1)) + service_k, as running sums and maxima.
        service = cost / capacity
        total = np.cumsum(service)
        finish = total + np.maximum.accumulate(np.maximum(arrival, now) - (total - service))
        begin, end = finish - service, now + self.tick
        busy = np.clip(np.minimum(finish, end) - begin, 0, None)
        done = finish <= end
        # Its turn came when the pool as a whole began with it, perhaps in an earlier tick; then it took one server.
        latency = finish - whole / capacity + whole / self.speed - arrival
        timely = done & (latency <= self.deadline)
        left = np.stack([arrival, cost - busy * capacity, gain])
        self.waiting, self.whole = left[:, ~done], whole[~done]
        return {
            "served": int(timely.sum()),
            "failed": dropped + int((done & ~timely).sum()),
            "spend": float(busy.sum() * capacity),
            "gain": float(gain[timely].sum()),
            "queue": int((~done).sum()),
            "latency": float(np.quantile(latency[done], 0.99)) if done.any() else 0.0,
            "utilization": float(busy.sum() / self.tick),
        }

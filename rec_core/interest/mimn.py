"""Multi-channel user interest memory network (Pi et al., KDD 2019, arXiv 1905.09248): a memory of fixed size that is
written as behaviours arrive and read when a target comes.

The forms are those of the authors' code, whose numbers `tests/rec_core/golden/make_interest.py` holds: the controller,
the addressing, and the re-balancing by a shift and a sharpening, where the paper writes a softmax of the utilisation.
Different from that code: the memory starts empty, utilisation adds up the weights that were written with (there they
are re-balanced once more), the GRUs reset after their matrix, and no head is clipped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from rec_core import losses
from rec_core.interest.base import Interest, check_positive
from rec_core.interest.din import DIN

_SHARP = 2.0  # the authors' factor on the sharpness of addressing
_SHIFT = 1  # a write moves by at most so many slots


class Memory(NamedTuple):
    """A user's state, of the same size after any number of behaviours; all zeros before the first. float32."""

    controller: Float[Array, "B units"]  # h_t
    last_read: Float[Array, "B d"]  # r_t, which the controller sees at the next behaviour
    memory: Float[Array, "B slots d"]  # M_t
    channels: Float[Array, "B slots d"]  # S_t, of the induction unit; no slots without it
    usage: Float[Array, "B slots"]  # g_t, the writing that each slot has had
    written: Int[Array, " B"]  # behaviours so far
    present: Bool[Array, "B T"] | None = None  # slots of the sequence that was encoded; no part of a state


class Cell(nn.Module):
    """One step of the memory: read with x, then write. Applied to a target it is the read, its new state dropped.

    A GRU sees `[x, r_(t-1)]`; from its output `h_t` (and `g_t`) a linear layer makes the keys `k`, the sharpness `beta`
    and the erase and add vectors `e_t`, `a_t`. Slot i of M is addressed by content (equations 1 and 2), by learned slot
    keys `K` too so that slots differ while they are empty:

        w(i) = softmax_i( beta / 2 (cos(k, M(i)) + cos(k, K(i))) )
        r_t = sum_i w_r(i) M_(t-1)(i)                                       (equation 3)
        M_t = (1 - w_w e_t^T) * M_(t-1) + w_w a_t^T                         (equations 4 and 5)

    With `balance` the write weight is re-balanced by what each slot has had, `g_t = sum w_w` (memory utilisation
    regularisation): moved along the slots by a small kernel that the controller chooses with g_t in sight, then
    sharpened. The induction unit (`induction` channels a step, 0 for none) takes the slots of the largest read weight
    and moves their channel on: `S_t(i) = GRU(S_(t-1)(i), [x, M_(t-1)(i)])`.
    """

    slots: int
    units: int
    balance: bool
    induction: int
    usage_scale: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, state: Memory, x: Float[Array, "B d"]) -> tuple[Memory, Float[Array, "B d"]]:
        """The state after behaviour x, and what was read: a linear layer on `[h_t, r_t]`."""
        d = x.shape[-1]
        seen = jnp.concatenate([x, state.last_read.astype(self.dtype)], axis=-1)
        h, _ = nn.GRUCell(self.units, dtype=self.dtype, name="controller")(state.controller.astype(self.dtype), seen)
        controls = h
        if self.balance:
            usage = jax.lax.stop_gradient(state.usage) / self.usage_scale
            controls = jnp.concatenate([h, usage.astype(self.dtype)], axis=-1)
        # In one product, since a step of a scan is bound by how many there are.
        sizes = {"read_key": d, "read_beta": 1, "write_key": d, "write_beta": 1, "erase": d, "add": d}
        sizes |= {"shift": 2 * _SHIFT + 1, "gamma": 1} if self.balance else {}
        controls = nn.Dense(sum(sizes.values()), dtype=self.dtype, name="controls")(controls).astype(jnp.float32)
        heads = dict(zip(sizes, jnp.split(controls, np.cumsum(list(sizes.values()))[:-1], axis=-1)))

        slot_keys = nn.tanh(self.param("slot_keys", nn.initializers.normal(0.5), (self.slots, d), jnp.float32))
        read = _address(heads["read_key"], heads["read_beta"], state.memory, slot_keys)
        write = _address(heads["write_key"], heads["write_beta"], state.memory, slot_keys)
        used = write
        if self.balance:
            # The regulariser teaches the shift, not what this behaviour's content is like.
            used = _rebalance(jax.lax.stop_gradient(write), heads["shift"], heads["gamma"])
            write = _rebalance(write, heads["shift"], heads["gamma"])
        r = jnp.einsum("bs,bsd->bd", read, state.memory)
        erase, add = nn.sigmoid(heads["erase"]), nn.tanh(heads["add"])
        memory = state.memory * (1 - write[..., None] * erase[:, None]) + write[..., None] * add[:, None]

        channels = state.channels
        if self.induction:
            chosen = jax.lax.top_k(jax.lax.stop_gradient(read), self.induction)[1]
            chosen = jax.nn.one_hot(chosen, self.slots).sum(axis=1)[..., None]
            content = jax.lax.stop_gradient(state.memory).astype(self.dtype)
            inputs = jnp.concatenate([jnp.broadcast_to(x[:, None], content.shape), content], axis=-1)
            moved, _ = nn.GRUCell(d, dtype=self.dtype, name="induction")(channels.astype(self.dtype), inputs)
            channels = jnp.where(chosen > 0, moved.astype(jnp.float32), channels)

        h = h.astype(jnp.float32)
        out = nn.Dense(d, dtype=self.dtype, name="out")(jnp.concatenate([h, r], axis=-1))
        return Memory(h, r, memory, channels, state.usage + used, state.written + 1), out


class MIMN(Interest):
    """What the target reads from the memory, and its attention over the induction unit's channels: `d_out = 2 d`, or
    `d` with `induction=0`.

    `encode` gives the state after the sequence, oldest first: `update(initial_state(B, d), sequence, mask)`. As
    behaviours arrive `update` goes on from the state, and `read` needs nothing else: neither sequence nor its length.
    Attention over the channels is DIN's with softmax. It reads the order of the behaviours, not time. A query for each
    of several behaviours has no meaning for a memory: their mean stands for them, over the behaviours that were encoded
    (over the queries, for a state of which nothing is known of the slots).
    """

    slots: int = 4
    units: int = 32  # of the controller
    balance: bool = True
    induction: int = 1
    usage_scale: float = 400.0  # the authors' unit of g_t as the controller sees it
    hidden: tuple[int, ...] = (80, 40)  # of the attention over channels

    def setup(self) -> None:
        check_positive(self, "slots", "units", "usage_scale")
        if not 0 <= self.induction <= self.slots:
            raise ValueError(f"MIMN: induction is {self.induction}, must be from 0 to slots, which is {self.slots}")
        if self.balance and self.slots < 2 * _SHIFT + 1:
            raise ValueError(f"MIMN: slots is {self.slots}, must be at least {2 * _SHIFT + 1}, or balance=False")
        self.cell = Cell(self.slots, self.units, self.balance, self.induction, self.usage_scale, self.dtype)
        self.attention = DIN(self.hidden, softmax=True, dtype=self.dtype)

    def initial_state(self, batch: int, width: int) -> Memory:
        """The state before any behaviour, for behaviours of this width. It reads no parameters."""
        channels = self.slots if self.induction else 0
        return Memory(
            controller=jnp.zeros((batch, self.units)),
            last_read=jnp.zeros((batch, width)),
            memory=jnp.zeros((batch, self.slots, width)),
            channels=jnp.zeros((batch, channels, width)),
            usage=jnp.zeros((batch, self.slots)),
            written=jnp.zeros(batch, jnp.int32),
        )

    def update(self, state: Memory, behaviors: Float[Array, "B n d"], mask: Bool[Array, "B n"] | None = None) -> Memory:
        """The state after n more behaviours, oldest first; padding changes nothing."""
        mask = jnp.ones(behaviors.shape[:2], bool) if mask is None else mask
        behaviors, mask = Interest.encode(self, behaviors, mask)

        def step(cell: Cell, state: Memory, inputs: tuple[Array, Array]) -> tuple[Memory, tuple[()]]:
            x, present = inputs
            moved, _ = cell(state, x)

            def keep(new: Array, old: Array) -> Array:
                return jnp.where(present.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            return jax.tree.map(keep, moved, state), ()

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1)
        after: Memory = scan(self.cell, state._replace(present=None), (behaviors, mask))[0]
        return after

    def encode(
        self,
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Memory:
        state = self.update(self.initial_state(len(sequence), sequence.shape[-1]), sequence, mask)
        return state._replace(present=mask.astype(bool))

    def read(self, encoded: Memory, target: Float[Array, "B d"] | Float[Array, "B G d"]) -> Float[Array, "B d_out"]:
        if target.ndim == 3:
            target = _mean_query(target, encoded.present)
        target = target.astype(self.dtype)
        parts = [self.cell(encoded, target)[1]]
        if self.induction:
            channels = encoded.channels.astype(self.dtype)
            everyone = jnp.ones(channels.shape[:2], bool)
            parts.append(self.attention(target, channels, everyone))
        # A user without behaviours has no interest to read.
        return jnp.where(encoded.written[:, None] > 0, jnp.concatenate(parts, axis=-1), 0)

    def auxiliary(self, encoded: Any, negatives: Float[Array, "B T d"] | None = None) -> dict[str, losses.Sum]:
        """`{"utilisation": sum}`: `sum_i (g(i) - mean(g))^2` (equation 11), over the users with behaviours.

        Ours: g is the slot's share of the user's writes, not their number, whose square outgrows every other loss on
        long sequences. Zero where all slots had the same share. It teaches the shift of the writes, so without
        `balance` there is no such loss. `negatives` are not read.
        """
        if not self.balance:
            return {}
        usage = encoded.usage / jnp.maximum(encoded.written, 1)[:, None]
        users = jnp.sum(encoded.written > 0, dtype=jnp.float32)
        spread = jnp.sum((usage - usage.mean(axis=-1, keepdims=True)) ** 2)
        return {"utilisation": (spread, users)}


def _mean_query(queries: Float[Array, "B G d"], present: Bool[Array, "B T"] | None) -> Float[Array, "B d"]:
    """The mean over the behaviours that are present, of which each query has T / G neighbouring slots."""
    if present is None:
        return queries.mean(axis=1)
    count = present.reshape(*queries.shape[:2], -1).sum(axis=2)[..., None]
    return jnp.where(count > 0, count * queries, 0).sum(axis=1) / jnp.maximum(count.sum(axis=1), 1)


def _address(
    key: Float[Array, "B d"],
    beta: Float[Array, "B 1"],
    memory: Float[Array, "B slots d"],
    keys: Float[Array, "slots d"],
) -> Float[Array, "B slots"]:
    key = losses.normalize(nn.tanh(key))
    similarity = jnp.einsum("bd,bsd->bs", key, losses.normalize(memory)) + key @ losses.normalize(keys).T
    return jax.nn.softmax(_SHARP * (nn.softplus(beta) + 1) * similarity / 2, axis=-1)


def _rebalance(
    w: Float[Array, "B slots"], shift: Float[Array, "B 2*shift+1"], gamma: Float[Array, "B 1"]
) -> Float[Array, "B slots"]:
    """`w(i)^gamma / sum w^gamma` of the weights moved in a circle by 0, 1, ... and ..., -1 slots, in shares `shift`."""
    shares = jax.nn.softmax(shift, axis=-1)
    moves = [*range(_SHIFT + 1), *range(-_SHIFT, 0)]
    moved = sum(shares[:, i, None] * jnp.roll(w, move, axis=-1) for i, move in enumerate(moves))
    sharpness = 2 * _SHARP * (nn.softplus(gamma) + 1)
    # As a softmax of logarithms, since w^gamma may be too small for a float.
    return jax.nn.softmax(sharpness * jnp.log(jnp.maximum(moved, jnp.finfo(jnp.float32).tiny)), axis=-1)

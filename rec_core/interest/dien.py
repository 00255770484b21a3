"""Deep interest evolution network (Zhou et al., AAAI 2019, arXiv 1809.03672): interests by a GRU, their evolution
towards the target by a GRU whose update gate the target's attention weakens."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from rec_core import losses
from rec_core.interest.base import Interest, masked_softmax, per_item

# Steps of one turn of a GPU's loop: more are fewer graphs, and longer to compile.
_TURN = 10


class Interests(NamedTuple):
    """The interest states `h_t` of the extractor layer, and the behaviours that they were made of."""

    sequence: Float[Array, "B T d"]
    mask: Bool[Array, "B T"]
    states: Float[Array, "B T d"]  # float32


class GatedGRU(nn.Module):
    """A GRU that goes only part of each step: `h_t = h_(t-1) + a_t (GRU(x_t, h_(t-1)) - h_(t-1))`.

    With the GRU's own step `h = (1 - u) h_(t-1) + u h~` this is the AUGRU (equations 10-12): its update gate is
    `a_t u_t`. With a_t = 1 it is the GRU (equations 2-5), and a_t = 0 passes the state on, as padding must.

    Parameters and numbers are `nn.GRUCell`'s. On a GPU the steps are taken as `_in_turns` does, for the same numbers.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T d"], a: Float[Array, "B T"]
    ) -> tuple[Float[Array, "B d"], Float[Array, "B T d"]]:
        """The last state and all states, of the width of x, float32."""

        def step(
            cell: nn.GRUCell, h: Float[Array, "B d"], inputs: tuple[Float[Array, "B d"], Float[Array, "B"]]
        ) -> tuple[Float[Array, "B d"], Float[Array, "B d"]]:
            whole, _ = cell(h.astype(self.dtype), inputs[0])
            h = h + inputs[1][:, None] * (whole.astype(jnp.float32) - h)
            return h, h

        cell = nn.GRUCell(x.shape[-1], dtype=self.dtype, name="cell")
        if jax.default_backend() == "gpu" and not self.is_initializing():
            return _in_turns(cell.variables["params"], x, a, self.dtype)
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        start = jnp.zeros((x.shape[0], x.shape[-1]), jnp.float32)
        last, states = scan(cell, start, (x, a.astype(jnp.float32)))
        return last, states


def _in_turns(
    cell: Mapping[str, Any], x: Float[Array, "B T d"], a: Float[Array, "B T"], dtype: str
) -> tuple[Float[Array, "B d"], Float[Array, "B T d"]]:
    """`GatedGRU` with fewer kernels, each of which a GPU waits for: last state and all states, float32.

    The inputs' three products are one for all steps, before the loop; the state's three are one; `_TURN` steps are one
    turn of the loop, which XLA launches as one CUDA graph.

    Args:
      cell: parameters of `nn.GRUCell`. dtype: of the products and the gates.
    """
    cell = jax.tree.map(lambda leaf: leaf.astype(dtype), cell)

    def joined(source: str, name: str) -> Array:
        return jnp.concatenate([cell[source + gate][name] for gate in "rzn"], axis=-1)

    inputs = x.astype(dtype) @ joined("i", "kernel") + joined("i", "bias")  # [B, T, 3 d]
    kernel, bias = joined("h", "kernel"), cell["hn"]["bias"]

    def step(h: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        r, z, n = jnp.split(now[0], 3, axis=-1)
        of_r, of_z, of_n = jnp.split(h.astype(dtype) @ kernel, 3, axis=-1)
        n = nn.tanh(n + nn.sigmoid(r + of_r) * (of_n + bias))
        u = now[1][:, None] * (1 - nn.sigmoid(z + of_z))
        h = h + u * (n - h)
        return h, h

    start = jnp.zeros((x.shape[0], x.shape[-1]), jnp.float32)
    steps = inputs.swapaxes(0, 1), a.astype(jnp.float32).T
    last, states = jax.lax.scan(step, start, steps, unroll=_TURN)
    return last, states.swapaxes(0, 1)


class DIEN(Interest):
    """The last state of the AUGRU over the interests, `d_out = d`. It reads the order of the behaviours, not time.

    Interest extractor: a GRU over the behaviours, oldest first, gives `h_t` (equations 2-5). Interest evolution:
    `a_t = softmax_t(h_t W e_target)` over the unpadded behaviours (equation 8), and the AUGRU over `h_t` (equations
    10-12). The extractor's auxiliary loss (equation 6) is `auxiliary`; as it compares h_t with behaviours by their
    inner product, h_t has their width.
    """

    def setup(self) -> None:
        self.extractor = GatedGRU(self.dtype)
        self.evolution = GatedGRU(self.dtype)

    def encode(
        self,
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Interests:
        sequence, mask = super().encode(sequence, mask)
        return Interests(sequence, mask, self.extractor(sequence, mask)[1])

    @nn.compact
    def read(self, encoded: Interests, target: Float[Array, "B d"] | Float[Array, "B G d"]) -> Float[Array, "B d"]:
        target = per_item(target, encoded.mask.shape[1])
        # W takes the target to the states: there are fewer targets than states.
        query = nn.Dense(encoded.states.shape[-1], use_bias=False, dtype=self.dtype, name="attention")(target)
        query = (query if target.ndim == 3 else query[:, None]).astype(jnp.float32)
        a = masked_softmax(jnp.sum(encoded.states * query, axis=-1), encoded.mask)
        return self.evolution(encoded.states, a)[0].astype(self.dtype)

    def auxiliary(self, encoded: Interests, negatives: Float[Array, "B T d"] | None = None) -> dict[str, losses.Sum]:
        """`{"next_behavior": sum}`: each interest state must tell the next behaviour from a sampled one (equation 6).

        `-log sigmoid(h_t . e_(t+1)) - log(1 - sigmoid(h_t . ^e_(t+1)))`, the next behaviour being the next that is not
        padding. Its weight counts the states that have one.

        Args:
          negatives: `^e`, at slot t an item that the user did not choose when behaviour t was chosen.
        """
        if negatives is None:
            raise ValueError("DIEN.auxiliary needs negatives [B, T, d]: at each slot an item that was not chosen then")
        if negatives.shape != encoded.sequence.shape:
            raise ValueError(f"negatives has shape {negatives.shape}, must be {encoded.sequence.shape}")
        following, exists = _next(encoded.mask)
        logits, labels = [], []
        for chosen, items in ((1.0, encoded.sequence), (0.0, negatives)):
            items = jnp.take_along_axis(items, following[..., None], axis=1).astype(jnp.float32)
            logits.append(jnp.sum(jnp.where(exists[..., None], items, 0) * encoded.states, axis=-1))
            labels.append(jnp.full(exists.shape, chosen))
        total, _ = losses.bce_with_logits(jnp.stack(logits), jnp.stack(labels), exists)
        return {"next_behavior": (total, jnp.sum(exists, dtype=jnp.float32))}


def _next(mask: Bool[Array, "B T"]) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """For each behaviour the slot of the next one, and whether there is one."""
    length = mask.shape[1]
    first = jax.lax.cummin(jnp.where(mask, jnp.arange(length), length), axis=1, reverse=True)  # at t or later
    later = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    return jnp.minimum(later, length - 1), mask & (later < length)

"""Multi-head target attention: the candidate asks, the behaviours answer (Vaswani et al., arXiv 1706.03762, section
3.2, with one query; ADS, arXiv 2502.05523, equations 8-12; the exact search unit of SIM, arXiv 2006.05639).

All of it but the softmax is linear, and so the order of its products is free. Keys and values of all behaviours are
each as large as the behaviours, and making, keeping and differentiating them is most of a step's memory traffic.
Here the matrices are moved to where there is less of what they act on:

    K_t . Q = E_t . (W_K^T Q)                 the query goes to the space of the behaviours
    sum_t a_t V_t = W_V sum_t a_t E_t         values are made of what the heads have read
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float

from rec_core.interest import multi_head_gpu
from rec_core.interest.base import Interest, check_positive, masked_softmax


@struct.dataclass
class Mapped:
    """Behaviours, and a linear map of them, `E_t weight + bias`, that is not applied yet.

    Attributes:
      sequence: in the dtype of the computation, zeros at padding; or, for kernels, which read the mask, `as_given`.
    """

    sequence: Float[Array, "B T d"]
    mask: Bool[Array, "B T"]
    linear: tuple[Float[Array, "B d d"], Float[Array, "B d"]] | None = None
    as_given: bool = struct.field(pytree_node=False, default=False)


class Kernel(nn.Module):
    """The matrix of a linear layer to all heads, float32, with the name and the first values of `nn.DenseGeneral`'s."""

    heads: int
    width: int

    @nn.compact
    def __call__(self, d: int) -> Float[Array, "d heads width"]:
        def init(key: Array, shape: tuple[int, int, int]) -> Array:
            return nn.initializers.lecun_normal()(key, (d, self.heads * self.width), jnp.float32).reshape(shape)

        kernel: Array = self.param("kernel", init, (d, self.heads, self.width))
        return kernel


class MultiHead(Interest):
    """Per head `s = sum_t softmax_t(Q_t . K_t / sqrt(width)) V_t`; the heads side by side, `d_out = heads * width`.

    No bias and no matrix after the concatenation: what reads `s` is an MLP, whose first layer is one. It does not read
    time; a model that wants it gives behaviours `[e ; e_time]` (SIM), since target and sequence may differ in width.

    A plug-in in front of it may leave its own linear maps to it, which then cost no pass over the behaviours either:
    `read(encode(E W + b, mask), Q)` is `attend(encoded, project(Q, encoded, G))` with
    `encoded = encode_mapped(E, mask, W, b)`, and `project` is linear in Q.
    """

    heads: int = 4
    width: int = 16  # of a head

    def setup(self) -> None:
        check_positive(self, "heads", "width")
        self.query = Kernel(self.heads, self.width)
        self.key = Kernel(self.heads, self.width)
        self.value = Kernel(self.heads, self.width)

    def encode(
        self,
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Mapped:
        if multi_head_gpu.runs(self.dtype, sequence.shape, self.heads):
            return Mapped(sequence.astype(self.dtype), mask.astype(bool), as_given=True)
        return Mapped(*super().encode(sequence, mask))

    def encode_mapped(
        self,
        sequence: Float[Array, "B T d"],
        mask: Bool[Array, "B T"],
        weight: Float[Array, "B d d"],
        bias: Float[Array, "B d"],
        *,
        time: Float[Array, "B T"] | None = None,
    ) -> Mapped:
        """`encode` of the behaviours `sequence weight + bias`, without making them."""
        linear = (weight.astype(self.dtype), bias.astype(self.dtype))
        return replace(self.encode(sequence, mask), linear=linear)

    def read(self, encoded: Mapped, target: Float[Array, "B d"] | Float[Array, "B G d"]) -> Float[Array, "B d_out"]:
        queries = (target[:, None] if target.ndim == 2 else target).astype(self.dtype)
        return self.attend(encoded, self.project(queries, encoded, queries.shape[1]))

    def project(self, target: Float[Array, "*n d"], encoded: Mapped, groups: int) -> Float[Array, "*n heads d_K"]:
        """The linear map from queries to what `attend` reads where each example has `groups` of them.

        Its result has the promoted dtype of `target` and the computation. d_K is the behaviours' d where the heads'
        queries, made that wide, are well below the size of all behaviours' keys, and else the width of a head.
        """
        query = self.query(target.shape[-1]) * self.width**-0.5
        if self._asks_behaviors(encoded, groups):
            query = jnp.einsum("qhw,dhw->qhd", query, self.key(encoded.sequence.shape[-1]))
        return jnp.einsum("...q,qhd->...hd", target, query.astype(jnp.promote_types(target.dtype, self.dtype)))

    def attend(self, encoded: Mapped, queries: Float[Array, "B G heads d_K"]) -> Float[Array, "B heads*width"]:
        """The interest in targets of which `project` made queries, each of T / G neighbouring behaviours."""
        size, length, d = encoded.sequence.shape
        groups, mask, linear = queries.shape[1], encoded.mask, encoded.linear
        if groups < 1 or length % groups:
            raise ValueError(f"MultiHead: {groups} queries for {length} behaviours; give a number that divides these")
        if encoded.as_given:
            if self._asks_behaviors(encoded, groups):
                value = self.value(d).astype(self.dtype)
                return multi_head_gpu.attend(encoded.sequence, mask, linear, queries, value)
            encoded = replace(encoded, sequence=super().encode(encoded.sequence, mask).sequence, as_given=False)
        if self._asks_behaviors(encoded, groups):
            score = self._score_behaviors(encoded, queries)
        else:
            score = self._score_keys(encoded, queries)
        weight = masked_softmax(score.swapaxes(1, 2).reshape(size, self.heads, length), mask[:, None])
        heads = rows_times(weight.astype(self.dtype), encoded.sequence)
        if linear is not None:
            # The weights' sum is 0 without any behaviour, else 1.
            heads = rows_times(heads.astype(self.dtype), linear[0]) + weight.sum(-1)[..., None] * linear[1][:, None]
        value = self.value(d).astype(self.dtype)
        return jnp.einsum("bhd,dhw->bhw", heads.astype(self.dtype), value).reshape(size, -1)

    def _asks_behaviors(self, encoded: Mapped, groups: int) -> bool:
        # Not as soon as such queries are smaller than keys, since products of a few rows for each group are slow: with
        # ADS over 200 behaviours, queries .8 of the keys' size (chunks of 5), a training step's dense part took 1.79 ms
        # on an H200, and with keys, of smaller chunks and more queries still, 1.51 (`ads-chunks`).
        length, d = encoded.sequence.shape[1:]
        return 2 * groups * d <= length * self.width

    def _score_behaviors(self, encoded: Mapped, queries: Float[Array, "B G heads d"]) -> Float[Array, "B G heads T/G"]:
        sequence, linear = encoded.sequence, encoded.linear
        groups, of_bias = queries.shape[1], None
        if linear is not None:
            weight, bias = linear
            of_bias = jnp.einsum("bgho,bo->bgh", queries, bias, preferred_element_type=jnp.float32)
            queries = jnp.einsum("bgho,bio->bghi", queries, weight)
        chunks = sequence.reshape(len(sequence), groups, -1, sequence.shape[-1])
        score = rows_times(queries, chunks.swapaxes(2, 3))
        return score if of_bias is None else score + of_bias[..., None]

    def _score_keys(self, encoded: Mapped, queries: Float[Array, "B G heads width"]) -> Float[Array, "B G heads T/G"]:
        sequence, linear = encoded.sequence, encoded.linear
        size, groups = queries.shape[:2]
        key = self.key(sequence.shape[-1]).astype(self.dtype)
        if linear is None:
            keys = jnp.einsum("btd,dhw->bthw", sequence, key).astype(jnp.float32)
        else:
            weight, bias = linear
            keys = jnp.einsum("btd,bdhw->bthw", sequence, jnp.einsum("bio,ohw->bihw", weight, key))
            keys = keys.astype(jnp.float32) + jnp.einsum("bo,ohw->bhw", bias, key)[:, None]
        keys = keys.reshape(size, groups, -1, *keys.shape[2:])
        # Not a product of matrices, of which one would have a single row: its operands were laid out anew.
        return jnp.sum(queries[:, :, None].astype(jnp.float32) * keys, axis=-1).swapaxes(2, 3)


@jax.custom_vjp
def rows_times(rows: Float[Array, "*n h k"], matrix: Float[Array, "*n k m"]) -> Float[Array, "*n h m"]:
    """`rows @ matrix` in float32, for rows that are few, such as one for each head.

    The gradient of the matrix, which has as little rank, is written as a sum over the rows, which a compiler adds up
    together with the matrix's other gradients in one pass; as a product of matrices it would be an array of its own.
    """
    return jnp.einsum("...hk,...km->...hm", rows, matrix, preferred_element_type=jnp.float32)


def _forward(rows: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return rows_times(rows, matrix), (rows, matrix)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    rows, matrix = saved
    of_rows = jnp.einsum("...hm,...km->...hk", gradient.astype(matrix.dtype), matrix)
    of_matrix = sum(rows[..., i, :, None] * gradient[..., i, None, :] for i in range(rows.shape[-2]))
    return of_rows.astype(rows.dtype), jnp.asarray(of_matrix).astype(matrix.dtype)


rows_times.defvjp(_forward, _backward)

"""Range attention: the one attention of this code base, and how an implementation of it is chosen.

Row i of a query array sees the keys ``[k_start_i, k_end_i)`` and itself. That covers causal training on packed
rows, grouped queries, queries against a cached prefix, and (without the self term) bidirectional attention.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from rec_core.attention import mosaic_gpu, mosaic_tpu
from rec_core.attention.ranges import ranges_from_segments
from rec_core.attention.reference import range_attention_reference
from rec_core.attention.xla import range_attention_xla


@dataclass(frozen=True)
class Call:
    """What an implementation may look at to say whether it can serve: shapes, dtype, device."""

    batch: int
    rows: int
    keys: int
    heads: int
    kv_heads: int
    head_width: int
    dtype: str
    self_term: bool
    platform: str  # "cpu", "gpu" or "tpu": JAX's default backend

    @classmethod
    def of(cls, q: Array, k: Array, *, self_term: bool) -> "Call":
        """The call of arrays [B, T, H, D] and [B, S, K, D], or of their shapes, on this machine."""
        batch, rows, heads, width = q.shape
        keys, kv_heads = k.shape[1:3]
        return cls(batch, rows, keys, heads, kv_heads, width, str(q.dtype), self_term, jax.default_backend())


@dataclass(frozen=True)
class Implementation:
    """``supports(call)`` is None or the reason why not; ``function`` has the signature of the reference.

    ``opaque``: the compiler cannot split it over a mesh, so it runs on each device's examples and heads.
    """

    supports: Callable[[Call], str | None]
    function: Callable[..., tuple[Array, Array]]
    opaque: bool = False


# In the order in which `implementation=None` tries them; kernels for one device stand before "xla".
IMPLEMENTATIONS: dict[str, Implementation] = {
    "mosaic_gpu": Implementation(mosaic_gpu.supports, mosaic_gpu.range_attention_mosaic_gpu, opaque=True),
    "mosaic_tpu": Implementation(mosaic_tpu.supports, mosaic_tpu.range_attention_tpu, opaque=True),
    "xla": Implementation(lambda call: None, range_attention_xla),
    "reference": Implementation(lambda call: None, range_attention_reference),
}


def choose(call: Call, name: str | None = None) -> str:
    """The implementation that serves ``call``.

    The rule for ``name=None``: the first of ``IMPLEMENTATIONS`` that supports the call: the kernel of the device if
    there is one for its shapes and dtype, then "xla", which takes every call. "reference" only runs when it is named:
    "xla" was at least as fast at every shape measured, the smallest included.

    Raises:
      ValueError: an unknown name, or a named implementation that cannot serve, with its reason.
    """
    if name is None:
        return next(name for name, entry in IMPLEMENTATIONS.items() if entry.supports(call) is None)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown; choose None or one of {', '.join(IMPLEMENTATIONS)}")
    reason = IMPLEMENTATIONS[name].supports(call)
    if reason is not None:
        raise ValueError(f"implementation={name!r} cannot serve this call: {reason}; {call}")
    return name


def range_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    *,
    k_self: Float[Array, "B T K D"] | None = None,
    v_self: Float[Array, "B T K D"] | None = None,
    self_term: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H D"] | tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """Softmax attention of each row over a range of keys and itself.

    Args:
      q: queries. k, v: keys and values; K heads, K divides H, query head h reads key head h // (H // K).
      k_start, k_end: row i sees keys [k_start_i, k_end_i), cut to [0, S). An empty range is legal. The range must not
        hold the row itself when ``self_term`` is on, or it is counted twice.
      k_self, v_self: each row's own key and value; None takes ``k`` and ``v`` themselves, which needs S == T.
      self_term: False for rows that see their range only; an empty range then gives out 0 and lse -inf.
      scale: factor on the logits, 1 / sqrt(D) when None.
      return_lse: also return the log-sum-exp of each row's logits (natural logarithm, at least float32), which is
        differentiable and lets ``merge`` join attention over several sets of keys.
      implementation: None (see ``choose``) or a name of ``IMPLEMENTATIONS``.

    Returns:
      ``out`` in the dtype of ``q``; with ``return_lse`` the pair ``(out, lse)``.

    Raises:
      ValueError: shapes or dtypes that do not fit, or a named implementation that cannot serve.
    """
    if self_term and k_self is None and v_self is None:
        if k.shape[1] != q.shape[1]:
            raise ValueError(
                f"k has {k.shape[1]} rows and q {q.shape[1]}: the self term needs each row's own key and value; give "
                "k_self and v_self, or set self_term=False"
            )
        k_self, v_self = k, v
    _check(q, k, v, k_start, k_end, k_self, v_self, self_term)
    name = choose(Call.of(q, k, self_term=self_term), implementation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    function = IMPLEMENTATIONS[name].function
    if IMPLEMENTATIONS[name].opaque:
        function = functools.partial(_on_each_device, function)
    out, lse = function(q, k, v, k_start, k_end, k_self, v_self, scale=scale)
    return (out, lse) if return_lse else out


def grouped_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    segment_ids: Int[Array, "B T"],
    is_query: Bool[Array, "B T"] | None = None,
    *,
    limit: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T H D"] | tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """Attention over packed rows: causal in each segment, and queries that see their segment's prefix and themselves.

    ``ranges_from_segments`` and ``range_attention`` in one call; see them for the arguments. A model with several
    layers makes the ranges once instead.
    """
    k_start, k_end = ranges_from_segments(segment_ids, is_query=is_query, limit=limit)
    return range_attention(q, k, v, k_start, k_end, scale=scale, return_lse=return_lse, implementation=implementation)


def merge(
    out1: Float[Array, "B T H D"],
    lse1: Float[Array, "B H T"],
    out2: Float[Array, "B T H D"],
    lse2: Float[Array, "B H T"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """Joins the attention of the same rows over two disjoint sets of keys; a set that a row saw nothing of has no say.

    ``lse = log(exp(lse1) + exp(lse2))`` and ``out = out1 exp(lse1 - lse) + out2 exp(lse2 - lse)``, in the dtype of the
    lse, returned in the dtype of ``out1``. Where both lse are -inf, out is 0 and lse -inf, with finite gradients.
    """
    top = jax.lax.stop_gradient(jnp.maximum(lse1, lse2))
    some = top > -jnp.inf
    top = jnp.where(some, top, 0.0)
    weight1, weight2 = jnp.exp(lse1 - top), jnp.exp(lse2 - top)
    total = jnp.where(some, weight1 + weight2, 1.0)
    share1, share2 = (jnp.swapaxes(w / total, 1, 2)[..., None] for w in (weight1, weight2))
    out = (out1 * share1 + out2 * share2).astype(out1.dtype)
    return out, jnp.where(some, top + jnp.log(total), -jnp.inf)


def _on_each_device(
    function: Callable[..., tuple[Array, Array]],
    q: Array,
    k: Array,
    v: Array,
    k_start: Array,
    k_end: Array,
    k_self: Array | None,
    v_self: Array | None,
    *,
    scale: float,
) -> tuple[Array, Array]:
    """``function`` on the examples and heads of each device of the mesh that is set, if one is.

    Examples are split over the mesh's axis "data" and key heads, with their query heads, over "model", each where it
    divides them; else every device of that axis does the work of all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    if all(mesh.shape[name] == 1 for name in axes):
        return function(q, k, v, k_start, k_end, k_self, v_self, scale=scale)
    data = "data" if "data" in axes and q.shape[0] % mesh.shape["data"] == 0 else None
    model = "model" if "model" in axes and k.shape[2] % mesh.shape["model"] == 0 else None
    by_head, by_row = P(data, None, model, None), P(data, None)
    same = k_self is k and v_self is v  # which an implementation may look at
    own = () if k_self is None or same else (k_self, v_self)

    def local(q: Array, k: Array, v: Array, k_start: Array, k_end: Array, *own: Array) -> tuple[Array, Array]:
        return function(q, k, v, k_start, k_end, *((k, v) if same else own or (None, None)), scale=scale)

    return jax.shard_map(
        local,
        axis_names=axes,
        in_specs=(by_head, by_head, by_head, by_row, by_row) + (by_head,) * len(own),
        out_specs=(by_head, P(data, model, None)),
        check_vma=False,
    )(q, k, v, k_start, k_end, *own)


def _check(
    q: Array,
    k: Array,
    v: Array,
    k_start: Array,
    k_end: Array,
    k_self: Array | None,
    v_self: Array | None,
    self_term: bool,
) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q and k must be [batch, length, heads, width]; got shapes {q.shape} and {k.shape}")
    batch, rows, heads, width = q.shape
    kv_heads = k.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k {kv_heads}: the heads of k must divide those of q")
    expected = {
        "k": (k, (batch, k.shape[1], kv_heads, width)),
        "v": (v, (batch, k.shape[1], kv_heads, width)),
        "k_start": (k_start, (batch, rows)),
        "k_end": (k_end, (batch, rows)),
    }
    if self_term:
        if k_self is None or v_self is None:
            raise ValueError("k_self and v_self come together: one of them is None")
        expected |= {
            "k_self": (k_self, (batch, rows, kv_heads, width)),
            "v_self": (v_self, (batch, rows, kv_heads, width)),
        }
    elif k_self is not None or v_self is not None:
        raise ValueError("self_term=False leaves no use for k_self and v_self; leave them out")
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape} to go with q of shape {q.shape}")
        if name in ("k_start", "k_end"):
            if not jnp.issubdtype(array.dtype, jnp.integer):
                raise ValueError(f"{name} has dtype {array.dtype}; ranges are integers: cast it to int32")
        elif array.dtype != q.dtype or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype} and q {q.dtype}; cast all to one floating dtype")

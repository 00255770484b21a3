"""The decoder of LUM and BAHE: RMSNorm, rotary positions, grouped-query range attention, SwiGLU.

Conventions are those of Llama, Qwen2 and Qwen3 in Hugging Face `transformers`, so that their weights fit: rotate-half
rotary with their scalings for long contexts, optional bias on query, key and value, optional RMSNorm per head on query
and key before the rotation, SwiGLU as ``down(silu(gate(x)) * up(x))``. Linen's kernels are [in, out], the transpose of
theirs. Parameters are float32; ``dtype`` is what matrix products run in; norms, rotation and softmax are float32
always. Layers are scanned, so every parameter of ``layers`` carries a leading axis of length ``layers``. In training
without rematerialisation the scan is unrolled: a loop copies all that the backward pass needs to stacks and back, half
of a step's memory traffic by the count of what is compiled for an H100 (135 M parameters, 1,024 tokens); not timed.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from rec_core.attention import IMPLEMENTATIONS, range_attention
from rec_core.sharding import constrain

RMSNorm = nn.RMSNorm  # Zhang & Sennrich, arXiv:1910.07467; linen computes its mean square in float32

_REMAT = ("none", "full", "dots")
_SCALINGS = ("linear", "llama3")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered, so that a longer context turns no further than the one trained on.

    ``kind`` "linear" divides all of them by ``factor`` (Chen et al., arXiv:2306.15595); the rest is not read. "llama3"
    (Llama 3.1 of Hugging Face `transformers`) divides by ``factor`` those that turn fewer than ``low_turns`` times in
    ``context`` positions, leaves those that turn more than ``high_turns`` times, and blends in between.
    """

    kind: str
    factor: float
    low_turns: float = 1.0
    high_turns: float = 4.0
    context: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in _SCALINGS:
            raise ValueError(f"kind={self.kind!r}: choose one of {', '.join(_SCALINGS)}")
        if not 1.0 <= self.factor < float("inf"):
            raise ValueError(f"factor={self.factor}: must be finite and at least 1")
        if not 0.0 < self.low_turns < self.high_turns < float("inf") or self.context < 1:
            raise ValueError(
                f"low_turns={self.low_turns}, high_turns={self.high_turns}, context={self.context}: must be "
                "0 < low_turns < high_turns and context at least 1"
            )

    def divisors(self, frequency: Float[Array, " half"]) -> Float[Array, " half"]:
        """What each frequency (radians a position) is divided by."""
        if self.kind == "linear":
            return jnp.full_like(frequency, self.factor)
        turns = self.context * frequency / (2 * jnp.pi)
        keep = jnp.clip((turns - self.low_turns) / (self.high_turns - self.low_turns), 0, 1)
        return 1 / ((1 - keep) / self.factor + keep)


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of a decoder.

    ``hidden`` is the inner width of SwiGLU; ``dtype`` the compute dtype; ``dropout`` acts on both residual branches;
    ``remat`` says what the backward pass computes again: "none", "full" (each block from its input) or "dots" (all but
    the outputs of weight products and of attention). ``attention`` names an implementation of ``range_attention``.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "kv_heads", "head_width", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads}, kv_heads={self.kv_heads}: kv_heads must divide heads")
        if self.head_width % 2:
            raise ValueError(f"head_width={self.head_width}: rotary positions turn pairs, so it must be even")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError(f"rope_theta={self.rope_theta}, norm_eps={self.norm_eps}: both must be above 0")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: choose float32, bfloat16 or float16")
        if self.remat not in _REMAT:
            raise ValueError(f"remat={self.remat!r}: choose one of {', '.join(_REMAT)}")
        if self.attention is not None and self.attention not in IMPLEMENTATIONS:
            raise ValueError(f"attention={self.attention!r}: choose None or one of {', '.join(IMPLEMENTATIONS)}")

    @property
    def parameters(self) -> int:
        """Number of parameters, final norm included, embeddings not."""
        query, key = self.heads * self.head_width, self.kv_heads * self.head_width
        attention = self.width * (2 * query + 2 * key)
        attention += (query + 2 * key) * self.qkv_bias + 2 * self.head_width * self.qk_norm
        return self.layers * (attention + 3 * self.width * self.hidden + 2 * self.width) + self.width


class KVCache(NamedTuple):
    """Rotated keys and values of tokens seen before; slot s of example b in ``k[:, b, s]``. A pytree."""

    k: Float[Array, "layers B S K D"]
    v: Float[Array, "layers B S K D"]


def empty_cache(config: TransformerConfig, batch: int, slots: int) -> KVCache:
    """A cache of zeros with room for ``slots`` tokens per example."""
    shape = (config.layers, batch, slots, config.kv_heads, config.head_width)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def check_append(cache: KVCache, cache_lengths: np.ndarray, new_lengths: np.ndarray) -> None:
    """Raises ValueError, naming the example, if its new tokens do not fit the cache. Host side.

    Under jit a token without a slot cannot raise: it is not written, and later tokens would not see it.
    """
    slots = cache.k.shape[2]
    used, new = np.asarray(cache_lengths), np.asarray(new_lengths)
    bad = np.flatnonzero((used < 0) | (used + new > slots))
    if bad.size:
        row = bad[0]
        raise ValueError(
            f"example {row}: {used[row]} cached and {new[row]} new tokens do not fit a cache of {slots} slots; make it "
            "with more slots, or recompute from the newest tokens"
        )


def rotary_angles(
    positions: Int[Array, "B T"], head_width: int, theta: float, scaling: RopeScaling | None = None
) -> Float[Array, "B T half"]:
    """Angles ``position * theta ** (-2 i / head_width)``, float32 (Su et al., arXiv:2104.09864), frequencies scaled."""
    frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    if scaling is not None:
        frequency = frequency / scaling.divisors(frequency)
    return positions.astype(jnp.float32)[..., None] * frequency


def rotate(x: Float[Array, "B T H D"], angles: Float[Array, "B T half"]) -> Float[Array, "B T H D"]:
    """Rotate-half form: the pair of element i is element i + D / 2."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _dense(config: TransformerConfig, features: int, name: str, *, bias: bool = False, out: bool = False) -> nn.Dense:
    # Both branches of every layer add to the residual stream: scaling their last kernels keeps its variance near 1.
    scale = 1.0 / (2 * config.layers) if out else 1.0
    init = nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, kernel_init=init, name=name)


class Attention(nn.Module):
    """Multi-head range attention with rotary positions; see ``Transformer`` for the cache."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T width"],
        angles: Float[Array, "B T half"],
        k_start: Int[Array, "B T"],
        k_end: Int[Array, "B T"],
        cache: KVCache | None = None,
        cache_lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T width"], KVCache]:
        """Returns the output and the keys and values: this call's own, or the cache with them written in."""
        c = self.config
        query = _dense(c, c.heads * c.head_width, "query", bias=c.qkv_bias)(x)
        key = _dense(c, c.kv_heads * c.head_width, "key", bias=c.qkv_bias)(x)
        value = _dense(c, c.kv_heads * c.head_width, "value", bias=c.qkv_bias)(x)
        query = query.reshape(*x.shape[:2], c.heads, c.head_width)
        key = key.reshape(*x.shape[:2], c.kv_heads, c.head_width)
        value = value.reshape(*x.shape[:2], c.kv_heads, c.head_width)
        if c.qk_norm:
            query = RMSNorm(epsilon=c.norm_eps, dtype=c.dtype, name="query_norm")(query)
            key = RMSNorm(epsilon=c.norm_eps, dtype=c.dtype, name="key_norm")(key)
        query, key = rotate(query, angles), rotate(key, angles)

        kv = KVCache(key, value)
        if cache is not None:
            kv = cache if cache_lengths is None else jax.tree.map(lambda a, b: _write(a, b, cache_lengths), cache, kv)
        out: Any = range_attention(
            query, kv.k, kv.v, k_start, k_end, k_self=key, v_self=value, implementation=c.attention
        )
        return _dense(c, c.width, "output", out=True)(out.reshape(*x.shape[:2], c.heads * c.head_width)), kv


def _write(cache: Float[Array, "B S K D"], new: Float[Array, "B T K D"], at: Int[Array, " B"]) -> Array:
    """``new`` in slots at_b ... at_b + T - 1 of each example; what has no slot is dropped (see ``check_append``)."""
    batch = jnp.arange(new.shape[0])[:, None]
    slot = at[:, None] + jnp.arange(new.shape[1], dtype=at.dtype)
    slot = jnp.where(slot < 0, cache.shape[1], slot)  # a negative index would count from the end
    return cache.at[batch, slot].set(new.astype(cache.dtype), mode="drop", unique_indices=True)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer, arXiv:2002.05202)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T width"]) -> Float[Array, "B T width"]:
        gate = _dense(self.config, self.config.hidden, "gate")(x)
        up = _dense(self.config, self.config.hidden, "up")(x)
        return _dense(self.config, self.config.width, "down", out=True)(nn.silu(gate) * up)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; returns x and the keys and values if ``return_kv``."""

    config: TransformerConfig
    deterministic: bool = True
    return_kv: bool = False

    @nn.compact
    def __call__(
        self, x: Array, cache: KVCache | None, angles: Array, k_start: Array, k_end: Array, cache_lengths: Any
    ) -> tuple[Array, Any]:
        c = self.config
        normed = RMSNorm(epsilon=c.norm_eps, dtype=c.dtype, name="attention_norm")(x)
        update, kv = Attention(c, name="attention")(normed, angles, k_start, k_end, cache, cache_lengths)
        x = constrain(x + nn.Dropout(c.dropout, deterministic=self.deterministic)(update), P("data"))
        update = SwiGLU(c, name="mlp")(RMSNorm(epsilon=c.norm_eps, dtype=c.dtype, name="mlp_norm")(x))
        x = constrain(x + nn.Dropout(c.dropout, deterministic=self.deterministic)(update), P("data"))
        return x, kv if self.return_kv else None


class Transformer(nn.Module):
    """``config.layers`` blocks, scanned, and a final norm (``final_norm=False`` leaves it out)."""

    config: TransformerConfig
    final_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T width"],
        positions: Int[Array, "B T"],
        k_start: Int[Array, "B T"],
        k_end: Int[Array, "B T"],
        *,
        cache: KVCache | None = None,
        cache_lengths: Int[Array, " B"] | None = None,
        return_kv: bool = False,
        deterministic: bool = True,
    ) -> Float[Array, "B T width"] | tuple[Float[Array, "B T width"], KVCache]:
        """Runs tokens that see the keys ``[k_start, k_end)`` and themselves (``rec_core.attention`` makes ranges).

        Args:
          x: token vectors. positions: index of each token in its own sequence; several tokens may share one.
          cache: without it, ranges are over the T tokens themselves. With it, ranges are over its S slots:
            ``cache_lengths=None`` *reads*: nothing is written, so tokens are queries that do not see each other;
            ``cache_lengths`` [B] *appends*: the tokens' keys and values are first written to slots
            ``cache_lengths[b] ...``, and ranges are over the cache with them in (``ranges_from_lengths(...,
            append=True)``). A token without a slot is not written: call ``check_append`` before.
          return_kv: also return the keys and values: of the tokens (no cache), or the cache (extended in append mode).
          deterministic: False applies dropout and needs ``rngs={"dropout": key}`` if ``config.dropout`` is above 0.

        Returns:
          [B, T, width] in ``config.dtype``, and with ``return_kv`` a ``KVCache``.

        Raises:
          ValueError: a cache of other layers, batch, heads or width, or ``cache_lengths`` without a cache.
        """
        c = self.config
        if x.ndim != 3 or x.shape[-1] != c.width:
            raise ValueError(f"x has shape {x.shape}, expected [batch, length, width={c.width}]")
        for name, array in (("positions", positions), ("k_start", k_start), ("k_end", k_end)):
            if array.shape != x.shape[:2]:
                raise ValueError(f"{name} has shape {array.shape}, expected {x.shape[:2]} to go with x {x.shape}")
        _check_cache(c, x, cache, cache_lengths)

        block = Block
        if c.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=_policy(c.remat))
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
            unroll=1 if deterministic or c.remat != "none" else c.layers,
        )
        angles = rotary_angles(positions, c.head_width, c.rope_theta, c.rope_scaling)
        x = constrain(x.astype(c.dtype), P("data"))
        x, kv = scanned(c, deterministic, return_kv, name="layers")(x, cache, angles, k_start, k_end, cache_lengths)
        if self.final_norm:
            x = RMSNorm(epsilon=c.norm_eps, dtype=c.dtype, name="final_norm")(x)
        return (x, kv) if return_kv else x


def _policy(remat: str) -> Any:
    policies = jax.checkpoint_policies
    if remat == "full":
        return policies.nothing_saveable
    return policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names("range_attention")
    )


def _check_cache(config: TransformerConfig, x: Array, cache: KVCache | None, cache_lengths: Array | None) -> None:
    if cache is None:
        if cache_lengths is not None:
            raise ValueError("cache_lengths without a cache: give the cache to append to (empty_cache makes one)")
        return
    expected = (config.layers, x.shape[0], cache.k.shape[2], config.kv_heads, config.head_width)
    for name, array in (("k", cache.k), ("v", cache.v)):
        if array.shape != expected or array.dtype != jnp.dtype(config.dtype):
            raise ValueError(f"cache.{name} is {array.dtype}{array.shape}, expected {config.dtype}{expected}")
    if cache_lengths is not None and cache_lengths.shape != (x.shape[0],):
        raise ValueError(f"cache_lengths has shape {cache_lengths.shape}, expected ({x.shape[0]},)")

"""Low-rank adaptation of a decoder's layers (Hu et al., arXiv 2106.09685): `y = W x + alpha / rank B A x`.

The additions lie in a tree of their own, so that the layers stay a language model's, and are run beside each matrix:
no sum of weights is made in training, and none of a weight's gradient.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from bahe_jax.config import Lora

_A, _B = "lora_a", "lora_b"
_MODULE = {"gate": "mlp", "up": "mlp", "down": "mlp"}  # the others are of "attention"


def init(key: PRNGKeyArray, layers: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
    """A tree like `layers` (stacked, `[L, in, out]` kernels) of `lora_a` [L, in, r] and `lora_b` [L, r, out].

    A is normal with deviation `1 / sqrt(in)`, B zero: the sum begins as the base model.
    """
    out: dict[str, Any] = {}
    for name, a_key in zip(lora.projections, jax.random.split(key, len(lora.projections))):
        module = _MODULE.get(name, "attention")
        count, width, wide = layers[module][name]["kernel"].shape
        a = jax.random.normal(a_key, (count, width, lora.rank)) * width**-0.5
        out.setdefault(module, {})[name] = {"lora_a": a, "lora_b": jnp.zeros((count, lora.rank, wide))}
    return out


def join(layers: Mapping[str, Any], additions: Mapping[str, Any]) -> dict[str, Any]:
    """One tree of both, for layers that run within `added`."""
    joined = dict(layers)
    for name, value in additions.items():
        joined[name] = join(layers[name], value) if isinstance(value, Mapping) and name in layers else value
    return joined


@contextlib.contextmanager
def added(lora: Lora) -> Iterator[None]:
    """Within it, each Dense layer whose parameters hold `lora_a` and `lora_b` adds `alpha / rank (x A) B`."""

    def call(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y, module = next_call(*args, **kwargs), context.module
        if isinstance(module, nn.Dense) and context.method_name == "__call__" and module.has_variable("params", _A):
            dtype = y.dtype
            pair: list[Array] = [module.get_variable("params", name).astype(dtype) for name in (_A, _B)]
            y = y + (args[0].astype(dtype) @ pair[0]) @ pair[1] * jnp.asarray(lora.alpha / lora.rank, dtype)
        return y

    with nn.intercept_methods(call):
        yield


def merge(layers: Mapping[str, Any], additions: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
    """The layers with `W + alpha / rank (A B)` in place of W: the same outputs without the additions."""
    merged: dict[str, Any] = {name: value for name, value in layers.items()}
    for module, projections in additions.items():
        merged[module] = dict(layers[module])
        for name, pair in projections.items():
            merged[module][name] = {**layers[module][name], "kernel": _sum(layers[module][name]["kernel"], pair, lora)}
    return merged


def _sum(kernel: Array, pair: Mapping[str, Array], lora: Lora) -> Array:
    product = jnp.einsum("lir,lro->lio", pair[_A], pair[_B], precision="highest")
    return (kernel + lora.alpha / lora.rank * product).astype(kernel.dtype)

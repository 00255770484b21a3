"""What a model costs: parameters by group, operations of the dense part, and the compiler's own count of these."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rec_core.ranking.gates import EPNet, FRNet, PPNet
from rec_core.ranking.networks import Inputs, Network


def parameters(params: Mapping[str, Any]) -> dict[str, int]:
    """Number of parameters in the embedding tables and in all the rest.

    Args:
      params: as a model's `init` gives them, `{"tables": {name: [rows, width]}, "net": ...}`; arrays or their shapes
        (`jax.eval_shape`).

    Returns:
      `{"tables": ..., "rest": ...}`.
    """

    def size(tree: Any) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    tables = size(params.get("tables", {}))
    return {"tables": tables, "rest": size(dict(params)) - tables}


def flops(network: Network, inputs: Inputs) -> int:
    """Operations of a network for one example: two a multiply-add of its matrix products, elementwise work left out.

    Args:
      network: a member of `NETWORKS`.
      inputs: arrays or their shapes, such as `jax.eval_shape` gives; the number of examples does not matter.
    """
    count, k = (0, 0) if inputs.fields is None else inputs.fields.shape[1:]
    return network.flops(inputs.x.shape[-1], count, k, 0 if inputs.domain is None else inputs.domain.shape[-1])


def gate_flops(gate: FRNet | EPNet | PPNet, *inputs: Any) -> int:
    """Operations of a gate for one example, counted as in `flops`; PPNet's are those of its towers too.

    Args:
      inputs: what the gate is called with, arrays or their shapes; the number of examples does not matter.
    """
    return gate.flops(*(size for x in inputs for size in x.shape[1:]))


def compiler_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations of one call as the compiler counts them, elementwise work included; nothing runs.

    Args:
      function: a function that `jax.jit` takes.
      arguments: arrays or their shapes.

    Raises:
      ValueError: the backend reports no count.
    """
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis() or {}
    if "flops" not in analysis:
        raise ValueError(f"the compiler of backend {jax.default_backend()!r} reports no flops; count on another")
    return float(analysis["flops"])

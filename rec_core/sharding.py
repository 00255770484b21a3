"""Where arrays live: one table from parameter path to PartitionSpec, for parameters and optimizer state alike.

A mesh has two axes: ``data`` (examples) and ``model`` (widths). Embedding tables are split by row over both, the
kernels of the transformer over ``model`` (Megatron's split: the output of query, key, value, gate and up, the input of
output and down), everything else is replicated. Axes are ``AxisType.Auto``: linen needs it.
"""

import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "model")
BY_EXAMPLE = P("data")

# Path -> spec of the last dimensions; the first rule that matches (re.search on "a/b/c") serves. Scanned layers put
# their axis in front, so a spec is aligned at the right. Linen's Dense kernel is [in, out]; DenseGeneral's is
# [in, heads, width] for query, key, value and [heads, width, in] for output.
RULES: tuple[tuple[str, P], ...] = (
    (r"(^|/)v_(row|col)(/|$)", P()),  # Adafactor's factored moments: one dimension less than the parameter, small
    (r"(^|/)tables/", P(("data", "model"), None)),
    (r"(^|/)(query|key|value|gate|up)/kernel$", P(None, "model")),
    (r"(^|/)(output|down)/kernel$", P("model", None)),
)
WARN_BYTES = 64 * 2**20


def make_mesh(data: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ``data`` x ``model`` mesh with Auto axes over the first ``data * model`` devices.

    Raises:
      ValueError: fewer devices than ``data * model``, or a size below 1.
    """
    if data < 1 or model < 1:
        raise ValueError(f"mesh sizes must be at least 1, got data={data}, model={model}")
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < data * model:
        raise ValueError(
            f"a mesh of data={data} x model={model} needs {data * model} devices, there are {len(devices)}: "
            "make data or model smaller (or simulate devices with XLA_FLAGS=--xla_force_host_platform_device_count=N)"
        )
    return jax.make_mesh((data, model), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[: data * model])


def constrain(x: Any, spec: P = BY_EXAMPLE) -> Any:
    """Asks that ``x`` be laid out by ``spec`` where the current mesh has those axes; otherwise gives ``x`` back.

    The same line serves with a mesh (``jax.set_mesh``), without one, under ``pmap`` and inside ``shard_map``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    auto = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
    names = set(jax.tree.leaves(tuple(spec)))
    return jax.lax.with_sharding_constraint(x, spec) if auto and names <= auto else x


def path_name(path: Sequence[Any]) -> str:
    """``tables/item``, ``net/params/layers/query/kernel``: a key path of ``jax.tree_util`` as text."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def spec_for(path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Sequence[tuple[str, P]] = RULES) -> P:
    """The spec of one array: the first matching rule, right-aligned; a dimension not divided by its axes is whole."""
    rule = next((spec for pattern, spec in rules if re.search(pattern, path)), P())
    last = tuple(rule)[-len(shape) :] if shape else ()
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes))
    wanted = (None,) * (len(shape) - len(last)) + last
    fits = []
    for size, axes in zip(shape, wanted):
        parts = math.prod(sizes[name] for name in ((axes,) if isinstance(axes, str) else axes or ()))
        fits.append(axes if parts > 1 and size > 0 and size % parts == 0 else None)
        if parts > 1 and size % parts and math.prod(shape) * 4 > WARN_BYTES:
            warnings.warn(
                f"{path} {tuple(shape)} is replicated: its dimension of {size} is not a multiple of {parts} devices; "
                f"{size + -size % parts} would be split",
                stacklevel=3,
            )
    return P(*fits)


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Sequence[tuple[str, P]] = RULES) -> Any:
    """A tree of ``NamedSharding`` like ``tree`` (arrays or ShapeDtypeStructs): parameters, optimizer state, or both."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh, rules)), tree
    )


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Examples over ``data``: the sharding of every leaf of a batch (leading axis B)."""
    return NamedSharding(mesh, BY_EXAMPLE)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a host batch on the mesh. With several processes, each gives its own slice of the global batch.

    Raises:
      ValueError: the global batch is not a multiple of the ``data`` axis.
    """
    sharding = batch_sharding(mesh)
    processes = len({device.process_index for device in mesh.devices.flat})
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        size = leaf.shape[0] * processes if leaf.ndim else 0
        if size == 0 or size % mesh.shape["data"]:
            raise ValueError(
                f"batch field {path_name(path)} of shape {leaf.shape} cannot be split over the mesh's data axis of "
                f"{mesh.shape['data']}: make the batch size a multiple of it"
            )
    if processes == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)

"""Training steps of a click model, plain and with ADS around its attention: the whole step, and its dense part."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.results import Row
from experiments.steps import ads_scale, timing
from experiments.steps.ads_scale import TRAIN, Sizes
from experiments.steps.timing import Program
from rec_core import embedding, losses, optimizers, training
from rec_core.ranking import ctr
from rec_core.sharding import make_mesh, put_batch

CYCLE = 4  # batches that lie on the device


@dataclass(frozen=True)
class Variant:
    """An attention alone (`items` None), or with ADS, so many neighbouring behaviours sharing a query."""

    attention: str
    length: int
    items: int | None

    @property
    def name(self) -> str:
        if self.items is None:
            return "alone"
        return "ADS, unchunked" if self.items == 1 else f"ADS, chunks of {self.items}"

    def row(self, what: str) -> Row:
        return {"what": what, "attention": self.attention, "length": self.length, "model": self.name}


def lower_whole(sizes: Sizes, variant: Variant, mesh: Mesh, batch: int | None = None) -> Any:
    """The whole step, lowered: look-ups, dense part, and the optimizer of net and touched rows."""
    module, config = ads_scale.model(sizes, variant.attention, variant.length, variant.items)
    shapes = _shapes(ads_scale.make_batch(sizes, variant.length, batch=batch))
    step = training.make_step(module, config, TRAIN, mesh)
    return step.lower(ads_scale.abstract_state(module, config), shapes)


def lower_dense(sizes: Sizes, variant: Variant) -> Any:
    """The dense part, lowered: from vectors that are there to gradients of net and vectors, and the net's optimizer."""
    module, config = ads_scale.model(sizes, variant.attention, variant.length, variant.items)
    net, state = _net(module, config)
    return jax.jit(partial(_dense_step, config), donate_argnums=(0, 1)).lower(
        *_shapes((net, state, *vectors(sizes, config, variant.length)))
    )


def dense_gflop(sizes: Sizes, variant: Variant) -> float | None:
    """Operations of the dense part as written, 1e9. They are counted for a CPU, where no kernel hides any; None where
    JAX was told to do without (JAX_PLATFORMS)."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    with jax.default_device(cpu):
        return float(lower_dense(sizes, variant).cost_analysis()["flops"]) / 1e9


def vectors(sizes: Sizes, config: ctr.Config, length: int) -> tuple[dict[str, Any], Any, Any]:
    """Shapes of what a batch is after its look-ups, of its mask and its labels."""
    size = sizes.batch

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), jnp.float32)

    found = {
        "sequence": of(length, embedding.width(config.item_features)),
        "target": of(embedding.width(config.item_features)),
    }
    for name, specs in (
        ("user", config.user_features),
        ("context", config.context_features),
        ("domain", config.domain_features),
        ("query", config.query_features),
    ):
        if specs:
            found[name] = of(embedding.width(specs))
    return found, jax.ShapeDtypeStruct((size, length), bool), of()


def _dense_step(config: ctr.Config, net: Any, state: Any, given: dict[str, Any], mask: Any, label: Any) -> Any:
    def loss(net: Any, given: dict[str, Any]) -> Any:
        x = ctr.Vectors(mask=mask, time=None, **({"query": given["target"]} | given))
        logits: Any = ctr.Net(config).apply({"params": net}, x)
        return losses.mean(*ctr.click_sums(logits[:, 0], label, jnp.ones_like(label))["loss"])

    value, (of_net, of_vectors) = jax.value_and_grad(loss, (0, 1))(net, given)
    updates, state = optimizers.transformation(TRAIN).update(of_net, state, net)
    return optax.apply_updates(net, updates), state, value, of_vectors


def measure_whole(
    sizes: Sizes, programs: Mapping[Variant, Program], *, steps: int, repeats: int
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Rows of the whole step for variants of one attention and length, in turn on the same tables; and milliseconds.

    The first variant is what the others are compared with.
    """
    first, mesh = next(iter(programs)), make_mesh()
    made = [ads_scale.make_batch(sizes, first.length, seed=i) for i in range(min(CYCLE, steps))]
    batches = [put_batch(batch, mesh) for batch in made]
    own: dict[Variant, Any] = {}
    shared: list[Any] = []

    def state_of(variant: Variant) -> training.State:
        module, config = ads_scale.model(sizes, variant.attention, variant.length, variant.items)
        if shared and any(leaf.is_deleted() for leaf in jax.tree.leaves(shared)):
            shared.clear()  # a step that failed had taken them
        if variant in own and shared:
            return ads_scale.join_state(own.pop(variant), shared[0])
        own.pop(variant, None)
        return ads_scale.make_state(module, config, mesh, shared[0] if shared else None)

    def run(variant: Variant) -> float:
        state = jax.block_until_ready(state_of(variant))
        state, ms = timed_steps(programs[variant], state, batches, steps)
        own[variant], tables = ads_scale.split_state(state)
        shared[:] = [tables]
        return ms

    return _compare("whole step", programs, run, repeats)


def timed_steps(program: Program, state: Any, batches: Sequence[Any], steps: int) -> tuple[Any, float]:
    """The state after so many steps, and milliseconds a step. Steps follow each other as in training, unwaited for.

    Raises:
      RuntimeError: a loss was not finite: the time of such steps would mean nothing.
    """
    began = time.perf_counter()
    for i in range(steps):
        state, metrics = program.call(state, batches[i % len(batches)])
    jax.block_until_ready((state, metrics))
    ms = 1000 * (time.perf_counter() - began) / steps
    if int(metrics["diverged"]) >= 0:
        raise RuntimeError(f"a timed step gave the loss {float(metrics['loss'])}; lower ads_scale.TRAIN's rate")
    return state, ms


def measure_dense(
    sizes: Sizes, programs: Mapping[Variant, Program], *, steps: int, repeats: int
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Rows of the dense part alone for variants of one attention and length, in turn; and milliseconds."""
    first = next(iter(programs))
    _, config = ads_scale.model(sizes, first.attention, first.length, first.items)
    given, *_ = vectors(sizes, config, first.length)
    inputs = {name: jax.random.normal(jax.random.key(i), x.shape) for i, (name, x) in enumerate(sorted(given.items()))}
    batch = ads_scale.make_batch(sizes, first.length)
    fixed = (inputs, jnp.asarray(batch.mask), jnp.asarray(batch.label))
    states: dict[Variant, Any] = {}

    def run(variant: Variant) -> float:
        module, config = ads_scale.model(sizes, variant.attention, variant.length, variant.items)
        net, state = states.pop(variant, None) or _drawn(_net(module, config))
        jax.block_until_ready((net, fixed))
        began = time.perf_counter()
        for _ in range(steps):
            net, state, loss, gradients = programs[variant].call(net, state, *fixed)
        jax.block_until_ready((net, gradients))
        ms = 1000 * (time.perf_counter() - began) / steps
        if not np.isfinite(float(loss)):
            raise RuntimeError("a timed dense part gave a loss that is not finite")
        states[variant] = (net, state)
        return ms

    rows, ms = _compare("dense part", programs, run, repeats)
    return [row | {"gflop": dense_gflop(sizes, v)} for row, v in zip(rows, programs, strict=True)], ms


def measure_devices(
    sizes: Sizes, variant: Variant, programs: Mapping[str, tuple[Program, int, int]], *, steps: int, repeats: int
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Rows of the whole step on one device and on more, in turn; and milliseconds.

    Args:
      programs: name -> program, devices, examples of the global batch. The first is what the others are compared with.
    """
    module, config = ads_scale.model(sizes, variant.attention, variant.length, variant.items)
    states: dict[str, Any] = {}
    batches: dict[str, list[Any]] = {}
    for name, (_, devices, size) in programs.items():
        made = [ads_scale.make_batch(sizes, variant.length, batch=size, seed=i) for i in range(min(CYCLE, steps))]
        batches[name] = [put_batch(batch, make_mesh(devices)) for batch in made]

    def run(name: str) -> float:
        program, devices, _ = programs[name]
        state = states.pop(name, None) or ads_scale.make_state(module, config, make_mesh(devices))
        states[name], ms = timed_steps(program, jax.block_until_ready(state), batches[name], steps)
        return ms

    there = {name: program for name, (program, _, _) in programs.items() if program.call is not None}
    ms, failed = timing.in_turn({name: partial(run, name) for name in there}, repeats)
    base = next(iter(programs))
    rows = []
    for name, (program, devices, size) in programs.items():
        row = variant.row("devices") | {"case": name, "devices": devices, "batch": size}
        if name not in ms:
            rows.append(row | {"reason": program.reason or failed[name]})
            continue
        row |= timing.summary(ms[name], None) | program.counts()
        if base in ms:
            row["speedup"] = float(np.median(ms[base] / ms[name])) * size / programs[base][2]
        rows.append(row)
    return rows, ms


def _compare(
    what: str, programs: Mapping[Variant, Program], run: Callable[[Variant], float], repeats: int
) -> tuple[list[Row], dict[str, np.ndarray]]:
    there = {variant.name: partial(run, variant) for variant, program in programs.items() if program.call is not None}
    ms, failed = timing.in_turn(there, repeats)
    base, rows = ms.get(next(iter(programs)).name), []
    for i, (variant, program) in enumerate(programs.items()):
        row = variant.row(what)
        if variant.name in ms:
            row |= timing.summary(ms[variant.name], base if i else None) | program.counts()
        else:
            row |= {"reason": program.reason or failed[variant.name]}
        rows.append(row)
    return rows, ms


def _net(module: ModuleType, config: ctr.Config) -> tuple[Any, Any]:
    """Shapes of the net and of its optimizer's state."""
    net = jax.eval_shape(partial(module.init, config=config), jax.random.key(0))["net"]
    return net, jax.eval_shape(optimizers.transformation(TRAIN).init, net)


def _drawn(shapes: tuple[Any, Any]) -> tuple[Any, Any]:
    draw = np.random.default_rng(0)
    net = jax.tree.map(lambda x: jnp.asarray(0.05 * draw.standard_normal(x.shape), x.dtype), shapes[0])
    return net, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

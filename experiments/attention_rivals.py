"""Other people's attention beside ours: cuDNN and tokamax through JAX, PyTorch's in child processes.

Each is called the way that is fastest for it: inputs cut beforehand, ranges known to the compiler, no copy to join what
two of its calls return. A rival that cannot do a case, or is not installed, is named with the reason.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.attention_cases import Case, Direction, Inputs, visible
from rec_core.attention import merge

type Attend = Callable[..., tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]]

ROOT = Path(__file__).parents[1]
TORCH = ("torch flash", "torch cudnn", "torch flex")


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    `prepare` turns the case's inputs into arguments, untimed; `function` takes them, and for the backward pass is
    differentiated in its first three, q, k and v; `join` turns what it returns into the output, untimed.
    """

    name: str
    function: Callable[..., Any]
    prepare: Callable[[Inputs], tuple[Any, ...]] = tuple
    join: Callable[[Any], Array] = lambda out: out
    side: str = "rival"
    chosen: bool = False  # by range_attention itself
    version: str | None = None  # of the rival's library


@dataclass(frozen=True)
class Missing:
    """What was not measured, and why."""

    name: str
    reason: str
    side: str = "rival"


def jax_rivals(case: Case, direction: Direction) -> list[Contender | Missing]:
    """The rivals that JAX runs on this backend."""
    if jax.default_backend() != "gpu":
        return [_plain_jax(case)]
    return [_cudnn(case, direction), *_tokamax(case, direction)]


def _plain_jax(case: Case) -> Contender:
    """JAX's public attention with its XLA implementation and a dense mask."""
    mask = visible(case)[None, None]

    def prepare(inputs: Inputs) -> tuple[Any, ...]:
        q, k, v, _, _, k_self, v_self = inputs
        if k_self is not None and v_self is not None:
            k, v = jnp.concatenate([k, k_self], 1), jnp.concatenate([v, v_self], 1)
        return q, k, v, jnp.asarray(mask)

    def function(q: Array, k: Array, v: Array, mask: Array) -> Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")

    return Contender("jax.nn xla", function, prepare)


def _cudnn(case: Case, direction: Direction) -> Contender | Missing:
    name = "cuDNN"
    if case.kind == "causal":

        def causal(q: Array, k: Array, v: Array) -> Array:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

        return Contender(name, causal, _qkv, version=_cudnn_version())
    if case.kind == "packed":
        function = functools.partial(_cudnn_packed, case)
        return Contender(f"{name} packed offsets", function, _qkv, version=_cudnn_version())
    if direction == "backward":
        return Missing(name, "the log-sum-exp that would join its calls has no gradient in JAX")
    return replace(decomposed(f"{name}, joined calls", case, _cudnn_with_lse), version=_cudnn_version())


def _qkv(inputs: Inputs) -> tuple[Any, ...]:
    return tuple(inputs[:3])


def _cudnn_version() -> str | None:
    from jax._src.lib import cuda_versions

    return None if cuda_versions is None else str(cuda_versions.cudnn_get_version())


def _cudnn_with_lse(q: Array, k: Array, v: Array, *, causal: bool) -> tuple[Array, Array]:
    """cuDNN's output and log-sum-exp [B, H, T] in float32: JAX's public function rounds it to the inputs' dtype."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    mask = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    return fused.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask_type=mask, return_residual=True)


def _cudnn_packed(case: Case, q: Array, k: Array, v: Array) -> Array:
    """Several users a row by cuDNN's offsets, which only JAX's private entry takes."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    lengths = jnp.tile(jnp.asarray(case.segments, jnp.int32), (case.batch, 1))
    # Where each user begins, and -1 for the end of a row: JAX leaves out what is below 0 and strings the rows together,
    # so that with the end of each row in between every later user would stand one place too far.
    starts = np.concatenate([[0], np.cumsum(case.segments)[:-1], [-1]])
    offsets = jnp.tile(jnp.asarray(starts, jnp.int32), (case.batch, 1))
    mask = fused.MaskType.PADDING_CAUSAL
    scale = case.width**-0.5
    return fused.dot_product_attention(
        q, k, v, None, None, lengths, lengths, offsets, offsets, scale=scale, mask_type=mask
    )


def decomposed(name: str, case: Case, attend: Attend) -> Contender:
    """Query tokens by `attend(q, k, v, causal=...) -> (out, lse)`, which knows no ranges: the prefix causally, the
    queries against the whole prefix, and their own keys joined by log-sum-exp."""

    def prepare(inputs: Inputs) -> tuple[Any, ...]:
        q, k, v, _, _, k_self, v_self = inputs
        if case.cached:
            return q, k, v, k_self, v_self
        p = case.prefix
        return q[:, p:], k[:, :p], v[:, :p], k[:, p:], v[:, p:], q[:, :p]

    def function(q: Array, k: Array, v: Array, k_self: Array, v_self: Array, q_prefix: Array | None = None) -> Any:
        out = with_self(*attend(q, k, v, causal=False), q, k_self, v_self)
        return out if q_prefix is None else (attend(q_prefix, k, v, causal=True)[0], out)

    def join(out: Any) -> Array:
        return out if case.cached else jnp.concatenate(out, 1)

    return Contender(name, function, prepare, join)


def with_self(
    out: Float[Array, "B T H D"],
    lse: Float[Array, "B H T"],
    q: Float[Array, "B T H D"],
    k_self: Float[Array, "B T K D"],
    v_self: Float[Array, "B T K D"],
) -> Float[Array, "B T H D"]:
    """Adds each row's own key to attention over other keys."""
    k_self, v_self = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k_self, v_self))
    logit = jnp.sum(q.astype(jnp.float32) * k_self.astype(jnp.float32), -1) * q.shape[-1] ** -0.5
    return merge(out, lse.astype(jnp.float32), v_self, jnp.swapaxes(logit, 1, 2))[0]


def _tokamax(case: Case, direction: Direction) -> Iterator[Contender | Missing]:
    name = "tokamax mosaic"
    if importlib.util.find_spec("tokamax") is None:
        yield Missing(name, "tokamax is not installed")
        return
    try:
        kernel = importlib.import_module("tokamax._src.ops.attention.pallas_mosaic_gpu")
        base = importlib.import_module("tokamax._src.ops.attention.base")
        version = importlib.metadata.version("tokamax")
        plain = kernel.PallasMosaicGpuFlashAttention()
        tile = kernel.ConfigSM90(block_q=128, block_kv=128, num_stages=2)
        tiled = kernel.PallasMosaicGpuFlashAttention(config=tile)
    except Exception as error:  # its own imports fail in many ways, and these names are private
        yield Missing(name, f"import of tokamax failed: {line(error)}")
        return
    if direction == "backward" and case.kind == "grouped":
        yield Missing(name, "the softmax residuals that would join the own keys have no gradient")
        return
    yield replace(_ranged(name, case, plain, base.Mask), version=version)
    if direction == "forward":
        yield replace(_ranged(f"{name} 128x128", case, tiled, base.Mask), version=version)


def _ranged(name: str, case: Case, attention: Callable[..., Any], mask: Callable[..., Any]) -> Contender:
    """tokamax: ranges of keys by `k_start` and `k_end`, own keys of query tokens joined by the softmax residuals."""
    scale = case.width**-0.5

    def residuals(q: Array, k: Array, v: Array, **ranges: Any) -> tuple[Array, Array]:
        options = {"mask": mask(**ranges)} if ranges else {}
        out, (top, total) = attention(q, k, v, logits_scale=scale, return_residuals=True, **options)
        return out, top + jnp.log(total)

    if case.cached:
        return decomposed(name, case, lambda q, k, v, causal: residuals(q, k, v))
    if case.queries:
        end = jnp.minimum(jnp.arange(1, case.rows + 1, dtype=jnp.int32), case.prefix)[None, None]

        def grouped(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            out, lse = residuals(q, k, v, k_end=end)
            p = case.prefix
            return out, with_self(out[:, p:], lse[:, :, p:], q[:, p:], k[:, p:], v[:, p:])

        def join(found: tuple[Array, Array]) -> Array:
            return jnp.concatenate([found[0][:, : case.prefix], found[1]], 1)

        return Contender(name, grouped, _qkv, join)
    starts = np.repeat(np.cumsum([0, *case.segments[:-1]]), case.segments)
    ranges: dict[str, Any] = {"is_causal": True}
    if case.kind == "packed":
        ranges["k_start"] = jnp.asarray(starts, jnp.int32)[None, None]

    def function(q: Array, k: Array, v: Array) -> Array:
        return attention(q, k, v, mask=mask(**ranges), logits_scale=scale)

    return Contender(name, function, _qkv)


@dataclass
class Child:
    """A rival in a process of its own, that may hang or crash. It compiles and checks first, then waits to be let at
    the device: `ready` waits for that, `results` lets it go and returns its rows; both within `limit` seconds."""

    name: str
    process: subprocess.Popen[str]
    limit: float
    errors: Any
    rows: list[dict[str, Any]] = field(default_factory=list)
    compiled: threading.Event = field(default_factory=threading.Event)
    killed: bool = False

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # a library's own talk
            if isinstance(row, dict) and row.get("ready"):
                self.compiled.set()
            elif isinstance(row, dict):
                self.rows.append(row)
        self.compiled.set()

    def tell(self, text: str) -> None:
        """Writes a line to the child. One that has ended cannot read it: its exit status will say why."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()

    def ready(self) -> None:
        if not self.compiled.wait(self.limit):
            self.kill()

    def results(self) -> tuple[list[dict[str, Any]], str]:
        """Rows so far, and "" or why there are not more."""
        self.tell("go")
        self.reader.join(self.limit)
        if self.reader.is_alive():
            self.kill()
        self.reader.join(10.0)
        status = self.process.wait()
        if self.killed:
            return self.rows, f"stopped after {self.limit:.0f} s"
        if status:
            self.errors.seek(0)
            said = [line.strip() for line in self.errors if line.strip()]
            return self.rows, f"ended with status {status}: {said[-1] if said else 'no message'}"[:300]
        return self.rows, ""

    def kill(self) -> None:
        """Ends the process, if it still runs, and all that it started."""
        if self.process.poll() is None:
            self.killed = True
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def children(
    specs: dict[str, dict[str, Any]], limit: float, command: Sequence[str] | None = None
) -> Iterator[list[Child]]:
    """Starts a child for each spec (`name` -> what `attention_torch` reads); none outlives the block."""
    command = command or [sys.executable, "-m", "experiments.attention_torch"]
    found: list[Child] = []
    with ExitStack() as stack:
        for name, spec in specs.items():
            errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, text=True, cwd=ROOT, start_new_session=True
            )
            found.append(Child(name, process, limit, errors))
            stack.callback(found[-1].kill)
            found[-1].tell(json.dumps(spec))
        yield found


def torch_specs(
    cases: Sequence[Case], dtype: str, repeats: int, seed: int, limit: float
) -> dict[str, dict[str, Any]] | Missing:
    """What each child of PyTorch is to do. It gives up compiling before it would be stopped, and keeps what it has."""
    if importlib.util.find_spec("torch") is None:
        return Missing("torch", "PyTorch is not installed")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    common = {"device": device, "dtype": dtype, "repeats": repeats, "seed": seed, "seconds": 0.7 * limit}
    jobs = [asdict(case) | {"kind": case.kind, "directions": case.directions} for case in cases]
    return {name: {"rival": name, "cases": jobs, **common} for name in TORCH}


def line(error: BaseException) -> str:
    """An error in one line of a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

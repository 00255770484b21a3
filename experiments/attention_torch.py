"""PyTorch's attention in a process of its own: `python -m experiments.attention_torch`, which attention-bench starts.

Reads one line of JSON, what to measure; compiles and checks every case; prints {"ready": true}; waits for a line, so
that only one process at a time is on the device; then prints a line of JSON a measurement: case, direction,
implementation, and either ms, ms_low, ms_high, repeats, error, worst_row or a reason. Times are CUDA events around
calls that rotate over distinct inputs; for a cached case also around replays of a CUDA graph of them. The check is that
of `attention_cases`. Imports nothing of this project, so that JAX does not load here.
"""

import functools
import inspect
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SECONDS = 0.02  # that one round of calls should last
MOST_CALLS = 500
SET_BYTES = 256e6  # that all input sets of a case hold together: several times a cache

Case = dict[str, Any]  # the fields of attention_cases.Case, its kind and its directions


@dataclass
class Rival:
    """How a rival computes one case.

    `arrange` turns the case's arrays (q, k, v and, of a cached case, k_self, v_self; all [B, H, T, D]) into arguments
    of `call`, untimed; gradients are taken in the first three. `restore` turns an output or a gradient back.
    `no_gradient` is why there is no backward pass, "" where there is.
    """

    call: Callable[..., Any]
    no_gradient: str = ""
    arrange: Callable[[list[Tensor]], list[Tensor]] = list
    restore: Callable[[Any], Tensor] = field(default=lambda out: out)


@dataclass
class Run:
    """A rival that has compiled and was compared with the reference."""

    case: Case
    rival: Rival
    backward: bool
    errors: dict[str, dict[str, float]]


def main() -> None:
    spec = json.loads(sys.stdin.readline())
    torch.manual_seed(spec["seed"])
    began = time.monotonic()
    runs = []
    for case in spec["cases"]:
        try:
            if time.monotonic() - began > spec["seconds"]:
                raise TimeoutError(f"not reached: compiling the cases before it took {spec['seconds']:.0f} s")
            runs.append(prepare(case, spec))
        except Exception as error:  # a row says so; the other cases go on
            for direction in case["directions"]:
                emit(case, direction, spec["rival"], reason=line(error))
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    for run in runs:
        for direction in run.case["directions"]:
            try:
                time_run(run, direction, spec)
            except Exception as error:
                emit(run.case, direction, spec["rival"], reason=line(error))


def emit(case: Case, direction: str, implementation: str, **values: Any) -> None:
    """Prints a row; a NaN, which JSON does not have, as text."""
    row = {"case": case["name"], "direction": direction, "implementation": implementation, **values}
    row["version"] = torch.__version__
    print(json.dumps({name: str(x) if x != x else x for name, x in row.items()}), flush=True)


def line(error: BaseException) -> str:
    """An error in one line of a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def sizes(case: Case) -> tuple[int, int, int]:
    """(prefix, rows of q, rows of k)."""
    prefix = sum(case["segments"])
    rows = case["queries"] if case["cached"] else prefix + case["queries"]
    return prefix, rows, prefix if case["cached"] else rows


def inputs(case: Case, spec: dict[str, Any]) -> list[Tensor]:
    _, rows, keys = sizes(case)
    shapes = [(case["heads"], rows), (case["kv_heads"], keys), (case["kv_heads"], keys)]
    if case["cached"]:
        shapes += [(case["kv_heads"], rows)] * 2
    dtype = getattr(torch, spec["dtype"])
    return [torch.randn(case["batch"], *s, case["width"], device=spec["device"], dtype=dtype) for s in shapes]


def leaves(rival: Rival, arrays: list[Tensor], backward: bool) -> list[Tensor]:
    """The arguments of the call; with a backward pass q, k and v ask for gradients."""
    arranged = rival.arrange(arrays)
    return [x.detach().requires_grad_(backward and i < 3) for i, x in enumerate(arranged)]


def prepare(case: Case, spec: dict[str, Any]) -> Run:
    """Builds the rival, runs it once each way, which compiles it, and compares with the reference."""
    rival = BUILD[spec["rival"]](case, spec["device"])
    backward = not rival.no_gradient and "backward" in case["directions"]
    arrays = inputs(case, spec)
    arguments = leaves(rival, arrays, backward)
    found = rival.call(*arguments)
    out = rival.restore(found).detach()
    run = Run(case, rival, backward, {})
    d_out, grads = torch.randn_like(out), []
    if backward:
        d_found = torch.randn_like(found)
        d_out = rival.restore(d_found)
        grads = [rival.restore(x) for x in torch.autograd.grad(found, arguments[:3], d_found)]
    for batch, head in ((0, 0), (case["batch"] - 1, case["kv_heads"] - 1)):
        compare(run, batch, head, arrays, d_out, out, grads)
    return run


def compare(
    run: Run, batch: int, head: int, arrays: list[Tensor], d_out: Tensor, out: Tensor, grads: list[Tensor]
) -> None:
    """The errors of one key head of one batch row and its query heads against dense attention in float32."""
    case = run.case
    group = case["heads"] // case["kv_heads"]

    def one(x: Tensor) -> Tensor:
        heads = group if x.shape[1] == case["heads"] else 1
        return x.detach()[batch, head * heads : (head + 1) * heads].float()

    q, k, v = (one(x).requires_grad_(run.backward) for x in arrays[:3])
    keys, values = k, v
    if case["cached"]:
        keys, values = torch.cat([k, one(arrays[3])], 1), torch.cat([v, one(arrays[4])], 1)
    prefix, rows, _ = sizes(case)
    row, key = torch.arange(rows, device=q.device), torch.arange(prefix + case["queries"], device=q.device)
    mask = mask_of(case, q.device)(None, None, row[:, None], key[None])
    logits = (q @ keys.mT * case["width"] ** -0.5).masked_fill(~mask, -math.inf)
    expected = torch.softmax(logits, -1) @ values
    pairs = {"forward": [(one(out), expected.detach())]}
    if run.backward:
        exact = torch.autograd.grad(expected, (q, k, v), one(d_out))
        pairs["backward"] = [(one(x), y) for x, y in zip(grads, exact)]
    for direction, arrays_of in pairs.items():
        own = run.errors.setdefault(direction, {"error": 0.0, "worst_row": 0.0})
        for found, reference in arrays_of:
            difference, norm = (found - reference).norm(dim=-1), reference.norm(dim=-1)
            mean = norm.square().mean().sqrt()
            error = float(difference.square().mean().sqrt() / mean)
            worst = float((difference / norm.clamp(min=float(mean))).max())
            for name, new in (("error", error), ("worst_row", worst)):
                own[name] = new if math.isnan(new) else max(own[name], new)  # from a NaN on it stays NaN


def mask_of(case: Case, device: Any) -> Callable[..., Tensor]:
    """The mask as FlexAttention takes it: (batch, head, row, key) -> whether the row sees the key. The own keys of a
    cached case stand behind the cache."""
    prefix = sum(case["segments"])
    if case["kind"] == "cached":
        return lambda b, h, i, j: (j < prefix) | (j == i + prefix)
    if case["kind"] == "grouped":
        return lambda b, h, i, j: ((j < prefix) & (j <= i)) | (i == j)
    if case["kind"] == "packed":
        lengths = torch.tensor(case["segments"])
        user = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
        return lambda b, h, i, j: (j <= i) & (user[i] == user[j])
    return lambda b, h, i, j: j <= i


def flex(case: Case, device: str) -> Rival:
    """FlexAttention, compiled, with a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config: Any = torch._dynamo.config
    config.recompile_limit = 256  # a compiled function is kept for every case
    _, rows, _ = sizes(case)
    keys = sum(case["segments"]) + case["queries"]
    blocks = create_block_mask(mask_of(case, device), None, None, rows, keys, device=device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    grouped = case["heads"] != case["kv_heads"]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return compiled(q, k, v, block_mask=blocks, enable_gqa=grouped)

    def arrange(arrays: list[Tensor]) -> list[Tensor]:
        if not case["cached"]:
            return arrays
        q, k, v, k_self, v_self = arrays
        return [q, torch.cat([k, k_self], 2), torch.cat([v, v_self], 2)]

    return Rival(call, "" if device == "cuda" else "FlexAttention has no backward pass on a CPU", arrange)


def flash(case: Case, device: str) -> Rival:
    """SDPA's flash kernel; query tokens by joining its calls through the log-sum-exp, packed rows by varlen_attn."""
    if case["kind"] == "causal":
        return sdpa(case, SDPBackend.FLASH_ATTENTION)
    if case["kind"] == "packed":
        return varlen(case, device)
    if case["heads"] != case["kv_heads"]:
        raise ValueError("the entry that returns the log-sum-exp takes no grouped key heads")
    aten, on_cuda = torch.ops.aten, device == "cuda"
    kernel = aten._scaled_dot_product_flash_attention if on_cuda else aten._scaled_dot_product_flash_attention_for_cpu
    prefix, scale = sum(case["segments"]), case["width"] ** -0.5
    unjoined = "the log-sum-exp that joins its calls has no gradient"

    def queries(q: Tensor, k: Tensor, v: Tensor, k_self: Tensor, v_self: Tensor) -> Tensor:
        out, lse = kernel(q, k, v, 0.0, False)[:2]
        own = (q.float() * k_self.float()).sum(-1) * scale
        both = torch.logaddexp(lse.float(), own)
        share, rest = (own - both).exp()[..., None], (lse.float() - both).exp()[..., None]
        return (out.float() * rest + v_self.float() * share).to(out.dtype)

    if case["cached"]:
        return Rival(queries, unjoined)

    def arrange(arrays: list[Tensor]) -> list[Tensor]:
        (qp, qq), (kp, kq), (vp, vq) = ((x[:, :, :prefix].contiguous(), x[:, :, prefix:].contiguous()) for x in arrays)
        return [qp, kp, vp, qq, kq, vq]

    def grouped(qp: Tensor, kp: Tensor, vp: Tensor, qq: Tensor, kq: Tensor, vq: Tensor) -> Any:
        return kernel(qp, kp, vp, 0.0, True)[0], queries(qq, kp, vp, kq, vq)

    return Rival(grouped, unjoined, arrange, lambda outs: torch.cat(outs, 2))


def cudnn(case: Case, device: str) -> Rival:
    """SDPA's cuDNN kernel: plain causal. Query tokens and packed rows go to the same library through JAX."""
    if device != "cuda":
        raise ValueError("cuDNN needs a CUDA device")
    if case["kind"] != "causal":
        raise ValueError("SDPA has no call for it with this backend; cuDNN is measured through JAX")
    return sdpa(case, SDPBackend.CUDNN_ATTENTION)


def sdpa(case: Case, backend: Any) -> Rival:
    grouped = case["heads"] != case["kv_heads"]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    return Rival(call)


def varlen(case: Case, device: str) -> Rival:
    """All users of all rows back to back, [tokens, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = torch.tensor(case["segments"] * case["batch"], dtype=torch.int32)
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    most = int(lengths.max())
    windowed = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if windowed else {"is_causal": True}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return varlen_attn(q, k, v, ends, ends, most, most, **causal)

    def arrange(arrays: list[Tensor]) -> list[Tensor]:
        return [x.transpose(1, 2).flatten(0, 1).contiguous() for x in arrays]

    return Rival(call, "", arrange, lambda x: x.unflatten(0, (case["batch"], -1)).transpose(1, 2))


BUILD: dict[str, Callable[[Case, str], Rival]] = {
    "torch flex": flex,
    "torch flash": flash,
    "torch cudnn": cudnn,
}


def time_run(run: Run, direction: str, spec: dict[str, Any]) -> None:
    """Times one direction and prints its row; a cached case on CUDA gives a second row, replayed from a graph."""
    if direction == "backward" and not run.backward:
        emit(run.case, direction, spec["rival"], reason=run.rival.no_gradient)
        return
    first = inputs(run.case, spec)
    count = min(8, max(2, math.ceil(SET_BYTES / sum(x.nbytes for x in first))))
    sets = [
        leaves(run.rival, arrays, run.backward)
        for arrays in (first, *(inputs(run.case, spec) for _ in range(count - 1)))
    ]
    calls: list[Callable[[], Any]] = [functools.partial(run.rival.call, *x) for x in sets]
    if direction == "backward":
        outs = [call() for call in calls]
        grad = functools.partial(torch.autograd.grad, retain_graph=True)
        calls = [functools.partial(grad, out, x[:3], torch.randn_like(out)) for x, out in zip(sets, outs)]
    on_cuda = spec["device"] == "cuda"
    times = measure(calls, spec["repeats"], on_cuda)
    emit(run.case, direction, spec["rival"], **times, **run.errors[direction])
    if run.case["cached"] and on_cuda:
        name = f"{spec['rival']}, CUDA graph"
        try:
            emit(run.case, direction, name, **replayed(calls, spec["repeats"]), **run.errors[direction])
        except Exception as error:
            emit(run.case, direction, name, reason=line(error))


def measure(calls: Sequence[Callable[[], Any]], repeats: int, on_cuda: bool) -> dict[str, float]:
    """Milliseconds a call: median, least and most of `repeats` rounds over `calls` in rotation."""
    rotation = itertools.cycle(calls)

    def milliseconds(count: int) -> float:
        if not on_cuda:
            began = time.perf_counter()
            for _ in range(count):
                next(rotation)()
            return 1e3 * (time.perf_counter() - began)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            next(rotation)()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    milliseconds(len(calls))
    each = milliseconds(len(calls)) / len(calls)
    count = max(len(calls), min(MOST_CALLS, math.ceil(1e3 * SECONDS / each)))
    milliseconds(count)
    return summary([milliseconds(count) / count for _ in range(repeats)])


def replayed(calls: Sequence[Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The same from a CUDA graph of all calls, replayed: no time of the host between them."""
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for _ in range(4):
            for call in calls:
                call()
    times = measure([graph.replay], repeats, True)
    return {name: x / (4 * len(calls)) if name != "repeats" else x for name, x in times.items()}


def summary(found: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(found), "ms_low": min(found), "ms_high": max(found), "repeats": len(found)}


if __name__ == "__main__":
    main()

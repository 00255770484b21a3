"""What the tests of the GPU kernels share: the interpreter, random arrays, errors."""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def interpreted():
    """Interprets kernels, each program's threads at once, and asserts that no two of them raced."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    # Threads wait for each other inside of XLA's pool: with fewer threads than warpgroups they would wait forever.
    assert int(os.environ.get("NPROC", os.cpu_count() or 1)) >= 8, "set NPROC=16 before JAX starts"
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert not gpu_callbacks.get_races().races_found


def arrays(rows, keys, heads=1, kv_heads=1, width=64, dtype=jnp.bfloat16, batch=1):
    """q, k, v, k_self, v_self, and cotangents of out and lse in float32."""
    key = jax.random.split(jax.random.key(rows * 1000 + keys), 7)
    mine, own, other = (batch, rows, heads, width), (batch, rows, kv_heads, width), (batch, keys, kv_heads, width)
    shapes = [mine, other, other, own, own, mine, (batch, heads, rows)]
    made = [jax.random.normal(k, s).astype(dtype) for k, s in zip(key, shapes)]
    return made[:5] + [x.astype(jnp.float32) for x in made[5:]]


def exact(data):
    return [x.astype(jnp.float32) for x in data]


def error(found, expected):
    return np.linalg.norm(np.float32(found) - expected) / np.linalg.norm(expected)

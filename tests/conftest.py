"""Every test runs on the CPU with eight simulated devices, so that meshes and pmap are real."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# The interpreter of GPU kernels blocks a thread of XLA's pool for each warpgroup; a pool of two would never end.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # tests compile much and run little: half the time
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Two thirds of a small program's compilation: emitting fusions through MLIR, and splitting the rest over threads.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count=1",
)
for _flag in _FLAGS:
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

from hypothesis import settings  # noqa: E402  (after the environment is set)

# Compilation and a shared two-core machine make single examples slow: no deadline; derandomised so that CI repeats.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("default")

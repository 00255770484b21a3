"""Every test runs on the CPU with eight simulated devices, so that meshes and pmap are real."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# The interpreter of GPU kernels blocks a thread of XLA's pool for each warpgroup; a pool of two would never end.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # tests compile much and run little: half the time
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

from hypothesis import settings  # noqa: E402  (after the environment is set)

# Compilation and a shared two-core machine make single examples slow: no deadline; derandomised so that CI repeats.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("default")

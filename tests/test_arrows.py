"""Imports point one way: rec_core knows no system, the systems do not know each other, nothing imports experiments."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SYSTEMS = ("ads_jax", "lum_jax", "sim_jax", "bahe_jax")
ALLOWED = {
    "rec_core": {"rec_core"},
    **{system: {"rec_core", system} for system in SYSTEMS},
    "experiments": {"rec_core", *SYSTEMS, "experiments"},
}
# Packages that only the module that owns them imports, at any depth.
OWNERS = {
    "grain": {"rec_core/data/pipeline.py"},
    "array_record": {"rec_core/data/records.py", "rec_core/data/writer.py"},
    "orbax": {"rec_core/checkpoint.py"},
    "lmdb": {"rec_core/store/lmdb_environment.py"},
    "redis": {"rec_core/store/redis.py"},
    "polars": {"rec_core/data/readers.py", "rec_core/data/tables.py"},
    "matplotlib": {"experiments/figures.py"},
    "torch": {"experiments/attention_torch.py"},
    "tyro": {"experiments/__main__.py", "experiments/tools.py"},
    "safetensors": {"bahe_jax/safetensors_files.py"},
    "gguf": {"bahe_jax/gguf_file.py"},
    "tokenizers": {"bahe_jax/tokenizer.py"},
}


def imports(path: Path) -> set[str]:
    """Top-level names of all packages that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_arrows_point_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        inside = imports(path) & set(ALLOWED)
        assert inside <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {sorted(inside - ALLOWED[package])}"


def test_heavy_packages_are_imported_by_their_owner_only():
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            for heavy in imports(path) & set(OWNERS):
                assert name in OWNERS[heavy], f"{name} imports {heavy}, which {sorted(OWNERS[heavy])} own"


def test_model_packages_import_with_jax_flax_jaxtyping_and_numpy_only():
    program = (
        "import sys\n"
        f"import {', '.join(SYSTEMS)}, lum_jax.two_tower, lum_jax.knowledge, rec_core.ranking.ctr\n"
        "import sim_jax.serving, sim_jax.resident, sim_jax.tree, bahe_jax.language_model, bahe_jax.reader\n"
        f"loaded = sorted(set(sys.modules) & {set(OWNERS) | {'tensorstore', 'tqdm', 'experiments'}!r})\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

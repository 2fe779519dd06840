"""Imports point one way, and only some modules import heavy libraries."""

import ast
import subprocess
import sys

import pytest

from tests.commands import ROOT

# Each package or module imports only from its own line and from the lines above it.
LAYERS = [
    {"errors", "version"},
    {"extras"},
    {"mapping", "checks", "fields"},
    {"execution"},
    {"config"},
    {"params"},
    {"runtime", "data"},
    {"models"},
    {"train"},
    {"store"},
    {"growth"},
    {"interop"},
    {"inference"},
    {"runs"},
    {"aot", "sft"},
    {"studies"},
    {"commands"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted((ROOT / "flm_jax").rglob("*.py"))
OWNERS = {
    "flax.linen": {"models"},
    "flax": {"models"},
    "seqio": {"data"},
    "tensorflow": {"data"},
    "orbax": {"store"},
    "tensorstore": {"store"},
    "ml_collections": {"commands"},
}


def module_of(path):
    return path.relative_to(ROOT / "flm_jax").with_suffix("").parts[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = module_of(path)
    for name in imported(path):
        for library, owners in OWNERS.items():
            if name == library or name.startswith(library + "."):
                assert module in owners, f"{path} imports {name}"
        parts = name.split(".")
        if parts[0] == "flm_jax" and module != "__init__":
            assert LEVEL[parts[1]] <= LEVEL[module], f"{path} imports {name}"
        assert parts[0] not in ("experiments", "configs"), f"{path} imports {name}"


def test_growth_imports_no_heavy_library():
    code = (
        "import sys, flm_jax.growth\n"
        "print([m for m in ('tensorflow', 'seqio', 'orbax', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"

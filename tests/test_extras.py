"""The core of the installation works without the extras, and a missing one is named in one line."""

import ast
import importlib.metadata
import re
import runpy
import subprocess
import sys
from unittest import mock

import pytest

from flm_jax import extras
from flm_jax.errors import UserError
from flm_jax.version import __version__
from tests.commands import ROOT

# Refuses what the extra [train] installs, as if it were missing.
BLOCKED = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {tuple(extras.OF_PACKAGE)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
# Import names that differ from the names of their distributions.
DISTRIBUTIONS = {
    "absl": "absl-py", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn", "lm_eval": "lm-eval"
}  # fmt: skip
# What comes with a package that is listed.
WITH = {"ml_dtypes": "jax", "yaml": "flax", "threadpoolctl": "scikit-learn", "safetensors": "torch"}


@pytest.fixture(scope="module")
def declared():
    """The arguments of setup.py."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def run_blocked(code):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_tree_grows_with_the_core_alone():
    done = run_blocked(
        # The control: it is blocked.
        "try:\n    import tensorflow\nexcept ModuleNotFoundError:\n    print('blocked')\n"
        "import jax\n"
        "from flm_jax import ModelSpec, Param, grow, growth, plan, UserError\n"
        "table = {'w': Param.of('embed:in mlp:out')}\n"
        "small, big = (ModelSpec(table, {'embed': 4, 'mlp': n}) for n in (6, 12))\n"
        "grown = grow({'w': jax.numpy.ones((4, 6))}, plan(small, big, 'tile'), jax.random.key(0))\n"
        "print(grown['w'].shape, 'tensorflow' in sys.modules)\n"
        "try:\n    from flm_jax import run\nexcept UserError as error:\n    print(error)\n"
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["blocked", "(4, 12) False"]
    assert lines[2].startswith("flm_jax.run needs the package ")
    assert lines[2].endswith("which is not installed; pip install 'flm_jax[train]'")


def test_every_command_names_the_missing_extra():
    done = run_blocked(
        "from flm_jax.commands import front\n"
        "for name in front.COMMANDS:\n"
        "    print(front.run([*name.split(), '--help']) in (0, 2))\n"
        "print(front.run(['train', '--config=configs/demo.py', '--workdir=/nowhere']))\n"
    )
    assert "False" not in done.stdout and "Traceback" not in done.stderr
    refused = done.stderr.splitlines()
    assert all(line.endswith(("pip install 'flm_jax[train]'", "[hf]'")) for line in refused)
    assert any(line.startswith("flm train: this needs the package ") for line in refused)


def test_only_the_packages_of_an_extra_are_named():
    missing = ModuleNotFoundError("No module named 'torch'", name="torch.nn")
    words = r"^x needs the package torch, .*\[hf\]', or y$"
    with pytest.raises(UserError, match=words), extras.named("x", "y"):
        raise missing
    with pytest.raises(ModuleNotFoundError), extras.named():
        import flm_jax.nothing  # noqa: F401
    with pytest.raises(UserError, match=r"gcsfs"), mock.patch("importlib.util.find_spec") as find:
        find.return_value = None
        extras.require("gcsfs")


def test_setup_lists_every_package_that_is_imported(declared):
    def names(requirements):
        return {r.partition("[")[0].partition(">")[0].partition("=")[0] for r in requirements}

    core = names(declared["install_requires"])
    optional = {name: names(listed) for name, listed in declared["extras_require"].items()}
    assert optional["train"] <= optional["dev"]
    found = set()
    for path in (ROOT / "flm_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    for name in found - set(sys.stdlib_module_names) - {"flm_jax"}:
        listed = DISTRIBUTIONS.get(name, WITH.get(name, name))
        if name in extras.OF_PACKAGE:
            assert listed in optional[extras.OF_PACKAGE[name]], name
        else:
            assert listed in core | optional["train"], name
            assert name in WITH or listed in core or name == "scipy", name  # jax installs scipy


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(__version__)} - \d{{4}}-\d\d-\d\d$", changes, re.M)


def test_the_versions_of_python_are_true(declared):
    assert declared["python_requires"] == ">=3.11,<3.14"
    listed = [c.rpartition(" ")[2] for c in declared["classifiers"] if ":: 3." in c]
    assert listed == ["3.11", "3.12", "3.13"]
    metadata = importlib.metadata.metadata("tensorflow")
    assert "Programming Language :: Python :: 3.13" in metadata.get_all("Classifier")

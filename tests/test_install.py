"""The package, built and installed as a wheel, and used from an empty folder."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from flm_jax.version import __version__
from tests.commands import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder in which the wheel is installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("install")
    for name in ("flm_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    subprocess.run(
        [
            *pip,
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            folder / "dist",
            folder / "source",
        ],
        check=True,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    shutil.rmtree(folder / "source")
    return folder / "site"


def flm(site, folder, *args):
    """Returns the standard output of the installed command, called in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [site / "bin" / "flm", *args], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_says_what_it_needs(site):
    (metadata,) = site.glob("flm_jax-*.dist-info/METADATA")
    lines = metadata.read_text().splitlines()
    assert "Requires-Python: >=3.11,<3.14" in lines
    core = {line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line}
    assert "Requires-Dist: optax>=0.2.8" in core
    assert not any(name in line for line in core for name in ("seqio", "tensorflow", "orbax"))
    assert 'Requires-Dist: seqio; extra == "train"' in lines
    extras = {line.removeprefix("Provides-Extra: ") for line in lines}
    assert {"train", "cuda12", "tpu", "hf", "gguf", "gcs", "s3", "docs", "dev"} <= extras


def test_the_command_and_the_configs_work_in_any_folder(site, tmp_path):
    assert flm(site, tmp_path, "--version") == f"flm {__version__}\n"
    assert (site / "flm_jax/py.typed").is_file() and (site / "flm_jax/runs").is_dir()
    for config in ("configs/tele_flm_1t.py", "tele_flm_1t"):
        described = json.loads(flm(site, tmp_path, "describe", f"--config={config}", "--json"))
        assert described["params"] == 1_083_735_265_280
    assert "| `msg` |" in flm(site, tmp_path, "growth", "check", "--list")
    (tmp_path / "own.py").write_text(
        "from flm_jax.commands import config_files\n"
        "def get_config():\n"
        "    config = config_files.shipped('tele_flm_proxy').get_config()\n"
        "    config.model.num_layers = 1\n"
        "    return config\n"
    )
    described = json.loads(flm(site, tmp_path, "describe", "--config=own.py", "--json"))
    assert 0 < described["params"] < 281_215_488
    assert not (tmp_path / "configs").exists()

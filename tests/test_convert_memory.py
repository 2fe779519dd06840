"""Peak memory of a conversion of gigabytes, measured in a separate process."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from flm_jax.config import TransformerConfig
from flm_jax.interop import hf_config, names, tensor_files
from flm_jax.params import axes
from tests.commands import ROOT

MEMORY_SCRIPT = """
import json, sys
from orbax.checkpoint import v1
from flm_jax import interop

def mib(key):
    return int(open("/proc/self/status").read().split(key)[1].split()[0]) / 1024

base = mib("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
done = interop.convert(*sys.argv[1:])
print(json.dumps({"above": mib("VmHWM:") - base, **done}))
"""


@pytest.mark.slow
def test_two_gigabytes_in_bounded_memory(tmp_path):
    """A sharded checkpoint of 2 GB becomes a run, with at most 1.2 GiB of additional memory."""
    config = TransformerConfig(32000, 16, 2048, 16, 128, 2816, 4)
    folder = tmp_path / "big"
    folder.mkdir()
    shapes = names.shapes(axes.table(config), axes.axis_sizes(config))
    writer = tensor_files.TensorsWriter(folder, shapes, np.dtype(np.float32), 500_000_000)
    assert writer.num_bytes > 2e9 and len(list(folder.glob("*.safetensors"))) > 4
    some = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)
    for name, shape in shapes.items():
        writer.write(name, 0, np.resize(some, shape))
    values = hf_config.write(config, "llama", "float32", {}, 2048)
    (folder / "config.json").write_text(json.dumps(values))
    target = tmp_path / "run"
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(folder), str(target), "flm"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    result = json.loads(done.stdout)
    assert result["bytes_read"] == writer.num_bytes
    assert result["above"] < 1.2 * 1024
    assert result["gb_per_s"] > 0 and "B/s" in done.stderr
    for large in (folder, target):  # pytest keeps its last folders, and these are large
        shutil.rmtree(large)

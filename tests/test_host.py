"""Memory of the host process: what is kept for the next step, and what goes back."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import numpy as np
from flm_jax.runtime import host

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

host.keep_freed()
host.return_freed({state})
x = np.ones(200 << 17)  # 200 MB
before = resident()
del x
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
@pytest.mark.parametrize(("state", "kept"), [(1 << 20, True), (1 << 50, False)])
def test_memory_is_kept_beside_a_small_state_only(state, kept):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(state=state)], capture_output=True, check=True
    )
    assert (int(result.stdout) < 100e6) == kept


@pytest.mark.parametrize(("given", "found"), [("", "cpu"), ("cuda", "cuda")])
def test_describing_an_accelerator_looks_for_none(given, found):
    """JAX is imported already, as in a command."""
    script = "import jax; from flm_jax.runtime import host; host.prefer_cpu(); "
    script += "print(jax.config.jax_platforms)"
    environment = os.environ | {"JAX_PLATFORMS": given}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, env=environment, text=True
    )
    assert result.stdout.split() == [found]

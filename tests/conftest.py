"""Settings of all tests: eight fake CPU devices, and no silent promotion of dtypes or ranks.

Tests compile many tiny models and run each of them only a few times, so quick compilation saves
time.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Read once, by whatever imports etils first: buckets are read by their own clients.
os.environ["EPATH_USE_TF"] = "false"

import jax
import pytest

from flm_jax.runtime import host

host.compile_quickly()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees a module's compiled programs; a process with too many memory mappings crashes."""
    yield
    jax.clear_caches()

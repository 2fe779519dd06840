"""Eight fake CPU devices; strict dtypes and ranks, so that nothing is promoted silently.

Tests compile many tiny models and run each a few times, so quick compilation saves time.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from flm_jax.runtime import host

host.compile_quickly()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

"""What a result depends on besides its config: machine and versions."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform

import jax

from flm_jax import mapping
from flm_jax.version import __version__

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def environment() -> dict[str, str]:
    """Names the processor or accelerator, and the versions of what computes."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "machine": _machine(),
        "python": platform.python_version(),
        "flm_jax": __version__,
        **versions,
    }


def _machine() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()})"


def digest(values: dict[str, str]) -> str:
    """A short digest of an environment."""
    return mapping.digest(values)[:12]

"""What a result depends on besides its config: machine, versions, devices, flags."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

from flm_jax.version import __version__

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Fields of `at_start` whose change may change the bits of a run that goes on.
MAY_CHANGE_BITS = (
    "machine", "platform", "devices", "processes", "cores", "flags", "jax", "jaxlib", "flax",
    "optax", "flm_jax", "commit",
)  # fmt: skip


def environment() -> dict[str, str]:
    """Names the processor or accelerator, and the versions of what computes."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "machine": _machine(),
        "python": platform.python_version(),
        "flm_jax": __version__,
        **versions,
    }


def at_start() -> dict[str, Any]:
    """Describes what this process computes with, as JSON values: `environment` and more.

    `cores` are those that this process may use: XLA's thread pool has one thread for each. `flags`
    are XLA's, as the environment has them.
    """
    return {
        **environment(),
        "commit": commit(pathlib.Path(__file__).parents[2]),
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": _cores(),
        "flags": {
            name: os.environ[name]
            for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
            if os.environ.get(name)
        },
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists the fields that may change bits and differ, with both values.

    >>> changes({"cores": 2, "python": "3.11"}, {"cores": 1, "python": "3.12"})
    ['cores: 2 -> 1']
    """
    return [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in MAY_CHANGE_BITS
        if before.get(name) != now.get(name)
    ]


def commit(root: pathlib.Path) -> str | None:
    """Reads the commit that is checked out in a folder; None if it is no git checkout."""
    try:
        git = root / ".git"
        if git.is_file():  # a further worktree: its folder names the common one
            git = (root / git.read_text().removeprefix("gitdir:").strip()).resolve()
        shared = git / "commondir"
        common = (git / shared.read_text().strip()).resolve() if shared.exists() else git
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        for folder in (git, common):
            if (folder / name).is_file():
                return (folder / name).read_text().strip()
        packed = (common / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {name}"))
    except (OSError, UnicodeDecodeError, StopIteration):
        return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _machine() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()})"

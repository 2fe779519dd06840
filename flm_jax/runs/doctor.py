"""What `flm doctor` reports: devices, mesh and files as each process sees them, and what is wrong.

`look` describes this process, `problems` judges the descriptions of all of them. The latter is a
function of plain values.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flm_jax.config import ExperimentConfig
from flm_jax.data import files
from flm_jax.errors import UserError
from flm_jax.runs.chain import on_devices
from flm_jax.runtime import clusters, paths, processes
from flm_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "libtpu", "orbax-checkpoint", "tensorstore")
_GPU, _TPU = re.compile(r"nvidia\d+"), re.compile(r"accel\d+")


def look(needs: Sequence[tuple[str, str, bool]]) -> dict[str, Any]:
    """Describes this process.

    Args:
      needs: (what, path, whether it must be writable) of the files that a run uses.

    Returns:
      JSON values, for `problems`.
    """
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    return {
        "process": jax.process_index(),
        "host": socket.gethostname(),
        "launcher": clusters.launcher(os.environ) or "none",
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "devices": len(devices),
        "ids": [device.id for device in devices],
        "installed": installed(os.environ),
        "memory_bytes": stats.get("bytes_limit"),
        "versions": versions(),
        "unreachable": [line for need in needs if (line := unreachable(*need))],
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python, of this package and of those that run the devices."""
    found = {"python": platform.python_version(), "flm_jax": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def installed(environment: Mapping[str, str], root: pathlib.Path = pathlib.Path("/dev")) -> int:
    """Returns how many accelerators this host offers to its processes.

    Args:
      environment: Slurm's count, or the user's own list of visible GPUs, precedes the host's.
      root: the folder of the host's devices; for tests.
    """
    for count in (clusters.on_host(environment), clusters.visible(environment)):
        if count is not None:
            return count
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    vfio = [path for path in (root / "vfio").glob("*") if path.name.isdigit()]
    return sum(bool(_GPU.fullmatch(name) or _TPU.fullmatch(name)) for name in names) or len(vfio)


def needs_of(config: ExperimentConfig | None, workdir: str) -> list[tuple[str, str, bool]]:
    """Returns what a run reads and writes, for `look`."""
    needs = [("workdir", workdir, True)]
    if config is not None:
        needs += [
            ("stages[0].source", config.stages[0].source, False),
            *(
                (f"data.{name}", str(root), False)
                for name in ("path", "validation_path")
                for root in files.roots(getattr(config.data, name), f"data.{name}")
            ),
        ]
        if config.data.vocabulary not in ("bytes", "source"):
            needs.append(("data.vocabulary", config.data.vocabulary, False))
    return [need for need in needs if need[1]]


def unreachable(what: str, path: str, write: bool) -> str:
    """Says why a path cannot be used; "" if it can. Leaves nothing behind."""
    try:
        where = paths.of(path, what)
        if not paths.remote(where):
            return _not_on_this_disk(what, where, write)
        paths.check_bucket(where, what)
        if not write:
            return "" if where.exists() else f"{what} {path} does not exist"
        probe = where / f".probe-{socket.gethostname()}-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except UserError as error:
        return str(error)
    except Exception as error:  # each object store's client has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"{what} {path} cannot be {'written' if write else 'read'}: {reason}"
    return ""


def _not_on_this_disk(what: str, path: pathlib.Path, write: bool) -> str:
    if not write:
        return (
            "" if os.access(path, os.R_OK) else f"{what} {path} does not exist or is not readable"
        )
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return ""
    return f"{what} {path} cannot be written: {there} is not a folder that this user can write to"


def meshes(config: ExperimentConfig) -> tuple[list[dict[str, int]], str]:
    """Returns each stage's mesh (devices by axis) and what is wrong with one; "": nothing."""
    try:
        _, layouts = on_devices(config, jax.devices())
    except UserError as error:
        return [], str(error)
    return [dict(layout.mesh.shape) for layout in layouts], ""


def problems(seen: Sequence[Mapping[str, Any]], counts: Mapping[int, int]) -> list[str]:
    """Judges what the processes see, one line for each problem.

    Args:
      seen: descriptions by `look`: of all processes, or of this one if `counts` differ.
      counts: number of devices of each process.
    """
    found = [line for line in [processes.uneven(counts)] if line]
    hosts = defaultdict(list)
    for one in seen:
        hosts[one["host"]].append(one)
    # A process that cannot ask the others knows only how many of its own host's devices it uses.
    if not found or len(counts) == 1:
        found += [line for host, there in hosts.items() for line in _idle(host, there)]
    for name in ("platform", "kind", "versions"):
        differing = {str(one[name]): one["process"] for one in seen}
        if len(differing) > 1:
            told = "; ".join(f"process {process}: {value}" for value, process in differing.items())
            found.append(f"processes differ in {name} ({told}); give all of them the same")
    for one in seen:
        found += [f"process {one['process']} on {one['host']}: {x}" for x in one["unreachable"]]
    return found


def _idle(host: str, there: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says whether the processes on a host leave some of its accelerators idle."""
    used, available = sum(one["devices"] for one in there), there[0]["installed"]
    if not available:
        return []
    if there[0]["platform"] == "cpu":
        return [
            f"host {host}: JAX computes on the CPU, and {available} accelerators are idle; install "
            "jax with the extra for them (cuda12, tpu), and unset JAX_PLATFORMS"
        ]
    # Each process of a launcher that shows it only its own GPUs counts those alone.
    if there[0]["launcher"] == "none" and len(there) > 1:
        return []
    if used < available:
        return [
            f"host {host}: {used} of {available} devices are used by {len(there)} "
            f"process{'es' * (len(there) > 1)}; start one process per host that sees all of them, "
            "or one per device"
        ]
    return []

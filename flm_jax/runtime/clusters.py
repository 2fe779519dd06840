"""What a launcher tells a process about its group: Slurm, Open MPI, TPU pods, Kubernetes.

`jax.distributed.initialize` finds the coordinator, the number of processes and its own index. It
also assumes one device per process wherever the launcher numbers the processes of a host: under
Slurm, one process per host would use GPU 0 of eight (jax 0.10, `jax/_src/clusters/cluster.py`). So
the devices are derived here, from the environment alone, and given explicitly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flm_jax.errors import UserError

Environment = Mapping[str, str]

# In jax's order: Open MPI inside a Slurm job counts as Open MPI.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def launcher(environment: Environment) -> str:
    """Returns what started the process: "openmpi", "slurm", "tpu", "kubernetes" or "".

    >>> launcher({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_JOB_ID": "7"})
    'openmpi'
    """
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return "openmpi"
    if all(name in environment for name in _SLURM):
        return "slurm"
    # GKE names the pod's TPU hosts. A TPU VM outside GKE is known only to its metadata server.
    if "TPU_WORKER_HOSTNAMES" in environment or "TPU_PROCESS_ADDRESSES" in environment:
        return "tpu"
    return "kubernetes" if "KUBERNETES_SERVICE_HOST" in environment else ""


def group(environment: Environment, have_kubernetes: bool) -> dict[str, Any]:
    """Returns what `jax.distributed.initialize` cannot find itself about the group of processes.

    Args:
      environment: the process's environment variables.
      have_kubernetes: whether the package `kubernetes` is installed.

    Returns:
      Keyword arguments for it.

    Raises:
      UserError: something is missing; says what.
    """
    found = launcher(environment)
    if found == "kubernetes" and not have_kubernetes:
        raise UserError(
            "this is a Kubernetes pod, and finding its group needs the package kubernetes; install "
            "flm_jax[k8s], or give coordinator, process and processes",
            argument="distributed",
        )
    if found != "openmpi":
        return {}
    if not {"OMPI_MCA_orte_hnp_uri", "JAX_COORDINATOR_ADDRESS"} & environment.keys():
        raise UserError(
            "Open MPI 5 does not tell processes where the first one is; start them with "
            "mpirun -x JAX_COORDINATOR_ADDRESS=HOST0:1234",
            argument="distributed",
        )
    return {
        "num_processes": int(environment["OMPI_COMM_WORLD_SIZE"]),
        "process_id": int(environment["OMPI_COMM_WORLD_RANK"]),
    }


def devices(environment: Environment) -> dict[str, Any]:
    """Returns the devices of this process, as a keyword argument of `jax.distributed.initialize`.

    {}: jax's own choice is right (all devices; or JAX_LOCAL_DEVICE_IDS, if the user sets it).
    """
    counted = launcher(environment) in ("openmpi", "slurm")
    if not counted or "JAX_LOCAL_DEVICE_IDS" in environment:
        return {}
    return {"local_device_ids": local_devices(environment)}


def local_devices(environment: Environment) -> list[int]:
    """Returns the GPUs of this process, as positions among those that it sees; []: all of them.

    A process that is alone on its host takes all that it sees. Several take equal parts in order,
    unless the launcher has already shown to each only its own (`--gpus-per-task`).

    Args:
      environment: of a process that Slurm or Open MPI started.

    Raises:
      UserError: the visible GPUs do not divide among the host's processes.
    """
    count, index = _on_this_host(environment)
    seen, allocated = visible(environment), on_host(environment)
    if seen is None:
        seen = allocated
    if seen is None:  # CPUs, or GPUs without a list: all of them, or one each
        return [] if count == 1 else [index]
    own = seen == 1 or (allocated is not None and seen * count <= allocated)
    if count == 1 or own:
        return list(range(seen))
    if seen % count:
        raise UserError(
            f"{count} processes on this host see the same {seen} GPUs, which do not divide among "
            "them; start one process per host, or one per GPU",
            argument="distributed",
        )
    each = seen // count
    return list(range(index * each, (index + 1) * each))


def visible(environment: Environment) -> int | None:
    """Returns how many GPUs the environment shows to this process; None: it does not say.

    >>> visible({"CUDA_VISIBLE_DEVICES": "0,3"}), visible({"CUDA_VISIBLE_DEVICES": ""}), visible({})
    (2, 0, None)
    """
    for name in _VISIBLE:
        if name in environment:
            ids = environment[name].split(",")
            # CUDA ignores what follows a number below 0; older Slurm writes NoDevFiles.
            return next((i for i, x in enumerate(ids) if x in ("", "-1", "NoDevFiles")), len(ids))
    return None


def on_host(environment: Environment) -> int | None:
    """Returns how many GPUs of this host Slurm allocated; None: it does not say."""
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isdigit() else None


def _on_this_host(environment: Environment) -> tuple[int, int]:
    """Returns the number of the launcher's processes on this host, and this one's index there."""
    if launcher(environment) == "openmpi":
        return (
            int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]),
            int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]),
        )
    index = int(environment["SLURM_LOCALID"])
    if "SLURM_STEP_TASKS_PER_NODE" in environment:
        counts = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        return counts[int(environment.get("SLURM_NODEID", 0)) % len(counts)], index
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    return -(-int(environment["SLURM_NTASKS"]) // nodes), index


def tasks_per_node(text: str) -> list[int]:
    """Expands Slurm's short form of the number of tasks on each node.

    >>> tasks_per_node("8(x3),2")
    [8, 8, 8, 2]
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; expected a form as 8(x3),2")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts

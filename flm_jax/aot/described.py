"""Described devices: of accelerators that this machine does not have, for their compilers."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

from jax.experimental import topologies

from flm_jax import extras
from flm_jax.aot import cudnn
from flm_jax.aot.chips import CHIPS, Chip
from flm_jax.errors import UserError
from flm_jax.params.topology import Topology, parse
from flm_jax.runtime import xla_flags

# Whether for GPUs -> the package that has the compiler, and the extra that installs it.
_PACKAGES = {False: ("libtpu", "tpu"), True: ("jax_plugins.xla_cuda12", "gpu-aot")}

# The facts about a Hopper GPU that XLA needs to compile without one (public specifications).
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: {memory}  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


def chip_of(topology: str) -> Chip:
    """Returns the chip of a topology. Raises UserError if it has no such name."""
    return CHIPS[parse(topology).kind]


def devices_of(topology: str) -> list[Any]:
    """Describes the topology's devices.

    Args:
      topology: chips and sizes, such as v5p:8x8x8 or h100:16x8 (nodes x GPUs).

    Raises:
      UserError: the topology is unknown, or the compiler's package is missing.
    """
    named, chip = parse(topology), chip_of(topology)
    gpu = chip.node > 1
    if gpu and (len(named.sizes) > 2 or named.slices > 1):
        raise UserError(
            f"topology={topology}: give nodes x GPUs, as {named.kind}:16x8", argument="topology"
        )
    if not installed(gpu):
        package, extra = _PACKAGES[gpu]
        raise UserError(
            f"topology={topology} needs the compiler in package {package}; install it: "
            f"{extras.pip(extra)}",
            argument="topology",
        )
    try:
        described = _gpus(named, chip) if gpu else _tpus(named)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"topology={topology}: {str(error).splitlines()[0]}", argument="topology"
        ) from error
    return list(described.devices)


def installed(gpu: bool) -> bool:
    """Whether the package with the compiler for GPUs, or else for TPUs, is installed."""
    try:
        return importlib.util.find_spec(_PACKAGES[gpu][0]) is not None
    except ModuleNotFoundError:  # the package's parent is missing
        return False


def _gpus(named: Topology, chip: Chip) -> Any:
    """Describes GPUs: sizes are nodes x GPUs in a node."""
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false "
        "--xla_gpu_shard_autotuning=false",
    )
    xla_flags.merge("cuda", os.environ)  # those of a run
    target = _HOPPER.format(
        bandwidth=int(chip.hbm_bandwidth),
        memory=int(chip.hbm_bytes),
        name=named.kind.upper(),
        cudnn=cudnn.VERSION,
    )
    sizes = (1, 1, *named.sizes)[-3:]  # XLA wants three
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=named.kind,
        target_config=target,
        topology="x".join(map(str, sizes)),
    )


def _tpus(named: Topology) -> Any:
    """Describes TPUs: sizes are those of the torus."""
    settings = {
        # Without these, libtpu asks a metadata server and logs to standard error.
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # libtpu locks the machine's TPUs. There are none, so several compilers may run.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    xla_flags.merge("tpu", os.environ)  # those of a run
    options: dict[str, Any] = {"num_slices": named.slices}
    if len(named.sizes) == 3:
        # Three axes: a torus, four chips to a host. Two: the compiler's defaults.
        options |= {"chips_per_host_bounds": (2, 2, 1), "wrap": (True,) * 3}
    if named.kind in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # one device per chip
    one = dataclasses.replace(named, slices=1)
    return topologies.get_topology_desc(platform="tpu", topology_name=str(one), **options)

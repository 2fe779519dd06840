"""Compiles a stage's programs for accelerators that this machine does not have.

XLA's TPU compiler is in the package libtpu, its GPU compiler in the CUDA wheels. Both compile for a
described topology on any machine. Nothing is run. The reports show whether a program lowers,
partitions and fits in memory, how many bytes it moves between devices, and a lower bound on its
time from the chips' published figures.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from flm_jax import growth
from flm_jax.aot import cudnn, hlo, roofline
from flm_jax.aot.roofline import CHIPS, Chip
from flm_jax.config import MESH_AXES, ExperimentConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.params import counts, sharding
from flm_jax.runs.stage import plan_of, with_derived
from flm_jax.runtime import xla_flags
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import abstract_state, make_train_step

WHAT = ("train", "train_masked", "growth")  # a stage's programs

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
    """Returns the chip of a topology. Raises UserError if its kind is not in `CHIPS`."""
    kind = topology.split(":")[0]
    if kind not in CHIPS or ":" not in topology:
        raise UserError(
            f"topology={topology}: give KIND:SIZES, such as v5p:8x8x8 or h100:16x8 "
            f"(nodes x GPUs); kinds: {', '.join(CHIPS)}",
            argument="topology",
        )
    return CHIPS[kind]


def devices_of(topology: str) -> list[Any]:
    """Describes the topology's devices.

    Args:
      topology: chips and sizes, such as v5p:8x8x8 or h100:16x8 (nodes x GPUs).

    Raises:
      UserError: the topology is unknown, or the compiler's package is missing.
    """
    chip = chip_of(topology)
    kind, sizes = topology.split(":")
    gpu = chip.node > 1
    _check_installed(topology, gpu)
    if not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise UserError(
            f"topology={topology}: sizes {sizes!r} are not numbers with x between them; give them "
            "as 8x8x8",
            argument="topology",
        )
    try:
        described = _gpus(kind, sizes, chip) if gpu else _tpus(topology, sizes)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"topology={topology}: {str(error).splitlines()[0]}", argument="topology"
        ) from error
    return list(described.devices)


def _check_installed(topology: str, gpu: bool) -> None:
    """Raises UserError if the compiler's package is missing."""
    package, extra = ("jax_plugins.xla_cuda12", "gpu-aot") if gpu else ("libtpu", "tpu")
    try:
        installed = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package's parent is missing
        installed = False
    if not installed:
        raise UserError(
            f"topology={topology} needs the compiler in package {package}; install it: "
            f"pip install -e '.[{extra}]'",
            argument="topology",
        )


def _gpus(kind: str, sizes: str, chip: Chip) -> Any:
    """Describes GPUs: `sizes` are nodes x GPUs in a node."""
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false "
        "--xla_gpu_shard_autotuning=false",
    )
    xla_flags.merge("cuda", os.environ)  # those of a run
    target = _HOPPER.format(
        bandwidth=int(chip.hbm_bandwidth),
        memory=int(chip.hbm_bytes),
        name=kind.upper(),
        cudnn=cudnn.VERSION,
    )
    shape = "x".join(["1"] * (3 - sizes.count("x") - 1) + [sizes])  # XLA wants three sizes
    return topologies.get_topology_desc(
        platform="cuda", topology_name=kind, target_config=target, topology=shape
    )


def _tpus(topology: str, sizes: str) -> Any:
    """Describes TPUs: `sizes` are those of the physical mesh."""
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
    options: dict[str, Any] = {}
    if sizes.count("x") == 2:
        # Three axes: a torus of megacore chips, four to a host. Two: the compiler's defaults.
        options = {
            "chip_config_name": "megacore",
            "chips_per_host_bounds": (2, 2, 1),
            "num_slices": 1,
            "wrap": (True,) * 3,
        }
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)


def mesh_of(topology: str, shape: dict[str, int], devices: list[Any]) -> Mesh:
    """Makes a mesh data x fsdp x tensor of described devices.

    Args:
      topology: the devices' topology, for the error.
      shape: mesh axis -> size; axes that are left out have size 1.
      devices: the devices, as `devices_of` returns them.

    Raises:
      UserError: an axis is unknown, or the sizes do not multiply to the number of devices.
    """
    given = ",".join(f"{name}={size}" for name, size in shape.items())
    unknown = set(shape) - set(MESH_AXES)
    if unknown:
        raise UserError(
            f"mesh={given}: no mesh axis {min(unknown)!r}; axes are {', '.join(MESH_AXES)}",
            argument="mesh",
        )
    sizes = tuple(shape.get(name, 1) for name in MESH_AXES)
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh={given}: {math.prod(sizes)} devices, but {topology} has {len(devices)}; make "
            "the sizes multiply to that",
            argument="mesh",
        )
    try:
        grid = mesh_utils.create_device_mesh(sizes, devices)
    except (NotImplementedError, TypeError, ValueError):
        grid = np.array(devices).reshape(sizes)  # sizes that cut across the physical axes
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def meshes(config: ExperimentConfig, index: int, devices: int) -> Iterator[dict[str, int]]:
    """Yields the meshes fsdp x tensor whose sizes divide a stage's model and batch.

    Args:
      config: the chain.
      index: the stage's index in it.
      devices: number of devices.

    Yields:
      Mesh axis -> size, as `compile_for` takes it; tensor is at most 64.
    """
    stage = config.stages[index]
    model = stage.model
    for tensor in range(1, min(devices, 64) + 1):
        fsdp = devices // tensor
        fits = (
            devices % tensor == 0
            and all(size % fsdp == 0 for size in (stage.batch_size, model.d_model))
            and all(n % tensor == 0 for n in (model.kv_heads, model.d_ff, model.vocab_size))
        )
        if fits:
            yield {"fsdp": fsdp, "tensor": tensor}


def program(
    config: ExperimentConfig, index: int, what: str, mesh: Mesh, attention: str
) -> tuple[Any, tuple[Any, ...]]:
    """Returns a program of a stage, ready to be lowered.

    Args:
      config: the chain.
      index: the stage's index in it.
      what: one of `WHAT`.
      mesh: the devices to compile for.
      attention: the attention's implementation; see `TransformerConfig.attention`.

    Returns:
      The jitted function, and its arguments as `ShapeDtypeStruct`s.

    Raises:
      UserError: the stage has no such program, because it did not grow.
    """

    def stage_at(i: int) -> StageConfig:
        model = dataclasses.replace(config.stages[i].model, attention=attention)
        return dataclasses.replace(config.stages[i], model=model)

    stage, layout = stage_at(index), sharding.Layout(mesh, config.mesh.rules)
    shape = schedules.schedule_shape(config.schedule, config.total_steps)
    grown_at = sum(s.steps for s in config.stages[:index]) if index else None
    if what != "train" and index == 0:
        raise UserError(
            f"what={what} needs a grown stage, but stage {index} is the first one; give a chain, "
            "such as configs/tele_flm_1t_chain.py, and a later stage",
            argument="what",
        )
    plan = plan_of(stage_at(index - 1).model, stage) if index else None
    if what == "growth":
        assert plan is not None
        small = stage_at(index - 1)
        tx = optim.optimizer(small, config.optimizer, shape)
        before = abstract_state(small.model, tx, layout)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return growth.growth_program(plan, before, layout), (before, key)
    tx = optim.optimizer(stage, config.optimizer, shape, grown_at)
    length = config.data_of(index).sequence_length
    placed = NamedSharding(mesh, sharding.BATCH)
    dtypes = {
        "tokens": jnp.int32,
        "targets": jnp.int32,
        "segment_ids": jnp.int32,
        "positions": jnp.int32,
        "weights": jnp.float32,
    }
    batch = {
        name: jax.ShapeDtypeStruct((stage.batch_size, length), dtype, sharding=placed)
        for name, dtype in dtypes.items()
    }
    masks_at, added = (plan.masks, growth.added_slots(plan)) if plan else (None, None)
    step = make_train_step(stage, tx, mesh, masks_at, layout.rules, added=added)
    mask = (jax.ShapeDtypeStruct((), jnp.float32),) if what == "train_masked" else ()
    return step, (abstract_state(stage.model, tx, layout), batch, *mask)


class _Compiled(NamedTuple):
    """The compiler's result.

    Attributes:
      fields: fields of the report.
      moves: the program's collectives; None: the compiler refused the program for its memory.
    """

    fields: dict[str, Any]
    moves: list[hlo.Move] | None


def compile_for(
    config: ExperimentConfig,
    index: int,
    what: str,
    topology: str,
    mesh_shape: dict[str, int],
    *,
    quick: bool = False,
) -> dict[str, Any]:
    """Lowers and compiles one program of a stage.

    Args:
      config: the chain.
      index: the stage's index in it.
      what: "train", "train_masked" or "growth".
      topology: chips and sizes, such as v5p:8x8x8.
      mesh_shape: mesh axis -> size.
      quick: optimises less. It takes a tenth of the time; memory differs by about 3%.

    Returns:
      A report of JSON values: memory, collectives, times.

    Raises:
      UserError: topology, mesh and batch do not fit each other, a compiler is missing, or it
        refuses the program for another reason than its memory.
    """
    config = with_derived(config)
    chip, devices = chip_of(topology), devices_of(topology)
    mesh = mesh_of(topology, mesh_shape, devices)
    stage = config.stages[index]
    rows = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    if stage.batch_size % rows:
        raise UserError(
            f"batch={stage.batch_size} does not divide over {rows} devices (mesh data x fsdp); "
            f"give a multiple of {rows}",
            argument="batch",
        )
    for model in [s.model for s in config.stages[max(index - 1, 0) : index + 1]]:
        if what == "growth" or model is stage.model:
            sharding.check_divisible(model, mesh, config.mesh.rules)
    report: dict[str, Any] = {
        "what": what,
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "batch": stage.batch_size,
        "stage": stage.name,
    }
    attention = "cudnn" if chip.node > 1 else "splash"
    start = time.monotonic()
    with jax.set_mesh(mesh), cudnn.described(devices[0]):
        if quick:
            jax.config.update("jax_optimization_level", "O0")
        function, arguments = program(config, index, what, mesh, attention)
        compiled = _compile(function.lower(*arguments), topology, chip, len(devices))
    report |= compiled.fields
    report["compile_s"] = time.monotonic() - start
    report["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    length = config.data_of(index).sequence_length
    tokens = stage.batch_size * length if what != "growth" else 0
    model_flops = tokens * counts.flops_per_token_train(stage.model, length) / len(devices)
    report["model_flops_per_device"] = model_flops
    if compiled.moves is not None:
        report["roofline"] = roofline.roofline(stage, what, report, compiled.moves, chip)
    return report


def _compile(lowered: Any, topology: str, chip: Chip, devices: int) -> _Compiled:
    """Compiles a lowered program; a program that needs too much memory is a result, too."""
    with tempfile.TemporaryDirectory() as dump:
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": dump})
        except jax.errors.JaxRuntimeError as error:
            sizes = _out_of_memory(str(error))
            if sizes is None:
                raise UserError(f"{topology}: the compiler refused: {error}") from error
            needed, available = sizes
            fields: dict[str, Any] = {
                "fits": False,
                "hbm_bytes": needed,
                "hbm_limit_bytes": available,
                "missing_bytes": needed - available,
            }
            return _Compiled(fields, None)
        memory = compiled.memory_analysis()
        used = _memory_report(dump) or (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
    moves = list(hlo.moves(compiled.as_text(), devices))
    fields = {
        "fits": used <= chip.hbm_bytes,
        "hbm_bytes": used,
        "hbm_limit_bytes": int(chip.hbm_bytes),
        "missing_bytes": max(0, used - int(chip.hbm_bytes)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        # The compiler counts the body of a loop only once, so this number is for ratios only.
        "xla_flops": (compiled.cost_analysis() or {}).get("flops"),
        "collectives": hlo.collectives(moves),
    }
    return _Compiled(fields, moves)


def _out_of_memory(message: str) -> tuple[int, int] | None:
    """Reads needed and available bytes from the compiler's error; None: another error."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    words = r"(?:HLO temporaries|available HBM|Used|of) \(?([\d.]+)([KMGT]?)"
    values = [int(float(number) * units[unit]) for number, unit in re.findall(words, message)]
    if "RESOURCE_EXHAUSTED" not in message or len(values) < 2:
        return None
    return values[0], values[1]


def _memory_report(folder: str) -> int | None:
    """Reads the assigned bytes of HBM from the compiler's report; None: there is no report."""
    for name in sorted(os.listdir(folder)):
        if name.endswith("memory-usage-report.txt"):
            with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                text = file.read()
            total = re.search(r"Memory Space: default.*?Total bytes: (\d+)", text, re.DOTALL)
            return int(total.group(1)) if total else None
    return None

"""Compiles a run's programs, for the devices that are there or that are only described.

XLA's TPU compiler is in the package libtpu, its GPU compiler in the CUDA wheels. Both compile for a
described topology on any machine. Nothing is run. The reports show whether a program lowers,
partitions and fits in memory, what its memory holds, how many bytes it moves between devices, and
how long it should take on the chips' published figures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from flm_jax.aot import cudnn, described, forecast, hlo, search
from flm_jax.aot.chips import CHIPS, Chip
from flm_jax.aot.links import Fabric
from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError
from flm_jax.params.topology import topology_of
from flm_jax.runs import chain
from flm_jax.runs.programs import Program, programs

Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices to compile for.

    Attributes:
      devices: all of them, real or described.
      hbm_bytes: memory of one.
      chip: published figures of one; None: there are none, and nothing is said of times.
    """

    devices: tuple[Any, ...]
    hbm_bytes: int
    chip: Chip | None = None

    @property
    def described(self) -> bool:
        """Whether the devices are not there."""
        return self.devices[0] not in jax.devices()

    @property
    def topology(self) -> str:
        """The topology's name."""
        return str(topology_of(self.devices))


def described_target(topology: str) -> Target:
    """A topology that this machine does not have; arguments and errors as `devices_of`."""
    chip = described.chip_of(topology)
    return Target(tuple(described.devices_of(topology)), int(chip.hbm_bytes), chip)


def own_target() -> Target:
    """The devices of this run. On CPUs each has an equal part of the machine's memory."""
    devices = jax.devices()
    stats = devices[0].memory_stats() or {}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = stats.get("bytes_limit") or machine // jax.local_device_count()
    kind = topology_of(devices).kind
    return Target(tuple(devices), int(limit), CHIPS.get(kind))


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile.

    Attributes:
      config: the chain as it runs on the target.
      index: the index of the program's stage.
      program: the program.
      target: the devices.
      quick: optimises less. It takes a tenth of the time; memory differs by about 3%.
    """

    config: ExperimentConfig
    index: int
    program: Program
    target: Target
    quick: bool = False

    @property
    def heading(self) -> Report:
        """The report's first fields: what is compiled, for which devices."""
        stage = self.config.stages[self.index]
        return {
            "stage": stage.name,
            "what": self.program.name,
            "topology": self.target.topology,
            "devices": len(self.target.devices),
            "mesh": dict(self.program.mesh.shape),
            "batch": stage.batch_size,
            "accumulate": stage.accumulate,
            "remat": stage.model.remat,
            "dtype": stage.model.dtype,
        }


def jobs(
    config: ExperimentConfig,
    target: Target,
    wanted: Callable[[int, str], bool] = lambda index, name: True,
    last: int | None = None,
    quick: bool = False,
) -> Iterator[Job]:
    """Yields what a run of the chain executes on a target.

    Args:
      config: the chain, as its config file gives it.
      target: the devices.
      wanted: (index of a stage, kind of program) -> whether to yield it.
      last: index of the last stage to run on it; None: the chain's last.
      quick: see `Job`.

    Raises:
      UserError: the chain cannot run on these devices; see `chain.on_devices`.
    """
    config, layouts = chain.on_devices(config, target.devices, last)
    config = _with_attention(config, target)
    for index in range(len(layouts)):
        for program in programs(config, index, layouts):
            if wanted(index, program.kind):
                yield Job(config, index, program, target, quick)


def _with_attention(config: ExperimentConfig, target: Target) -> ExperimentConfig:
    """Names the kernel that "auto" stands for on the target, not on this machine's platform."""
    if not target.described:
        return config
    kernel = "splash" if target.devices[0].platform == "tpu" else "cudnn"
    stages = []
    for stage in config.stages:
        named = kernel if stage.model.attention == "auto" else stage.model.attention
        model = dataclasses.replace(stage.model, attention=named)
        stages.append(dataclasses.replace(stage, model=model))
    return dataclasses.replace(config, stages=tuple(stages))


def key_of(job: Job, lowered: Any) -> str:
    """A digest of all that a program's report depends on, so that it may be kept."""
    order = [device.id for device in job.program.mesh.devices.flat]
    parts = (jax.__version__, job.heading, job.quick, job.program.held_bytes, order)
    text = "" if lowered is None else lowered.as_text()
    return hashlib.sha256(f"{parts}{text}".encode()).hexdigest()


def kept_nowhere(identity: Mapping[str, Any], compute: Callable[[], Report]) -> Report:
    """Computes a report, and keeps it nowhere; the same signature as `Trials.result`."""
    return {**identity, **compute()}


def report(
    job: Job,
    keep: Callable[[Mapping[str, Any], Callable[[], Report]], Report] = kept_nowhere,
) -> Report:
    """Lowers and compiles one program.

    Args:
      job: the program and its target.
      keep: (identity, compute) -> the report: where reports are kept, as `Trials.result`.

    Returns:
      JSON values. `fits`; `hbm_bytes`, what the program needs on one device with what is held
      beside it, of `hbm_limit_bytes`; `missing_bytes`; its parts (`argument_bytes`,
      `temporary_bytes`, `output_bytes`, `held_bytes`) and `binds`, the largest; `compile_s`;
      `peak_host_bytes` of the compiling process so far; the collectives;
      `forecast` of a train step (`forecast.py`).

    Raises:
      UserError: a compiler refuses the program for another reason than its memory.
    """
    start = time.monotonic()
    with _optimisation(job.quick), _traceable(job.target):
        lowered = job.program.lower() if job.program.function else None
        lower_s = time.monotonic() - start
        identity = {**job.heading, "key": key_of(job, lowered)}
        return keep(identity, lambda: {**_report(job, lowered), "lower_s": lower_s})


def _traceable(target: Target) -> contextlib.AbstractContextManager[None]:
    """A context in which the target's kernels can be traced."""
    return cudnn.described(target.devices[0]) if target.described else contextlib.nullcontext()


def _report(job: Job, lowered: Any) -> Report:
    """The report's fields after the heading."""
    start = time.monotonic()
    held, limit = job.program.held_bytes, job.target.hbm_bytes
    if lowered is None:  # arrays are only placed
        return _memory({"held_bytes": held}, held, limit) | {"compile_s": 0.0}
    fields = _compile(lowered, job.target, held)
    fields["compile_s"] = time.monotonic() - start
    fields["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    moves = fields.pop("moves", None)
    if moves is not None and job.target.chip and job.program.name in _STEPS:
        fields["forecast"] = _forecast(job, job.target.chip, moves)
    return fields


def _forecast(job: Job, chip: Chip, moves: list[hlo.Move]) -> Report:
    """The forecast of a train step, in the schedule that the compiler gave it."""
    mesh, stage = job.program.mesh, job.config.stages[job.index]
    length = job.config.data_of(job.index).sequence_length
    step = search.step_of(stage, length, job.config.mesh_of(job.index), mesh.size)
    return forecast.of_program(step, Fabric.of(chip, list(mesh.devices.flat)), moves).as_json()


_STEPS = ("train", "train_masked")  # programs that are forecast


@contextlib.contextmanager
def _optimisation(quick: bool) -> Iterator[None]:
    """Compiles with less optimisation inside the block, if `quick`."""
    before = jax.config.values["jax_optimization_level"]
    jax.config.update("jax_optimization_level", "O0" if quick else before)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def _compile(lowered: Any, target: Target, held: int) -> Report:
    """Compiles a lowered program; a program that needs too much memory is a result, too."""
    with tempfile.TemporaryDirectory() as dump:
        # The compiler's own report of the memory that it assigned.
        options = {"xla_dump_to": dump} if target.described else None
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            sizes = _out_of_memory(str(error))
            if sizes is None:
                raise UserError(f"{target.topology}: the compiler refused: {error}") from error
            needed, available = sizes
            return _memory({"held_bytes": held}, needed + held, available) | {
                "fits": False, "binds": "temporary",
            }  # fmt: skip
        memory = compiled.memory_analysis()
        parts = {
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            # Results that take a donated argument's memory do not count again.
            "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "held_bytes": held,
        }
        used = _memory_report(dump)
        used = sum(parts.values()) if used is None else used + held
    moves = list(hlo.moves(compiled.as_text(), len(target.devices)))
    return _memory(parts, used, target.hbm_bytes) | {
        # The compiler counts the body of a loop only once, so this number is for ratios only.
        "xla_flops": (compiled.cost_analysis() or {}).get("flops"),
        "collectives": hlo.collectives(moves),
        "moves": moves,
    }


def _memory(parts: dict[str, int], used: int, limit: int) -> Report:
    """The report's fields about memory; `parts` by name, such as "argument_bytes"."""
    return {
        "fits": used <= limit,
        "hbm_bytes": used,
        "hbm_limit_bytes": limit,
        "missing_bytes": max(0, used - limit),
        **parts,
        "binds": max(parts, key=lambda name: parts[name]).removesuffix("_bytes"),
    }


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

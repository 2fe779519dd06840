"""Compiles a stage for a TPU pod or GPU cluster without having one: does it fit?

  flm compile --config=configs/tele_flm_1t_chain.py \
      --topology=v5p:8x8x8 --mesh=fsdp=32,tensor=16 --batch=32 --what=train_masked

Prints the memory that the stage needs, and its communication. TPUs need the extra `[tpu]`, GPU
clusters `[gpu-aot]`. `--search` tries the meshes of the topology and prints those that fit, best
first.
Without `--topology` every layout that the config holds is compiled, each in a separate process:
the step, the masked step and the growth, unless `--what` chooses one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import rich.console
import rich.table

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag
from flm_jax.config import ExperimentConfig, LayoutConfig
from flm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    topology: str | None = flag(None, "Chips, as v5p:8x8x8, v5e:16x16 or h100:16x8.")
    mesh: str = flag("", "Mesh, as fsdp=32,tensor=16.")
    batch: int = flag(0, "Sequences of one step; 0: the stage's.")
    what: str = flag("", "Program: train (if empty), train_masked or growth.")
    stage: int | None = flag(None, "Index of the chain's stage; -1: the last.")
    quick: bool = flag(False, "Compile with less optimisation: a tenth of the time.")
    search: bool = flag(False, "Try the topology's meshes, quickly.")


def _mesh(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        return {name: int(size) for name, size in pairs}
    except ValueError:
        raise UserError(f"--mesh={text}: give sizes by axis, as fsdp=32,tensor=16") from None


def _chain(call: Call[Flags]) -> tuple[ExperimentConfig, int]:
    flags, chain = call.flags, config_files.experiment(call.config)
    index = config_files.stage_index(chain, -1 if flags.stage is None else flags.stage)
    if flags.batch < 0:
        raise UserError(f"--batch={flags.batch}: give a number above 0")
    if flags.batch:
        stages = list(chain.stages)
        stages[index] = dataclasses.replace(stages[index], batch_size=flags.batch, accumulate=1)
        chain = dataclasses.replace(chain, stages=tuple(stages))
    return chain, index


def _programs(flags: Flags, chain: ExperimentConfig, layout: LayoutConfig) -> list[str]:
    """Lists what to compile for a layout: a chain's first stage has no masks and no growth."""
    if flags.stage is not None and layout.stage != chain.stages[flags.stage].name:
        return []
    if flags.what:
        return [flags.what]
    first = layout.stage == chain.stages[0].name
    return ["train"] if first else ["train", "train_masked", "growth"]


def _apart(
    argv: tuple[str, ...], chain: ExperimentConfig, layout: LayoutConfig, program: str
) -> dict[str, Any]:
    """Compiles a layout's program in a separate process; returns its report.

    TPU and GPU compilers read their settings once in a process, and peak memory is measured for a
    whole process.
    """
    names = [stage.name for stage in chain.stages]
    flags_of_layout = {
        "topology": layout.topology, "stage": names.index(layout.stage), "what": program,
        "mesh": f"data={layout.data},fsdp={layout.fsdp},tensor={layout.tensor}",
        "batch": layout.batch_size,
    }  # fmt: skip
    # If a flag is given twice, the last value counts.
    command = [sys.executable, "-m", "flm_jax.commands", "compile", *argv, "--json"]
    command += [f"--{name}={value}" for name, value in flags_of_layout.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["the compiler ended without a message"])[-1]
        raise UserError(last.removeprefix("flm compile: "))
    return dict(json.loads(done.stdout))


def _row(report: dict[str, Any]) -> list[str]:
    limit = report["hbm_limit_bytes"]
    roofline = report.get("roofline")
    return [
        report["stage"], report["what"], report["topology"],
        ",".join(f"{k}={v}" for k, v in report["mesh"].items() if v > 1),
        "yes" if report["fits"] else f"no: {report['missing_bytes'] / 1e9:.1f} GB missing",
        f"{report['hbm_bytes'] / 1e9:.1f} of {limit / 1e9:.1f} GB",
        f"{roofline['step_s']:.2f} s ({roofline['bound']}), {roofline['utilisation']:.0%}"
        if roofline else "",
        f"{report['compile_s']:.0f} s",
    ]  # fmt: skip


def main(call: Call[Flags]) -> dict[str, Any]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from flm_jax.aot import compiler

    flags = call.flags
    what = flags.what or "train"
    if what not in compiler.WHAT:
        raise UserError(f"--what={what}: choose one of {', '.join(compiler.WHAT)}")
    chain, index = _chain(call)
    console = rich.console.Console(stderr=True, highlight=False)
    if not flags.topology:
        if not chain.layouts or flags.mesh or flags.batch or flags.search:
            raise UserError("--topology is missing; give one, as --topology=v5p:8x8x8")
        reports = []
        for layout in chain.layouts:
            for program in _programs(flags, chain, layout):
                reports.append(_apart(call.argv, chain, layout, program))
                console.print("  ".join(_row(reports[-1])))
        result: dict[str, Any] = {"layouts": reports}
    elif flags.search:
        reports = []
        count = len(compiler.devices_of(flags.topology))
        for shape in compiler.meshes(chain, index, count):
            report = compiler.compile_for(chain, index, what, flags.topology, shape, quick=True)
            reports.append(report)
            console.print("  ".join(_row(report)))
        reports.sort(key=lambda r: (not r["fits"], r.get("roofline", {}).get("step_s", 0)))
        result = {"meshes": reports}
    else:
        report = compiler.compile_for(
            chain, index, what, flags.topology, _mesh(flags.mesh), quick=flags.quick
        )
        reports, result = [report], report
    table = rich.table.Table(
        "stage", "what", "topology", "mesh", "fits", "HBM", "bound on a step", "compile"
    )
    for report in reports:
        table.add_row(*_row(report))
    call.console(width=140).print(table)
    return result


COMMAND = Command(main, Flags)

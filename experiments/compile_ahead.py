"""Compiles a stage for a TPU pod or a GPU cluster that is not here: does it fit, what does it move?

  python -m experiments.compile_ahead --config=configs/tele_flm_1t_chain.py \
    --topology=v5p:8x8x8 --mesh=fsdp=32,tensor=16 --batch=32 --what=train_masked

TPUs need the extra `[tpu]`, GPU clusters `[gpu-aot]`. `--search` tries the meshes of the topology
and prints those that fit, best first. Without `--topology` every layout that the config holds is
compiled, each in a process of its own: the step, the masked step and the growth, unless `--what`
chooses one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import ml_collections
import rich.console
import rich.table
from absl import flags

from experiments import cli
from flm_jax.config import ExperimentConfig, LayoutConfig
from flm_jax.errors import UserError

TOPOLOGY = flags.DEFINE_string("topology", None, "As v5p:8x8x8, v5e:16x16, h100:16x8.")
MESH = flags.DEFINE_string("mesh", "", "As fsdp=32,tensor=16.")
BATCH = flags.DEFINE_integer("batch", 0, "Sequences in one step; 0: the stage's.")
WHAT = flags.DEFINE_string("what", "", "train (if empty), train_masked or growth.")
STAGE = flags.DEFINE_integer("stage", -1, "Of a chain: which stage; -1: the last.")
QUICK = flags.DEFINE_bool("quick", False, "Compile with less optimisation: a tenth of the time.")
SEARCH = flags.DEFINE_bool("search", False, "Try the topology's meshes, quickly.")


def _mesh(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        return {name: int(size) for name, size in pairs}
    except ValueError:
        raise UserError(f"--mesh={text}: give sizes by axis, as fsdp=32,tensor=16") from None


def _chain(config: ml_collections.ConfigDict) -> tuple[ExperimentConfig, int]:
    chain = cli.experiment(config)
    count = len(chain.stages)
    if not -count <= STAGE.value < count:
        raise UserError(f"--stage={STAGE.value}: the config has stages 0 to {count - 1}")
    index = STAGE.value % count
    if BATCH.value < 0:
        raise UserError(f"--batch={BATCH.value}: give a number above 0")
    if BATCH.value:
        stages = list(chain.stages)
        stages[index] = dataclasses.replace(stages[index], batch_size=BATCH.value, accumulate=1)
        chain = dataclasses.replace(chain, stages=tuple(stages))
    return chain, index


def _programs(chain: ExperimentConfig, layout: LayoutConfig) -> list[str]:
    """What to compile for a layout: a chain's first stage has no masks and no growth."""
    if STAGE.present and layout.stage != chain.stages[STAGE.value].name:
        return []
    if WHAT.value:
        return [WHAT.value]
    first = layout.stage == chain.stages[0].name
    return ["train"] if first else ["train", "train_masked", "growth"]


def _apart(chain: ExperimentConfig, layout: LayoutConfig, program: str) -> dict[str, Any]:
    """The report of a layout's program, compiled in a process of its own.

    TPU and GPU compilers read their settings once in a process, and peak memory is a process's.
    """
    given = [f for f in sys.argv[1:] if f.startswith(("--config", "--quick"))]
    names = [stage.name for stage in chain.stages]
    flags_of_layout = {
        "topology": layout.topology, "stage": names.index(layout.stage), "what": program,
        "mesh": f"data={layout.data},fsdp={layout.fsdp},tensor={layout.tensor}",
        "batch": layout.batch_size,
    }  # fmt: skip
    command = [sys.executable, "-m", "experiments.compile_ahead", "--json", *given]
    command += [f"--{name}={value}" for name, value in flags_of_layout.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or ["the compiler ended silently"])[-1])
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


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from flm_jax.aot import compiler

    what = WHAT.value or "train"
    if what not in compiler.WHAT:
        raise UserError(f"--what={what}: choose one of {', '.join(compiler.WHAT)}")
    chain, index = _chain(config)
    console = rich.console.Console(stderr=True, highlight=False)
    if not TOPOLOGY.value:
        if not chain.layouts or MESH.value or BATCH.value or SEARCH.value:
            raise UserError("--topology is missing; give one, as --topology=v5p:8x8x8")
        reports = []
        for layout in chain.layouts:
            for program in _programs(chain, layout):
                reports.append(_apart(chain, layout, program))
                console.print("  ".join(_row(reports[-1])))
        result: dict[str, Any] = {"layouts": reports}
    elif SEARCH.value:
        reports = []
        count = len(compiler.devices_of(TOPOLOGY.value))
        for shape in compiler.meshes(chain, index, count):
            report = compiler.compile_for(chain, index, what, TOPOLOGY.value, shape, quick=True)
            reports.append(report)
            console.print("  ".join(_row(report)))
        reports.sort(key=lambda r: (not r["fits"], r.get("roofline", {}).get("step_s", 0)))
        result = {"meshes": reports}
    else:
        report = compiler.compile_for(
            chain, index, what, TOPOLOGY.value, _mesh(MESH.value), quick=QUICK.value
        )
        reports, result = [report], report
    table = rich.table.Table(
        "stage", "what", "topology", "mesh", "fits", "HBM", "bound on a step", "compile"
    )
    for report in reports:
        table.add_row(*_row(report))
    rich.console.Console(stderr=cli.json_wanted(), width=140).print(table)
    return result


if __name__ == "__main__":
    cli.run(main)

"""Trains a chain of stages, each grown from the one before.

  flm train --config=configs/demo.py --workdir=runs/demo

Stopped anywhere (Ctrl-C, SIGTERM, kill -9) and called again, it resumes from the last checkpoint.
Afterwards see DIR/report/report.md, `tensorboard --logdir DIR/tensorboard` and `flm inspect DIR`.

On several hosts, start the same command on each, with a workdir that all of them share:

  flm train ... --coordinator=HOST0:1234 --processes=4 --process=I

with I from 0 on HOST0 to 3; on a TPU pod, or under Slurm, `--distributed` instead of these three. A
signal to one stops all at the same step; if one is lost, the others end.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import rich.console

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag
from flm_jax.runs import chain, report
from flm_jax.runtime import processes, xla_flags
from flm_jax.store.lineage import RunFolder


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    coordinator: str = flag("", "HOST:PORT where process 0 listens.")
    process: int | None = flag(None, "This process's index, from 0.")
    processes: int | None = flag(None, "Number of processes.")
    distributed: bool = flag(
        False, "JAX finds the processes itself: on a TPU pod, under Slurm or Open MPI."
    )
    join_within: int = flag(300, "Seconds within which all processes must start.")
    lost_after: int = flag(
        60, "Seconds without a sign of life after which a process counts as lost."
    )


def main(call: Call[Flags]) -> dict[str, Any]:
    experiment, folder = config_files.experiment(call.config), RunFolder(call.workdir)
    flags = call.flags
    group = processes.Group(
        flags.coordinator, flags.process, flags.processes, flags.distributed,
        join_within=flags.join_within, lost_after=flags.lost_after,
    )  # fmt: skip
    xla_flags.apply()  # before the processes meet: that starts JAX
    with processes.joined(group):
        finished = folder.lineage.exists() and folder.stages()
        stages = chain.run(experiment, str(folder.path))
        if processes.first():
            _show(folder, stages, finished == stages, call.console())
    return {"stages": stages}


def _show(
    folder: RunFolder, stages: list[dict[str, Any]], complete: bool, console: rich.console.Console
) -> None:
    if complete:
        console.print(f"{folder.path}: the run is complete")
    path = report.write(folder)
    console.print(report.table(stages), f"report: {path}", sep="\n")


COMMAND = Command(main, Flags, workdir="required")

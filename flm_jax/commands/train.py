"""Trains a chain of stages, each grown from the one before.

  flm train --config=configs/demo.py --workdir=runs/demo

Stopped anywhere (Ctrl-C, SIGTERM, kill -9) and called again, it resumes from the last checkpoint.
Afterwards see DIR/report/report.md, `tensorboard --logdir DIR/tensorboard` and `flm inspect DIR`.

On several hosts, start the same command on each, with a workdir that all of them share:

  flm train ... --coordinator=HOST0:1234 --processes=4 --process=I

with I from 0 on HOST0 to 3; under Slurm, Open MPI, Kubernetes or on a TPU pod, `--distributed`
instead of these three (docs/clusters.md). A signal to one stops all at the same step; if one is
lost, the others end. `flm doctor` checks the group before a run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import rich.console

from flm_jax.aot import compiler
from flm_jax.commands import config_files, fit_table, training
from flm_jax.commands.command import Call, Command, flag
from flm_jax.commands.group_flags import GroupFlags
from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError
from flm_jax.runtime import host, paths, processes, xla_flags
from flm_jax.store.lineage import RunFolder


@dataclasses.dataclass(frozen=True)
class Flags(GroupFlags):
    """The command's own flags."""

    preflight: bool = flag(
        False, "First compile every program of every stage; train only if all fit the devices."
    )


def main(call: Call[Flags]) -> dict[str, Any]:
    experiment, folder = config_files.experiment(call.config), RunFolder(call.workdir)
    paths.check_bucket(folder.path, "workdir")
    xla_flags.apply()  # before the processes meet: that starts JAX
    with processes.joined(call.flags.group()):
        if call.flags.preflight:
            _preflight(experiment, call.console(width=150))
        return training.train(experiment, folder, call.console())


def _preflight(experiment: ExperimentConfig, console: rich.console.Console) -> None:
    """Compiles what the run will execute. Raises UserError if a program does not fit."""
    if experiment.quick_compile:
        host.compile_quickly()
    reports = [compiler.report(job) for job in compiler.jobs(experiment, compiler.own_target())]
    if processes.first():
        console.print(fit_table.table(reports))
    if lacks := fit_table.failure({"programs": reports}):
        raise UserError(f"{lacks}; change its layout")


COMMAND = Command(main, Flags, workdir="required")

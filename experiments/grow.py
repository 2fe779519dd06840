"""Trains a chain of stages, each grown out of the one before.

  python -m experiments.grow --config=configs/demo.py --workdir=runs/demo

Stopped anywhere (Ctrl-C, SIGTERM, kill -9) and called again, it goes on from the last checkpoint.
Afterwards see DIR/report/report.md, `tensorboard --logdir DIR/tensorboard` and
`python -m experiments.inspect DIR`.

On several hosts, start the same command on each, with a workdir that all of them share:

  python -m experiments.grow ... --coordinator=HOST0:1234 --processes=4 --process=I

with I from 0 on HOST0 to 3; on a TPU pod, or under Slurm, `--distributed` instead of these three.
A signal to one stops all at the same step; if one is lost, the others end.
"""

from __future__ import annotations

from typing import Any

import ml_collections
import rich.console
from absl import flags

from experiments import cli
from flm_jax.runs import chain, report
from flm_jax.runtime import processes
from flm_jax.store.lineage import RunFolder

COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT where process 0 listens.")
PROCESS = flags.DEFINE_integer("process", None, "This process's index, from 0.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several processes, found by JAX: on a TPU pod, under Slurm, Open MPI."
)
JOIN_WITHIN = flags.DEFINE_integer("join_within", 300, "Seconds in which all processes must come.")
LOST_AFTER = flags.DEFINE_integer(
    "lost_after", 60, "Seconds without a sign of life after which a process counts as lost."
)


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    experiment, folder = cli.experiment(config), RunFolder(cli.workdir())
    group = processes.Group(
        COORDINATOR.value, PROCESS.value, PROCESSES.value, DISTRIBUTED.value,
        join_within=JOIN_WITHIN.value, lost_after=LOST_AFTER.value,
    )  # fmt: skip
    with processes.joined(group):
        finished = folder.lineage.exists() and folder.stages()
        stages = chain.run(experiment, str(folder.path))
        if processes.first():
            show(folder, stages, already=finished == stages)
    return {"stages": stages}


def show(folder: RunFolder, stages: list[dict[str, Any]], already: bool) -> None:
    console = rich.console.Console(stderr=cli.json_wanted())
    if already:
        console.print(f"{folder.path}: the run is complete")
    path = report.write(folder)
    console.print(report.table(stages), f"report: {path}", sep="\n")


if __name__ == "__main__":
    cli.run(main, needs_workdir=True)

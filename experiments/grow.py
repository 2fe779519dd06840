"""Trains a chain of stages, each grown out of the one before.

  python -m experiments.grow --config=configs/demo.py --workdir=runs/demo

Stopped anywhere (Ctrl-C, SIGTERM, kill -9) and called again, it goes on from the last checkpoint.
Afterwards see DIR/report/report.md, `tensorboard --logdir DIR/tensorboard` and
`python -m experiments.inspect DIR`.
"""

from __future__ import annotations

from typing import Any

import ml_collections
import rich.console

from experiments import cli
from flm_jax import chain, report
from flm_jax.lineage import RunFolder


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    folder = RunFolder(cli.workdir())
    finished = folder.lineage.exists() and folder.stages()
    stages = chain.run(cli.experiment(config), str(folder.path))
    console = rich.console.Console(stderr=cli.json_wanted())
    if finished == stages:
        console.print(f"{folder.path}: the run is complete")
    path = report.write(folder)
    console.print(report.table(stages), f"report: {path}", sep="\n")
    return {"stages": stages}


if __name__ == "__main__":
    cli.run(main, needs_workdir=True)

"""Trains a run and shows its report, for the commands that do so."""

from __future__ import annotations

from typing import Any

import rich.console

from flm_jax.config import ExperimentConfig
from flm_jax.runs import chain, report
from flm_jax.runtime import phases, processes
from flm_jax.store.lineage import RunFolder
from flm_jax.store.metrics import TensorBoard


def train(
    experiment: ExperimentConfig, folder: RunFolder, console: rich.console.Console
) -> dict[str, Any]:
    """Trains what is left of a run; the first process writes and shows its report.

    Args:
      experiment: the run's config.
      folder: the run's folder.
      console: for the report's table.

    Returns:
      `stages`, the entries of lineage.json.

    Raises:
      UserError, RunStopped: as `chain.run`.
    """
    finished = folder.lineage.exists() and folder.stages()
    stages = chain.run(experiment, str(folder.path))
    if processes.first():
        if finished == stages:
            console.print(f"{folder.path}: the run is complete")
        with phases.phase("writing the report"):
            path = report.write(folder)
        if finished != stages:
            with TensorBoard(folder.tensorboard) as board:
                steps = sum(stage["steps"] for stage in stages)
                board.text(steps, "report", path.read_text(encoding="utf-8"))
        console.print(report.table(stages), f"report: {path}", sep="\n")
    return {"stages": stages}

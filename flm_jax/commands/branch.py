"""Starts a new run from a state of another run: any finished stage, or any step that was kept.

  flm branch runs/demo:small --workdir=runs/tile --config.stages[1].growth.recipe=tile
  flm branch runs/demo:large:1400 --workdir=runs/slow --config.stages[2].learning_rate=2e-4
  flm branch runs/demo:0 --workdir=runs/other --config=my_chain.py

The state is RUN:STAGE:STEP: STAGE is an index or a name, STEP the name of a checkpoint (a global
step; without it, the end of the stage). Without --config the new run has the config of RUN; fields
of it are set as with `flm train`. The new run keeps what was trained before the state, the
optimizer's state, and the position in the data unless the data changes. --notrain only prepares it;
the same command without it trains, and resumes. See docs/experiments.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from flm_jax import mapping
from flm_jax.commands import config_files, training
from flm_jax.commands.command import Call, Command, flag
from flm_jax.commands.group_flags import GroupFlags
from flm_jax.runs import branch
from flm_jax.runtime import processes, xla_flags
from flm_jax.store import experiment_file
from flm_jax.store.lineage import RunFolder


@dataclasses.dataclass(frozen=True)
class Flags(GroupFlags):
    """The command's own flags."""

    train: bool = flag(True, "Train the new run; --notrain only prepares its folder.")


def main(call: Call[Flags]) -> dict[str, Any]:
    point = branch.find(call.arguments[0])
    experiment, console = config_files.experiment(call.config), call.console()
    xla_flags.apply()  # before the processes meet: that starts JAX
    with processes.joined(call.flags.group()):
        origin = branch.prepare(point, experiment, call.workdir)
        if processes.first():
            console.print(
                f"{call.workdir}: from step {origin.step} of stage {origin.stage} of {origin.run}, "
                f"with its optimizer's state; the data {_data(origin)}"
            )
            if not (point.run.experiment.exists() or config_files.split(call.argv)[0]):
                console.print(
                    f"{point.run.path} has no experiment.json (an earlier version wrote it): "
                    "evaluation, checkpoints and mesh have their defaults"
                )
        trained: dict[str, Any] = {"stages": []}
        if call.flags.train:
            trained = training.train(experiment, RunFolder(call.workdir), console)
    return {"origin": mapping.to_dict(origin), **trained}


def _data(origin: experiment_file.Origin) -> str:
    if origin.restarts_data:
        return "differ, and are read from their start"
    return "continue at its position"


def _config_of(given: str) -> ConfigDict:
    return config_files.to_config_dict(experiment_file.config_of(branch.find(given).run))


COMMAND = Command(
    main,
    Flags,
    config="optional",
    workdir="required",
    config_of=_config_of,
    positional=("RUN:STAGE[:STEP]",),
)

"""Trains the last stage of a finished run for more steps.

  flm extend runs/demo --stage=large --steps=+400

The result has the bits of the run that was configured longer from the start. Under `constant` it
continues from the stage's end; under `wsd` from the last kept checkpoint before the decay, and the
run as it was stays in RUN/ended/STEP. A cosine has another shape in a longer run, so it is refused,
with what is possible instead. Stopped and called again, it resumes. See docs/experiments.md.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from flm_jax import mapping
from flm_jax.commands import training
from flm_jax.commands.command import Call, Command, flag
from flm_jax.commands.group_flags import GroupFlags
from flm_jax.errors import UserError
from flm_jax.runs import extend
from flm_jax.runtime import processes, xla_flags
from flm_jax.store.lineage import RunFolder


@dataclasses.dataclass(frozen=True)
class Flags(GroupFlags):
    """The command's own flags."""

    stage: str = flag("", "The stage, by index or name; it must be the last one.")
    steps: str = flag("", "Steps to add, as +400.", required="give the number to add, as +400")
    tracker: str = flag("", "Tracker of the added steps, as package.module:function.")


def main(call: Call[Flags]) -> dict[str, Any]:
    flags, (run,) = call.flags, call.arguments
    if not re.fullmatch(r"\+0*[1-9]\d{0,17}", flags.steps):
        raise UserError(f"--steps={flags.steps}: give the number of steps to add, as +400")
    console = call.console()
    xla_flags.apply()  # before the processes meet: that starts JAX
    with processes.joined(flags.group()):
        experiment = extend.prepare(run, flags.stage, int(flags.steps))
        extension = experiment.extension
        assert extension is not None
        if processes.first():
            console.print(f"{run}: stage {extension.stage} continues from step {extension.step}")
        config = dataclasses.replace(experiment.config, tracker=flags.tracker)
        trained = training.train(config, RunFolder(run), console)
    return {"extension": mapping.to_dict(extension), **trained}


COMMAND = Command(main, Flags, config="none", positional=("RUN",))

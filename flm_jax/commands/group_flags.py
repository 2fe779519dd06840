"""The flags of commands that run in several processes."""

from __future__ import annotations

import dataclasses

from flm_jax.commands.command import flag
from flm_jax.runtime.processes import Group


@dataclasses.dataclass(frozen=True)
class GroupFlags:
    """Base of such a command's flags."""

    coordinator: str = flag("", "HOST:PORT where process 0 listens.")
    process: int | None = flag(None, "This process's index, from 0.")
    processes: int | None = flag(None, "Number of processes.")
    distributed: bool = flag(
        False, "The launcher tells the processes: Slurm, Open MPI, a TPU pod or Kubernetes."
    )
    join_within: int = flag(300, "Seconds within which all processes must start.")
    lost_after: int = flag(
        60, "Seconds without a sign of life after which a process counts as lost."
    )

    def group(self) -> Group:
        """Returns the group. Raises UserError if the flags do not fit each other."""
        return Group(
            self.coordinator, self.process, self.processes, self.distributed,
            join_within=self.join_within, lost_after=self.lost_after,
        )  # fmt: skip

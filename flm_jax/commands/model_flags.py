"""The flags that say which model a command opens."""

from __future__ import annotations

import dataclasses

from flm_jax.commands.command import flag
from flm_jax.interop.opening import OpenedModel, open_model
from flm_jax.runtime import host


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """A run, a checkpoint or a folder of Hugging Face files."""

    checkpoint: str = flag(
        "", "Run folder, checkpoint, or folder of Hugging Face files.",
        required="give a run's folder or one of Hugging Face files",
    )  # fmt: skip
    stage: str = flag("", "Index or name of a run's stage; empty: the last one.")

    def open(self) -> OpenedModel:
        """Opens the model. Call it before JAX does anything."""
        host.keep_freed()
        return open_model(self.checkpoint, self.stage)

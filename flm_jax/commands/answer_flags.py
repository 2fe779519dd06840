"""The flag of commands that run code from answers."""

from __future__ import annotations

import dataclasses

from flm_jax.commands.command import flag


@dataclasses.dataclass(frozen=True)
class AnswerFlags:
    """How code from answers is run."""

    unsafe: bool = flag(
        False,
        "Run code from answers also where this system cannot isolate it (docs/reliability.md).",
    )

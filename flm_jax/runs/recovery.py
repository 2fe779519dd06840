"""A stage continues from the newest of its checkpoints that is intact.

A damaged checkpoint is moved from checkpoints/STEP to damaged/STEP: nothing deletes it, the number
of kept checkpoints does not count it, and its step can be saved again. metrics.jsonl gets a row of
the kind "damage" for it, and the stage's entry in lineage.json the same fields.
"""

from __future__ import annotations

import functools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import TypeVar

import jax

from flm_jax.errors import DamageError
from flm_jax.runtime import paths, processes
from flm_jax.store import audit
from flm_jax.store.checkpoint import Checkpoints, check_loss, set_aside
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.lineage import StageFolder

T = TypeVar("T")


def opened(folder: StageFolder, keep: int | None) -> Checkpoints:
    """Opens the checkpoints of a stage, without those whose description is damaged."""

    def sweep() -> None:
        for step in folder.steps():
            path = folder.checkpoints / str(step)
            try:
                check_loss(path)
                CheckpointReader(path)
            except DamageError as error:
                _move(folder, error)

    processes.once(sweep)
    return Checkpoints(folder.checkpoints, keep)


def surviving(folder: StageFolder, checkpoints: Checkpoints, action: Callable[[], T]) -> T:
    """Runs an action on a stage's checkpoints again until none that it reads is damaged.

    Args:
      folder: the stage's folder.
      checkpoints: its checkpoints.
      action: reads the latest or best checkpoint, if there is one.

    Raises:
      DamageError: something else is damaged, such as a checkpoint of the stage before.
    """
    while True:
        try:
            return action()
        except DamageError as error:
            path = paths.of(error.path)
            # A second look, without orbax: what only one of the two cannot read stays where it is.
            if path.parent != folder.checkpoints or not _confirmed(path):
                raise
            checkpoints.close()
            processes.once(functools.partial(_move, folder, error))
            checkpoints.open()


def _confirmed(path: pathlib.Path) -> bool:
    return any(processes.everyone(audit.damage(path, together=jax.process_count() > 1)))


def _move(folder: StageFolder, error: DamageError) -> None:
    """Moves a damaged checkpoint aside, and says so; the first process calls it."""
    path = paths.of(error.path)
    target = _in_run(folder, set_aside(path))
    print(f"{error}; moved to {target}, an earlier state is used", file=sys.stderr)
    row = {"what": str(error), "checkpoint": _in_run(folder, path), "moved_to": target}
    folder.metrics.append("damage", int(path.name), **row)
    folder.metrics.publish()


def _in_run(folder: StageFolder, path: pathlib.Path) -> str:
    return os.fspath(path.relative_to(folder.run.path))

"""Shows the comparison of runs, for the commands that do so."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import rich.console

from flm_jax.runs import comparison
from flm_jax.runs.comparison import Run

_MOST_NOTES = 20


def show(
    runs: Sequence[Run], folder: pathlib.Path, console: rich.console.Console
) -> dict[str, Any]:
    """Prints the table of runs and where they differ; writes their curves.

    Args:
      runs: one or more.
      folder: for the curves.
      console: for table and notes.

    Returns:
      `runs` (the table's rows), `notes`, and `files` (the curves').

    Raises:
      UserError: the folder cannot be written.
    """
    notes = comparison.notes(runs)
    files = comparison.write(runs, folder)
    console.print(comparison.table(runs))
    for note in notes[:_MOST_NOTES]:
        console.print(note)
    if len(notes) > _MOST_NOTES:
        console.print(f"and {len(notes) - _MOST_NOTES} more differences (--json lists them all)")
    console.print(f"curves: {', '.join(map(str, files))}")
    return {
        "runs": [run.row() for run in runs],
        "notes": notes,
        "files": [str(file) for file in files],
    }

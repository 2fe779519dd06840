"""Files that are written atomically, and the metrics file."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
from typing import Any

from flm_jax.data import json_text
from flm_jax.runtime import processes
from flm_jax.store import entries


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file; a reader sees the old or the new content, also after a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value of a run as JSON, atomically; it is read back exactly."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def write_result(path: pathlib.Path, value: Any) -> None:
    """Writes what a command measured as JSON, atomically; NaN and infinity become null."""
    write_atomically(path, json_text.dump(value, indent=1) + "\n")


def link(source: str, target: str) -> None:
    """Makes a hard link, or a copy if the target is on another disk; keeps an existing target."""
    if os.path.exists(target):
        return
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copy2(source, target + ".tmp")
        os.replace(target + ".tmp", target)


class MetricsFile:
    """A file with one JSON object per line; each has a `kind` and a `step`."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Reads the rows of one `kind` (None: of all kinds), without an incomplete last line."""
        rows = entries.read_metrics(self.path)
        return [row for row in rows if kind is None or row["kind"] == kind]

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Deletes the rows after `step`: a resumed run repeats their steps. Returns the others."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    def append(self, kind: str, step: int, **values: Any) -> None:
        """Appends a row; only the first process writes."""
        if not processes.first():
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

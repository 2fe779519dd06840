"""Files that appear whole or not at all, and the metrics file."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
from typing import Any

from flm_jax.runtime import processes


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a reader, or a kill, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: pathlib.Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def link(source: str, target: str) -> None:
    """A hard link, on another disk a copy; what an interrupted call made is kept."""
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
    """One JSON object a line, each with a `step`; rewound when a run resumes before its end."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Complete rows, of one `kind` (train or eval) if given. A torn last line is left out."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return [row for row in found if kind is None or row["kind"] == kind]

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Forgets what lies after `step`, the steps that the run does again; returns the rest."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    def append(self, kind: str, step: int, **values: Any) -> None:
        """Adds a row, in the first process."""
        if not processes.first():
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

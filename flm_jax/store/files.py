"""Files that are written atomically, on a disk or a bucket, and the metrics file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.runtime import paths, processes
from flm_jax.store import entries, objects


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file; a reader sees the old or the new content, also after a kill.

    On a bucket an object appears whole, once all of it has arrived. On a disk the file and the
    folder that names it are on the disk when the call returns.
    """
    if paths.remote(path):
        path.write_bytes(text.encode())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two writers of one file do not write into each other's.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_UMASK)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync(path.parent)


def _umask() -> int:
    """The system has no call that reads it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


_UMASK = _umask()  # read once: setting it is not safe beside other threads


def sync(path: pathlib.Path) -> None:
    """Waits until a file or a folder of this machine is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value of a run as JSON, atomically; it is read back exactly."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[Callable[[Any], None]]:
    """Yields a function that writes JSON which the block derives from the file's present content.

    On a bucket, the write is refused if the object changed since the block began.

    Raises:
      UserError: it was refused.
    """
    if not paths.remote(path):
        yield lambda value: write_json(path, value)
        return
    generation = objects.read(path)[1]
    try:
        yield lambda value: _replace(path, value, generation)
    except objects.Changed as error:
        raise UserError(
            f"{path}: another process wrote it meanwhile; end one of the two, then call again"
        ) from error


def _replace(path: pathlib.Path, value: Any, generation: bytes) -> None:
    objects.write(path, (json.dumps(value, indent=1) + "\n").encode(), generation)


def write_result(path: pathlib.Path, value: Any) -> None:
    """Writes what a command measured as JSON, atomically; NaN and infinity become null."""
    write_atomically(path, json_text.dump(value, indent=1) + "\n")


def link_tree(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a folder whose files never change; keeps the files that the target has.

    On one disk the copies are hard links. On one bucket the data stays there.
    """
    for path in paths.files(source):
        copy = target / path.relative_to(source)
        if copy.exists():
            continue
        if paths.remote(path) or paths.remote(copy):
            paths.copy(path, copy)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            temporary = copy.with_name(copy.name + ".tmp")
            paths.copy(path, temporary)
            os.replace(temporary, copy)


class MetricsFile:
    """A file with one JSON object per line; each has a `kind` and a `step`.

    A bucket cannot append to an object. There the rows are kept until `publish` writes all of
    them, or the next row after `_PUBLISH_S` seconds does.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._pending: list[dict[str, Any]] = []  # rows that the bucket does not have yet
        self._published = time.monotonic()

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Reads the rows of one `kind` (None: of all kinds), without an incomplete last line."""
        rows = entries.read_metrics(self.path) + self._pending
        return [row for row in rows if kind is None or row["kind"] == kind]

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Deletes the rows after `step`: a resumed run repeats their steps. Returns the others.

        Rows of the kind "damage" stay: they are of a checkpoint, not of a step.
        """
        kept = [row for row in self.rows() if row["step"] <= step or row["kind"] == "damage"]
        self.write(kept)
        return kept

    def append(self, kind: str, step: int, **values: Any) -> None:
        """Appends a row; only the first process writes."""
        if not processes.first():
            return
        row = {"kind": kind, "step": step, **values}
        if paths.remote(self.path):
            self._pending.append(row)
            if time.monotonic() - self._published > _PUBLISH_S:
                self.publish()
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def publish(self) -> None:
        """Makes sure that the file has all rows; call it before a checkpoint that follows them."""
        if self._pending:
            self.write(self.rows())

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Replaces all rows."""
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._pending, self._published = [], time.monotonic()


_PUBLISH_S = 30.0

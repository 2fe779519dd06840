"""A store of results that are computed once: one JSON object per line, with an identity.

Trials of a study, scores of a model and a judge's answers are stored here. A whole run resumes
from its run folder instead.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from flm_jax.data import json_text
from flm_jax.runtime import paths, regular

Row = dict[str, Any]


class Trials:
    """A JSONL file of finished results.

    A result is on disk before `result` returns, so a kill loses at most the result that is being
    computed. A line that is not a JSON object was written by a process that was killed. It is
    ignored, and its result is computed again. Threads may share an instance; processes may not
    share a file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = paths.of(path)
        self._lock = threading.Lock()
        self._rows: list[Row] = []
        self._incomplete = False  # the file ends in the middle of a line
        if self.path.exists():
            text = regular.read(self.path, regular.DATA_BYTES).decode("utf-8", "replace")
            self._rows = [row for line in text.split("\n") if (row := _parsed(line)) is not None]
            self._incomplete = bool(text) and not text.endswith("\n")

    def find(self, identity: Mapping[str, Any]) -> Row | None:
        """Returns the result with these values, or None.

        Args:
          identity: JSON values of the fields that identify the result. One of them is a digest of
            everything that affects the result (`mapping.digest`).
        """
        # A failure is stored, but computed again.
        return next((row for row in self._of(identity) if "failure" not in row), None)

    def failure(self, identity: Mapping[str, Any]) -> str:
        """Returns the latest failure of the result with these values; "": there is none."""
        return next((row["failure"] for row in self._of(identity)[::-1] if "failure" in row), "")

    def _of(self, identity: Mapping[str, Any]) -> list[Row]:
        return [row for row in self._rows if all(row.get(k) == v for k, v in identity.items())]

    def result(self, identity: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Row:
        """Returns the stored result with this identity; computes and stores it if there is none.

        Args:
          identity: see `find`.
          compute: returns the result's other fields as JSON values. A result with a field
            `failure` is stored too, but the next call computes it again.

        Returns:
          The row, with the fields of `identity` and of the result.
        """
        stored = self.find(identity)
        if stored is not None:
            return stored
        line = json.dumps({**identity, **compute()})
        row: Row = json.loads(line)  # the same value that a later call reads
        with self._lock:
            self._rows.append(row)
            if paths.remote(self.path):  # a bucket cannot append
                self.path.write_text("".join(json.dumps(each) + "\n" for each in self._rows))
            else:
                self._append(line)
        return row

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"\n{line}\n" if self._incomplete else f"{line}\n")
        self._incomplete = False


def _parsed(line: str) -> Row | None:
    """Returns the line's JSON object; None if it is not one."""
    try:
        row = json_text.parse(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None

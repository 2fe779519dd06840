"""Where a run is, and a watchdog that notices when it does not move on."""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import os
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from flm_jax.errors import Exit
from flm_jax.runtime import stop


@dataclasses.dataclass
class Place:
    """Where this process is in a run.

    Attributes:
      stage: the stage's name; "": before the first one.
      phase: what the time is spent on, as in `ledger.KINDS`.
      step: the global step.
      since: when it last moved on, in seconds of the monotonic clock.
    """

    stage: str = ""
    phase: str = "start"
    step: int | None = None
    since: float = dataclasses.field(default_factory=time.monotonic)

    def moved(self, *, stage: str = "", phase: str = "", step: int | None = None) -> None:
        """Notes that the run moved on."""
        self.since = time.monotonic()
        if stage and stage != self.stage:
            self.stage, self.step = stage, None
        self.phase = phase or self.phase
        self.step = self.step if step is None else step

    def __str__(self) -> str:
        at = f", step {self.step}" if self.step is not None else ""
        return f"{self.phase} of stage {self.stage or '(none yet)'}{at}"


HERE = Place()  # there is one run at a time in a process


class Watchdog:
    """A thread that writes all threads' stacks when a run does not move on; a context manager.

    It writes once for each time that the run stands still. It sees no hang in C code that holds
    Python's lock.
    """

    def __init__(
        self, seconds: float, ends: bool, keep: Callable[[str, str], pathlib.Path | None]
    ) -> None:
        """Watches nothing yet.

        Args:
          seconds: without progress that count as a hang; 0: never.
          ends: whether to end the process with Exit.HUNG.
          keep: (kind, text) -> the file that it was written to.
        """
        self._seconds, self._ends, self._keep = seconds, ends, keep
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        HERE.moved(phase="start")
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        told = None
        while not self._over.wait(min(self._seconds / 4, 10.0)):
            since = HERE.since
            if since == told or time.monotonic() - since < self._seconds:
                continue
            told = since
            path = self._keep("hang", stacks())
            line = f"no progress for {self._seconds:g} s in {HERE}; stacks: {path}"
            if self._ends:
                stop.end(Exit.HUNG, f"{line}; the same command continues from the last checkpoint")
            print(line, file=sys.stderr, flush=True)


def stacks() -> str:
    """Returns the stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def file_name(kind: str) -> str:
    """Returns the name of a new file, such as "20261128T010203-77-hang.txt"."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    return f"{now}-{os.getpid()}-{kind}.txt"

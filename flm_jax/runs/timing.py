"""A stage's time: where it goes (time.jsonl), and when the next checkpoint is due by it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from flm_jax.runtime import phases, processes, watch
from flm_jax.runtime.ledger import UNKNOWN, Ledger, account, goodput
from flm_jax.store.files import MetricsFile

EVERY_SECONDS = 30.0  # between two rows; what a killed process did after its last row is not known


# What a person sees of each kind.
_WORDS = {
    "steps": "training", "input": "reading data", "save": "saving", "evaluation": "measuring",
    "growth": "growing", "start": "opening",
}  # fmt: skip


class StageTime:
    """Writes the seconds of this process's life, by kind, to a stage's time.jsonl."""

    def __init__(self, name: str, file: MetricsFile, now: Callable[[], float] = time.time):
        """Begins a life. Only the first process writes.

        Args:
          name: the stage's, which its phases are shown with.
          file: time.jsonl, with the rows of earlier lives.
          now: seconds since 1970; for tests.
        """
        if processes.first():
            file.rewind(sys.maxsize)  # removes a line that a killed life did not write whole
        self._file, self._life = file, now()
        self._ledger, self._written = Ledger(), 0.0
        self._name = name
        self.write(UNKNOWN)

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Counts the time of the block as a kind of `ledger.KINDS`, and shows it as a phase."""
        outer = watch.HERE.phase
        watch.HERE.moved(phase=kind)
        with phases.phase(f"{self._name}  {_WORDS[kind]}"), self._ledger.spend(kind):
            yield
        watch.HERE.moved(phase=outer)  # an error keeps the phase in which it came

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """Shows the block as compilation; the ledger knows by itself what it is."""
        return phases.phase(f"{self._name}  compiling the train step")

    def busy(self) -> float:
        """Seconds of this life in steps and their input: without compilation and all else."""
        seconds = self._ledger.seconds()
        return seconds["steps"] + seconds["input"]

    def write(self, step: int) -> None:
        """Writes a row at a global step: at the first step of this life, and at every save."""
        seconds = self._ledger.seconds()
        self._written = sum(seconds.values())
        self._file.append("time", step, life=self._life, seconds=seconds)

    def tick(self, step: int) -> None:
        """Notes progress; writes a row if the last one is old."""
        watch.HERE.moved(step=step)
        if sum(self._ledger.seconds().values()) - self._written >= EVERY_SECONDS:
            self.write(step)

    def result(self) -> dict[str, Any]:
        """Returns the stage's account for its entry in lineage.json."""
        seconds = account(self._file.rows())
        return {"share": goodput(seconds), "seconds": seconds}


class SaveTimer:
    """Tells when a checkpoint is due by wall time."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        """Starts the interval.

        Args:
          minutes: between two checkpoints; 0: none is due by time.
          clock: seconds; for tests.
        """
        self._seconds, self._clock = 60 * minutes, clock
        self.restart()

    def restart(self) -> None:
        """Starts the interval again, after a checkpoint for any reason."""
        self._last = self._clock()

    def due(self) -> bool:
        """Whether the interval is over."""
        return self._seconds > 0 and self._clock() - self._last >= self._seconds

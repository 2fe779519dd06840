"""Where the time of a run goes: a ledger of seconds by kind, which sums to wall time.

One `Ledger` accounts for one life of a process. The kinds exclude each other: inside `spend`, time
counts for the innermost kind, and compiling counts as "compile" wherever it happens. `account` adds
up the lives of a stage; work that a restart repeated counts as "redone", and the time between two
lives as "down".
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.monitoring

# "start": opening and restoring; "growth": growing and measuring it; "other": the rest of a life.
KINDS = ("steps", "compile", "input", "save", "evaluation", "growth", "start", "other")
LOST = ("redone", "down")
UNKNOWN = -1  # the step of a row of a life that is not resumed yet
_COMPILE = "/jax/core/compile/"  # jax's events: tracing, lowering, compiling


class _CompileClock:
    """The total time in which jax traced, lowered or compiled, without counting any second twice.

    jax reports each interval at its end, and intervals nest: a function is traced while another is.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._intervals: list[tuple[float, float]] = []  # disjoint, in order

    def __call__(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith(_COMPILE) and event.endswith("_duration"):
            end = self._clock()
            start = end - duration_secs
            while self._intervals and self._intervals[-1][1] > start:
                start = min(start, self._intervals.pop()[0])
            self._intervals.append((start, end))

    def take(self) -> float:
        """Returns the seconds since the last call."""
        total = sum(end - start for start, end in self._intervals)
        self._intervals.clear()
        return total


@functools.cache
def _compile_clock() -> _CompileClock:
    clock = _CompileClock(time.monotonic)
    jax.monitoring.register_event_duration_secs_listener(clock)
    return clock


class Ledger:
    """The seconds of one life of a process, by kind."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        compiling: Callable[[], float] | None = None,
    ):
        """Starts with the kind "other".

        Args:
          clock: seconds; for tests.
          compiling: returns the seconds of compilation since its last call; for tests.
        """
        self._clock, self._compiling = clock, compiling or _compile_clock().take
        self._compiling()  # what was compiled before is not of this life
        self._last = clock()
        self._kinds = ["other"]
        self._seconds = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Counts the time of the block as `kind`, but for blocks inside it."""
        assert kind in self._seconds, kind
        self._settle()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._settle()
            self._kinds.pop()

    def seconds(self) -> dict[str, float]:
        """Returns the seconds by kind so far; their sum is this life's wall time."""
        self._settle()
        return dict(self._seconds)

    def _settle(self) -> None:
        now = self._clock()
        elapsed, self._last = now - self._last, now
        compiled = min(self._compiling(), elapsed)
        self._seconds["compile"] += compiled
        self._seconds[self._kinds[-1]] += elapsed - compiled


def account(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Adds up the lives of a stage.

    Args:
      rows: in order of writing; each has `life` (when the process's life began, in seconds since
        1970), `step` (UNKNOWN until the life knows from which step it goes on) and `seconds` (as
        `Ledger.seconds`, since the life began).

    Returns:
      Seconds by kind, of KINDS and LOST. Their sum is the time from the first life's beginning to
      the last row. Rows of a life beyond the step from which the next one goes on, or to which the
      life itself goes back, are redone: all of their seconds are lost, whatever they were spent on.
      What a killed life did after its last row is not known, and counts as "down".
    """
    kept: list[tuple[int, dict[str, float]]] = []  # (step, seconds since the row before)
    total = dict.fromkeys((*KINDS, *LOST), 0.0)
    before: Mapping[str, Any] | None = None
    resumed = False  # whether this life's first step is known
    for row in rows:
        seconds = dict(row["seconds"])
        if before is None or row["life"] != before["life"]:
            if before is not None:
                end = before["life"] + sum(before["seconds"].values())
                total["down"] += max(row["life"] - end, 0.0)
            resumed = False
        else:
            seconds = {kind: s - before["seconds"][kind] for kind, s in seconds.items()}
        back = before is not None and row["step"] < before["step"]  # after a spike
        if row["step"] != UNKNOWN and (back or not resumed):
            lost = [spent for step, spent in kept if step > row["step"]]
            kept = [entry for entry in kept if entry[0] <= row["step"]]
            total["redone"] += sum(sum(spent.values()) for spent in lost)
            resumed = True
        kept.append((row["step"], seconds))
        before = row
    for _, seconds in kept:
        for kind, s in seconds.items():
            total[kind] += s
    return total


def goodput(total: Mapping[str, float]) -> float:
    """Returns the share of the wall time in steps that were kept."""
    return total["steps"] / max(sum(total.values()), 1e-9)

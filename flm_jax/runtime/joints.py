"""Places where a run can end after a signal (`stop.py`), in all of its processes together."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

from flm_jax.errors import RunStopped
from flm_jax.runtime import processes, stop, watch

T = TypeVar("T")


class CutShort(Exception):
    """A signal came between two items of `between`.

    Attributes:
      number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


def between(items: Iterable[T]) -> Iterator[T]:
    """Yields the items; raises CutShort before one if a signal came to any process."""
    for item in items:
        watch.HERE.moved()
        if number := _requested():
            raise CutShort(number)
        yield item


def check(where: str) -> None:
    """Ends the run here if a signal came to any process; nothing new needs saving.

    Args:
      where: as "after the growth of stage large".

    Raises:
      RunStopped: a signal came.
    """
    if number := _requested():
        raise RunStopped(
            f"{signal.Signals(number).name}: stopped {where}; the same command continues from "
            "there",
            number,
        )


def _requested() -> int:
    """Returns the largest number of a signal that came to a process; 0: none."""
    return int(processes.largest(stop.requested()))

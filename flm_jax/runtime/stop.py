"""Stop requests: Ctrl-C and SIGTERM end a run at its next step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def request(signal_number: int, save: bool) -> int:
    """One number for what a process asks of all: to stop (a signal's number; 0: no), or to save.

    All follow the largest number, so a signal beats a save. A stop saves too.

    >>> read_request(max(request(0, True), request(15, False)))
    (15, False)
    """
    return signal_number << 1 | save


def read_request(number: int) -> tuple[int, bool]:
    """Returns the signal's number and whether to save; see `request`."""
    return number >> 1, bool(number & 1)


class StopRequest:
    """A context manager that records SIGINT and SIGTERM; a second SIGINT acts as if unhandled.

    SIGTERM may come twice at one preemption: from the scheduler to every process, and forwarded by
    a launcher.

    Attributes:
      requested: the number of the signal that came; 0: none.
    """

    def __init__(self) -> None:
        self.requested = 0

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])

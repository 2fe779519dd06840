"""Stop requests: Ctrl-C and SIGTERM end a run at its next step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context manager that records SIGINT and SIGTERM; a second signal acts as if unhandled.

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
        signal.signal(number, self._before[signal.Signals(number)])

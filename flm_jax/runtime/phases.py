"""Named phases of a command, so that no work is silent.

While a phase lasts, a line says so whenever nothing else was printed for a while; at its end a line
gives its time, if it took long enough to notice. Phases nest, and the innermost one is shown. One
thread watches them all, so that entering one costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

from flm_jax.runtime import display

PATIENCE = 5.0  # seconds of silence after which a line says what is going on
_NOTICED = 1.0  # seconds from which a finished phase is worth a line
_POLL = 0.5


@dataclasses.dataclass
class _Phase:
    name: str
    began: float
    patience: float


class Watch:
    """The phases that are going on in this process."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        show: Callable[[str], None] = display.note,
        silent_since: Callable[[], float] = display.silent_since,
    ):
        """Starts without phases.

        Args:
          clock: seconds; for tests.
          show: prints a line; for tests.
          silent_since: when the last line was printed, by the clock; for tests.
        """
        self._clock, self._show, self._silent_since = clock, show, silent_since
        self._phases: list[_Phase] = []

    @contextlib.contextmanager
    def phase(self, name: str, patience: float = PATIENCE) -> Iterator[None]:
        """Shows the block as a phase; an error in it prints no line of its own.

        Args:
          name: what is shown, as "large  growing".
          patience: seconds of silence after which a line says so.
        """
        phase = _Phase(name, self._clock(), patience)
        self._phases.append(phase)
        try:
            yield
        finally:
            self._phases.remove(phase)
        if self._clock() - phase.began >= _NOTICED:
            self._show(f"{name}  {self._clock() - phase.began:.1f} s")

    def look(self) -> None:
        """Prints a line if the innermost phase has been silent for too long."""
        phases = self._phases[-1:]
        for phase in phases:
            now = self._clock()
            if now - max(self._silent_since(), phase.began) >= phase.patience:
                self._show(f"{phase.name} ... {now - phase.began:.0f} s")


_WATCH = Watch()
_START = threading.Lock()
_THREADS: list[threading.Thread] = []


def phase(name: str, patience: float = PATIENCE) -> contextlib.AbstractContextManager[None]:
    """Shows a block of this process as a phase: see `Watch.phase`."""
    with _START:
        if not _THREADS:
            _THREADS.append(threading.Thread(target=_watch, name="phases", daemon=True))
            _THREADS[0].start()
    return _WATCH.phase(name, patience)


def before_mistakes(name: str) -> contextlib.AbstractContextManager[None]:
    """Shows a block that may end in a mistake of the user as a phase: see `Watch.phase`.

    Such a mistake is one line, also for a program that reads standard error. So only a person at a
    terminal is told early what is going on.
    """
    terminal = display.open_console(stderr=True).is_terminal
    return phase(name, PATIENCE if terminal else 6 * PATIENCE)


def _watch() -> None:
    while True:
        time.sleep(_POLL)
        _WATCH.look()

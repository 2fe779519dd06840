"""Stop requests: a signal ends a run soon, with its state on disk.

`StopRequest` records the signals, and the run looks at it at its joints: between steps, between the
batches of an evaluation, after a growth (`joints.py`). A joint may be far away: a program
compiles for minutes, or a file system hangs. A command therefore runs inside `Guard`, a thread
that ends the process itself: at once where nothing new needs saving, and otherwise after `GRACE_S`.
Every file of a run is written so that the process can end anywhere.

This module loads quickly: every command begins with it.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# Ctrl-C; the scheduler's notice before it takes the machine; a lost terminal; Slurm's notice.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GRACE_S = 60.0  # after a signal, until the last save begins
_GRACE_STEPS = 3  # or so many steps, if they take longer
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


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


def heeded() -> list[signal.Signals]:
    """Returns the signals that this process may handle: those that are not ignored.

    Nor a signal with a handler that is not Python's, which could not be put back.
    """
    return [s for s in SIGNALS if signal.getsignal(s) not in (signal.SIG_IGN, None)]


class StopRequest:
    """A context manager that records signals; a second SIGINT acts as if unhandled.

    SIGTERM may come twice at one preemption: from the scheduler to every process, and forwarded by
    a launcher. A signal that is ignored on entry stays so: SIGHUP under nohup, SIGINT in a shell's
    background job.

    Attributes:
      requested: the number of the signal that came; 0: none.
      unsaved: whether the run has steps that are not on disk.
      saving: whether the last save has begun.
      step_s: seconds of the shortest step so far.
    """

    def __init__(self, bounded: bool = False) -> None:
        """Records nothing yet.

        Args:
          bounded: whether a `Guard` may end the process.
        """
        self.requested = requested()  # also by what encloses this
        self.bounded, self.unsaved, self.saving = bounded, False, False
        self.step_s = math.inf

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in heeded()}
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def grace_s(self) -> float:
        """Seconds from a signal until the last save must have begun."""
        return GRACE_S if math.isinf(self.step_s) else max(GRACE_S, _GRACE_STEPS * self.step_s)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        if number == signal.SIGINT and not (self.bounded and _guards):
            signal.signal(number, self._before[signal.SIGINT])


# Signals belong to the process, and so do these; of several the last one decides.
_active: list[StopRequest] = []
_guards: list[Guard] = []
_endings: list[Callable[[], None]] = []


@contextlib.contextmanager
def at_end(action: Callable[[], None]) -> Iterator[None]:
    """During the block, `Guard` calls `action` before it ends the process."""
    _endings.append(action)
    try:
        yield
    finally:
        _endings.remove(action)


def requested() -> int:
    """Returns the number of the signal that came to this process during a run; 0: none."""
    return _active[-1].requested if _active else 0


class Guard:
    """A thread that ends this process in time after a signal; a context manager.

    For commands alone: a process that calls the library is not the library's to end.
    """

    def __init__(self, name: str) -> None:
        """Watches nothing yet.

        Args:
          name: begins the line that it prints.
        """
        self._name = name

    def __enter__(self) -> Guard:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python's C code writes each signal's number there at once, whatever the main thread does.
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        self._thread.start()
        _guards.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _guards.remove(self)
        signal.set_wakeup_fd(self._before)
        os.write(self._write, bytes([0]))
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _watch(self) -> None:
        first, number, interrupts = math.inf, 0, 0
        while True:
            if select.select([self._read], [], [], 0.1 if number else None)[0]:
                came = os.read(self._read, 1)[0]
                if came == 0:
                    return
                if came not in SIGNALS or not (_active and _active[-1].bounded):
                    continue
                first, number = min(first, time.monotonic()), came
                interrupts += came == signal.SIGINT
            if not (number and _active):
                continue
            run, name = _active[-1], signal.Signals(number).name
            if interrupts > 1:
                how = "again: stopped at once; the same command continues from the last checkpoint"
            elif not run.unsaved:
                how = "stopped it; nothing was lost, and the same command continues from there"
            elif not run.saving and time.monotonic() - first > run.grace_s:
                how = (
                    f"came, and no step ended within {run.grace_s:.0f} s; the same command "
                    "continues from the last checkpoint"
                )
            else:
                continue
            end(128 + number, f"{self._name}: {name} {how}")


def end(status: int, message: str) -> None:
    """Ends the process with one line, without waiting for any other thread of it."""
    for ending in list(_endings):
        with contextlib.suppress(Exception):
            ending()
    cursor = _SHOW_CURSOR if sys.stderr.isatty() else b""
    os.write(2, cursor + f"{message}\n".encode())
    os._exit(status)


def _apart() -> None:
    """A child's signals are not its parent's."""
    if _guards:
        signal.set_wakeup_fd(-1)
        _guards.clear()


os.register_at_fork(after_in_child=_apart)

"""What a person sees while a command works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any

import rich.console
import rich.progress
from rich.filesize import decimal

from flm_jax.runtime import processes

PLAIN_SECONDS = 5.0
WINDOW_SECONDS = 30.0  # over which rates are averaged
_LAST_LINE = [time.monotonic()]  # when this process printed its last line


WIDE = 1000  # columns where there is no terminal: nothing is wrapped in a file or a pipe


def short(number: float) -> str:
    """A count in three digits, as people say it.

    >>> short(77_700), short(17_129_920), short(1_595_360), short(52), short(1.2e12)
    ('77.7k', '17.1M', '1.6M', '52', '1.2T')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def open_console(*, stderr: bool = False, **options: Any) -> rich.console.Console:
    """A console that wraps text only on a terminal; brackets in text are not markup."""
    made = rich.console.Console(stderr=stderr, markup=False, **options)
    if not made.is_terminal:
        made.width = WIDE
    return made


def note(text: str) -> None:
    """Prints one line on standard error, by the first process."""
    open_console(stderr=True, quiet=not processes.first()).print(text, highlight=False)
    _LAST_LINE[0] = time.monotonic()


def silent_since() -> float:
    """When `note` or a `Progress` printed their last line, by `time.monotonic`."""
    return _LAST_LINE[0]


class Progress:
    """Shows how much of some work is done, and the time left; a context manager.

    Writes to standard error; of several processes only the first writes.
    """

    def __init__(
        self,
        name: str,
        done: int = 0,
        total: int | None = None,
        unit: str = "steps",
        clock: Callable[[], float] = time.monotonic,
        console: rich.console.Console | None = None,
    ):
        """Initialises the display.

        Args:
          name: name of the work.
          done: number of units already done.
          total: total number of units; None: unknown until `count` sets it.
          unit: name of the units. "bytes" are shown as sizes, with their speed.
          clock: seconds; for tests.
          console: where to write; for tests.
        """
        self._console = console or open_console(stderr=True, quiet=not processes.first())
        self._clock, self._name, self._unit = clock, name, unit
        self._done = done
        self._total = total
        self._began = self._last_line = clock()
        # Time at work, units and tokens at some updates: the ends of the window of rates.
        self._past: collections.deque[tuple[float, int, int]] = collections.deque([(0.0, done, 0)])
        amount: list[rich.progress.ProgressColumn] = [rich.progress.MofNCompleteColumn()]
        if unit == "bytes":
            amount = [rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn()]
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            *amount,
            rich.progress.TextColumn("{task.fields[status]}"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, status="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(
        self,
        done: int,
        loss: float | None = None,
        tokens: int = 0,
        mask: float | None = None,
        busy: float | None = None,
    ) -> None:
        """Shows that `done` units are done.

        Args:
          done: number of units, including those done before this display started.
          loss: loss of the last training step, in nats per token; None: nothing is trained.
          tokens: number of tokens trained since this display started.
          mask: value of the run-time masks; None: there are none.
          busy: seconds of work since this display started, without what rates should leave out;
            None: all of them.
        """
        self._done, now = done, self._clock()
        busy = now - self._began if busy is None else busy
        self._past.append((busy, done, tokens))
        while len(self._past) > 2 and busy - self._past[1][0] >= WINDOW_SECONDS:
            self._past.popleft()
        status = "" if loss is None else f"loss {loss:.3f}  {self.rate():,.0f} tokens/s"
        if mask is not None:
            status += f"  mask {mask:.2f}"
        self._bar.update(self._task, completed=done, total=self._total, status=status)
        if self._console.is_terminal:
            _LAST_LINE[0] = time.monotonic()  # the bar has moved
        due = now - self._last_line >= PLAIN_SECONDS or done == self._total
        if due and not self._console.is_terminal:
            self._last_line = now
            self.note(self._line(status))

    def rate(self) -> float:
        """Tokens per second of work, over the window."""
        (then, _, before), (now, _, tokens) = self._past[0], self._past[-1]
        return (tokens - before) / max(now - then, 1e-9)

    def add(self, units: int) -> None:
        """Shows that more units are done."""
        self.update(self._done + units)

    def count(self, done: int, total: int) -> None:
        """Shows `done` of `total` units; for work whose total is not known at first."""
        self._total = total
        self.update(done)

    def note(self, text: str) -> None:
        """Prints a line of its own, above the bar."""
        self._console.print(text, highlight=False)
        _LAST_LINE[0] = time.monotonic()

    def _line(self, status: str) -> str:
        total = self._total or 0
        (then, first, _), (now, done, _) = self._past[0], self._past[-1]
        rate = (done - first) / max(now - then, 1e-9)
        if self._unit == "bytes":
            amount = f"{decimal(self._done)} of {decimal(total)}  {decimal(int(rate))}/s"
        else:
            amount = f"{self._unit} {self._done}/{total}"
        left = f"{(total - self._done) / rate:.0f} s left" if rate else ""
        return "  ".join(part for part in (self._name, amount, status, left) if part)

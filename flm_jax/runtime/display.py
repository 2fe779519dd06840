"""What a person sees while a command works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import rich.console
import rich.progress
from rich.filesize import decimal

from flm_jax.runtime import processes

PLAIN_SECONDS = 10.0


WIDE = 1000  # columns where there is no terminal: nothing is wrapped in a file or a pipe


def open_console(*, stderr: bool = False, **options: Any) -> rich.console.Console:
    """A console that wraps text only on a terminal; brackets in text are not markup."""
    made = rich.console.Console(stderr=stderr, markup=False, **options)
    if not made.is_terminal:
        made.width = WIDE
    return made


def note(text: str) -> None:
    """Prints one line on standard error, by the first process."""
    open_console(stderr=True, quiet=not processes.first()).print(text, highlight=False)


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
        self._first = self._done = done
        self._total = total
        self._began = self._last_line = clock()
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
        self, done: int, loss: float | None = None, tokens: int = 0, mask: float | None = None
    ) -> None:
        """Shows that `done` units are done.

        Args:
          done: number of units, including those done before this display started.
          loss: loss of the last training step, in nats per token; None: nothing is trained.
          tokens: number of tokens trained since this display started.
          mask: value of the run-time masks; None: there are none.
        """
        self._done, now = done, self._clock()
        seconds = max(now - self._began, 1e-9)
        status = "" if loss is None else f"loss {loss:.3f}  {tokens / seconds:,.0f} tokens/s"
        if mask is not None:
            status += f"  mask {mask:.2f}"
        self._bar.update(self._task, completed=done, total=self._total, status=status)
        due = now - self._last_line >= PLAIN_SECONDS or done == self._total
        if due and not self._console.is_terminal:
            self._last_line = now
            self._console.print(self._line(status, seconds), highlight=False)

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

    def _line(self, status: str, seconds: float) -> str:
        total = self._total or 0
        rate = (self._done - self._first) / seconds
        if self._unit == "bytes":
            amount = f"{decimal(self._done)} of {decimal(total)}  {decimal(int(rate))}/s"
        else:
            amount = f"{self._unit} {self._done}/{total}"
        left = f"{(total - self._done) / rate:.0f} s left" if rate else ""
        return "  ".join(part for part in (self._name, amount, status, left) if part)

"""What a person sees while a command works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import rich.console
import rich.progress
from rich.filesize import decimal

from flm_jax.runtime import processes

PLAIN_SECONDS = 10.0


class Progress:
    """Shows loss, tokens/s, mask value and time left of one stage; a context manager.

    Writes to standard error, of several processes in the first. `clock` is for tests.
    """

    def __init__(
        self,
        name: str,
        start: int,
        end: int,
        clock: Callable[[], float] = time.monotonic,
        console: rich.console.Console | None = None,
    ):
        self._console = console or rich.console.Console(stderr=True, quiet=not processes.first())
        self._clock, self._name, self._end = clock, name, end
        self._first, self._began, self._last_line = start, clock(), clock()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[status]}"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=end, completed=start, status="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, tokens: int, mask: float | None) -> None:
        """After `step`, with `tokens` trained since this display began."""
        now = self._clock()
        seconds = max(now - self._began, 1e-9)
        ramp = "" if mask is None else f"  mask {mask:.2f}"
        status = f"loss {loss:.3f}  {tokens / seconds:,.0f} tokens/s{ramp}"
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_terminal and (
            now - self._last_line >= PLAIN_SECONDS or step == self._end
        ):
            self._last_line = now
            left = seconds / max(step - self._first, 1) * (self._end - step)
            self._console.print(
                f"{self._name}  step {step}/{self._end}  {status}  {left:.0f} s left",
                highlight=False,
            )

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, highlight=False)


class Transfer:
    """Shows bytes done, GB/s and time left; a context manager. Writes to standard error.

    `clock` is for tests.
    """

    def __init__(
        self,
        name: str,
        done: int,
        total: int,
        clock: Callable[[], float] = time.monotonic,
        console: rich.console.Console | None = None,
    ):
        """`done`: of `total` bytes, by an earlier call."""
        self._console = console or rich.console.Console(stderr=True)
        self._clock, self._name, self._total = clock, name, total
        self._before = self._done = done
        self._began = self._last_line = clock()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, completed=done)

    def __enter__(self) -> Transfer:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, done: int) -> None:
        """After `done` more bytes."""
        self._done += done
        self._bar.update(self._task, completed=self._done)
        now = self._clock()
        if not self._console.is_terminal and (
            now - self._last_line >= PLAIN_SECONDS or self._done == self._total
        ):
            self._last_line = now
            rate = (self._done - self._before) / max(now - self._began, 1e-9)
            self._console.print(
                f"{self._name}  {decimal(self._done)} of {decimal(self._total)}  "
                f"{decimal(int(rate))}/s  {(self._total - self._done) / max(rate, 1):.0f} s left",
                highlight=False,
            )


def counting(
    name: str,
    console: rich.console.Console,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[int, int], None]:
    """`note(done, of)` that prints a line now and then, for work that only counts."""
    last = clock()

    def note(done: int, of: int) -> None:
        nonlocal last
        if clock() - last >= PLAIN_SECONDS:
            last = clock()
            console.print(f"{name}  {done}/{of}", highlight=False)

    return note

"""Lives of a run in forked processes, and what must hold after each of them.

A life is forked from a process that has imported everything and never started JAX: JAX cannot be
forked once it runs. Compiled programs come from a cache that all lives share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

# Read when they are imported.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "EPATH_USE_TF": "false",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

import clu.metric_writers  # noqa: F401  (warm in every life)

from flm_jax.runtime.stop import SIGNALS, Guard
from flm_jax.store.files import MetricsFile
from tests.faults import chain
from tests.faults.table import Row

PATIENCE_S = 120.0  # beyond this a life hangs; it takes about 5 s on a free core
COMPILING = 10  # times as much for a life that fills the cache of programs
_PIPE_BYTES = 1 << 20  # of a life's output; more would block it
_F_SETPIPE_SZ = 1031


@dataclasses.dataclass(frozen=True)
class Home:
    """What all trials share.

    Attributes:
      work: the folder of their run folders.
      want: the result of the undisturbed run.
      rows: its rows of metrics.
      seconds: how long it took.
    """

    work: pathlib.Path
    want: list[Any]
    rows: list[Any]
    seconds: float

    @property
    def compiled(self) -> pathlib.Path:
        return self.work / "compiled"


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a life ended: its status (-N: by signal N; None: it hung), and all that it printed."""

    status: int | None
    text: str


class Life:
    """A forked process that calls an action; its result is the exit status."""

    def __init__(self, action: Callable[[], int]):
        self._read, write = os.pipe()
        fcntl.fcntl(write, _F_SETPIPE_SZ, _PIPE_BYTES)
        self.pid = os.fork()
        if not self.pid:
            os.close(self._read)
            _live(action, write)
        os.close(write)

    def kill(self, number: int) -> bool:
        """Sends a signal; returns whether the life was still there."""
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        os.kill(self.pid, number)
        return True

    def wait(self, patience: float = PATIENCE_S) -> Ended:
        end, status, hung = time.monotonic() + patience, None, False
        while status is None:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(code)
            elif time.monotonic() > end:
                hung = True
                os.kill(self.pid, signal.SIGKILL)
                end += patience
            else:
                time.sleep(0.005)
        with open(self._read, "rb") as pipe:
            text = pipe.read().decode(errors="replace")
        return Ended(None if hung else status, text)


def _live(action: Callable[[], int], output: int) -> None:
    """Becomes a process as a command has it, and never returns."""
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        for number in set(SIGNALS) - {signal.SIGINT}:
            signal.signal(number, signal.SIG_DFL)
        with Guard("faults"):
            status = action()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)


def saved(workdir: pathlib.Path) -> dict[str, int]:
    """Returns the newest complete checkpoint of each stage."""
    steps: dict[str, int] = {}
    for path in workdir.glob("stages/*/checkpoints/*"):
        if path.name.isdigit():
            stage = path.parent.parent.name
            steps[stage] = max(steps.get(stage, 0), int(path.name))
    return steps


def _began(workdir: pathlib.Path, stage: str, since: float) -> int | None:
    """Returns the step from which a life that began after `since` went on in a stage, if any."""
    rows = MetricsFile(workdir / "stages" / stage / "time.jsonl").rows()
    return next((r["step"] for r in rows if r["life"] >= since and r["step"] >= 0), None)


class Trial:
    """One run and the faults that happen to it; counts into a row."""

    def __init__(self, home: Home, fault: str, name: str, count: int = 1):
        """Names a new run folder.

        Args:
          home: what all trials share.
          fault: the row's name.
          name: of the trial and its folder, for findings.
          count: processes of its lives.
        """
        self.home, self.count = home, count
        self.workdir, self.row, self._name = home.work / name, Row(fault), name
        self._bad: set[str] = set()

    def bad(self, column: str, finding: str) -> None:
        """Counts the trial once in a column."""
        if column not in self._bad:
            self._bad.add(column)
            setattr(self.row, column, getattr(self.row, column) + 1)
        self.row.findings.append(f"{self.row.fault}, {self._name}: {column}: {finding}")

    def begin(self, before: Callable[[], None] = lambda: None) -> Life:
        """Starts a life; `before` runs in it first."""

        def action() -> int:
            before()
            return chain.train(self.workdir, self.home.compiled)

        self._before, self._since = saved(self.workdir), time.time()
        return Life(action)

    def end(self, life: Life, *statuses: int) -> Ended:
        """Waits for a life, and checks its status, its output, and that it lost nothing."""
        ended = life.wait()
        self.check(ended, *statuses)
        for stage, step in self._before.items():
            began = _began(self.workdir, stage, self._since)
            if (began is not None and began < step) or saved(self.workdir).get(stage, -1) < step:
                self.bad("lost", f"{stage} had step {step}; the next life began at {began}")
        return ended

    def check(self, ended: Ended, *statuses: int) -> None:
        """Checks a life's status and output."""
        if ended.status is None:
            self.bad("hang", ended.text[-2000:])
        elif ended.status not in statuses:
            self.bad("wrong", f"status {ended.status} instead of {statuses}: {ended.text[-2000:]}")
        if "Traceback (most recent call last)" in ended.text:
            self.bad("traceback", ended.text[-4000:])

    def finish(self, faults: int) -> Row:
        """Runs to the end undisturbed, and compares the result; returns the row."""
        self.end(self.begin(), 0)
        self.compare()
        return self.close(faults)

    def compare(self, told: str = "") -> None:
        """Compares the result with that of the undisturbed run.

        Args:
          told: what a life printed. If it says that evaluations are missing, they may be.
        """
        if not self._bad & {"wrong", "hang"}:
            got, want = chain.result(self.workdir), self.home.want
            if "rows of evaluations are missing" in told:
                got, want = ([e | {"eval": None} for e in one] for one in (got, want))
                if got != want:
                    self.bad("wrong", f"another result: {got}")
            elif got != want:
                self.bad("wrong", f"another result: {got}")
            elif (got := chain.rows(self.workdir)) != self.home.rows:
                self.bad("wrong", f"rows of metrics are lost or doubled: {got}")

    def close(self, faults: int) -> Row:
        """Returns the row, with the number of faults that were injected."""
        self.row.injected = faults
        self.row.survived = faults - min(faults, len(self._bad))
        return self.row


def undisturbed(work: pathlib.Path) -> Home:
    """Runs the chain twice: the first fills the cache of programs, the second is timed."""
    home = Home(work, [], [], 0.0)
    for name in ("first", "undisturbed"):
        began = time.monotonic()
        life = Life(lambda name=name: chain.train(work / name, home.compiled))
        ended = life.wait(COMPILING * PATIENCE_S)
        assert ended.status == 0, ended.text
    results: Sequence[Any] = [chain.result(work / name) for name in ("first", "undisturbed")]
    assert results[0] == results[1], "the run is not deterministic here"
    seconds = time.monotonic() - began
    return Home(work, results[0], chain.rows(work / "undisturbed"), seconds)

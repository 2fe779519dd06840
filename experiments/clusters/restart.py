r"""Starts a command again while its exit status says that this can help, with growing pauses.

  python -m experiments.clusters.restart [--most=10] [--first=5] [--last=120] [--steady=600] \
    COMMAND...

It gives up at every status that is not in `flm_jax.errors.RESTARTABLE` (a user's mistake, Ctrl-C,
success), after a signal to this script, and after --most restarts in a row none of whose
lives lasted --steady seconds. The pauses double from --first to --last seconds. Its own status is
that of the command's last life. SIGTERM, SIGHUP and SIGUSR1 are forwarded to the command.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from flm_jax.errors import RESTARTABLE
from flm_jax.runtime.stop import heeded


def pause(failures: int, first: float, last: float) -> float:
    """Returns the seconds to wait after so many failures in a row.

    >>> [pause(n, 5, 60) for n in (1, 2, 3, 4, 5, 10_000)]
    [5.0, 10.0, 20.0, 40.0, 60, 60]
    """
    return min(first * 2.0 ** min(failures - 1, 60), last)


def run(command: Sequence[str], most: int, first: float, last: float, steady: float) -> int:
    """Runs the command to its end; returns its last exit status."""
    stopped = threading.Event()
    child: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()
        # A terminal sends Ctrl-C to the command itself.
        if number != signal.SIGINT and child is not None and child.poll() is None:
            child.send_signal(number)

    for number in heeded():
        signal.signal(number, stop)
    failures = 0
    while True:
        began = time.monotonic()
        child = subprocess.Popen(command)
        if stopped.is_set():  # the signal came before the command was there
            child.terminate()
        code = child.wait()
        status = 128 - code if code < 0 else code
        if stopped.is_set() or status not in RESTARTABLE:
            return status
        failures = 1 if time.monotonic() - began >= steady else failures + 1
        if failures > most:
            _say(f"status {status}, and {most} restarts in a row did not last; giving up")
            return status
        seconds = pause(failures, first, last)
        _say(f"status {status}; restart {failures} of {most} in {seconds:g} s")
        if stopped.wait(seconds):
            return status


def _say(text: str) -> None:
    print(f"restart: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Reads the flags; everything after them is the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most", type=int, default=10)
    parser.add_argument("--first", type=float, default=5)
    parser.add_argument("--last", type=float, default=120)
    parser.add_argument("--steady", type=float, default=600)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if not given.command:
        parser.error("give a command")
    sys.exit(run(given.command, given.most, given.first, given.last, given.steady))


if __name__ == "__main__":
    main()

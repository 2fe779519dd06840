"""What ends a command: exit statuses, and the errors that mean them.

`Exit` is the one list of statuses. By the status alone, a scheduler or
`experiments/clusters/restart.sh` decides whether to start the same command again (`RESTARTABLE`).
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Iterator


class Exit(enum.IntEnum):
    """Exit statuses of every command. 128 + N: stopped by signal N, with the state on disk."""

    OK = 0
    FAILED = 1  # a traceback, or a check of the command does not hold (its --help says which)
    MISTAKE = 2  # of the user: one line says what to change
    GATE = 3  # `flm compare`: the new model is worse than its limits allow
    DAMAGE = 65  # a file of a run is damaged or missing (EX_DATAERR)
    NUMERICS = 70  # a loss, gradient or update is not finite, or losses spike (EX_SOFTWARE)
    DISK = 74  # no space, or a disk fails (EX_IOERR)
    LOST = 75  # another process was lost (EX_TEMPFAIL of sysexits.h: try again)
    HUNG = 76  # nothing moved for `watchdog.minutes`, and `watchdog.ends` is set
    HANGUP = 129  # SIGHUP: the terminal is gone
    INTERRUPTED = 130  # Ctrl-C (SIGINT)
    NOTICE = 138  # SIGUSR1, as Slurm can send it some time before it ends a job
    PREEMPTED = 143  # SIGTERM, as schedulers send it before they take the machine


# After these the same command can continue where it stopped. After damage and numerics it would
# come to the same end, and a full disk needs somebody who makes room. A hardware fault also shows
# as a traceback (1), or as a signal that nobody handles: abort, bus error, kill (also by the kernel
# for memory), segmentation fault.
RESTARTABLE = (Exit.FAILED, Exit.LOST, Exit.HUNG, 134, 135, 137, Exit.NOTICE, 139, Exit.PREEMPTED)


class UserError(ValueError):
    """A mistake in what the user gave: config, data, folder.

    The message is one line that names the field, both values and what to do next.
    Commands print it on standard error and exit with status 2.

    Attributes:
      argument: the name of the wrong argument or field; a command whose flag has this name says so.
    """

    status = Exit.MISTAKE

    def __init__(self, message: str, *, argument: str = "") -> None:
        super().__init__(_one_line(message))
        self.argument = argument


@contextlib.contextmanager
def within(place: str) -> Iterator[None]:
    """Puts a place, as "stage large", before the message of a UserError raised inside.

    A message that begins with the place stays as it is.
    """
    try:
        yield
    except UserError as error:
        if not str(error).startswith(f"{place}:"):
            error.args = (_one_line(f"{place}: {error}"),)
        raise


class NumericsError(UserError):
    """A loss, gradient or update is not finite, or losses spike; the last good state is kept."""

    status = Exit.NUMERICS


class DiskError(UserError):
    """A disk is full or fails; what was saved before stays as it is."""

    status = Exit.DISK


class DamageError(UserError):
    """A file of a run is damaged, or missing beside the files that belong to it.

    Attributes:
      path: the damaged checkpoint's folder, or the file.
    """

    status = Exit.DAMAGE

    def __init__(self, message: str, path: os.PathLike[str] | str = "") -> None:
        super().__init__(message)
        self.path = os.fspath(path)


def _one_line(message: str) -> str:
    """The message without control characters, which may come from a file, and not endless.

    >>> _one_line("no tensor a\\nb")
    'no tensor a\\\\nb'
    """
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 4 :]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


_LONGEST = 4000  # characters


class RunStopped(Exception):
    """A signal stopped the run; its state is on disk, and the same command resumes from there.

    Attributes:
      status: the exit status: 128 + the signal's number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number

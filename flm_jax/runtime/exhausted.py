"""Errors that a limit of the machine causes, in one line: full or broken disks, files, memory.

Libraries wrap the system's error in one of their own, often from a thread. It is found in the chain
of causes, by its number, or by the system's words for it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from flm_jax.errors import DiskError, UserError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_ADVICE = {
    errno.EMFILE: "too many open files; raise ulimit -n",
    errno.ENFILE: "too many open files on this machine; raise fs.file-max",
    errno.ENOMEM: "the machine has no more memory for this process; raise ulimit -v, or take a "
    "smaller batch or a larger machine",
    errno.EAGAIN: "no more threads or processes for this user; raise ulimit -u",
}
# The system's words for an error, where a library keeps only these.
_WORDS = {os.strerror(number): number for number in (*_DISK, errno.EMFILE, errno.ENFILE)} | {
    "Out of memory": errno.ENOMEM,
    "Cannot allocate memory": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,
}


def explained(error: BaseException, place: str) -> UserError | None:
    """Returns the error as one line, if a limit of the machine caused it; else None.

    Args:
      error: any error, with what caused it.
      place: what was written, as "workdir runs/demo"; used where the error names no file.
    """
    for one in _chain(error):
        number = _number(one)
        if number in _DISK:
            file = getattr(one, "filename", None) or place
            return DiskError(
                f"{file}: {os.strerror(number)}; make room or repair the disk, then give the same "
                "command again: it continues from the last checkpoint"
            )
        if number in _ADVICE:
            return UserError(f"{place}: {_ADVICE[number]}; the same command continues")
    return None


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno in (*_DISK, errno.EMFILE, errno.ENFILE):
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return errno.ENOMEM
    text = str(error)
    return next((number for words, number in _WORDS.items() if words in text), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and all that led to it, each once."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        parts = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        waiting += [e for e in (*parts, one.__context__, one.__cause__) if e is not None]

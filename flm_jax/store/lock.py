"""One writer for each run folder: a lock that dies with its process.

On a disk it is the system's file lock (flock), which ends with the process that holds it. A bucket
has no such lock. There it is a lease: an object that its owner rewrites every few seconds. Whoever
finds one watches it for `LEASE` seconds by its own clock: an object that changes has a living
owner, and one that does not is taken over. Each write names the generation that it replaces, so of
two that take over at once one wins, and an owner that was replaced learns it and ends.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from typing import Any, Protocol

from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.runtime import paths
from flm_jax.store import objects
from flm_jax.store.objects import Changed

NAME = ".lock"  # of the file in the run folder
LEASE = 30.0  # seconds without a sign of life after which an owner on a bucket counts as dead
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # a disk without file locks


class Lock(Protocol):
    """A lock that is held until it is released, or its process ends."""

    def release(self) -> None: ...


def acquire(folder: pathlib.Path, lease: float = LEASE) -> Lock:
    """Makes this process the only writer of a folder.

    Args:
      folder: a folder that exists, or a path on a bucket.
      lease: seconds, for a bucket; all processes use the same.

    Returns:
      The lock, to be released at the end.

    Raises:
      UserError: another process has it; names its host, its number and its start.
    """
    path = folder / NAME
    try:
        return _Lease(path, lease) if paths.remote(path) else _FileLock(path)
    except OSError as error:
        raise UserError(
            f"workdir {folder} cannot be locked ({paths.reason_of(error)}); fix this, or give "
            "another workdir",
            argument="workdir",
        ) from error


def _owner() -> dict[str, Any]:
    """Describes this process."""
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": started,
        "id": uuid.uuid4().hex,  # of this lock
    }


def _text(content: bytes) -> str:
    """Describes an owner, for messages."""
    try:
        owner = json_text.parse(content)
        return f"process {owner['process']} on {owner['host']} since {owner['started']}"
    except (ValueError, KeyError, TypeError):
        return "a process that did not write its name"


def _refusal(path: pathlib.Path, content: bytes) -> UserError:
    return UserError(
        f"workdir {path.parent} is in use by {_text(content)}; wait until it ends, or give another "
        "workdir",
        argument="workdir",
    )


def _taken_over(path: pathlib.Path, content: bytes) -> None:
    print(
        f"{path.parent}: {_text(content)} ended without giving the folder back; this process takes "
        "it over",
        file=sys.stderr,
    )


class _FileLock:
    """A lock of the system on a file, which also names its owner."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                content = os.read(self._file, 1 << 12)
                if error.errno == errno.EWOULDBLOCK:
                    os.close(self._file)
                    raise _refusal(path, content) from None
                if error.errno not in _UNSUPPORTED:
                    os.close(self._file)
                    raise
                print(
                    f"{path.parent}: its disk has no file locks ({error.strerror}); start no "
                    "second process on this folder", file=sys.stderr,
                )  # fmt: skip
            # The owner before may have removed the file after it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), os.stat(path)):
                    break
            os.close(self._file)
        if content := os.read(self._file, 1 << 12):
            _taken_over(path, content)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(_owner()).encode(), 0)

    def release(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # someone removed the folder
            self._path.unlink()
        os.close(self._file)


class _Lease:
    """An object on a bucket that its owner keeps rewriting."""

    def __init__(self, path: pathlib.Path, lease: float):
        self._path, self._lease = path, lease
        self._owner, self._renewals = _owner(), 0
        self._generation = self._create()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _content(self) -> bytes:
        self._renewals += 1
        # Without the count, a renewal would be the same object on a store that names content.
        return json.dumps(self._owner | {"renewals": self._renewals}).encode()

    def _create(self) -> bytes:
        """Writes the object; waits until its owner shows that it is alive, or `lease` is over."""
        content, generation = objects.read(self._path)
        if content:
            end = time.monotonic() + self._lease
            while time.monotonic() < end:
                time.sleep(self._lease / 30)
                now, current = objects.read(self._path)
                if not now:  # given back meanwhile
                    content, generation = now, current
                    break
                if current != generation:
                    raise _refusal(self._path, now)
        try:
            created = objects.write(self._path, self._content(), generation)
        except Changed:
            raise _refusal(self._path, objects.read(self._path)[0]) from None
        if content:
            _taken_over(self._path, content)
        return created

    def _renew(self) -> None:
        """Rewrites the object until the lock is released; ends the process if it lost the lock."""
        seen = time.monotonic()  # when the lock was certainly held
        while not self._ended.wait(self._lease / 6):
            try:
                self._generation = objects.write(self._path, self._content(), self._generation)
                seen = time.monotonic()
            except Changed:
                self._check_owner()
            except OSError as error:
                if time.monotonic() - seen > self._lease:
                    self._give_up(f"it could not be renewed for {self._lease:g} s ({error})")

    def _check_owner(self) -> None:
        """Ends this process unless the object is its own, written twice after a lost answer."""
        with contextlib.suppress(OSError):  # the next renewal tries again
            content, generation = objects.read(self._path)
            if content and json.loads(content).items() >= self._owner.items():
                self._generation = generation
            else:
                self._give_up(f"{_text(content)} took it over")

    def _give_up(self, reason: str) -> None:
        """Ends this process before it writes into a folder that is another's."""
        message = f"workdir {self._path.parent} is no longer this process's: {reason}; it ends"
        sys.stdout.flush()
        os.write(2, f"{' '.join(message.split())}\n".encode())
        os._exit(1)

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Changed, OSError):  # it then runs out
            objects.write(self._path, None, self._generation)

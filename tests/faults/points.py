"""Crash points: every change that a run makes to its folder, named by its call and its file.

Python tells an audit hook of each before it happens. A hook in a life ends it there, or makes the
disk fail from there on. So the points need no help of the product, and no list that could miss one.
"""

from __future__ import annotations

import collections
import errno
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.link": 1}
_FREES = ("os.remove", "os.rmdir")  # they succeed on a full disk

Act = Callable[[str, str], None]  # (name of the point, path)


def watch(workdir: pathlib.Path, act: Act) -> None:
    """Calls `act` before each change in a folder, for the rest of this process."""
    root, inside = f"{workdir}/", [False]

    def hook(event: str, args: tuple) -> None:
        if inside[0]:
            return
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & _WRITES:
                return
        elif event in _EVENTS:
            path = args[_EVENTS[event]]
        else:
            return
        if isinstance(path, bytes):
            path = path.decode()
        if not isinstance(path, str | os.PathLike) or not f"{path}".startswith(root):
            return
        inside[0] = True
        try:
            act(f"{event.removeprefix('os.')} {_plain(f'{path}'.removeprefix(root))}", f"{path}")
        finally:
            inside[0] = False

    sys.addaudithook(hook)


def _plain(path: str) -> str:
    """A path without what differs from run to run.

    >>> _plain("stages/0-s/.config.json.a1b2c3d4"), _plain(".write-test-1234")
    ('stages/0-s/.config.json.TMP', '.write-test-N')
    """
    path = re.sub(r"(\.jsonl?\.)[a-z0-9_]{8}$", r"\1TMP", path)
    path = re.sub(r"[0-9a-f]{12,}", "H", path)
    path = re.sub(r"events\.out\..*", "events", path)
    return re.sub(r"\d{3,}", "N", path)


def listed(workdir: pathlib.Path, descriptor: int) -> Callable[[], None]:
    """Before a life: writes each point's name to a descriptor, one a line."""
    return lambda: watch(
        workdir, lambda name, _: os.write(descriptor, f"{name}\n".encode()) and None
    )


def killed_at(workdir: pathlib.Path, point: str, torn: bool = False) -> Callable[[], None]:
    """Before a life: kills it when it comes to a point; `torn`: half of a row is written then."""

    def act(name: str, path: str) -> None:
        if name == point:
            if torn:
                with open(path, "a") as file:
                    file.write('{"kind": "time", "st')
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: watch(workdir, act)


def failing_from(workdir: pathlib.Path, index: int, number: int) -> Callable[[], None]:
    """Before a life: every change from the one with this index on fails with an error number."""
    seen: collections.Counter[str] = collections.Counter()

    def act(name: str, path: str) -> None:
        seen["all"] += 1
        full = number in (errno.ENOSPC, errno.EDQUOT)
        if seen["all"] > index and not (full and f"os.{name.split()[0]}" in _FREES):
            raise OSError(number, os.strerror(number), path)

    return lambda: watch(workdir, act)

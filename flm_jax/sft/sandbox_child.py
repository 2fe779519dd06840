"""The process that `sandbox.py` starts: it gives up its permissions, then runs an answer.

A script on its own: Python runs it in isolated mode without site packages, so it imports the
standard library alone. It reads one JSON object from standard input, and writes one line, "sealed"
or "lacks ...", and then a JSON object with the outputs. The line is written before the answer runs,
so that the answer cannot forge it.

Every protection is the kernel's. Nothing here is meant to resist code in this same process: an
answer may change or call everything that it finds here, and gains nothing by it.
"""

from __future__ import annotations

# ruff: noqa: F401  Modules that answers use are loaded here: once sealed, a process of another user
# cannot read a Python in a private folder, nor the system libraries that some modules load.
import abc
import array
import bisect
import calendar
import cmath
import collections
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import decimal
import enum
import errno
import fractions
import functools
import hashlib
import heapq
import io
import itertools
import json
import math
import numbers
import operator
import os
import pathlib
import queue
import random
import re
import resource
import statistics
import string
import struct
import sys
import textwrap
import time
import traceback
import types
import typing
import unicodedata
import zlib
from typing import Any

NOBODY = 65534
OLDEST_LANDLOCK = 3  # the first version that refuses to truncate files

# System calls that need no permission: memory, time, reading what is open, and ending. `openat` is
# allowed for reading, where Landlock decides which files. All others give EPERM: sockets, processes
# and threads, signals, other users' ids, limits, keys, tracing, mounts, writing and truncating.
# No `ioctl` (it can type into a terminal) and no `fcntl` (F_SETOWN sends signals).
SYSTEM_CALLS = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8, "mmap": 9,
        "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
        "rt_sigreturn": 15, "pread64": 17, "readv": 19, "writev": 20, "sched_yield": 24,
        "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60, "getcwd": 79,
        "gettimeofday": 96, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
        "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "getdents64": 217,
        "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
        "exit_group": 231, "newfstatat": 262, "getrandom": 318, "statx": 332, "openat": 257,
    },
    "aarch64": {
        "getcwd": 17, "close": 57, "getdents64": 61, "lseek": 62, "read": 63, "write": 64,
        "readv": 65, "writev": 66, "pread64": 67, "newfstatat": 79, "fstat": 80, "exit": 93,
        "exit_group": 94, "futex": 98, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114,
        "clock_nanosleep": 115, "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132,
        "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "gettimeofday": 169,
        "getpid": 172, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178,
        "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233,
        "getrandom": 278, "statx": 291, "openat": 56,
    },
}  # fmt: skip
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def seal(limits: dict[str, int]) -> list[str]:
    """Gives up every permission that the kernel can take, permanently.

    Args:
      limits: `cpu_seconds` and `memory_bytes`.

    Returns:
      The protections that this kernel lacks, for the error; [] if it has all.
    """
    for kind, limit in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    libc = ctypes.CDLL(None, use_errno=True)
    linux = sys.platform.startswith("linux")
    ruleset = _landlock_ruleset(libc) if linux else -1  # opens files that nobody could not
    lacks = []
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError:
            lacks.append("a user that is not root (CAP_SETUID)")
    if not linux:
        return [*lacks, "Linux"]
    # Where the system allows it, on top of the filter: CLONE_NEWUSER, NEWNET, NEWIPC.
    libc.unshare(0x10000000 | 0x40000000 | 0x08000000)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    mounted = "FLM_SANDBOX_MOUNTS" in os.environ  # bubblewrap shows only the interpreter's files
    restricted = ruleset >= 0 and libc.syscall(446, ruleset, 0) == 0  # landlock_restrict_self
    if not restricted and not mounted:
        lacks.append(f"Landlock of version {OLDEST_LANDLOCK} or later (Linux 6.2), or bubblewrap")
    if ruleset >= 0:
        os.close(ruleset)
    if not _filter_system_calls(libc):
        lacks.append("seccomp filters for this processor")
    return lacks


def _landlock_ruleset(libc: ctypes.CDLL) -> int:
    """Makes rules that allow only reading the standard library; -1 without Landlock."""
    version = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset, to ask for the version
    if version < OLDEST_LANDLOCK:
        return -1
    # Files: all rights of this version. Network: bind and connect. Scopes: sockets and signals.
    files = (1 << (15 if version < 5 else 16)) - 1
    handled = (ctypes.c_uint64 * 3)(files, 0b11 if version >= 4 else 0, 0b11)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = int(libc.syscall(444, handled, ctypes.c_size_t(size), 0))
    read_file, read_dir = 1 << 2, 1 << 3
    library = pathlib.Path(os.__file__).parent
    paths = [p for p in library.iterdir() if not p.name.endswith("-packages")]
    for path, rights in [(library, read_dir), *((path, read_file) for path in paths)]:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, folder)
        libc.syscall(445, ruleset, 1, rule, 0)  # landlock_add_rule, for what is below a path
        os.close(folder)
    return ruleset


def _filter_system_calls(libc: ctypes.CDLL) -> bool:
    """Installs the filter of `SYSTEM_CALLS`; says whether the kernel took it."""
    machine = os.uname().machine
    if machine not in SYSTEM_CALLS:
        return False
    load, jump_if_equal, jump_if_set, end = 0x20, 0x15, 0x45, 0x06
    refuse, allow, kill = 0x00050000 | errno.EPERM, 0x7FFF0000, 0x80000000
    nr, arch, third_argument = 0, 4, 16 + 8 * 2  # offsets in struct seccomp_data
    program = [
        (load, 0, 0, arch),
        (jump_if_equal, 1, 0, AUDIT_ARCH[machine]),
        (end, 0, 0, kill),  # called through another processor mode's table
        (load, 0, 0, nr),
    ]
    for name, number in SYSTEM_CALLS[machine].items():
        if name != "openat":
            program += [(jump_if_equal, 0, 1, number), (end, 0, 0, allow)]
    program += [
        (jump_if_equal, 1, 0, SYSTEM_CALLS[machine]["openat"]),
        (end, 0, 0, refuse),
        (load, 0, 0, third_argument),
        (jump_if_set, 0, 1, _WRITES),
        (end, 0, 0, refuse),
        (end, 0, 0, allow),
    ]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, and where they are.
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    return bool(libc.prctl(22, 2, header, 0, 0) == 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def run(source: str, examples: list[str]) -> tuple[list[str], str]:
    """Runs a module and its examples; returns each example's output, and why there are none."""
    module = {"__name__": "answer"}
    outputs: list[str] = []
    try:
        exec(compile(source, "<answer>", "exec"), module)
    except BaseException as error:
        return outputs, "".join(traceback.format_exception_only(error)).strip()[-300:]
    for example in examples:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                exec(compile(example, "<example>", "single"), module)
                output = said.getvalue()
            except BaseException as error:
                last = traceback.format_exception_only(error)[-1]
                output = "Traceback (most recent call last):\n" + last
        outputs.append(output)
    return outputs, ""


def main() -> None:
    task = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    lacks = seal(task["limits"])
    os.write(answer, f"lacks {'; '.join(lacks)}\n".encode() if lacks else b"sealed\n")
    if not lacks or task["unsafe"]:
        # Makes `import ctypes` fail. It is no protection: an answer can find it here, to no avail.
        sys.modules["ctypes"] = sys.modules["_ctypes"] = None  # type: ignore[assignment]
        outputs, failure = run(task["source"], task["examples"])
        os.write(answer, json.dumps({"outputs": outputs, "failure": failure}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()

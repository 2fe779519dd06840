"""Runs code that a model wrote in a separate process with few permissions.

The child is Python in isolated mode, without site packages, with an empty environment and an empty
folder. Before it runs the code it permanently gives up: CPU time and memory above a limit, writing
to files, and starting processes (as root it first becomes `nobody`, because root cannot be denied
processes). Where the kernel supports it, the child also gives up the network (Linux, user
namespaces) and every change of the file system (Linux, Landlock). An audit hook refuses all but a
few harmless events. It is a second barrier, and the only one where the kernel lacks support. The
child can still read files. The parent kills the process group at the wall-clock limit and reads at
most `output_bytes` of output.

The child never learns the expected outputs: the parent compares them. Exit codes, monkeypatching
and early exits therefore gain nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the child may use."""

    cpu_seconds: int = 2
    wall_seconds: float = 10.0
    memory_bytes: int = 512 << 20  # of address space
    output_bytes: int = 64 << 10


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Output of the examples that ran; `failure` says why there is none."""

    outputs: tuple[str, ...] = ()
    failure: str = ""


def run_examples(source: str, examples: Sequence[str], limits: Limits = Limits()) -> Outcome:
    """Executes a module's source, then each example as if typed at the interpreter's prompt.

    Args:
      source: the module's source.
      examples: statements or expressions, each with a final newline.
      limits: what the child may use.

    Returns:
      Each example's output as doctest shows it: the printed text, then the value's repr; or
      doctest's traceback header and the traceback's last line.
    """
    task = {"source": source, "examples": list(examples), **dataclasses.asdict(limits)}
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # `nobody` must be able to enter it
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        assert process.stdin and process.stdout
        timed_out = threading.Event()

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def time_out() -> None:
            timed_out.set()
            kill()

        timer = threading.Timer(limits.wall_seconds, time_out)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(task).encode())
                process.stdin.close()
            output = process.stdout.read(limits.output_bytes + 1)
        finally:
            timer.cancel()
            kill()
            process.stdout.close()
            process.wait()
    if timed_out.is_set():
        return Outcome(failure=f"ran for more than {limits.wall_seconds:g} s")
    if len(output) > limits.output_bytes:
        return Outcome(failure=f"wrote more than {limits.output_bytes} bytes")
    try:
        result = json.loads(output)
        return Outcome(tuple(map(str, result["outputs"])), str(result["failure"]))
    except (ValueError, TypeError, KeyError):
        return Outcome(failure="ended without a result (it reached a limit, or exited)")


# The child's program. It restricts itself before it runs any code.
CHILD = r"""
import contextlib, ctypes, io, json, os, resource, sys, traceback
# Imported now: as nobody, a Python in a private folder can no longer be read.
import bisect, collections, datetime, functools, heapq, itertools, math, operator, random, re

def confine(task):
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    for kind, limit in (
        (resource.RLIMIT_CPU, task["cpu_seconds"]), (resource.RLIMIT_AS, task["memory_bytes"]),
        (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        libc.unshare(0x10000000 | 0x40000000 | 0x08000000)  # CLONE_NEWUSER, NEWNET, NEWIPC
        # Landlock, first version: a ruleset that handles every write and grants none.
        handled = ctypes.c_uint64(0x1FF2)
        ruleset = libc.syscall(444, ctypes.byref(handled), ctypes.c_size_t(8), 0)
        if ruleset >= 0:
            libc.syscall(446, ruleset, 0)
            os.close(ruleset)
    allowed = {
        "import", "compile", "exec", "os.listdir", "os.scandir", "marshal.loads", "code.__new__",
        "function.__new__", "object.__getattr__", "object.__setattr__", "object.__delattr__",
        "builtins.id", "sys._getframe", "array.__new__", "time.sleep",
    }

    def hook(event, arguments):
        if event in allowed:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if not flags & writes:
                return
        raise PermissionError(f"the sandbox refuses {event}")

    sys.addaudithook(hook)

def run(task):
    module = {"__name__": "answer"}
    outputs = []
    try:
        exec(compile(task["source"], "<answer>", "exec"), module)
    except BaseException as error:
        return outputs, "".join(traceback.format_exception_only(error)).strip()[-300:]
    for source in task["examples"]:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                exec(compile(source, "<example>", "single"), module)
                output = said.getvalue()
            except BaseException as error:
                last = traceback.format_exception_only(error)[-1]
                output = "Traceback (most recent call last):\n" + last
        outputs.append(output)
    return outputs, ""

def main():
    task = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    confine(task)
    outputs, failure = run(task)
    os.write(answer, json.dumps({"outputs": outputs, "failure": failure}).encode())
    os._exit(0)

main()
"""

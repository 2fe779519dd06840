"""Runs code that a model wrote, in a process that the kernel isolates.

The child (`sandbox_child.py`) gives up its permissions before it runs the code: a seccomp filter
allows the few system calls that computing needs, Landlock allows reading Python's standard library
alone, and limits bound CPU time, memory and open files. Started by root it becomes `nobody` first.
Where bubblewrap is installed and works, the child also lives in namespaces of its own. The parent
kills it at the wall-clock limit and reads at most `output_bytes` of its output. No protection is
Python's: an answer may patch all that it finds in its own process. A kernel that lacks one of them
runs nothing, unless `unsafe` is given. See docs/reliability.md, "Running untrusted answers".

The child never learns the expected outputs: the parent compares them. Exit codes, monkeypatching
and early exits therefore gain nothing.

Own code of 60 lines instead of a library (0.8): pyseccomp's last release is of 2021 and needs a
system library; sandlock brings a supervisor that this process does not need; Landlock's bindings
would have to be importable in a child without site packages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence

from flm_jax.data import json_text
from flm_jax.errors import UserError

CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


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


def run_examples(
    source: str, examples: Sequence[str], limits: Limits = Limits(), unsafe: bool = False
) -> Outcome:
    """Executes a module's source, then each example as if typed at the interpreter's prompt.

    Args:
      source: the module's source.
      examples: statements or expressions, each with a final newline.
      limits: what the child may use.
      unsafe: also run where the kernel lacks a protection.

    Returns:
      Each example's output as doctest shows it: the printed text, then the value's repr; or
      doctest's traceback header and the traceback's last line.

    Raises:
      UserError: the kernel lacks a protection, and `unsafe` is not given; names what it lacks.
    """
    task = {
        "source": source,
        "examples": list(examples),
        "unsafe": unsafe,
        "limits": {"cpu_seconds": limits.cpu_seconds, "memory_bytes": limits.memory_bytes},
    }
    output, timed_out = _output_of(json.dumps(task).encode(), limits)
    first, newline, result = output.partition(b"\n")
    if first.startswith(b"lacks ") and newline and not unsafe:
        raise UserError(
            f"answers are not run: this system lacks {first[6:].decode()}, so they would not be "
            "isolated; run on such a system, or give --unsafe if you trust the answers"
        )
    if timed_out:
        return Outcome(failure=f"ran for more than {limits.wall_seconds:g} s")
    if len(output) > limits.output_bytes:
        return Outcome(failure=f"wrote more than {limits.output_bytes} bytes")
    try:
        read = json_text.parse(result)
        return Outcome(tuple(map(str, read["outputs"])), str(read["failure"]))
    except (ValueError, TypeError, KeyError):
        return Outcome(failure="ended without a result (it reached a limit, or exited)")


def _output_of(task: bytes, limits: Limits) -> tuple[bytes, bool]:
    """Runs the child; returns the start of its output, and whether it reached the time limit."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # `nobody` must be able to enter it
        process = subprocess.Popen(
            [*_namespaces(CHILD), sys.executable, "-I", "-S", str(CHILD)],
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
                process.stdin.write(task)
                process.stdin.close()
            output = process.stdout.read(limits.output_bytes + 1)
        finally:
            timer.cancel()
            kill()
            process.stdout.close()
            process.wait()
    return output, timed_out.is_set()


@functools.cache
def _namespaces(child: pathlib.Path) -> tuple[str, ...]:
    """The command line of bubblewrap; () where it is not installed or may not make namespaces.

    The child then sees only the interpreter's files and the system's libraries, no network, no
    other process, and has no capabilities. If the parent is killed, so is the child.
    """
    program = shutil.which("bwrap")
    if not program:
        return ()
    shown = [
        sysconfig.get_path("stdlib"),
        sys.executable,
        os.path.realpath(sys.executable),
        str(pathlib.Path(sys.prefix) / "pyvenv.cfg"),
        str(child),
        *_LIBRARIES,
    ]
    files = [word for path in dict.fromkeys(shown) for word in ("--ro-bind-try", path, path)]
    command = (
        program, "--unshare-all", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL",
        "--die-with-parent", "--new-session", "--clearenv", "--setenv", "FLM_SANDBOX_MOUNTS", "1",
        "--dev", "/dev", *files,
    )  # fmt: skip
    probe = [*command, sys.executable, "-I", "-S", "-c", ""]
    try:
        works = subprocess.run(probe, capture_output=True, timeout=10, env={}).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        works = False
    return command if works else ()

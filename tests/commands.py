"""Helpers that call the commands, in this process or in a separate one."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import time
from unittest import mock

import pytest

from flm_jax.commands import front

ROOT = pathlib.Path(__file__).parent.parent
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra [tpu]"
)


def call(*args: str) -> tuple[int, str, str]:
    """Calls `flm ARGS...` in this process; returns status, standard output, standard error.

    It runs with the devices and the strict dtypes of the tests (tests/conftest.py).
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ),  # a command may set XLA_FLAGS to compile quickly
    ):
        status = front.run(args)
    return status, out.getvalue(), err.getvalue()


def start(*args: str, devices: int = 1) -> subprocess.Popen:
    """Starts `flm ARGS...` in a separate process, on fake devices, with a user's compiler flags."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-m", "flm_jax.commands", *args],
        cwd=ROOT,
        env={**environment, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args: str) -> tuple[int, str, str]:
    """Does the same as `call`, in a separate process with one device."""
    process = start(*args)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def json_of(*args: str, by=call) -> dict:
    """Returns the one JSON object that a command prints with --json."""
    status, out, err = by(*args, "--json")
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def mistake(*args: str, by=call) -> str:
    """Returns the one-line error of a command that refuses a user's mistake."""
    status, out, err = by(*args)
    assert status == 2, err
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert out == ""
    return lines[0]


def wait_for(pattern, workdir, process, timeout=120):
    """Waits until a file matches the pattern; fails if the process ends first."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if list(workdir.glob(pattern)):
            return
        if process.poll() is not None:
            raise AssertionError(f"ended before {pattern}: {process.communicate()[1]}")
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} after {timeout} s")


def peak_memory(*args: str) -> int:
    """Returns the peak memory of a command in a separate process, in bytes."""
    # VmHWM, because a child's ru_maxrss includes the memory of the process that forked it.
    code = (
        "import sys\n"
        "from flm_jax.commands import front\n"
        "assert front.run(sys.argv[1:]) == 0\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return 1024 * int(done.stderr.split()[-1])

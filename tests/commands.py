"""Runs the commands as a user would, in a process of their own."""

import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent


def start(*args: str, devices: int = 1) -> subprocess.Popen:
    """`python -m experiments...`, on fake devices and as optimised as users run it."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-m", *args],
        cwd=ROOT,
        env={**environment, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args: str) -> tuple[int, str, str]:
    """Status, standard output, standard error."""
    process = start(*args)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def json_of(*args: str) -> dict:
    """The one JSON object that a command prints with --json."""
    status, out, err = run(*args, "--json")
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def mistake(*args: str) -> str:
    """The one line that a user's mistake gives."""
    status, out, err = run(*args)
    assert status == 2, err
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert out == ""
    return lines[0]


def wait_for(pattern, workdir, process, timeout=120):
    """Until a file of that pattern is there; fails if the process ends before."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if list(workdir.glob(pattern)):
            return
        if process.poll() is not None:
            raise AssertionError(f"ended before {pattern}: {process.communicate()[1]}")
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} after {timeout} s")


def peak_memory(*args: str) -> int:
    """Bytes that a command, run in a process of its own, held at most."""
    # VmHWM, since a child's ru_maxrss counts the memory of the process that it was forked from.
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return 1024 * int(done.stderr.split()[-1])

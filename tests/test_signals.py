"""Signals: which ones stop a run, and the thread that ends a command in time."""

import contextlib
import signal
import subprocess
import sys
import time

import pytest

from flm_jax.runtime import joints, stop
from flm_jax.runtime.stop import SIGNALS, StopRequest
from tests.commands import ROOT


@contextlib.contextmanager
def handler(number, action):
    inherited = signal.signal(number, action)
    try:
        yield
    finally:
        signal.signal(number, inherited)


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_is_recorded_and_an_ignored_one_stays_ignored(number):
    """nohup ignores SIGHUP; a shell ignores SIGINT in its background jobs."""
    with handler(number, signal.default_int_handler):
        with StopRequest() as request:
            signal.raise_signal(number)
            assert request.requested == number == stop.requested()
            with pytest.raises(joints.CutShort):
                list(joints.between([1]))
        assert signal.getsignal(number) == signal.default_int_handler and not stop.requested()
    with handler(number, signal.SIG_IGN):
        with StopRequest() as request:
            signal.raise_signal(number)
            assert not request.requested and list(joints.between([1])) == [1]
        assert signal.getsignal(number) == signal.SIG_IGN


def test_a_request_inside_another_one_knows_what_came_before():
    with handler(signal.SIGTERM, signal.default_int_handler), StopRequest():
        signal.raise_signal(signal.SIGTERM)
        with StopRequest() as inner:
            assert inner.requested == signal.SIGTERM


# A process whose main thread is in a call of C that no signal ends: a mutex, locked twice.
_DEAF = """
import ctypes, os
from flm_jax.runtime import stop
stop.GRACE_S = 1.5
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
with stop.Guard("flm"), stop.StopRequest(bounded={bounded}) as run:
    run.unsaved, run.saving = {unsaved}, {saving}
    with stop.at_end(lambda: os.write(1, b"given back")):
        os.write(1, b"begun ")
        lock(mutex), lock(mutex)
"""


def deaf(*numbers, bounded=True, unsaved=False, saving=False, patience=5.0):
    """Sends signals to such a process.

    Returns its status (None: it did not end), seconds, standard output and standard error.
    """
    code = _DEAF.format(bounded=bounded, unsaved=unsaved, saving=saving)
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.read(6) == b"begun "
        began = time.monotonic()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)  # equal signals that wait together are one
        try:
            status = process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            status = None
            process.kill()
        seconds = time.monotonic() - began
        return status, seconds, process.stdout.read(), process.stderr.read().decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_ends_at_once_where_nothing_is_unsaved(number):
    status, seconds, out, err = deaf(number)
    assert status == 128 + number and seconds < 1.5 and out == b"given back"
    line = f"flm: {signal.Signals(number).name} stopped it; nothing was lost, and the same command "
    assert err == line + "continues from there\n"


def test_a_command_with_unsaved_steps_has_a_grace_period():
    status, seconds, _, err = deaf(signal.SIGTERM, signal.SIGTERM, unsaved=True)
    assert status == 128 + signal.SIGTERM and seconds >= 1.5
    assert "SIGTERM came, and no step ended within 2 s" in err and err.count("\n") == 1


def test_a_second_ctrl_c_ends_a_command_at_once():
    status, seconds, out, err = deaf(signal.SIGINT, signal.SIGINT, unsaved=True, saving=True)
    assert status == 128 + signal.SIGINT and seconds < 1.5 and out == b"given back"
    assert "SIGINT again: stopped at once" in err and err.count("\n") == 1


@pytest.mark.parametrize("fields", [{"bounded": False}, {"unsaved": True, "saving": True}])
def test_negative_control_without_a_bound_and_during_the_last_save_it_waits(fields):
    assert deaf(signal.SIGTERM, patience=2.5, **fields)[0] is None


def test_a_signal_to_a_forked_child_is_not_its_parents():
    code = (
        "import os, signal, time\n"
        "from flm_jax.runtime import stop\n"
        "with stop.Guard('flm'), stop.StopRequest(bounded=True):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1); os._exit(0)\n"
        "    os.waitpid(child, 0); time.sleep(0.3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

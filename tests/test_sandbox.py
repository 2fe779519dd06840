"""Attacks on the process that runs answers. The kernel must refuse each, not Python."""

import contextlib
import os
import pathlib
import platform
import re
import tempfile
import threading
import time

import pytest

from flm_jax.errors import UserError
from flm_jax.sft import sandbox, sandbox_child, scoring
from flm_jax.sft.chats import Check
from flm_jax.sft.sandbox import Limits, run_examples

DOUBLE = Check(
    "doctest", 'def f(x):\n    """Twice x.\n\n    >>> f(3)\n    6\n    >>> f(-1)\n    -2\n    """\n'
)
# The sealed process still holds its own ctypes: with it an answer can make any system call.
NATIVE = "import __main__, os\nctypes = __main__.ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def lacks():
    """What this machine lacks to isolate answers without bubblewrap; "" if nothing."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sandbox, "_namespaces", lambda child: ())
            run_examples("", [])
    except UserError as error:
        return str(error)
    return ""


LACKS = lacks()


@pytest.fixture(params=["filters", "bubblewrap"])
def isolation(request, monkeypatch):
    """Runs a test without and with bubblewrap."""
    if request.param == "bubblewrap":
        if not sandbox._namespaces(sandbox.CHILD):
            pytest.skip("bubblewrap is not installed, or may not make namespaces here")
    else:
        if LACKS:
            pytest.skip(f"this kernel does not isolate: {LACKS}")
        monkeypatch.setattr(sandbox, "_namespaces", lambda child: ())


def attack(examples, source=NATIVE, **limits):
    outcome = run_examples(source, [f"{e}\n" for e in examples], Limits(**limits))
    assert not outcome.failure, outcome
    return dict(zip(examples, outcome.outputs, strict=True))


@pytest.mark.parametrize(
    "trick",
    [
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "import doctest\ndoctest.OutputChecker.check_output = lambda *a: True",
        "class Equal:\n    def __eq__(self, other): return True\nreturn Equal()",
        "import sys\nsys.modules['__main__'].json.dumps = lambda x: 'x'",
        # Writes a result itself: with the wanted outputs it would be right, without it cannot be.
        'import os\nos.write(3, b\'{"outputs": ["7", "7"], "failure": ""}\')\nos._exit(0)',
        'import os\nos.write(3, b\'{"outputs": [], "failure": ""}\')\nos._exit(0)',
        "import os\nos.write(3, b'[]')\nos._exit(0)",
        "import os\nos.write(3, b'[' * 60000)\nos._exit(0)",
        # Claims that the kernel lacks a protection, as the parent reads before the answer runs.
        "import os\nos.write(3, b'lacks all\\n')\nos._exit(0)",
        # Reads the expected output from its own docstring.
        "return int(f.__doc__.split('\\n')[-2])",
    ],
)
def test_tricks_do_not_pass(trick):
    if LACKS and not sandbox._namespaces(sandbox.CHILD):
        pytest.skip(LACKS)
    right, why = scoring.check_answer(DOUBLE, trick)
    assert not right and why


def test_the_channel_of_the_tricks_passes_with_right_outputs(isolation):
    """Negative control of the tricks above: right outputs in the same channel pass."""
    message = r'{"outputs": ["6\\n", "-2\\n"], "failure": ""}'
    assert scoring.check_answer(DOUBLE, f"import os\nos.write(3, b'{message}')\nos._exit(0)")[0]


def test_time_memory_and_output_are_limited(isolation):
    def failure(body, **limits):
        return run_examples(f"def f():\n    {body}\n", ["f()\n"], Limits(**limits))

    begin = time.monotonic()
    assert "ended without" in failure("while True: pass", cpu_seconds=1).failure
    assert "more than 0.9 s" in failure("import time; time.sleep(60)", wall_seconds=0.9).failure
    assert "MemoryError" in failure("return len([0] * 10**10)").outputs[0]
    assert "MemoryError" in failure("x = []\n    while True: x.append(' ' * 10**6)").outputs[0]
    assert "wrote more" in failure("print('x' * 10**6)").failure
    assert "wrote more" in failure("import os\n    while True: os.write(3, b'x' * 999)").failure
    assert time.monotonic() - begin < 60


def test_every_other_system_call_is_refused(isolation):
    """All numbers up to 600, and those of the x32 table, made directly with harmless arguments."""
    allowed = set(sandbox_child.SYSTEM_CALLS[platform.machine()].values())
    # 335 and 336 (uprobes) never reach the filter: the kernel kills any caller but its own code.
    numbers = [n for n in range(600) if n not in allowed and n not in (335, 336)]
    numbers += [0x40000000 | n for n in (0, 41, 56, 57, 59, 62)]
    example = f"[n for n in {numbers} if libc.syscall(n, 0, 0, 0, 0, 0, 0) != -1]"
    errors = f"{{(libc.syscall(n, 0, 0, 0, 0, 0, 0), ctypes.get_errno()) for n in {numbers}}}"
    assert list(attack([example, errors]).values()) == ["[]\n", "{(-1, 1)}\n"]  # 1: EPERM
    # Negative control: an allowed call in the same way.
    assert attack([f"libc.syscall({sandbox_child.SYSTEM_CALLS[platform.machine()]['getpid']}) > 0"])


def test_files_outside_the_interpreter_are_neither_read_nor_changed(isolation, tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        if folder.owner() == tmp_path.owner() and folder.name != "tmp":
            folder.chmod(0o755)
    at = repr(str(path))
    refused = [
        f"open({at}).read()", f"open({at}, 'w')", f"open({at}, 'a')", f"open({at}, 'r+')",
        f"os.open({at}, os.O_RDONLY | os.O_TRUNC)", f"os.truncate({at}, 0)", f"os.remove({at})",
        f"os.rename({at}, {at} + '2')", f"os.link({at}, {at} + '2')", f"os.chmod({at}, 0)",
        f"os.utime({at})", f"os.symlink({at}, 'x')", "os.mkdir('x')", "open('x', 'w')",
        "os.listdir('/')", "open('/etc/passwd')", "open('/etc/shadow')", "open('/dev/tty')",
        "open('/proc/self/environ')", "open('/proc/self/maps')", "open('/proc/1/cmdline')",
        f"open('/proc/{os.getpid()}/environ')", f"open('/proc/{os.getpid()}/mem', 'rb')",
        "os.readlink('/proc/self/exe')", "os.chdir('/')", "os.chroot('/')", "os.mknod('x')",
    ]  # fmt: skip
    native = f"libc.open({str(path).encode()!r}, 0), libc.open({str(path).encode()!r}, 2)"
    done = attack([*refused, native])
    assert done.pop(native) == "(-1, -1)\n"
    for example, output in done.items():
        assert output.startswith("Traceback"), (example, output)
    assert path.read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["file"]
    assert attack(["open(os.__file__).read(6)"], "import os")  # negative control


def test_no_process_no_signal_no_network_no_limit(isolation):
    parent = os.getpid()
    refused = [
        "os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "os.execv('/bin/true', ['true'])",
        "__import__('_thread').start_new_thread(print, ())", f"os.kill({parent}, 15)",
        f"os.kill({parent}, 0)", "os.kill(-1, 9)", "os.killpg(0, 9)", "os.setsid()", "os.nice(-1)",
        "os.setuid(0)", "os.sched_setaffinity(0, {0})", "os.memfd_create('x')", "os.pipe()",
        "__import__('resource').setrlimit(0, (99, 99))", "1 / libc.setpgid(0, 0).__add__(1)",
        "__import__('socket').socket()", "__import__('ctypes')",
        "__import__('fcntl').fcntl(3, 8, " + str(parent) + ")",  # F_SETOWN
    ]  # fmt: skip
    for example, output in attack(refused).items():
        assert output.startswith("Traceback"), (example, output)


def test_hooks_and_frames_gain_nothing(isolation):
    """What broke an audit hook: patch every frame's globals, and memory through ctypes."""
    source = NATIVE + (
        "import gc, sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for name in list(frame.f_globals):\n"
        "        if callable(frame.f_globals[name]) and name not in ('attack', 'run', 'main'):\n"
        "            frame.f_globals[name] = lambda *a, **k: None\n"
        "    frame = frame.f_back\n"
        "for x in gc.get_objects():\n    if type(x) is list: x.sort(key=id)\n"
        "ctypes.memmove(id(PermissionError), id(KeyError), 8)\n"
    )
    outcome = run_examples(source, ["open('/etc/passwd')\n"])
    assert outcome.failure or outcome.outputs[0].startswith("Traceback")


def test_environment_folder_and_open_files_are_empty(isolation, monkeypatch, tmp_path):
    monkeypatch.setenv("A_SECRET", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").write_text("the caller's folder")
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        done = attack(
            [
                "'A_SECRET' in os.environ",
                "os.getcwd()",
                "for fd in [*range(3), *range(4, 999)]: libc.write(fd, b'x', 1)",
                "__import__('numpy')",
            ]
        )
    secret, folder, _, numpy = done.values()
    assert secret == "False\n" and str(tmp_path) not in folder
    assert numpy.endswith("No module named 'numpy'\n")
    assert (tmp_path / "open").read_text() == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "open"]


def test_nothing_outlives_the_time_limit(isolation, monkeypatch):
    before = threading.active_count()
    with tempfile.TemporaryDirectory() as folder:
        child = pathlib.Path(folder, "child.py")  # its command line is like no other
        child.write_text(sandbox.CHILD.read_text())
        monkeypatch.setattr(sandbox, "CHILD", child)
        outcome = run_examples("import time\ntime.sleep(99)", [], Limits(wall_seconds=0.9))
        assert "more than 0.9 s" in outcome.failure and threading.active_count() == before
        deadline = time.monotonic() + 5
        while running(str(child)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not running(str(child))


def running(path):
    """The processes with this path in their command line."""
    lines = []
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended
            lines.append(file.read_bytes())
    return [line for line in lines if path.encode() in line]


def weakened(monkeypatch, tmp_path, pattern, replacement):
    """Makes the child believe that the kernel has less than it has."""
    text, count = re.subn(pattern, replacement, sandbox.CHILD.read_text())
    assert count == 1
    child = tmp_path / "child.py"
    child.write_text(text)
    monkeypatch.setattr(sandbox, "CHILD", child)
    monkeypatch.setattr(sandbox, "_namespaces", lambda child: ())


@pytest.mark.parametrize(
    ("pattern", "replacement", "missing", "example"),
    [
        ("OLDEST_LANDLOCK = 3", "OLDEST_LANDLOCK = 99", "Landlock of version 99",
         "os.listdir('/')"),
        (r"machine not in SYSTEM_CALLS", "machine", "seccomp filters", "os.pipe()"),
        (r"if os.geteuid\(\) == 0:", "if lacks.append('another user'):", "another user", "1"),
    ],
)  # fmt: skip
def test_a_kernel_without_a_protection_runs_nothing(
    pattern, replacement, missing, example, monkeypatch, tmp_path
):
    """And negative controls: with unsafe the same attack gets through that one missing layer."""
    weakened(monkeypatch, tmp_path, pattern, replacement)
    with pytest.raises(UserError, match=f"^answers are not run: .*{missing}.*--unsafe") as caught:
        run_examples("import os", [f"{example}\n"])
    assert "\n" not in str(caught.value)
    outcome = run_examples("import os", [f"{example}\n"], unsafe=True)
    assert outcome.outputs and not outcome.outputs[0].startswith("Traceback")

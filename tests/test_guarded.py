"""The last word on errors of a run: crash files, full disks, limits of the machine, hangs."""

import errno
import time

import pytest

from flm_jax.config import WatchdogConfig
from flm_jax.errors import DiskError, Exit, RunStopped, UserError
from flm_jax.runs.guarded import guarded
from flm_jax.runtime import exhausted, watch
from flm_jax.store.lineage import RunFolder

QUIET = WatchdogConfig(minutes=0.0)


def crashes(run):
    return sorted(p.name for p in run.crashes.glob("*")) if run.crashes.exists() else []


def wrapped(error):
    """An error as libraries pass it on: from a thread, in a group, with a message of their own."""
    try:
        try:
            raise error
        except type(error) as inner:
            raise RuntimeError("the thread failed") from inner
    except RuntimeError as outer:
        return ExceptionGroup("two tasks", [ValueError("other"), outer])


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), DiskError, "a/b: No space"),
        (OSError(errno.EIO, "Input/output error"), DiskError, "workdir"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskError, "Disk quota"),
        (OSError(errno.EROFS, "Read-only file system"), DiskError, "Read-only"),
        (OSError(errno.EFBIG, "File too large"), DiskError, "File too large"),
        (ValueError("UNKNOWN: write [OS error 28: ENOSPC No space left on device]"), DiskError,
         "No space"),
        (OSError(errno.EMFILE, "Too many open files"), UserError, "ulimit -n"),
        (MemoryError(), UserError, "ulimit -v"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), UserError, "memory"),
    ],
)  # fmt: skip
def test_a_limit_of_the_machine_is_one_line(tmp_path, error, kind, words):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError) as raised, guarded(run, "s", QUIET):
        raise wrapped(error)
    assert type(raised.value) is kind and words in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1 and not crashes(run)
    assert raised.value.status == (Exit.DISK if kind is DiskError else Exit.MISTAKE)


def test_a_bugs_traceback_is_kept_with_its_circumstances(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError) as raised, guarded(run, "tiny", QUIET):
        watch.HERE.moved(stage="large", phase="growth", step=12)
        print(1 // 0)
    (name,) = crashes(run)
    text = (run.crashes / name).read_text()
    for words in ("print(1 // 0)", "growth of stage large, step 12", "tiny", "flm_jax", "Python"):
        assert words in text
    assert str(run.crashes / name) in raised.value.__notes__[0]
    # A run whose first call crashed this early can be started again.
    with guarded(run, "tiny", QUIET):
        pass


def test_a_folder_in_which_a_process_was_killed_before_its_first_file_can_be_used(tmp_path):
    run = RunFolder(tmp_path)
    for name in (".write-test-77", ".lock"):
        (run.path / name).touch()
    with guarded(run, "tiny", QUIET):
        pass
    (run.path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds files but no run"), guarded(run, "tiny", QUIET):
        pass


@pytest.mark.parametrize("error", [UserError("mistake"), RunStopped("SIGTERM", 15)])
def test_mistakes_and_stops_are_no_crashes(tmp_path, error):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(type(error)) as raised, guarded(run, "s", QUIET):
        raise error
    assert raised.value is error and not crashes(run)


def test_a_crash_on_a_full_disk_is_still_told(tmp_path, monkeypatch):
    """The original error is raised, whatever happens to the file about it."""
    run = RunFolder(tmp_path / "run")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ZeroDivisionError), guarded(run, "s", QUIET):
        monkeypatch.setattr("flm_jax.runs.guarded.write_atomically", full)
        print(1 // 0)


def test_other_errors_are_not_explained():
    for error in (ValueError("no"), OSError(errno.ENOENT, "No such file"), KeyError("x")):
        assert exhausted.explained(wrapped(error), "x") is None


def test_a_run_that_does_not_move_leaves_its_stacks_once(tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    with guarded(run, "tiny", WatchdogConfig(minutes=0.3 / 60)):
        for _ in range(8):  # it moves: no hang
            time.sleep(0.1)
            watch.HERE.moved(stage="large", phase="steps", step=3)
        assert not crashes(run)
        time.sleep(1.0)
    (name,) = crashes(run)
    text = (run.crashes / name).read_text()
    assert name.endswith("hang.txt") and "steps of stage large, step 3" in text
    assert "test_a_run_that_does_not_move" in text and "Thread" in text
    line = capsys.readouterr().err
    assert line.startswith("no progress for 0.3 s in steps of stage large, step 3; stacks: ")
    assert line.count("\n") == 1


def test_a_hanging_run_ends_where_asked(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr("flm_jax.runtime.stop.end", lambda *how: ended.append(how))
    with guarded(RunFolder(tmp_path / "run"), "tiny", WatchdogConfig(0.2 / 60, ends=True)):
        time.sleep(0.5)
    ((status, line),) = ended
    assert status == Exit.HUNG and "stacks: " in line and "the same command continues" in line

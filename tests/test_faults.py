"""The fault suite: it sees each way to fail, and a short form of it runs clean."""

import json
import os
import subprocess
import sys

import pytest

from tests.commands import ROOT
from tests.faults.table import BAD, Row, summed, text


def python(*args, timeout=900):
    """Runs Python apart from the tests' own settings of JAX; returns status and standard output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_table_adds_up():
    rows = [Row("a", 2, 2), Row("b", 1, 0, wrong=1, findings=["why"]), Row("a", 3, 2, hang=1)]
    total = summed(rows)
    assert list(total) == ["a", "b"] and total["a"].injected == 5 and total["b"].findings == ["why"]
    assert not total["a"].clean and not total["b"].clean and Row("a", 1, 1).clean
    assert text(total.values()).splitlines()[-1] == "| all | 6 | 4 | 0 | 1 | 0 | 1 |"


# Each life breaks one promise, and the trial must count it in that column alone.
_LIVES = """
import json, os, pathlib, sys, tempfile, time
from tests.faults import lives, points
from tests.faults.lives import Ended, Home, Life, Trial
lives.PATIENCE_S = 20.0
with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(folder)
    rows = {}
    def counted(name, action, *statuses):
        trial = Trial(Home(work, [], [], 0.0), "f", name)
        trial.check(Life(action).wait(1.0 if name == "hang" else 20.0), *statuses)
        rows[name] = trial.close(1)
    counted("none", lambda: 74, 0, 74)
    counted("hang", lambda: time.sleep(60) or 0, 0)
    counted("wrong", lambda: 0, 143)
    counted("traceback", lambda: 1 // 0, 1)
    # A life that begins before the newest checkpoint, and one that removes it.
    checkpoints = work / "lost" / "stages" / "0-s" / "checkpoints"
    for name in ("lost", "removed"):
        (checkpoints / "8").mkdir(parents=True, exist_ok=True)
        trial = Trial(Home(work, [], [], 0.0), "f", "lost")
        lives.chain.train = lambda *_: 0
        life = trial.begin()
        if name == "removed":
            (checkpoints / "8").rmdir()
        else:
            row = {"kind": "time", "step": 4, "life": time.time(), "seconds": {}}
            (checkpoints.parent / "time.jsonl").write_text(json.dumps(row) + "\\n")
        trial.end(life, 0)
        rows[name] = trial.close(1)
    # Points: a change inside the folder is one, a read is none; a life ends before it.
    inside = work / "points"
    inside.mkdir()
    (inside / "old").write_text("x")
    def changes():
        points.killed_at(inside, "rename new")()
        (inside / "old").read_text()
        (inside / "temporary").write_text("y")
        os.replace(inside / "temporary", inside / "new")
        return 0
    assert Life(changes).wait().status == -9
    assert sorted(p.name for p in inside.iterdir()) == ["old", "temporary"]
    print(json.dumps({n: [c for c in ("lost", "wrong", "traceback", "hang") if getattr(r, c)]
                      for n, r in rows.items()}))
"""


@pytest.mark.slow
def test_each_broken_promise_is_counted_in_its_column():
    status, out, err = python("-c", _LIVES)
    assert status == 0, err
    counted = json.loads(out.splitlines()[-1])
    assert counted == {"none": [], "removed": ["lost"], **{name: [name] for name in BAD}}


# Without the position in the data, or with a seal that nobody checks, a result is wrong.
_FORGETS = """
import pathlib, sys, tempfile
from tests.faults import chain, kinds, lives
with tempfile.TemporaryDirectory() as folder:
    home = lives.undisturbed(pathlib.Path(folder))
    point = "mkdir stages/1-large/checkpoints/10.orbax-checkpoint-tmp"
    assert kinds.crash(home, 0, [point]).clean
    chain.Stream.set_state = lambda self, state: None
    row = kinds.crash(home, 1, [point])
    assert row.wrong == 1 and not (row.lost or row.traceback or row.hang), row
    print("seen")
"""


@pytest.mark.slow
def test_negative_control_a_stream_that_forgets_its_position_is_wrong():
    status, out, err = python("-c", _FORGETS)
    assert status == 0 and "seen" in out, err


@pytest.mark.slow
def test_a_short_form_runs_clean():
    names = "kill,torn,disk,damage,json"
    status, out, err = python("-m", "tests.faults", "--share=0.01", "--json", f"--only={names}")
    assert status == 0, err + out
    faults = json.loads(out)["faults"]
    assert len(faults) >= 5 and all(row["injected"] for row in faults.values())

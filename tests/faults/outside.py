"""Faults beside a run of one process: two writers of a file, groups of processes, hostile files."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from flm_jax.errors import Exit
from flm_jax.runtime.processes import Group
from flm_jax.store.files import write_json
from tests.commands import ROOT
from tests.faults import chain, points
from tests.faults.lives import COMPILING, PATIENCE_S, Home, Life, Trial
from tests.faults.table import Row

WRITES = 300


def json_writers(home: Home, seed: int) -> Row:
    """Two processes write one JSON file, while a third one reads it."""
    trial = Trial(home, "two writers of one JSON file", f"json-{seed}")
    path = trial.workdir / "file.json"
    write_json(path, [0] * 1000)

    def write(value: int) -> int:
        for n in range(WRITES // 2):
            write_json(path, [value] * (1000 + n))
        return 0

    writers = [Life(functools.partial(write, value)) for value in (1, 2)]
    reads, here = 0, True
    while here:
        here = any([life.kill(0) for life in writers])
        with contextlib.suppress(FileNotFoundError):
            values = path.read_text()
            try:
                whole = len(set(json.loads(values))) == 1
            except ValueError:
                whole = False
            if not whole:
                trial.bad("wrong", f"torn: {values[:200]!r}")
            reads += 1
    for life in writers:
        trial.check(life.wait(), 0)
    if left := [p.name for p in trial.workdir.iterdir() if p != path]:
        trial.bad("wrong", f"left behind: {left}")
    return trial.close(WRITES)


def _port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("localhost", 0))
        port: int = listener.getsockname()[1]
        return port


class GroupTrial(Trial):
    """A run of several processes, with one device each."""

    def __init__(self, home: Home, fault: str, name: str, count: int):
        super().__init__(home, fault, name)
        self.count = count

    def lives(self, victim: int = -1, point: str = "") -> list[Life]:
        """Starts all processes; one is killed at a point."""
        port = _port()

        def action(index: int) -> int:
            if index == victim:
                points.killed_at(self.workdir, point)()
            group = Group(f"localhost:{port}", index, self.count, lost_after=10)
            return chain.train(self.workdir, self.home.compiled, group)

        return [Life(functools.partial(action, index)) for index in range(self.count)]


def lost_process(
    home: Home, seed: int, count: int, victim: int, names: Sequence[str], want: pathlib.Path
) -> Row:
    """One of several processes is killed at each of some points, in turn; the others end."""
    fault = f"one of {count} processes killed at a change of the folder"
    trial, faults = GroupTrial(home, fault, f"group-{count}-{seed}", count), 0
    for point in names:
        started = trial.lives(victim, point)
        ended = [life.wait() for life in started]
        killed = ended[victim].status == -signal.SIGKILL
        for index, one in enumerate(ended):
            trial.check(one, *((-signal.SIGKILL,) if index == victim else (Exit.LOST,))
                        if killed else (0,))  # fmt: skip
        faults += killed
        if not killed:
            break
    for life in trial.lives():
        trial.check(life.wait(), 0)
    expected = json.loads(want.read_text())
    if json.loads(json.dumps(chain.result(trial.workdir))) != expected:
        trial.bad("wrong", "another result than that of the undisturbed group")
    return trial.close(faults)


def group_jobs(home: Home, names: Sequence[str], numbers: range) -> Iterator[functools.partial]:
    """Yields trials of two and three processes, with one lost at points chosen by seed."""
    for count in (2, 3):
        first = GroupTrial(home, "", f"group-{count}-undisturbed", count)
        for life in first.lives():
            first.check(life.wait(COMPILING * PATIENCE_S), 0)  # programs for this many devices
        assert not first.row.findings, first.row.findings
        want = home.work / f"group-{count}.json"
        want.write_text(json.dumps(chain.result(first.workdir)))
        for n in numbers[count - 2 :: 2]:
            rng = random.Random(f"group {n}")
            places = sorted(rng.sample(range(len(names)), min(2, len(names))))
            part, victim = [names[i] for i in places], rng.choice((0, 0, count - 1))
            yield functools.partial(lost_process, home, n, count, victim, part, want)


def hostile(seed: int, share: float) -> Row:
    """Hostile files (`python -m tests.hostile`)."""
    row = Row("hostile files")
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", f"--seed={seed}", f"--share={share}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    totals = [line for line in done.stdout.splitlines() if line.startswith("| all |")]
    if not totals:
        row.findings.append(done.stderr[-4000:])
        row.injected = row.wrong = 1
        return row
    numbers = [int(cell) for cell in totals[0].split("|")[2:-1]]
    row.injected, accepted, refused, row.traceback, row.hang, row.wrong = numbers
    row.survived = accepted + refused
    if not row.clean:
        row.findings.append(done.stderr[-8000:])
    return row

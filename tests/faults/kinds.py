"""The kinds of faults: each function makes one trial, by seed, and returns its row."""

from __future__ import annotations

import errno
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence

from flm_jax.errors import Exit
from flm_jax.runtime.stop import SIGNALS
from tests import damage
from tests.faults import chain, points
from tests.faults.lives import Home, Life, Trial, saved
from tests.faults.table import Row

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def kill(home: Home, seed: int, times: int = 3) -> Row:
    """Signals at random times of a run: kill -9, or one that asks it to stop."""
    rng = random.Random(f"kill {seed}")
    trial, faults = Trial(home, "kills and signals at random times", f"kill-{seed}"), 0
    while faults < times:
        number = rng.choice((signal.SIGKILL, *SIGNALS, signal.SIGKILL))
        life = trial.begin()
        time.sleep(rng.uniform(0.05, home.seconds))
        sent = life.kill(number)
        faults += sent
        asked = () if number == signal.SIGKILL else (128 + number, -number)
        # A process that has not taken its handlers yet, or has given them back, dies of a signal.
        trial.end(life, 0, *asked, *(() if asked else (-number,)))
        if not sent or len(chain.result(trial.workdir)) == len(home.want):
            faults = max(faults, 1)
            break
    return trial.finish(faults)


def all_points(home: Home) -> list[str]:
    """Runs the chain once, and returns all crash points in the order of their first times."""
    read, write = os.pipe()
    trial = Trial(home, "", "points")
    before = points.listed(trial.workdir, write)
    if not (reader := os.fork()):  # the pipe holds less than all names
        os.close(write)
        with open(read) as file, open(home.work / "points.txt", "w") as out:
            out.write(file.read())
        os._exit(0)
    os.close(read)
    trial.end(trial.begin(before), 0)
    os.close(write)
    os.waitpid(reader, 0)
    assert not trial.row.findings, trial.row.findings
    return list(dict.fromkeys((home.work / "points.txt").read_text().splitlines()))


def crash(home: Home, seed: int, names: Sequence[str], torn: bool = False) -> Row:
    """Kill -9 at each of the points, in turn, in one run."""
    what = "kill -9 within a row of metrics" if torn else "kill -9 at each change of the folder"
    trial, faults = Trial(home, what, f"crash-{'torn-' * torn}{seed}"), 0
    for name in names:
        life = trial.begin(points.killed_at(trial.workdir, name, torn))
        ended = trial.end(life, 0, -signal.SIGKILL)
        faults += ended.status == -signal.SIGKILL
        if ended.status == 0:
            break
    return trial.finish(faults)


def failing_disk(home: Home, seed: int, total: int) -> Row:
    """Every write fails from some point on, with an error of a disk; then there is room again."""
    rng = random.Random(f"disk {seed}")
    trial = Trial(home, "a disk that fails from some write on", f"disk-{seed}")
    number, index = FULL[seed % len(FULL)], rng.randrange(total)
    life = trial.begin(points.failing_from(trial.workdir, index, number))
    trial.end(life, 0, Exit.DISK)
    return trial.finish(1)


def small_files(home: Home, seed: int) -> Row:
    """No file may be larger than some size (ulimit -f)."""
    size = int(2 ** random.Random(f"size {seed}").uniform(6, 16))
    trial = Trial(home, "ulimit -f, by size", f"size-{seed}-{size}")
    limit = resource.RLIMIT_FSIZE
    life = trial.begin(lambda: resource.setrlimit(limit, (size, resource.RLIM_INFINITY)))
    trial.end(life, 0, Exit.DISK)
    return trial.finish(1)


def few_files(home: Home, seed: int) -> Row:
    """No more than some files may be open (ulimit -n)."""
    rng = random.Random(f"files {seed}")
    trial = Trial(home, "ulimit -n, by number", f"files-{seed}")
    count = rng.randrange(12, 80)
    limit = resource.RLIMIT_NOFILE
    life = trial.begin(lambda: resource.setrlimit(limit, (count, count)))
    trial.end(life, 0, Exit.MISTAKE)
    return trial.finish(1)


def mounted(path: pathlib.Path, options: str) -> bool:
    """Mounts a file system in memory; returns whether that is allowed here."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
    return subprocess.run(command, capture_output=True).returncode == 0


def full_disk(home: Home, seed: int) -> Row:
    """A disk of some size, which becomes large enough later."""
    size = int(2 ** random.Random(f"tmpfs {seed}").uniform(2, 9.5))
    trial = Trial(home, "a full disk (tmpfs), by size", f"tmpfs-{seed}-{size}k/run")
    disk = trial.workdir.parent
    if not mounted(disk, f"size={size}k"):
        return trial.row
    try:
        trial.end(trial.begin(), 0, Exit.DISK)
        mounted(disk, "remount,size=64m")
        return trial.finish(1)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def half_finished(home: Home) -> pathlib.Path:
    """Makes a run that was killed in its second stage, with two checkpoints there."""
    trial = Trial(home, "", "half")
    point = "mkdir stages/1-large/checkpoints/12.orbax-checkpoint-tmp"
    trial.end(trial.begin(points.killed_at(trial.workdir, point)), -signal.SIGKILL)
    assert saved(trial.workdir).get("1-large"), saved(trial.workdir)
    return trial.workdir


def targets(run: pathlib.Path) -> list[pathlib.Path]:
    """Every file of a run that a resumed run reads, relative to the run."""
    skipped = (".lock", "tensorboard", "compiled")
    files = (p.relative_to(run) for p in damage.files_of(run))
    return [p for p in files if p.parts[0] not in skipped]


def damages(half: pathlib.Path, seed: int, flips: range) -> Iterator[tuple[pathlib.Path, str]]:
    """Yields bit flips spread over all files, and each other kind of damage for each file."""
    files = targets(half)
    random.Random(f"damages {seed}").shuffle(files)
    for n in range(len(flips)):
        yield files[n % len(files)], "bit"
    others = [(file, kind) for kind in damage.KINDS if kind != "bit" for file in files]
    share = min(1.0, len(flips) / 50)
    yield from random.Random(seed).sample(others, max(1, round(share * len(others))))


def damaged(home: Home, seed: int, half: pathlib.Path, file: pathlib.Path, kind: str) -> Row:
    """A damaged file in a half-finished run: refused, or resumed to the same result."""
    trial = Trial(home, f"damage: {kind}", f"damage-{kind}-{seed}")
    shutil.copytree(half, trial.workdir)
    damage.inflict(trial.workdir / file, kind, seed)
    trial._name = f"damage-{kind}-{seed} {file}"
    life = trial.begin()
    ended = life.wait()
    trial.check(ended, 0, Exit.DAMAGE, Exit.MISTAKE)
    if ended.status == 0:
        trial.compare(ended.text)
    shutil.rmtree(trial.workdir)
    return trial.close(1)


def _killed_on_the_way(trial: Trial, home: Home, draw: random.Random) -> None:
    """A life that is killed somewhere between its first steps and its end."""
    life = trial.begin()
    time.sleep(draw.uniform(0.3, 0.9) * home.seconds)
    life.kill(signal.SIGKILL)
    trial.end(life, 0, -signal.SIGKILL)


def moved(home: Home, seed: int) -> Row:
    """A run folder that is moved between two lives."""
    trial = Trial(home, "a moved folder", f"moved-{seed}")
    _killed_on_the_way(trial, home, random.Random(f"moved {seed}"))
    there = trial.workdir.with_name(f"elsewhere-{seed}")
    if trial.workdir.exists():
        trial.workdir.rename(there)
    trial.workdir = there
    return trial.finish(1)


def not_finite(home: Home, seed: int) -> Row:
    """A loss of 0 / 0 in some step, of which half are saved; then the batches are as they were."""
    trial = Trial(home, "a loss that is not finite", f"nan-{seed}")
    at = seed % (2 * chain.STEPS)

    def silence() -> None:
        good = chain.Stream.__next__

        def bad(stream: chain.Stream) -> dict:
            place, batch = stream.get_state()["place"], good(stream)
            return batch | {"weights": 0 * batch["weights"]} if place == at else batch

        chain.Stream.__next__ = bad

    trial.end(trial.begin(silence), Exit.NUMERICS)
    if (newest := max(saved(trial.workdir).values(), default=0)) > at:
        trial.bad("wrong", f"step {newest} was saved after the loss of step {at + 1}")
    return trial.finish(1)


def one_core(home: Home, seed: int) -> Row:
    """A life with one core after others with all: it ends well. Its bits may be others."""
    trial = Trial(home, "another number of threads (bits may differ)", f"core-{seed}")
    _killed_on_the_way(trial, home, random.Random(f"core {seed}"))
    core = min(os.sched_getaffinity(0))
    trial.end(trial.begin(lambda: os.sched_setaffinity(0, {core})), 0)
    if [entry["name"] for entry in chain.result(trial.workdir)] != [e["name"] for e in home.want]:
        trial.bad("wrong", "stages are missing")
    return trial.close(1)


def two_runners(home: Home, seed: int) -> Row:
    """A second runner while the first one works: it is refused, and the first one goes on."""
    trial = Trial(home, "a second runner", f"runners-{seed}")
    first = trial.begin()
    while not (trial.workdir / ".lock").exists():
        time.sleep(0.01)
    time.sleep(random.Random(f"runners {seed}").uniform(0.0, 0.3) * home.seconds)
    second = Life(lambda: chain.train(trial.workdir, home.compiled)).wait()
    trial.end(first, 0)
    trial.check(second, Exit.MISTAKE)
    if "is in use by process" not in second.text:
        trial.bad("wrong", second.text[-1000:])
    trial.compare()
    return trial.close(1)


def groups(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Distributes points over runs so that those of one run come one after the other."""
    count = -(-len(names) // size)
    for first in range(count):
        yield names[first::count]

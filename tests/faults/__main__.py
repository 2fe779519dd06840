"""Injects faults into small runs, by seed, and prints what became of them.

  make faults                       everything, in less than 30 minutes on two free cores
  python -m tests.faults --seed=1 --share=0.1 --only=kill,crash --json

Each fault happens to a run of two stages with a growth (`chain.py`), in a process of its own. The
run is then started again, and must reach the result of an undisturbed run, bit for bit. The command
exits with status 1 if a number in one of the last four columns is not 0.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from tests.faults import kinds, lives, outside
from tests.faults.lives import Home
from tests.faults.table import COLUMNS, Row, summed, text

Job = Callable[[], Row]
NAMES = ("kill", "crash", "torn", "disk", "size", "files", "tmpfs", "damage", "moved", "runners",
         "nan", "core", "json", "group", "hostile")  # fmt: skip
ALONE = {"json", "hostile"}  # they need no run


def jobs(home: Home, names: list[str], seed: int, share: float) -> Iterator[Job]:
    """Yields the trials of these kinds; `share` of the usual number of each."""

    def number(usual: int) -> range:
        return range(1000 * seed, 1000 * seed + max(1, round(usual * share)))

    def some(kind: Callable[..., Row], usual: int) -> Iterator[Job]:
        return (functools.partial(kind, home, n) for n in number(usual))

    yield from some(kinds.kill, 40) if "kill" in names else ()
    if {"crash", "torn", "disk", "group"} & set(names):
        found = kinds.all_points(home)
        every = max(1, round(1 / min(share, 1)))
        if "crash" in names:
            for n, part in enumerate(kinds.groups(found[seed % every :: every], 5)):
                yield functools.partial(kinds.crash, home, n, part)
        rows = [name for name in found if name.startswith("open") and name.endswith(".jsonl")]
        if "torn" in names:
            yield functools.partial(kinds.crash, home, seed, rows, torn=True)
        if "disk" in names:
            total = len((home.work / "points.txt").read_text().splitlines())
            yield from (functools.partial(kinds.failing_disk, home, n, total) for n in number(24))
        if "group" in names:
            yield from outside.group_jobs(home, found, number(18))
    yield from some(kinds.small_files, 16) if "size" in names else ()
    yield from some(kinds.few_files, 8) if "files" in names else ()
    yield from some(kinds.full_disk, 12) if "tmpfs" in names else ()
    if "damage" in names:
        half = kinds.half_finished(home)
        for n, (file, kind) in enumerate(kinds.damages(half, seed, number(50))):
            yield functools.partial(kinds.damaged, home, 1000 * seed + n, half, file, kind)
    yield from some(kinds.moved, 4) if "moved" in names else ()
    yield from some(kinds.not_finite, 6) if "nan" in names else ()
    yield from some(kinds.one_core, 2) if "core" in names else ()
    yield from some(kinds.two_runners, 4) if "runners" in names else ()
    yield from some(outside.json_writers, 3) if "json" in names else ()
    if "hostile" in names:
        yield functools.partial(outside.hostile, seed, share)


def _call(job: Job) -> Row:
    return job()


def run(names: list[str], seed: int, share: float, processes: int = 2) -> dict[str, Row]:
    """Makes the trials of these kinds; returns their rows."""
    memory = pathlib.Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        home = Home(pathlib.Path(folder), [], [], 0.0)
        if set(names) - ALONE:
            home = lives.undisturbed(home.work)
        todo = list(jobs(home, names, seed, share))
        rows = []
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            for row in pool.imap_unordered(_call, todo):
                rows.append(row)
                for finding in row.findings:
                    print(finding, file=sys.stderr, flush=True)
                if sys.stderr.isatty():
                    print(f"\r{len(rows)} of {len(todo)} trials", end="", file=sys.stderr)
        return summed(row for row in rows if row.injected)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of faults")
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--only", default=",".join(NAMES), help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(NAMES):
        parser.error(f"--only: no fault {', '.join(sorted(unknown))}; choose of {', '.join(NAMES)}")
    began = time.monotonic()
    rows = run(names, given.seed, 0.02 if given.short else given.share)
    seconds = time.monotonic() - began
    if given.json:
        values = {name: {c: getattr(row, c) for c in COLUMNS} for name, row in rows.items()}
        print(json.dumps({"seed": given.seed, "seconds": seconds, "faults": values}))
    else:
        print(text(rows.values()))
        print(f"seed {given.seed}, {seconds:.0f} s", file=sys.stderr)
    sys.exit(not all(row.clean for row in rows.values()))


if __name__ == "__main__":
    main()

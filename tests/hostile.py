"""Makes hostile inputs from valid ones, by seed, and counts how readers take them.

`python -m tests.hostile` runs everything; `--seed` and `--share` choose other inputs or fewer. A
reader survives an input if it accepts it or refuses it in one line. Counted otherwise:

  traceback  another exception than UserError
  hang       no answer in `PATIENCE_S` seconds
  wrong      a refusal of several lines, a file written outside, an input that a second reader
             refuses (`hostile_readers.py`), or a value that cannot be meant (NaN)
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import random
import resource
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from flm_jax.errors import UserError

PATIENCE_S = 10
MORE_MEMORY = 6 << 30  # bytes of address space that readers may add


class WrongError(AssertionError):
    """A reader accepted what it must not, or changed what it must not."""


class HangError(BaseException):
    """No answer in time; not an Exception, so that no reader catches it."""


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


# Values that replace others.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, -(2**31), 2**53 + 1, 2**63, -(2**63), 2**64, 10**40,
    10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"), "", " ", "x",
    "0", "-1", "1e9", "nan", "true", "../../../x", "..", ".", "/", "/etc/passwd", "a/b", "a\\b",
    "a\nb\nc", "\x00", "a\x00b", "\x1b[31mred", "\u2028", "\ud83d", "é" * 9, "x" * 5000, "{0}",
    "%s", "{{ 1 }}", "{% for i in range(10**9) %}{% endfor %}", [], {}, [None], [[]], {"": None},
    {"a": 1}, [1, "a", None], ["x"] * 50, {"base": "source"}, nested(90), nested(210),
]  # fmt: skip


def paths_of(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a JSON value's parts."""
    yield here
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from paths_of(value, (*here, key))


def mutated_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of a JSON value with one to three changes."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(paths_of(tree))
        place = rng.choice(places)
        if not place:
            if rng.random() < 0.1:
                return copy.deepcopy(rng.choice(ODD))
            continue
        *outer, key = place
        node = tree
        for step in outer:
            node = node[step]
        _change(rng, node, key, tree, places)
    return tree


def _change(
    rng: random.Random, node: Any, key: Any, tree: Any, places: list[tuple[Any, ...]]
) -> None:
    value, action = node[key], rng.randrange(12)
    if action <= 4:
        node[key] = copy.deepcopy(rng.choice(ODD))
    elif action == 5:
        del node[key]
    elif action == 6:  # another part of the tree, in its place
        other: Any = tree
        for step in rng.choice(places):
            other = other[step]
        node[key] = copy.deepcopy(other)
    elif action == 7 and isinstance(node, dict):
        node[rng.choice((str(key).upper(), f"{key}s", "", "x", "stage", "__class__"))] = value
    elif action == 8 and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), copy.deepcopy(value))
    elif action == 9:
        node[key] = rng.choice(([value], {str(key): value}, str(value), [value, value]))
    elif action == 10 and isinstance(value, int | float) and abs(value) < 1e300:
        node[key] = rng.choice(
            (-value, value + 1, value - 1, value * 1000, float(value), value / 3)
        )
    elif action == 11 and isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        node[key] = rng.choice(
            (value[:cut], value + "/../..", value * 3, f"{value}\n", value[::-1])
        )


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """A copy of a file's bytes with one to four damages."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        span = rng.choice((1, 1, 2, 8, 64, 512))
        action = rng.randrange(8)
        if action == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif action == 1:
            del out[at : at + span]
        elif action == 2:
            out[at:at] = rng.randbytes(span)
        elif action == 3:
            del out[at:]
        elif action == 4:
            out[at:at] = out[at : at + span]
        elif action == 5:
            out[at : at + span] = bytes(min(span, len(out) - at))
        elif action == 6:
            out[at:at] = rng.choice((
                b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"-Infinity",
                b"1" * 5000, b'"\\ud800"', b"\x00", b"\n", b"1e999", b"//", b",", b'"',
            ))  # fmt: skip
        else:
            out[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), b"\x00" * 7 + b"\x80"))
    return bytes(out)


def written(rng: random.Random, tree: Any) -> bytes:
    """A JSON value as bytes, sometimes in an unusual form."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
    data = text.encode("utf-8", "surrogatepass")
    form = rng.randrange(40)
    if form == 0:
        return b"\xef\xbb\xbf" + data
    if form == 1:
        return data.decode("utf-8", "replace").encode("utf-16")
    if form == 2:
        return data + rng.choice((b"\n\n", b"x", b"\x00", data))
    if form == 3:
        return data[: rng.randrange(len(data))]
    if form == 4:  # keys given twice
        return data.replace(b"{", b'{"name": 1, "version": 2, ', 1)
    return data


def hostile_json(rng: random.Random, tree: Any) -> bytes:
    """The bytes of a file that should hold this JSON value."""
    if rng.random() < 0.25:
        return mutated_bytes(rng, json.dumps(tree).encode())
    return written(rng, mutated_tree(rng, tree))


SPECIAL = ("fifo", "folder", "loop", "zero", "outside", "socket", "empty", "sparse", "gone", "tty")


def make_special(path: pathlib.Path, kind: str) -> None:
    """Puts something that is not the expected file in its place."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "tty":
        path.symlink_to("/dev/ptmx")
    elif kind == "outside":
        path.symlink_to("/etc/passwd")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "sparse":
        path.write_bytes(b"{")
        os.truncate(path, 1 << 40)


def remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced(path: pathlib.Path, data: bytes | str) -> Iterator[None]:
    """Gives a file other bytes, or makes it special (`SPECIAL`), and restores it afterwards."""
    kept = path.read_bytes()
    try:
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            make_special(path, data)
        yield
    finally:
        remove(path)
        path.write_bytes(kept)


@dataclasses.dataclass
class Count:
    """How the inputs of one kind were taken."""

    accepted: int = 0
    refused: int = 0
    traceback: int = 0
    hang: int = 0
    wrong: int = 0
    findings: list[str] = dataclasses.field(default_factory=list)

    @property
    def injected(self) -> int:
        return self.accepted + self.refused + self.traceback + self.hang + self.wrong

    @property
    def clean(self) -> bool:
        return not (self.traceback or self.hang or self.wrong)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise HangError

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """An allocation of a size that a file asks for fails, and does not take all memory."""
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def attempt(count: Count, name: str, read: Callable[[], None]) -> None:
    """Calls a reader on one hostile input, and counts the outcome."""
    try:
        with patience(PATIENCE_S):
            read()
        count.accepted += 1
    except UserError as error:
        if len(str(error).splitlines()) == 1 and str(error).isprintable():
            count.refused += 1
        else:
            count.wrong += 1
            count.findings.append(f"{name}: not one printable line: {str(error)[:200]!r}")
    except HangError:
        count.hang += 1
        count.findings.append(f"{name}: hang\n{traceback.format_exc(limit=-4)}")
    except WrongError as error:
        count.wrong += 1
        count.findings.append(f"{name}: {error}")
    except Exception:
        count.traceback += 1
        count.findings.append(f"{name}: {traceback.format_exc(limit=-3)}")


def check_stays(folder: pathlib.Path, before: set[str]) -> None:
    """Raises WrongError if something was written beside the folders of the test."""
    if extra := {p.name for p in folder.iterdir()} - before:
        raise WrongError(f"written outside: {sorted(extra)}")


def main() -> None:
    from tests import hostile_readers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of inputs")
    parser.add_argument("--only", default="", help="a kind of input")
    given = parser.parse_args()
    total: collections.Counter[str] = collections.Counter()
    columns = ("injected", "accepted", "refused", "traceback", "hang", "wrong")
    print("| input |" + " | ".join(columns), "|")
    with tempfile.TemporaryDirectory() as folder, bounded_memory():
        for kind in hostile_readers.KINDS:
            if given.only and given.only != kind.name:
                continue
            number = max(1, round(kind.usual * given.share))
            count = hostile_readers.run(kind, given.seed, number, pathlib.Path(folder))
            numbers = {name: getattr(count, name) for name in columns}
            total.update(numbers)
            print(f"| {kind.name} |", " | ".join(map(str, numbers.values())), "|", flush=True)
            for finding in count.findings:
                print(finding, file=sys.stderr, flush=True)
    print("| all |", " | ".join(str(total[name]) for name in columns), "|")
    sys.exit(bool(total["traceback"] or total["hang"] or total["wrong"]))


if __name__ == "__main__":
    main()

"""Damages the files of a run, by kind and seed. The fault tests share these injectors.

damage.inflict(path, "bit", seed=3)       one file, in place
damage.files_of(checkpoint)               what can be damaged in a folder
"""

import pathlib
import random
from collections.abc import Callable


def _bit(path: pathlib.Path, rng: random.Random) -> None:
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    _replace(path, bytes(content))


def _truncated(path: pathlib.Path, rng: random.Random) -> None:
    """Cuts off the end: one byte or more."""
    content = path.read_bytes()
    _replace(path, content[: rng.randrange(len(content))])


def _deleted(path: pathlib.Path, rng: random.Random) -> None:
    path.unlink()


def _emptied(path: pathlib.Path, rng: random.Random) -> None:
    _replace(path, b"")


def _foreign(path: pathlib.Path, rng: random.Random) -> None:
    """Replaces all bytes by random ones; the size stays."""
    _replace(path, rng.randbytes(len(path.read_bytes())))


def _zeroed(path: pathlib.Path, rng: random.Random) -> None:
    """Fills a part with zeros, as a page that never reached the disk; the size stays."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.randint(1, 4096))
    if not any(content[start:end]):  # these are zeros already
        start, end = 0, len(content)
    content[start:end] = bytes(end - start)
    _replace(path, bytes(content))


KINDS: dict[str, Callable[[pathlib.Path, random.Random], None]] = {
    "bit": _bit,
    "truncated": _truncated,
    "deleted": _deleted,
    "emptied": _emptied,
    "foreign": _foreign,
    "zeroed": _zeroed,
}


def inflict(path: pathlib.Path, kind: str, seed: object) -> None:
    """Damages one file that is not empty.

    The damaged file is a new one: hard links to the old one, as `RunFolder.branch` makes them, keep
    its content.

    Args:
      path: the file.
      kind: one of `KINDS`.
      seed: with the kind it decides where; names of files in a checkpoint differ in each run.
    """
    KINDS[kind](path, random.Random(f"{seed} {kind}"))


def _replace(path: pathlib.Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files in a folder that can be damaged, sorted: all that are not empty."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def checkpoints_of(run: pathlib.Path) -> list[pathlib.Path]:
    """Returns the complete checkpoints of a run, in the order of stages and steps."""
    found = (p for p in run.glob("stages/*/checkpoints/*") if p.name.isdigit())
    return sorted(found, key=lambda p: (int(p.parent.parent.name.split("-")[0]), int(p.name)))

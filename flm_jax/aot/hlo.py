"""The traffic between devices in a compiled program, read from its text (XLA's HLO)."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

# Bytes of one entry, by XLA's name of the dtype.
_SIZES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Move:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      count: number of runs in one call of the program.
      bytes: bytes that each device sends in one run, by the ring algorithm.
      group: one of the groups of devices that exchange data; all have the same size. For a
        permutation: a device and its target.
    """

    kind: str
    count: int
    bytes: float
    group: tuple[int, ...]


def moves(text: str, devices: int) -> Iterator[Move]:
    """Yields the collectives of a compiled program.

    The body of a loop counts once per iteration. The number of iterations is the known trip count,
    or the constant in the loop's condition.

    Args:
      text: the compiled program, as `compiled.as_text()` gives it.
      devices: number of devices that run it.

    Yields:
      One `Move` for each place in the program that calls a collective.
    """
    bodies = dict(_computations(text))

    def visit(name: str, times: int) -> Iterator[Move]:
        for line in bodies.get(name, ()):
            inner = times
            condition = re.search(r" while\(.*condition=%?([\w.-]+)", line)
            if condition:
                bounds = re.findall(r"known_trip_count\W+n\W+(\d+)", line)
                bounds += re.findall(r" constant\((\d+)\)", "".join(bodies[condition.group(1)]))
                inner = times * max(map(int, bounds), default=1)
            operation = re.search(r"= (.*?) ([\w-]+)\(", line)
            if operation:
                kind = operation.group(2).removesuffix("-start")
                if kind in KINDS:
                    shape = operation.group(1)
                    if operation.group(2).endswith("-start") and kind != "all-reduce":
                        shape = _elements(shape)[1]  # the shape is (operands, results, ..)
                    group = _group(line, devices)
                    result = _bytes(shape)
                    if name.startswith("all-reduce-scatter"):
                        # An all-reduce after which each device keeps only a part of the result.
                        kind, result = "reduce-scatter", result // len(group)
                    yield Move(kind, times, _sent(kind, result, len(group)), group)
            for called in re.findall(
                r"(?:calls|body|to_apply|branch_computations)=\{?%?([\w.-]+)", line
            ):
                yield from visit(called, inner)

    return visit("ENTRY", 1)


def collectives(moves: Iterable[Move]) -> dict[str, dict[str, float]]:
    """Sums collectives by kind.

    Returns:
      kind -> `count`, the runs in one call of the program, and `bytes`, what each device sends.

    >>> collectives([Move("all-gather", 2, 100, (0, 1)), Move("all-gather", 1, 50, (0, 1))])
    {'all-gather': {'count': 3, 'bytes': 250}}
    """
    total: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for move in moves:
        total[move.kind]["count"] += move.count
        total[move.kind]["bytes"] += move.count * move.bytes
    return {kind: dict(total[kind]) for kind in KINDS if kind in total}


def _sent(kind: str, result: int, size: int) -> float:
    """Returns the bytes that each of `size` devices sends, from the bytes of its result."""
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter":
        return result * (size - 1)
    return result * (size - 1) / size * (2 if kind == "all-reduce" else 1)


def _group(line: str, devices: int) -> tuple[int, ...]:
    """Returns one group of a collective. XLA has three notations; a permutation has pairs."""
    pair = next((p for p in re.findall(r"\{(\d+),(\d+)\}", line) if p[0] != p[1]), ("0", "0"))
    if "source_target_pairs=" in line:
        return tuple(map(int, pair))
    mesh = re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line)
    if mesh:
        sizes = {n: int(s) for n, s in re.findall(r"'(\w+)'=(\d+)", mesh.group(1))}
        chosen = re.findall(r"'(\w+)'", mesh.group(2))
        order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", line)
        ids = _iota(*order.groups()) if order else np.arange(math.prod(sizes.values()))
        ids = ids.reshape(tuple(sizes.values()))
        index = tuple(slice(None) if name in chosen else 0 for name in sizes)
        return tuple(ids[index].ravel().tolist())
    listed = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if listed:
        ids = _iota(*listed.groups()[2:])
        return tuple(ids.reshape(-1, int(listed.group(2)))[0].tolist())
    first = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return tuple(map(int, first.group(1).split(","))) if first else tuple(range(devices))


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Returns 0, 1, ... in a shape such as "64,16", with its axes transposed to an order "1,0"."""
    sizes = [int(n) for n in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _bytes(shape: str) -> int:
    """Returns the bytes of an HLO shape such as "f32[4,2]", or of a tuple of them."""
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        if dtype in _SIZES:
            total += _SIZES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _elements(shape: str) -> list[str]:
    """Splits a tuple's shape: "((f32[2]),f32[4,2])" becomes "(f32[2])" and "f32[4,2]"."""
    elements, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return elements


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each computation's name and lines; the entry's name is "ENTRY"."""
    name = ""
    lines: list[str] = []
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            head = line.split("(")[0].split()
            name, lines = head[-1].lstrip("%") if head else "", []
            if line.startswith("ENTRY"):
                name = "ENTRY"
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)

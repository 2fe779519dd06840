"""The traffic between devices in a compiled program, read from its text (XLA's HLO)."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from flm_jax.aot.loops import Computations, computations, trips

# Bytes of one entry, by XLA's name of the dtype.
_SIZES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that take time on the matrix or vector units.
_COMPUTE = re.compile(r"\b(?:fusion|dot|convolution|custom-call|while|reduce)\(")


@dataclasses.dataclass(frozen=True)
class Move:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      count: number of runs in one call of the program; None: in a loop of unknown length.
      bytes: bytes that each device sends in one run, by the ring algorithm.
      group: one of the groups of devices that exchange data, as positions in the mesh; all have
        the same size. For a permutation: a device and its target.
      pairs: of a permutation: each device that sends, and its target.
      hidden: whether it runs while the device computes: it starts before other work and ends after
        it.
    """

    kind: str
    count: int | None
    bytes: float
    group: tuple[int, ...]
    hidden: bool = False
    pairs: tuple[tuple[int, int], ...] = ()


def moves(text: str, devices: int) -> Iterator[Move]:
    """Yields the collectives of a compiled program.

    The body of a loop counts once per iteration (`loops.trips`). The TPU compiler may run a
    collective inside other fusions, a piece in each: it counts once, where it starts, as hidden.

    Args:
      text: the compiled program, as `compiled.as_text()` gives it.
      devices: number of devices that run it.

    Yields:
      One `Move` for each place in the program that calls a collective.
    """
    bodies = computations(text)

    def visit(name: str, times: int | None, behind: bool) -> Iterator[Move]:
        """The collectives of a computation; `behind`: it all runs while other work does."""
        lines = bodies.get(name, [])
        if name.startswith("async_collective_fusion") or _ends(lines):
            return
        hidden = _hidden(lines)
        for line in lines:
            inner = times
            if " while(" in line:
                rounds = trips(line, lines, bodies)
                inner = None if rounds is None or times is None else times * rounds
            result = line.strip().removeprefix("ROOT ").partition(" = ")[0].lstrip("%")
            apart = behind or result in hidden
            move = _move(name, line, devices, times, apart)
            if move is not None:
                yield move
            for called in _called(line, bodies):
                yield from visit(called, inner, apart)

    return visit("ENTRY", 1, False)


def _move(name: str, line: str, devices: int, times: int | None, hidden: bool) -> Move | None:
    """Reads the collective of a line of computation `name`; None: the line has none."""
    operation = re.search(r" = (.*?) ([\w-]+)\(", line)
    if operation is None or operation.group(2).removesuffix("-start") not in KINDS:
        return None
    shape, called = operation.groups()
    kind = called.removesuffix("-start")
    if called.endswith("-start") and kind != "all-reduce":
        shape = _elements(shape)[1]  # the shape is (operands, results, ..)
    group = _group(line, devices)
    size = _bytes(shape)
    if name.startswith("all-reduce-scatter"):
        # An all-reduce after which each device keeps only a part of the result.
        kind, size = "reduce-scatter", size // len(group)
    pairs = _pairs(line) if kind == "collective-permute" else ()
    group = pairs[0] if pairs else group
    return Move(kind, times, _sent(kind, size, len(group)), group, hidden, pairs)


def _called(line: str, bodies: Computations) -> list[str]:
    """The computations that a line runs; a reduction's function moves nothing."""
    names = re.findall(r"(?:calls|body|to_apply)=%?([\w.-]+)", line)
    for several in re.findall(r"branch_computations=\{([^}]*)\}", line):
        names += re.findall(r"[\w.-]+", several)
    return [name for name in names if name in bodies]


def _hidden(lines: list[str]) -> set[str]:
    """The names of collectives that start before, and end after, an operation that computes."""
    started: dict[str, bool] = {}
    hidden: set[str] = set()
    for line in lines:
        handed_on = re.search(r"custom-call\(%?([\w.-]+)\).*\"AsyncCollectiveStart\"", line)
        if handed_on:
            hidden.add(handed_on.group(1))
        operation = re.search(r"%?([\w.-]+) = .*? ([\w-]+)\(%?([\w.-]*)", line)
        if operation is None:
            continue
        name, called, operand = operation.groups()
        if called.endswith("-start") and called.removesuffix("-start") in (*KINDS, "async"):
            started[name] = False
        elif called.endswith("-done") and started.pop(operand, False):
            hidden.add(operand)
        elif _COMPUTE.search(line):
            started = dict.fromkeys(started, True)
    return hidden


def _ends(lines: list[str]) -> bool:
    """Whether a fusion waits for the end of a collective that another one started."""
    return any('custom_call_target="AsyncCollectiveDone"' in line for line in lines)


def collectives(moves: Iterable[Move]) -> dict[str, dict[str, float]]:
    """Sums collectives by kind.

    Returns:
      kind -> `count`, the runs in one call of the program, and `bytes`, what each device sends.
      Collectives in loops of unknown length count in neither, but in `unknown`, by place.

    >>> collectives([Move("all-gather", 2, 100, (0, 1)), Move("all-gather", 1, 50, (0, 1))])
    {'all-gather': {'count': 3, 'bytes': 250}}
    >>> collectives([Move("all-reduce", None, 100, (0, 1))])
    {'all-reduce': {'count': 0, 'bytes': 0, 'unknown': 1}}
    """
    total: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for move in moves:
        entry = total[move.kind]
        if move.count is None:
            entry["unknown"] = entry.get("unknown", 0) + 1
        else:
            entry["count"] += move.count
            entry["bytes"] += move.count * move.bytes
    return {kind: dict(total[kind]) for kind in KINDS if kind in total}


def _sent(kind: str, result: int, size: int) -> float:
    """Returns the bytes that each of `size` devices sends, from the bytes of its result."""
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter":
        return result * (size - 1)
    return result * (size - 1) / size * (2 if kind == "all-reduce" else 1)


def _pairs(line: str) -> tuple[tuple[int, int], ...]:
    """Returns a permutation's pairs of device and target, without devices that keep theirs."""
    listed = line.partition("source_target_pairs=")[2]
    pairs = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", listed)]
    return tuple(pair for pair in pairs if pair[0] != pair[1]) or ((0, 0),)


def _group(line: str, devices: int) -> tuple[int, ...]:
    """Returns one group of a collective. XLA has three notations."""
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

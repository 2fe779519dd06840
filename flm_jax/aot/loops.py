"""How often the loops of a compiled program (XLA's HLO text) run."""

from __future__ import annotations

import re
from collections.abc import Callable

Computations = dict[str, list[str]]  # name -> lines; the entry's name is "ENTRY"

_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start")
_ORDER = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}  # with sides exchanged


def computations(text: str) -> Computations:
    """The lines of each computation in a program's text."""
    found: Computations = {}
    name = ""
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            head = line.split("(")[0].split()
            name = "ENTRY" if line.startswith("ENTRY") else head[-1].lstrip("%") if head else ""
            found[name] = []
        elif not line.startswith("}") and name:
            found[name].append(line)
    return found


class _Scope:
    """A computation's operations, by name."""

    def __init__(self, lines: list[str]) -> None:
        self.operations: dict[str, tuple[str, list[str], str]] = {}
        self.root = ""
        for line in lines:
            parsed = re.match(r"\s*(ROOT )?%?([\w.-]+) = ", line)
            if not parsed:
                continue
            rest = _after_shape(line[parsed.end() :])
            called = re.match(r"\s*([\w-]+)\((.*)", rest)
            if not called:
                continue
            inside, attributes = _split_call(called.group(2))
            names = [] if called.group(1) in ("constant", "parameter") else _names(inside)
            names = names or [inside]
            self.operations[parsed.group(2)] = (called.group(1), names, attributes)
            if parsed.group(1):
                self.root = parsed.group(2)

    def source(self, name: str) -> tuple[str, list[str], str]:
        """The operation that a value comes from, through copies and conversions."""
        operation = self.operations.get(name, ("", [], ""))
        while operation[0] in _SAME:
            operation = self.operations.get(operation[1][0], ("", [], ""))
        return operation

    def constant(self, name: str) -> int | None:
        """A value that is an integer constant; None: it is not."""
        kind, operands, _ = self.source(name)
        number = operands[0] if operands else ""
        return int(number) if kind == "constant" and re.fullmatch(r"-?\d+", number) else None

    def element(self, name: str) -> int | None:
        """The index of the loop's tuple that a value is; None: it is something else."""
        kind, operands, attributes = self.source(name)
        index = re.search(r"index=(\d+)", attributes)
        if kind != "get-tuple-element" or index is None:
            return None
        carried = self.source(operands[0])[0] == "parameter"
        return int(index.group(1)) if carried else None

    def member(self, tuple_name: str, index: int) -> str:
        """The name of a tuple's element; "" if the operation is not a tuple."""
        kind, operands, _ = self.source(tuple_name)
        return operands[index] if kind == "tuple" and index < len(operands) else ""


def _after_shape(text: str) -> str:
    """What follows the result's shape at the start of a text."""
    if not text.startswith("("):
        return text.partition(" ")[2]
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[position + 1 :]
    return ""


def _split_call(text: str) -> tuple[str, str]:
    """Splits "operands), attributes" at the bracket that closes the operands."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:position], text[position + 1 :]
    return text, ""


def _names(operands: str) -> list[str]:
    """The operands' names: "%a, /*index=1*/%b", or with shapes "s32[] %a, (f32[]) %b"."""
    names = re.findall(r"%([\w.-]+)", operands)
    return names or [part.split()[-1] for part in operands.split(",") if part.strip()]


def trips(line: str, around: list[str], bodies: Computations) -> int | None:
    """Number of iterations of a loop.

    The compiler's own number (`known_trip_count`) is taken where it is present. Otherwise it
    follows from the loop's counter: the constant that it starts from, the constant that the body
    adds to it or subtracts, and the constant that the condition compares it with.

    Args:
      line: the `while` operation.
      around: the lines of the computation that it is in.
      bodies: all computations.

    Returns:
      The number; None: it cannot be read, because one of the three is not a constant.
    """
    known = re.search(r"known_trip_count\W+n\W+(\d+)", line)
    if known:
        return int(known.group(1))
    called = re.search(r" while\(([^)]*)\).*condition=%?([\w.-]+), body=%?([\w.-]+)", line)
    if called is None or not {called.group(2), called.group(3)} <= set(bodies):
        return None
    outer, body = _Scope(around), _Scope(bodies[called.group(3)])
    start_tuple = _names(called.group(1))[0]

    def initial(index: int) -> int | None:
        return outer.constant(outer.member(start_tuple, index))

    def unchanging(index: int) -> int | None:
        """An element that the body passes on: what it was before the loop."""
        passed = body.element(body.member(body.root, index)) == index
        return initial(index) if passed else None

    compared = _comparison(called.group(2), bodies)
    if compared is None:
        return None
    (left, right), direction = compared
    if left[0] == "constant" or (left[0] == "element" and unchanging(left[1]) is not None):
        left, right, direction = right, left, _ORDER.get(direction, "")
    if left[0] != "element":
        return None
    bound = right[1] if right[0] == "constant" else unchanging(right[1])
    start, step = initial(left[1]), _step(body, left[1], unchanging)
    if bound is None or start is None or not step:
        return None
    return _count(start, step, bound, direction)


_Side = tuple[str, int]  # ("constant", value) or ("element", index of the loop's tuple)


def _comparison(condition: str, bodies: Computations) -> tuple[tuple[_Side, _Side], str] | None:
    """What a loop's condition compares, and how; the comparison may be inside a fusion."""
    scope = _Scope(bodies[condition])

    def side(name: str) -> _Side | None:
        value, index = scope.constant(name), scope.element(name)
        if value is not None:
            return "constant", value
        return None if index is None else ("element", index)

    kind, operands, attributes = scope.source(scope.root)
    outside = {name: side(name) for name in operands}
    sides = [outside[name] for name in operands]
    if kind == "fusion":
        inner = re.search(r"calls=%?([\w.-]+)", attributes)
        if inner is None or inner.group(1) not in bodies:
            return None
        fused = _Scope(bodies[inner.group(1)])
        kind, names, attributes = fused.source(fused.root)
        given, sides = sides, []
        for name in names:
            value = fused.constant(name)
            source, parameter, _ = fused.source(name)
            if value is not None:
                sides.append(("constant", value))
            elif source == "parameter" and int(parameter[0]) < len(given):
                sides.append(given[int(parameter[0])])
    direction = re.search(r"direction=(\w+)", attributes)
    if kind != "compare" or direction is None or len(sides) != 2:
        return None
    left, right = sides
    if left is None or right is None:
        return None
    return (left, right), direction.group(1)


def _step(body: _Scope, index: int, unchanging: Callable[[int], int | None]) -> int | None:
    """What the body adds to an element of the loop's tuple; None: no constant."""
    kind, operands, _ = body.source(body.member(body.root, index))
    if kind not in ("add", "subtract") or len(operands) != 2:
        return None
    counter, amount = operands
    if kind == "add" and body.element(counter) != index:
        counter, amount = amount, counter
    if body.element(counter) != index:
        return None
    number, element = body.constant(amount), body.element(amount)
    if number is None and element is not None:
        number = unchanging(element)
    return None if number is None else number if kind == "add" else -number


def _count(start: int, step: int, bound: int, direction: str) -> int | None:
    """Iterations of `for i = start; i DIRECTION bound; i += step`; None: it does not end.

    >>> _count(0, 2, 16, "LT"), _count(7, -1, 0, "GE"), _count(0, 3, 9, "NE")
    (8, 8, 3)
    """
    if direction in ("GT", "GE"):
        start, step, bound = -start, -step, -bound
        direction = {"GT": "LT", "GE": "LE"}[direction]
    if direction == "NE":
        distance, rest = divmod(bound - start, step)
        return distance if rest == 0 and distance >= 0 else None
    if direction not in ("LT", "LE") or (step <= 0 and start <= bound):
        return None
    last = bound + (direction == "LE")
    return max(0, -(-(last - start) // step)) if step > 0 else 0

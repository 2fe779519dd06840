"""Jinja's sandbox with a budget: a template ends, in bounded time and memory.

Jinja's own sandbox keeps a template away from Python's objects. It does not bound loops in loops,
macros that call themselves twice, or a text that is doubled in every turn.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
import time
from collections.abc import Callable, Iterator, Sized
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes

SECONDS = 5.0  # of one rendering
CHARACTERS = 64 << 20  # that one rendering writes, or makes on the way
_PRODUCT = 1 << 30  # most of what a call's arguments can make of each other, as in a.replace(b, c)
_BITS = 10_000  # of a number
_WIDE = re.compile(r"\d{6}|\*")  # a width in a format


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.deadline, self.left = time.monotonic() + SECONDS, CHARACTERS

    def spend(self, characters: int) -> None:
        self.left -= characters
        if self.left < 0:
            raise jinja2.TemplateError(f"it makes more than {CHARACTERS:,} characters of text")
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateError(f"it takes more than {SECONDS:g} s")


_current: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


@contextlib.contextmanager
def rendering() -> Iterator[None]:
    """Gives the templates that are rendered inside a new budget."""
    token = _current.set(_Budget())
    try:
        yield
    finally:
        _current.reset(token)


def _spend(characters: int) -> None:
    if budget := _current.get(None):  # there is none while a template is compiled
        budget.spend(characters)


def _size(value: Any) -> int:
    if isinstance(value, Sized):
        return len(value)
    return abs(value) if isinstance(value, int) else 1


def _check_call(values: tuple[Any, ...]) -> None:
    """Raises TemplateError if a call could make something too large of its arguments."""
    sizes = sorted((_size(value) + 1 for value in values), reverse=True)
    if len(sizes) > 1 and sizes[0] * sizes[1] > _PRODUCT:
        raise jinja2.TemplateError(f"a call with arguments of sizes {sizes[0]:,} and {sizes[1]:,}")
    _spend(1)


def _check_format(text: Any) -> None:
    if isinstance(text, str) and _WIDE.search(text):
        raise jinja2.TemplateError("a format with a width of six digits or of an argument")


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which every loop, macro, call and operator counts."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self.written, **options)
        del self.globals["lipsum"]  # makes as much text as it is asked for
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Adds a filter whose calls count."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            values = (*args, *kwargs.values())
            _check_call(values)
            if name == "format":
                _check_format(next((value for value in values if isinstance(value, str)), ""))
            return function(*args, **kwargs)

        self.filters[name] = counted

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        text = owner if isinstance(owner, str) else ""
        _check_call((text, *args, *kwargs.values()))
        if getattr(__obj, "__name__", "").startswith("format"):
            _check_format(text)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [x for x in (left, right) if isinstance(x, int)]
        if operator == "%":
            _check_format(left)
        elif operator == "+" and not numbers:
            _spend(_size(left) + _size(right))
        elif len(numbers) == 1 and isinstance(left, Sized) + isinstance(right, Sized):
            _spend(_size(left) * _size(right))
        elif len(numbers) == 2:
            bits = [abs(x).bit_length() for x in numbers]
            if (bits[0] * abs(right) if operator == "**" else sum(bits)) > _BITS:
                raise jinja2.TemplateError(f"a number of more than {_BITS:,} bits")
        return super().call_binop(context, operator, left, right)

    def turn(self) -> bool:
        """Counts one turn of a loop or one call of a macro."""
        _spend(1)
        return True

    def joined(self, *parts: Any) -> str:
        """What `~` makes of its operands."""
        texts = [str(part) for part in parts]
        _spend(sum(map(len, texts)))
        return "".join(texts)

    def written(self, value: Any) -> Any:
        """Counts what a template writes."""
        if isinstance(value, str):
            _spend(len(value))
        return value

    def template(self, text: str) -> jinja2.Template:
        """Compiles a template."""
        tree = self.parse(text)
        for loop in tree.find_all(nodes.For):
            if loop.test is not None:
                loop.test = nodes.And(_call("turn"), loop.test)
        bodies: list[Any] = list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)))
        for node in bodies:
            node.body.insert(0, nodes.ExprStmt(_call("turn")))
        _replace_joins(tree)
        return self.from_string(tree)


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    """A call of a method of the environment, which a template cannot name."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


def _replace_joins(node: nodes.Node) -> None:
    """Replaces `a ~ b` below a node by a call of `Environment.joined`."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_joined(x) for x in value]
        else:
            setattr(node, name, _joined(value))
    for child in node.iter_child_nodes():
        _replace_joins(child)


def _joined(value: Any) -> Any:
    return _call("joined", *value.nodes) if isinstance(value, nodes.Concat) else value

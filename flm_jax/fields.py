"""What --help and the docs say of a config's fields: their types, defaults and comments.

The source is the only place where a field is described. A comment belongs to a field if it is on
the field's line, or goes on below it. A field without one has the comment above it; a comment above
a field that has its own is the heading of a group.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Any

_FIELD = re.compile(r"    (\w+): ")


def comments(cls: type) -> dict[str, str]:
    """Returns the comment of each field of a dataclass, "" for a field without one."""
    source = inspect.getsource(cls)
    lines = source.splitlines()
    comment_at: dict[int, tuple[int, str]] = {}  # line -> column, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment_at[token.start[0]] = (token.start[1], token.string.lstrip("# "))
    found: dict[str, str] = {}
    above: list[str] = []
    last = ""  # the field that a comment without code of its own may continue
    for number, line in enumerate(lines, start=1):
        if line.startswith(("    def ", "    @")):
            break  # the fields are above the methods
        field = _FIELD.match(line)
        column, text = comment_at.get(number, (0, ""))
        if field:
            last = field[1]
            found[last] = text or " ".join(above)
            above = []
        elif text and not line[:column].strip() and column > 4 and last:
            found[last] += f" {text}"  # aligned with a comment on the line before
        elif text and not line[:column].strip():
            above.append(text)
        else:
            above = []
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(cls)}


def default_of(field: dataclasses.Field[Any]) -> str:
    """A field's default in words, as "= 3"."""
    if field.default is not dataclasses.MISSING:
        if dataclasses.is_dataclass(field.default):
            return "= its defaults"
        return f"= {field.default!r}"
    return "(required)" if field.default_factory is dataclasses.MISSING else "= made at the start"


def described(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields path, type and default, and comment of each field, also of nested configs.

    Args:
      cls: a config dataclass.
      prefix: what the paths begin with.

    >>> from flm_jax.config import ExperimentConfig
    >>> [row[:2] for row in described(ExperimentConfig)][:2]
    [('stages[0].name', 'str (required)'), ('stages[0].model.vocab_size', 'int (required)')]
    """
    hints, said = typing.get_type_hints(cls), comments(cls)
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        nested, index = _config_in(hints[field.name])
        if nested:
            yield from described(nested, f"{path}{index}.")
        else:
            yield path, f"{field.type} {default_of(field)}", said[field.name]


def _config_in(hint: Any) -> tuple[type | None, str]:
    """The config dataclass that a field holds, and "[0]" if it holds several."""
    items = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next((found for found in map(_config_in, items) if found[0]), (None, ""))
    if typing.get_origin(hint) is tuple:
        return _config_in(items[0])[0], "[0]"
    known = isinstance(hint, type) and dataclasses.is_dataclass(hint)
    return (hint if known else None), ""

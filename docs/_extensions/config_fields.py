"""The directive `config-fields`: a table of a dataclass's fields, with the comments beside them.

The source is the only place where a field is described. A comment belongs to a field if it is on
the field's line, or goes on below it. A field without one has the comment above it; a comment above
a field that has its own is the heading of a group.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import re
import tokenize
from typing import Any, ClassVar

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

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


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        if dataclasses.is_dataclass(field.default):
            return "= its defaults"
        return f"= {field.default!r}"
    return "(required)" if field.default_factory is dataclasses.MISSING else "= made at the start"


class ConfigFields(SphinxDirective):
    """`{config-fields} module:Class`."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].partition(":")
        cls = getattr(importlib.import_module(module), name)
        said = comments(cls)
        group = nodes.tgroup(cols=3)
        group += [nodes.colspec(colwidth=width) for width in (25, 25, 50)]
        group += nodes.thead("", _row(*map(nodes.Text, ("field", "type and default", "meaning"))))
        group += nodes.tbody("", *(_field_row(f, said[f.name]) for f in dataclasses.fields(cls)))
        return [nodes.table("", group, classes=["colwidths-given"])]


def _field_row(field: dataclasses.Field[Any], comment: str) -> nodes.row:
    kind = nodes.inline("", "", nodes.literal(text=str(field.type)), nodes.Text(" "))
    kind += nodes.literal(text=_default(field))
    meaning = nodes.inline()
    for number, part in enumerate(comment.split("`")):
        meaning += nodes.literal(text=part) if number % 2 else nodes.Text(part)
    return _row(nodes.literal(text=field.name), kind, meaning)


def _row(*cells: nodes.Node) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("config-fields", ConfigFields)
    return {"parallel_read_safe": True}

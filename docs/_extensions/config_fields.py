"""The directive `config-fields`: a table of a dataclass's fields, with the comments beside them."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, ClassVar

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from flm_jax.fields import comments, default_of


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
    kind += nodes.literal(text=default_of(field))
    meaning = nodes.inline()
    for number, part in enumerate(comment.split("`")):
        meaning += nodes.literal(text=part) if number % 2 else nodes.Text(part)
    return _row(nodes.literal(text=field.name), kind, meaning)


def _row(*cells: nodes.Node) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("config-fields", ConfigFields)
    return {"parallel_read_safe": True}

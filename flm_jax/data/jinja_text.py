"""Runs chat templates of Jinja as transformers does, in a sandbox: a template is foreign code."""

from __future__ import annotations

import datetime
import functools
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes, parser

from flm_jax.data import jinja_budget, json_text
from flm_jax.errors import UserError

# The day that training writes where a template asks for the date: a resumed training must write
# the same text. It is the default of Llama's template.
TRAINING_DAY = datetime.datetime(2024, 7, 26)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _marked(self, context: jinja2.runtime.Context, caller: Any) -> str:
        mark = context.get(_MARK, "")
        return f"{mark}{caller()}{mark}"


_MARK = "_generation_mark"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; transformers' does not."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    environment = jinja_budget.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _raise
    try:
        return environment.template(text)
    except Exception as error:  # also Python's compiler refuses some, by several types
        line = getattr(error, "lineno", None)
        raise UserError(
            f"the chat template is not valid Jinja{f', line {line}' if line else ''}: "
            f"{_one_line(error)}; fix it, or give another template"
        ) from error


def check(text: str) -> None:
    """Raises UserError if a chat template is not valid Jinja."""
    _compiled(text)


def render(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, str],
    tools: Sequence[Any] = (),
    prompt: bool = False,
    now: datetime.datetime = TRAINING_DAY,
) -> tuple[str, list[tuple[int, int]]]:
    """Writes a conversation.

    Args:
      text: the template.
      messages: role, content and other fields of each message.
      variables: names of special tokens.
      tools: definitions of tools.
      prompt: also write what precedes the assistant's next answer.
      now: the time that the template's `strftime_now` writes.

    Returns:
      The text, and the spans inside `{% generation %}`, as start and end in characters.

    Raises:
      UserError: the template refuses these messages, or fails.
    """
    mark = f"\x00{secrets.token_hex(8)}\x00"
    try:
        with jinja_budget.rendering():
            marked = _compiled(text).render(
                {
                    **variables,
                    "messages": [dict(message) for message in messages],
                    "tools": list(tools) or None,
                    "documents": None,
                    "add_generation_prompt": prompt,
                    "strftime_now": now.strftime,
                    _MARK: mark,
                }
            )
        json_text.check_text(marked)
    except Exception as error:  # a template can raise any exception
        raise UserError(
            f"the chat template refuses it: {_one_line(error)}; fix the conversation, or give "
            "another template"
        ) from error
    pieces = marked.split(mark)
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    return "".join(pieces), [(ends[n], ends[n + 1]) for n in range(1, len(pieces), 2)]


def _one_line(error: Exception) -> str:
    return " ".join(f"{error or type(error).__name__}".split())

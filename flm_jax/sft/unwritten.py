"""What a chat template does not write: whole conversations that it refuses, or parts of others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from flm_jax.data.chat_template import TemplateConfig
from flm_jax.data.tokenizer import Tokenizer
from flm_jax.errors import UserError
from flm_jax.sft.chats import BadRows, Message, Sample
from flm_jax.sft.template import encode_sample, render

_CALLS = "tool_calls"
_FIRST = 8_675_309_000_000  # numbers from here on stand for contents; no text has them by chance


def writable(
    samples: Sequence[Sample], tokenizer: Tokenizer, template: TemplateConfig, bad: BadRows
) -> list[Sample]:
    """Returns the samples that a template can write.

    Args:
      samples: conversations.
      tokenizer: the model's.
      template: how messages are written.
      bad: counts the others.

    Raises:
      UserError: there are more others than `bad` allows.
    """
    kept = []
    for sample in samples:
        try:
            encode_sample(sample, tokenizer, template)
        except UserError as error:
            bad.add(str(error))
        else:
            kept.append(sample)
    return kept


def left_out(sample: Sample, tokenizer: Tokenizer, template: TemplateConfig) -> list[str]:
    """Lists what a template does not write of a conversation that it can write.

    Returns:
      One name for each, as "system messages", "parts of user messages", "calls of tools",
      "reasoning" or "lists of tools".
    """
    if template.jinja:
        return _left_out_by_jinja(sample, tokenizer, template)
    lost = [
        "system messages" for m in sample.messages if m.role == "system" and not template.system
    ]
    lost += ["reasoning" for m in sample.messages if m.reasoning]
    return lost + ["lists of tools"] * bool(sample.tools)


def _left_out_by_jinja(sample: Sample, tokenizer: Tokenizer, template: TemplateConfig) -> list[str]:
    messages = sample.messages

    def written(messages: Sequence[Message], tools: str = sample.tools) -> str:
        """The text; "" if the template refuses these messages."""
        try:
            return render(messages, tokenizer, template, tools)[0]
        except UserError:
            return ""

    text, lost = written(messages), []
    # A short content may also be in other text, so each content is also replaced by a number.
    numbers = [f"{_FIRST + n}" if m.content.strip() else "" for n, m in enumerate(messages)]
    replaced = [dataclasses.replace(m, content=n) for m, n in zip(messages, numbers, strict=True)]
    numbered = written(replaced)
    for message, number in zip(messages, numbers, strict=True):
        if number and numbered and number not in numbered:
            lost.append(f"{message.role} messages")
        elif not _holds(text, message.content.strip()):
            lost.append(f"parts of {message.role} messages")
        lost += ["reasoning"] * (not _holds(text, message.reasoning.strip()))
    calling = [m for m in messages if _CALLS in m.fields]
    if calling and text == written([_without_calls(m) for m in messages]):
        lost += ["calls of tools"] * len(calling)
    if sample.tools and text == written(messages, tools=""):
        lost.append("lists of tools")
    return lost


def _without_calls(message: Message) -> Message:
    more = {name: value for name, value in message.fields.items() if name != _CALLS}
    return dataclasses.replace(message, more=json.dumps(more) if more else "")


def _holds(text: str, content: str) -> bool:
    """Whether a rendered text holds a content, as it is or as JSON."""
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text

"""Chat templates: conversations as tokens, and which tokens are learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from flm_jax.data.tokenizer import Tokenizer
from flm_jax.sft.chats import Message
from flm_jax.sft.config import TEXT, TemplateConfig

TELE_FLM = TemplateConfig()
GENERIC = TemplateConfig(
    system="### System:\n{text}\n\n",
    user="### User:\n{text}\n\n",
    assistant="### Assistant:\n{text}",
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A text that is encoded separately: no token is partly learned.

    Attributes:
      text: the text.
      markup: part of the template, where names of special tokens are encoded as these tokens.
      learned: its tokens are targets of training.
      ends: the end token follows.
    """

    text: str
    markup: bool = True
    learned: bool = False
    ends: bool = False


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens, and for each whether its prediction is learned."""

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]


def pieces(messages: Sequence[Message], template: TemplateConfig = TELE_FLM) -> Iterator[Piece]:
    """Splits a conversation into pieces.

    The assistant's text and the template's text after it are learned, and nothing else.

    Args:
      messages: the conversation.
      template: how messages are written. A role without a pattern is left out.
    """
    for message in messages:
        pattern = getattr(template, message.role)
        if not pattern:
            continue
        before, _, after = pattern.partition(TEXT)
        learned = message.role == "assistant"
        stripped = template.strip and not learned
        yield Piece(before)
        text = message.content.strip() if stripped else message.content
        yield Piece(text, markup=False, learned=learned)
        yield Piece(after, learned=learned, ends=learned)


def _to_answer(messages: Sequence[Message], template: TemplateConfig) -> Iterator[Piece]:
    """Yields the conversation and the template's text before the assistant's next answer."""
    yield from pieces(messages, template)
    yield Piece(template.assistant.partition(TEXT)[0])


def prompt(messages: Sequence[Message], template: TemplateConfig = TELE_FLM) -> str:
    """Returns the prompt as text, without end tokens; `encode_prompt` includes them.

    >>> prompt([Message("user", "1 + 1?")])
    '<_user>1 + 1?<_bot>'
    """
    return "".join(piece.text for piece in _to_answer(messages, template))


def encode(
    messages: Sequence[Message], tokenizer: Tokenizer, template: TemplateConfig = TELE_FLM
) -> Encoded:
    """Encodes a whole conversation, without the model's start token.

    Args:
      messages: the conversation.
      tokenizer: the model's.
      template: how messages are written.
    """
    return _encode(pieces(messages, template), tokenizer)


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: TemplateConfig = TELE_FLM
) -> tuple[int, ...]:
    """Encodes a prompt exactly as training saw it, without the model's start token.

    Args:
      messages: the conversation so far.
      tokenizer: the model's.
      template: how messages are written.
    """
    return _encode(_to_answer(messages, template), tokenizer).tokens


def _encode(parts: Iterator[Piece], tokenizer: Tokenizer) -> Encoded:
    """Encodes the pieces one by one and joins them."""
    tokens: list[int] = []
    learned: list[bool] = []
    for piece in parts:
        # No piece is the beginning of a text, where a tokenizer may add a space.
        ids = tokenizer.encode(piece.text, special=piece.markup, inside=True) if piece.text else []
        if piece.ends:
            ids = [*ids, tokenizer.eos_id]
        tokens += ids
        learned += [piece.learned] * len(ids)
    return Encoded(tuple(tokens), tuple(learned))

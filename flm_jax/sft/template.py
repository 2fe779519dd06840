"""Chat templates: conversations to tokens, and which of these are learned."""

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
    """Text that is encoded on its own, so that a token never spans a border of learning."""

    text: str
    markup: bool = True  # the template's: names of special tokens are those tokens
    learned: bool = False
    ends: bool = False  # followed by the end token


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens, and of each whether its prediction is learned."""

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]


def pieces(messages: Sequence[Message], template: TemplateConfig = TELE_FLM) -> Iterator[Piece]:
    """A conversation in pieces: what the assistant said, and what follows it, is learned."""
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
    """The conversation up to where the assistant's next answer begins."""
    yield from pieces(messages, template)
    yield Piece(template.assistant.partition(TEXT)[0])


def prompt(messages: Sequence[Message], template: TemplateConfig = TELE_FLM) -> str:
    """The text that an answer follows. End tokens are no text: `encode_prompt` has them."""
    return "".join(piece.text for piece in _to_answer(messages, template))


def encode(
    messages: Sequence[Message], tokenizer: Tokenizer, template: TemplateConfig = TELE_FLM
) -> Encoded:
    """The tokens of a whole conversation, without the model's start token."""
    return _encode(pieces(messages, template), tokenizer)


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: TemplateConfig = TELE_FLM
) -> tuple[int, ...]:
    """The tokens that an answer follows, as in training; without the model's start token."""
    return _encode(_to_answer(messages, template), tokenizer).tokens


def _encode(of: Iterator[Piece], tokenizer: Tokenizer) -> Encoded:
    tokens: list[int] = []
    learned: list[bool] = []
    for piece in of:
        ids = tokenizer.encode(piece.text, special=piece.markup) if piece.text else []
        ids += [tokenizer.eos_id] * piece.ends
        tokens += ids
        learned += [piece.learned] * len(ids)
    return Encoded(tuple(tokens), tuple(learned))

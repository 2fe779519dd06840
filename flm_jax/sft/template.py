"""Chat templates: conversations to tokens, and which of these are learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

from flm_jax.errors import UserError
from flm_jax.sft.chat import Message
from flm_jax.sft.config import TEXT, TemplateConfig

TELE_FLM = TemplateConfig()
GENERIC = TemplateConfig(
    system="### System:\n{text}\n\n",
    user="### User:\n{text}\n\n",
    assistant="### Assistant:\n{text}",
)


class Vocabulary(Protocol):
    """What is needed of a tokenizer; seqio's have it."""

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str) -> Sequence[int]: ...


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text that is encoded on its own, so that a token never spans a border of learning."""

    text: str
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
        if message.role == "assistant":
            yield Piece(before)
            yield Piece(message.content + after, learned=True, ends=True)
        else:
            text = message.content.strip() if template.strip else message.content
            yield Piece(before + text + after)


def _to_answer(messages: Sequence[Message], template: TemplateConfig) -> Iterator[Piece]:
    """The conversation up to where the assistant's next answer begins."""
    yield from pieces(messages, template)
    yield Piece(template.assistant.partition(TEXT)[0])


def prompt(messages: Sequence[Message], template: TemplateConfig = TELE_FLM) -> str:
    """The text that an answer follows. End tokens are no text: `encode_prompt` has them."""
    return "".join(piece.text for piece in _to_answer(messages, template))


def encode(
    messages: Sequence[Message], vocabulary: Vocabulary, template: TemplateConfig = TELE_FLM
) -> Encoded:
    """The tokens of a whole conversation, without the model's start token."""
    return _encode(pieces(messages, template), vocabulary)


def encode_prompt(
    messages: Sequence[Message], vocabulary: Vocabulary, template: TemplateConfig = TELE_FLM
) -> tuple[int, ...]:
    """The tokens that an answer follows, as in training; without the model's start token."""
    return _encode(_to_answer(messages, template), vocabulary).tokens


def _encode(of: Iterator[Piece], vocabulary: Vocabulary) -> Encoded:
    tokens: list[int] = []
    learned: list[bool] = []
    for piece in of:
        ids = [int(token) for token in vocabulary.encode(piece.text)]
        if piece.ends:
            ids.append(end_token(vocabulary))
        tokens += ids
        learned += [piece.learned] * len(ids)
    return Encoded(tuple(tokens), tuple(learned))


def end_token(vocabulary: Vocabulary) -> int:
    """Raises UserError if the vocabulary has none."""
    if vocabulary.eos_id is None:
        raise UserError("the vocabulary has no end-of-sequence token; answers could not end")
    return int(vocabulary.eos_id)

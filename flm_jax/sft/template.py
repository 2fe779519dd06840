"""Chat templates: conversations as tokens, and which tokens are learned."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterator, Sequence
from typing import Any

from flm_jax.data import jinja_text
from flm_jax.data.chat_template import TEXT, TemplateConfig, as_jinja, names_of_tokens
from flm_jax.data.tokenizer import Tokenizer
from flm_jax.errors import UserError
from flm_jax.interop.opening import OpenedModel
from flm_jax.sft.chats import Message, Sample

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
      weight: weight of its tokens as targets of training; 0: they are not learned.
      ends: the end token follows.
    """

    text: str
    markup: bool = True
    weight: float = 0.0
    ends: bool = False


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
      tokens: its tokens.
      weights: for each the weight of its prediction in the loss; 0: not learned.
      begun: the template writes the start token itself, or none; no other is added.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    begun: bool = False

    @property
    def learned(self) -> tuple[bool, ...]:
        """For each token whether its prediction is learned."""
        return tuple(weight > 0 for weight in self.weights)

    def scaled(self, weight: float) -> Encoded:
        """The conversation with all weights multiplied."""
        return dataclasses.replace(self, weights=tuple(weight * w for w in self.weights))

    def cut(self, length: int) -> Encoded:
        """The first `length` tokens."""
        return Encoded(self.tokens[:length], self.weights[:length], self.begun)


def weight_of(message: Message) -> float:
    """The weight of a message in the loss: only answers that say something are learned."""
    return message.weight if message.role == "assistant" and not message.empty else 0.0


def pieces(messages: Sequence[Message], template: TemplateConfig = TELE_FLM) -> Iterator[Piece]:
    """Splits a conversation into pieces, for a template of patterns.

    The assistant's text and the template's text after it are learned, and nothing else.

    Args:
      messages: the conversation.
      template: how messages are written. Without a pattern for them, system messages are left out
        (`unwritten.left_out` counts them).

    Raises:
      UserError: a message uses tools, and the template has no pattern for them.
    """
    for message in messages:
        pattern = getattr(template, message.role)
        if "tool_calls" in message.fields or (message.role == "tool" and not pattern):
            what = "messages of tools" if message.role == "tool" else "calls of tools"
            raise UserError(
                f"it has {what}, which the template cannot write; give a Jinja template "
                "(template.jinja), or leave such conversations out (bad_rows)"
            )
        if not pattern:
            continue
        before, _, after = pattern.partition(TEXT)
        answer = message.role == "assistant"
        text = message.content if answer or not template.strip else message.content.strip()
        weight = weight_of(message)
        yield Piece(before)
        yield Piece(text, markup=False, weight=weight)
        yield Piece(after, weight=weight, ends=answer)


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
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: TemplateConfig = TELE_FLM,
    tools: str = "",
) -> Encoded:
    """Encodes a whole conversation, without the model's start token.

    A Jinja template writes the start token itself, if there is one.

    Args:
      messages: the conversation.
      tokenizer: the model's.
      template: how messages are written.
      tools: definitions of tools, as JSON; "": none.

    Raises:
      UserError: the template cannot write this conversation.
    """
    if not template.jinja:
        # Other text always comes before: the start token is no text, but no space follows it.
        return _encode(pieces(messages, template), tokenizer, inside=True)
    whole = _encode(_jinja_pieces(messages, tokenizer, template, tools), tokenizer, inside=False)
    if not whole.tokens:
        raise UserError("the chat template writes nothing; give another template")
    return Encoded(whole.tokens, _without_space_after_end(whole, tokenizer), begun=True)


def encode_sample(sample: Sample, tokenizer: Tokenizer, template: TemplateConfig) -> Encoded:
    """Encodes a sample as `encode` does, with its own weight; errors name the sample."""
    try:
        encoded = encode(sample.messages, tokenizer, template, sample.tools)
    except UserError as error:
        raise UserError(f"{sample.where or f'sample {sample.id!r}'}: {error}") from error
    return encoded.scaled(sample.weight)


def encode_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: TemplateConfig = TELE_FLM,
    tools: str = "",
) -> tuple[int, ...]:
    """Encodes a prompt exactly as training saw it, without the model's start token.

    With a Jinja template these are all tokens, the start token included; only the date, if it
    writes one, differs from training.

    Args:
      messages: the conversation so far.
      tokenizer: the model's.
      template: how messages are written.
      tools: definitions of tools, as JSON; "": none.

    Raises:
      UserError: the template cannot write this conversation.
    """
    if not template.jinja:
        return _encode(_to_answer(messages, template), tokenizer, inside=True).tokens
    now = datetime.datetime.now()
    text, _ = render(messages, tokenizer, template, tools, prompt=True, now=now)
    try:
        spans = _spans(messages, tokenizer, template, tools, now)
        written, _ = render(messages, tokenizer, template, tools, now=now)
    except UserError:  # nothing can be trained on it, but the model can still answer
        spans, written = [], ""
    parts, start = [], 0
    if text.startswith(written):  # split where training splits
        for span in spans:
            parts += [Piece(text[start : span[0]]), Piece(text[span[0] : span[1]])]
            start = span[1]
    return _encode(iter([*parts, Piece(text[start:])]), tokenizer, inside=False).tokens


def model_prompt(model: OpenedModel, messages: Sequence[Message], tools: str = "") -> list[int]:
    """Returns the tokens that a model reads before its answer, by its own template.

    Args:
      model: its template, tokenizer and rule for the start token apply.
      messages: the conversation so far.
      tools: definitions of tools, as JSON; "": none.

    Raises:
      UserError: the template cannot write this conversation.
    """
    ids = encode_prompt(messages, model.tokenizer, model.template, tools)
    return list(ids) if model.template.jinja else model.with_start(ids)


def prompt_text(model: OpenedModel, messages: Sequence[Message]) -> str:
    """Returns the text of `model_prompt`, with the names of end tokens, without the start token.

    Args:
      model: its template and tokenizer apply.
      messages: the conversation so far.
    """
    names = names_of_tokens(model.tokenizer.name)
    text = as_jinja(model.template, start="", end=names.get("eos_token", ""))
    rows = [_as_given(message) for message in messages]
    return jinja_text.render(text, rows, names, prompt=True, now=datetime.datetime.now())[0]


def stop_ids(tokenizer: Tokenizer, template: TemplateConfig = TELE_FLM) -> tuple[int, ...]:
    """Returns the tokens that end an answer: the tokenizer's, and the one that the template writes.

    Args:
      tokenizer: the model's.
      template: how messages are written.
    """
    if not template.jinja:
        return tokenizer.stop_ids
    encoded = encode([Message("user", "a"), Message("assistant", "b")], tokenizer, template)
    ends = [t for t, yes in zip(encoded.tokens, encoded.learned, strict=True) if yes]
    written = [t for t in ends[-1:] if not tokenizer.pieces[t]]
    return tuple(dict.fromkeys((*tokenizer.stop_ids, *written)))


def without_questions(messages: Sequence[Message], template: TemplateConfig) -> tuple[Message, ...]:
    """The assistant's messages alone; a Jinja template keeps the others, with empty texts.

    (Most of them refuse conversations in which user and assistant do not take turns.)
    """
    if not template.jinja:
        return tuple(m for m in messages if m.role == "assistant")
    return tuple(
        m if m.role == "assistant" else dataclasses.replace(m, content="") for m in messages
    )


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: TemplateConfig,
    tools: str,
    prompt: bool = False,
    now: datetime.datetime = jinja_text.TRAINING_DAY,
) -> tuple[str, list[tuple[int, int]]]:
    """Writes a conversation by a Jinja template; see `jinja_text.render`.

    Args:
      messages: the conversation.
      tokenizer: gives the names of special tokens.
      template: how messages are written.
      tools: definitions of tools, as JSON; "": none.
      prompt: also write what precedes the assistant's next answer.
      now: the time that the template may write.
    """
    rows = [_as_given(message) for message in messages]
    definitions = json.loads(tools) if tools else ()
    variables = names_of_tokens(tokenizer.name)
    return jinja_text.render(template.jinja, rows, variables, definitions, prompt, now)


def _as_given(message: Message) -> dict[str, Any]:
    """The message as transformers gives it to a template.

    A null is absent, and reasoning has both names that templates read.
    """
    values = {"role": message.role, "content": message.content, **message.fields}
    if reasoning := message.reasoning:
        values = {"thinking": reasoning, **values, "reasoning_content": reasoning}
    return {name: value for name, value in values.items() if value is not None}


def _jinja_pieces(
    messages: Sequence[Message], tokenizer: Tokenizer, template: TemplateConfig, tools: str
) -> Iterator[Piece]:
    """Splits a rendered conversation at the assistant's answers."""
    text, _ = render(messages, tokenizer, template, tools)
    answers = [m for m in messages if m.role == "assistant"]
    start = 0
    spans = _spans(messages, tokenizer, template, tools)
    for message, span in zip(answers, spans, strict=True):
        yield Piece(text[start : span[0]])
        yield Piece(text[span[0] : span[1]], weight=weight_of(message))
        start = span[1]
    yield Piece(text[start:])


def _spans(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: TemplateConfig,
    tools: str,
    now: datetime.datetime = jinja_text.TRAINING_DAY,
) -> list[tuple[int, int]]:
    """Finds the assistant's answers in a rendered conversation.

    They are what `{% generation %}` marks, as in transformers. In a template without such marks, an
    answer is what the conversation up to it has more than the prompt before it.

    Returns:
      Start and end in characters, one pair for each message of the assistant.

    Raises:
      UserError: the answers cannot be found, because a message changes how others are written.
    """
    text, marked = render(messages, tokenizer, template, tools, now=now)
    answers = [n for n, m in enumerate(messages) if m.role == "assistant"]
    if marked:
        if len(marked) != len(answers):
            raise UserError(
                f"the chat template marks {len(marked)} answers by {{% generation %}}, but the "
                f"conversation has {len(answers)}; mark each answer once, or give another template"
            )
        return marked
    spans = []
    for n in answers:
        before, _ = render(messages[:n], tokenizer, template, tools, prompt=True, now=now)
        upto, _ = render(messages[: n + 1], tokenizer, template, tools, now=now)
        if not (upto.startswith(before) and text.startswith(upto)):
            raise UserError(
                f"the chat template writes the text before message {n} in another way once that "
                "message or a later one follows, so the answer cannot be found; mark answers by "
                "{% generation %} in the template, or give another template"
            )
        spans.append((len(before), len(upto)))
    return spans


def _without_space_after_end(encoded: Encoded, tokenizer: Tokenizer) -> tuple[float, ...]:
    """The weights without white space that follows an answer's end token: nothing generates it."""
    weights = list(encoded.weights)
    ended = False
    for n, token in enumerate(encoded.tokens):
        piece = tokenizer.pieces[token]
        if not piece:
            ended = weights[n] > 0
        elif ended and not piece.strip():
            weights[n] = 0.0
        else:
            ended = False
    return tuple(weights)


def _encode(parts: Iterator[Piece], tokenizer: Tokenizer, inside: bool) -> Encoded:
    """Encodes the pieces one by one and joins them.

    Args:
      parts: the pieces.
      tokenizer: the model's.
      inside: other text comes before the first piece, so that the tokenizer adds no space to it.
    """
    tokens: list[int] = []
    weights: list[float] = []
    for piece in parts:
        ids = []
        if piece.text:
            ids = tokenizer.encode(piece.text, special=piece.markup, inside=inside or bool(tokens))
        if piece.ends:
            ids = [*ids, tokenizer.eos_id]
        tokens += ids
        weights += [piece.weight] * len(ids)
    return Encoded(tuple(tokens), tuple(weights))

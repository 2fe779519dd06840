"""Conversations in files: read, split by hash, and counted.

`formats.py` lists the forms of rows. Rows may have `category`, `id`, `weight`, `tools`, and `check`
({"kind", "expected"}, see `Check`). `write_jsonl` writes such files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flm_jax.errors import UserError
from flm_jax.sft import chat_files, formats
from flm_jax.sft.config import USUAL_FIELDS, FieldsConfig
from flm_jax.store.files import write_atomically

_ADVICE = "fix or remove the line, or set bad_rows"


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str  # one of formats.ROLES
    content: str
    weight: float = 1.0  # of an assistant message, in the loss
    more: str = ""  # fields that only a Jinja template writes, as calls of tools; a JSON object

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The fields of `more`."""
        fields: dict[str, Any] = json.loads(self.more) if self.more else {}
        return fields

    @property
    def reasoning(self) -> str:
        """The text before the answer, in a field of its own; "" if there is none."""
        texts = (self.fields.get(name) for name in formats.REASONING)
        return next((text for text in texts if isinstance(text, str)), "")

    @property
    def empty(self) -> bool:
        """Whether it says nothing, not even white space, and calls no tool."""
        return not (self.content or "tool_calls" in self.fields)


@dataclasses.dataclass(frozen=True)
class Check:
    """A rule that decides whether an answer is right; `scoring.py` applies it.

    Attributes:
      kind: "exact": the answer equals `expected`, except for white space around it. "number": the
        last numbers of both are equal. "doctest": `expected` is the source of a module whose last
        function has a docstring and no body; with the answer as that body, the docstring's
        examples pass.
      expected: see `kind`.
    """

    kind: str
    expected: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation; training learns the assistant's messages."""

    messages: tuple[Message, ...]
    category: str = ""
    id: str = ""
    check: Check | None = None  # of the last assistant message
    weight: float = 1.0  # of all its messages, in the loss
    tools: str = ""  # definitions of tools; a JSON list
    where: str = dataclasses.field(default="", compare=False)  # file and line, for errors

    @property
    def answers(self) -> tuple[Message, ...]:
        """The assistant's messages."""
        return tuple(m for m in self.messages if m.role == "assistant")


class BadRows:
    """Leaves out and counts rows that cannot be used, up to a limit.

    Attributes:
      reasons: why each was left out, with file and line.
    """

    def __init__(self, most: int = 0) -> None:
        """Args: `most` is the number of rows that may be left out."""
        self.most = most
        self.reasons: list[str] = []

    def add(self, reason: str) -> None:
        """Counts one row. Raises UserError with the reason if that is one too many."""
        self.reasons.append(reason)
        if len(self.reasons) > self.most:
            more = f"; it is bad row {len(self.reasons)}, and bad_rows is {self.most}"
            raise UserError(reason + more * (self.most > 0))

    def __str__(self) -> str:
        if not self.reasons:
            return ""
        return f"{len(self.reasons)} bad rows left out; the first: {self.reasons[0]}"


def to_row(sample: Sample) -> dict[str, Any]:
    """Converts a sample to one row of JSONL, without its empty fields.

    >>> to_row(Sample((Message("user", "1 + 1?"),), category="sums"))
    {'messages': [{'role': 'user', 'content': '1 + 1?'}], 'category': 'sums'}
    """
    values: dict[str, Any] = {"messages": [_message_row(message) for message in sample.messages]}
    values |= {"category": sample.category, "id": sample.id}
    values["check"] = sample.check and dataclasses.asdict(sample.check)
    values["tools"] = json.loads(sample.tools) if sample.tools else []
    values = {name: value for name, value in values.items() if value}
    return values if sample.weight == 1 else values | {"weight": sample.weight}


def _message_row(message: Message) -> dict[str, Any]:
    weight = {} if message.weight == 1 else {"weight": message.weight}
    return {"role": message.role, "content": message.content, **weight, **message.fields}


def write_jsonl(path: pathlib.Path, samples: Iterable[Sample]) -> None:
    """Writes samples as JSONL, UTF-8, atomically."""
    lines = (json.dumps(to_row(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(path, "".join(lines))


def read(
    paths: Sequence[str], fields: FieldsConfig = USUAL_FIELDS, bad: BadRows | None = None
) -> list[Sample]:
    """Reads conversations.

    Args:
      paths: files (see `chat_files.rows`), and folders of such files.
      fields: names of the rows' fields.
      bad: counts the malformed rows; None: the first one is refused.

    Returns:
      The samples of all files, in order.

    Raises:
      UserError: a path has no such file, or too many rows are malformed; the error names file and
        line.
    """
    bad = bad or BadRows()
    samples = []
    for path in (file for given in paths for file in chat_files.files(given)):
        for number, row in chat_files.rows(path):
            where = f"{path}, line {number}"
            try:
                samples.append(sample(row(), fields, where))
            except ValueError as error:  # JSON's and UTF-8's errors are ValueErrors
                bad.add(f"{where}: {error}; {_ADVICE}")
    return samples


def sample(row: Any, fields: FieldsConfig = USUAL_FIELDS, where: str = "") -> Sample:
    """Converts one parsed row to a sample.

    Args:
      row: a JSON value, in one of the forms of `formats.py`.
      fields: names of the row's fields.
      where: file and line of the row, for later errors.

    Raises:
      ValueError: the row is malformed.
    """
    own = formats.own_form(row, fields)
    check = own.get("check")
    return Sample(
        tuple(_message(values) for values in own["messages"]),
        own.get("category", ""),
        own.get("id", ""),
        Check(**check) if check else None,
        own.get("weight", 1.0),
        json.dumps(own["tools"], ensure_ascii=False) if "tools" in own else "",
        where,
    )


def _message(values: Mapping[str, Any]) -> Message:
    known = ("role", "content", "weight")
    more = {name: value for name, value in values.items() if name not in known}
    text = json.dumps(more, ensure_ascii=False) if more else ""
    return Message(values["role"], values["content"], values.get("weight", 1.0), text)


def content_hash(sample: Sample) -> str:
    """SHA-256, hex, of what is said; id, category and weights do not change it."""
    said: list[Any] = [
        (m.role, m.content, m.more) if m.more else (m.role, m.content) for m in sample.messages
    ]
    said += [sample.tools] if sample.tools else []
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256, hex, of what is said in all samples, in order, and of weights other than 1."""
    texts = []
    for s in samples:
        weights = [s.weight, *(m.weight for m in s.messages)]
        texts.append(content_hash(s) + f"{weights}" * any(w != 1 for w in weights))
    return hashlib.sha256(" ".join(texts).encode()).hexdigest()


def split(samples: Sequence[Sample], held_out: float) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into training and held out, by the hash of the messages: copies stay together.

    If no hash falls into the held-out share, the sample with the lowest hash is held out.

    Args:
      samples: conversations.
      held_out: share to hold out, between 0 and 1.

    Returns:
      The samples for training, and the held-out samples; each in the given order.
    """
    hashes = [content_hash(s) for s in samples]
    bound = max(f"{int(held_out * 16**8):08x}", min((h[:8] + "g" for h in hashes), default=""))
    kept = [s for s, h in zip(samples, hashes, strict=True) if h >= bound]
    return kept, [s for s, h in zip(samples, hashes, strict=True) if h < bound]

"""Conversations in JSONL files: read, split by hash, and counted.

A row is an object with `messages`, a list of {"role", "content"}; or with `instruction` and
`response`, optionally also `input` (appended to the instruction) and `system`. Both kinds may have
`category`, `id`, and `check` ({"kind", "expected"}, see `Check`). `write_jsonl` writes such files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.store.files import write_atomically

ROLES = ("system", "user", "assistant")
_ADVICE = "fix or remove the line"


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str  # one of ROLES
    content: str


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


def to_row(sample: Sample) -> dict[str, Any]:
    """Converts a sample to one row of JSONL, without its empty fields.

    >>> to_row(Sample((Message("user", "1 + 1?"),), category="sums"))
    {'messages': [{'role': 'user', 'content': '1 + 1?'}], 'category': 'sums'}
    """
    values = dataclasses.asdict(sample)
    values["messages"] = list(values["messages"])
    return {name: value for name, value in values.items() if value}


def write_jsonl(path: pathlib.Path, samples: Iterable[Sample]) -> None:
    """Writes samples as JSONL, UTF-8, atomically."""
    lines = (json.dumps(to_row(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(path, "".join(lines))


def read(paths: Sequence[str]) -> list[Sample]:
    """Reads conversations.

    Args:
      paths: JSONL files, and folders whose .jsonl files are read.

    Returns:
      The samples of all files, in order.

    Raises:
      UserError: a path has no such file, or a row is malformed; the error names file and line.
    """
    samples = []
    for path in (file for given in paths for file in _files(given)):
        for number, row in json_text.rows(path, _ADVICE):
            try:
                samples.append(sample(row))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}; {_ADVICE}") from error
    return samples


def _files(given: str) -> list[pathlib.Path]:
    """The file itself, or the sorted .jsonl files of a folder."""
    path = pathlib.Path(given).expanduser()
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.jsonl"))
    if not found:
        raise UserError(
            f"{given} is neither a file nor a folder with .jsonl files; give conversations"
        )
    return found


def sample(row: Any) -> Sample:
    """Converts one parsed JSONL row to a sample. Raises ValueError if it is malformed."""
    if not isinstance(row, Mapping):
        raise ValueError("it is not a JSON object")
    if "messages" in row:
        rows = row["messages"]
        if not isinstance(rows, list) or not all(isinstance(m, Mapping) for m in rows):
            raise ValueError("messages must be a list of objects with role and content")
        messages = tuple(Message(_text(m, "role"), _text(m, "content")) for m in rows)
        for message in messages:
            if message.role not in ROLES:
                raise ValueError(f"role is {message.role!r}; it must be one of {', '.join(ROLES)}")
    elif "instruction" in row and "response" in row:
        question = [_text(row, name) for name in ("instruction", "input") if row.get(name)]
        system = [Message("system", _text(row, "system"))] if row.get("system") else []
        answer = Message("assistant", _text(row, "response"))
        messages = (*system, Message("user", "\n".join(question)), answer)
    else:
        raise ValueError("it has neither messages, nor instruction and response")
    check = row.get("check")
    if check is not None and not isinstance(check, Mapping):
        raise ValueError("check must be an object with kind and expected")
    return Sample(
        messages,
        _text(row, "category", ""),
        _text(row, "id", ""),
        Check(_text(check, "kind"), _text(check, "expected")) if check else None,
    )


def _text(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A field that must be text. Raises ValueError if it is not."""
    value = row.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be text")
    return value


def content_hash(sample: Sample) -> str:
    """SHA-256, hex, of the messages alone; id and category do not change it."""
    return hashlib.sha256(json.dumps(dataclasses.astuple(sample)[0]).encode()).hexdigest()


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256, hex, of the messages of all samples, in order."""
    return hashlib.sha256(" ".join(content_hash(s) for s in samples).encode()).hexdigest()


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

"""Conversations in JSONL files: read, split by hash, and counted.

A row is an object with `messages`, a list of {"role", "content"}; or with `instruction` and
`response`, and perhaps `input` (appended to the instruction) and `system`. Both may have
`category`, `id`, and `check` ({"kind", "expected"}, see `Check`). `write_jsonl` writes such
files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flm_jax.errors import UserError
from flm_jax.store.files import write_atomically

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Message:
    role: str  # one of ROLES
    content: str


@dataclasses.dataclass(frozen=True)
class Check:
    """How a program decides whether an answer is right (`scoring.py`).

    kind: "exact" (the answer is `expected`), "number" (the last number in it is), or "doctest"
    (the answer, appended to `expected`, a module's source whose last function has a docstring and
    no body, makes that docstring's examples pass).
    """

    kind: str
    expected: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation: messages in turns, the assistant's being what is learned."""

    messages: tuple[Message, ...]
    category: str = ""
    id: str = ""
    check: Check | None = None  # of the last assistant message


def to_row(sample: Sample) -> dict[str, Any]:
    """The sample as one row of JSONL; fields that are empty are left out."""
    values = dataclasses.asdict(sample)
    values["messages"] = list(values["messages"])
    return {name: value for name, value in values.items() if value}


def write_jsonl(path: pathlib.Path, samples: Iterable[Sample]) -> None:
    """One row a line, UTF-8; the whole file or nothing."""
    lines = (json.dumps(to_row(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_atomically(path, "".join(lines))


def read(paths: Sequence[str]) -> list[Sample]:
    """All rows of the files, and of the .jsonl files of folders, in order.

    Raises:
      UserError: nothing is there, or a row is malformed; with file and line.
    """
    samples = []
    for path in (file for given in paths for file in _files(given)):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        samples.append(sample(json.loads(line)))
                    except ValueError as error:  # of JSON and of UTF-8 too
                        raise UserError(
                            f"{path}, line {number}: {error}; fix or remove the line"
                        ) from error
    return samples


def _files(given: str) -> list[pathlib.Path]:
    path = pathlib.Path(given).expanduser()
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.jsonl"))
    if not found:
        raise UserError(f"{given} is no file, nor a folder with .jsonl files; give conversations")
    return found


def sample(row: Any) -> Sample:
    """A row as a sample. Raises ValueError, saying what is wrong."""
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
        asked = [_text(row, name) for name in ("instruction", "input") if row.get(name)]
        system = [Message("system", _text(row, "system"))] if row.get("system") else []
        answer = Message("assistant", _text(row, "response"))
        messages = (*system, Message("user", "\n".join(asked)), answer)
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
    value = row.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be text")
    return value


def content_hash(sample: Sample) -> str:
    """SHA-256 of the messages alone: equal for a sample under another id or category."""
    return hashlib.sha256(json.dumps(dataclasses.astuple(sample)[0]).encode()).hexdigest()


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 of all samples, in order."""
    return hashlib.sha256(" ".join(content_hash(s) for s in samples).encode()).hexdigest()


def split(samples: Sequence[Sample], held_out: float) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into training and held out, by the hash of the messages: copies stay together.

    Where no hash falls into the held-out share, the lowest one is held out.
    """
    hashes = [content_hash(s) for s in samples]
    bound = max(f"{int(held_out * 16**8):08x}", min((h[:8] + "g" for h in hashes), default=""))
    kept = [s for s, h in zip(samples, hashes, strict=True) if h >= bound]
    return kept, [s for s, h in zip(samples, hashes, strict=True) if h < bound]

"""Chat samples: conversations with a category, and how a program can check their answer."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from flm_jax.lineage import write_atomically

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

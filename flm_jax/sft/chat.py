"""Chat samples: conversations with a category, and how a program can check their answer."""

from __future__ import annotations

import dataclasses

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Message:
    role: str  # one of ROLES
    content: str


@dataclasses.dataclass(frozen=True)
class Check:
    """How a program decides whether an answer is right (`scoring.py`).

    kind: "exact" (the answer is `expected`), "number" (the last number in it is), or "doctest"
    (a function is completed so that the doctests in `expected`, a module's source with the answer
    left out, pass).
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

"""Rows of conversations in the forms that public data has, converted to this library's own form.

| form | fields of a row |
| --- | --- |
| messages | `messages` or `conversations`: objects with `role`, `content` or `from`, `value` |
| instruction | `instruction`, `input`, and `output` or `response`; also `system` and `history` |
| prompt | `prompt` and `completion`, both text or both lists of messages |

Other names are given by a `FieldsConfig`. A field that is null counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flm_jax.data import json_text
from flm_jax.sft.config import USUAL_FIELDS, FieldsConfig

Row = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# Names of roles in public data; upper case is ignored.
_ROLES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "ai": "assistant",
    "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles whose content is a call, as JSON
# The usual names of each field of `FieldsConfig`.
_USUAL: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "role": ("role", "from"),
    "content": ("content", "value"),
    "question": ("instruction", "prompt", "question", "query"),
    "input": ("input", "context"),
    "answer": ("response", "output", "completion", "answer"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "category": ("category",),
    "id": ("id",),
    "weight": ("weight",),
    "tools": ("tools",),
}
# Fields that say, besides `weight`, whether an answer is learned.
_LEARNED = ("loss", "loss_mask", "train", "training", "trainable")
# Fields of a message that would change what is learned in a way that is not supported.
_UNCLEAR = {
    "train_detail": "only whole messages can be weighted",
    "training_detail": "only whole messages can be weighted",
    "mask": "it does not say whether the message is learned; write weight: 0 or weight: 1",
}
# A weight is 0 or within these bounds, so that products and sums of weights fit float32.
_SMALLEST, _LARGEST = 1e-6, 1e6
# Fields of preference data without pairs (KTO): false marks an answer that is not wanted.
_REJECTED = ("label", "kto_tag")
_SHOWN = 80  # characters of a value in an error
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# Fields of a message that a chat template may write, besides role and content.
REASONING = ("reasoning_content", "thinking", "reasoning")
_MORE = ("tool_calls", "tool_call_id", "name", *REASONING)


def own_form(row: Any, fields: FieldsConfig = USUAL_FIELDS) -> dict[str, Any]:
    """Converts a row to the form with `messages` that `chats.write_jsonl` writes.

    Args:
      row: a parsed JSON value.
      fields: names of the row's fields; an empty name stands for the usual ones.

    Returns:
      `messages`, a list of objects with role (one of ROLES), content (text), weight, and fields for
      chat templates; and, where the row has them: category and id (text), weight, tools, check.

    Raises:
      ValueError: the row has none of the forms, or a field has a wrong type.

    >>> row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    >>> [(m["role"], m["content"]) for m in own_form(row)["messages"]]
    [('user', 'hi'), ('assistant', 'yo')]
    """
    if not isinstance(row, Mapping):
        raise ValueError("it is not a JSON object")
    row = _present(row)
    _refuse_media(row)
    for name in _REJECTED:
        if row.get(name) is False:
            raise ValueError(
                f"{name} is false, as in preference data, where such an answer is not wanted; "
                "remove the field if it means something else"
            )
    own: dict[str, Any] = {"messages": _messages_of(row, fields)}
    for name in ("category", "id"):
        if (value := _find(row, name, fields)) is not None:
            own[name] = _label(name, value)
    if (weight := _product(row, (_name(row, "weight", fields), "train"))) is not None:
        own["weight"] = weight
    if tools := _tools(_find(row, "tools", fields)):
        own["tools"] = tools
    if (check := row.get("check")) is not None:
        if not isinstance(check, Mapping):
            raise ValueError("check must be an object with kind and expected")
        own["check"] = {name: _text(check, name) for name in ("kind", "expected")}
    return own


def _messages_of(row: Row, fields: FieldsConfig) -> list[dict[str, Any]]:
    """The conversation of a row in any of the forms."""
    system = _find(row, "system", fields)
    turns = _find(row, "messages", fields)
    if turns is not None:
        messages = _messages(turns, _name(row, "messages", fields), fields)
    else:
        messages = _question_and_answer(row, fields)
    if system in (None, ""):
        return messages
    text = _content("system", system)
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != text:
            raise ValueError("it has a system message and another text in its field system")
        return messages
    return [{"role": "system", "content": text}, *messages]


def _question_and_answer(row: Row, fields: FieldsConfig) -> list[dict[str, Any]]:
    """The conversation of a row with a question and an answer."""
    question, extra = _find(row, "question", fields), _find(row, "input", fields)
    answer = _find(row, "answer", fields)
    if answer is None or (question is None and extra is None):
        raise ValueError(_what_is_missing(row, fields, answered=answer is not None))
    if isinstance(question, list):
        # As in TRL, only the completion is learned.
        before = [
            {"weight": 0.0, **message} if message["role"] == "assistant" else message
            for message in _messages(question, _name(row, "question", fields), fields)
        ]
    else:
        texts = [
            _content(_name(row, name, fields), value)
            for name, value in (("question", question), ("input", extra))
            if value not in (None, "")
        ]
        before = [{"role": "user", "content": "\n".join(texts)}]
    name = _name(row, "answer", fields)
    if isinstance(answer, list) and any(_is_message(part, fields) for part in answer):
        after = _messages(answer, name, fields)
    else:
        after = [{"role": "assistant", "content": _content(name, answer)}]
    return [*_history(_find(row, "history", fields)), *before, *after]


def _what_is_missing(row: Row, fields: FieldsConfig, answered: bool) -> str:
    for name in ("messages", "question", "input", "answer"):
        given = getattr(fields, name)
        if given and given not in row:
            return f"it has no {given!r}, which fields.{name} names"
    names = [name for key in ("question", "input") for name in _USUAL[key] if name in row]
    if names and not answered:
        return f"it has {names[0]}, but no answer ({', '.join(_USUAL['answer'])})"
    have = _short(", ".join(row))[1:-1] if row else "none"
    return (
        "it has neither messages, nor instruction and response (nor other names for these); its "
        f"fields are {have}"
    )


def _is_message(part: Any, fields: FieldsConfig) -> bool:
    return isinstance(part, Mapping) and _find(part, "role", fields) is not None


def _history(pairs: Any) -> list[dict[str, Any]]:
    """Earlier turns: pairs of a question and its answer."""
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise ValueError("history must be a list of pairs of a question and its answer")
    return [
        {"role": role, "content": _content(f"history[{n}]", text)}
        for n, pair in enumerate(pairs)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _messages(turns: Any, name: str, fields: FieldsConfig) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"{name} must be a list of objects with role and content")
    messages = []
    for n, turn in enumerate(turns):
        try:
            messages.append(_message(_present(turn), fields))
        except ValueError as error:
            raise ValueError(f"{name}[{n}]: {error}") from None
    return messages


def _message(turn: Row, fields: FieldsConfig) -> dict[str, Any]:
    _refuse_media(turn)
    name = _find(turn, "role", fields)
    renamed = dict(text.split("=", 1) for text in fields.roles)
    role = renamed.get(name) or _ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(
            f"role is {_short(name)}; it must be one of {', '.join(ROLES)}, or be named in "
            "fields.roles"
        )
    message: dict[str, Any] = {"role": role}
    more = {key: turn[key] for key in _MORE if turn.get(key) not in (None, [], "")}
    content = _find(turn, "content", fields)
    if isinstance(name, str) and name.lower() in _CALLS:
        more["tool_calls"], content = [_call(content)], ""
    elif isinstance(call := turn.get("function_call"), Mapping):
        more["tool_calls"] = [{"type": "function", "function": dict(call)}]
    if content is None and "tool_calls" in more:
        content, more["content"] = "", None  # not the same as an empty text
    message["content"] = _content("content", content)
    weight = _message_weight(turn, fields)
    if weight is not None and role == "assistant":
        message["weight"] = weight
    elif weight:
        raise ValueError(f"weight is {weight:g} in a message of role {role}; only assistants learn")
    return message | more


def _message_weight(turn: Row, fields: FieldsConfig) -> float | None:
    """The product of a message's weights; None if it has none."""
    for name, problem in _UNCLEAR.items():
        if name in turn:
            raise ValueError(f"{name} is given; {problem}")
    weight = _product(turn, (fields.weight or "weight", *_LEARNED))
    masked = turn.get("masked")
    if masked is None:
        return weight
    if not isinstance(masked, bool):
        raise ValueError(f"masked is {_short(masked)}; it must be true or false")
    return 0.0 if masked else weight


def _product(row: Row, names: Sequence[str]) -> float | None:
    """The product of the weights in a row's fields; None if it has none of the fields."""
    weights = [_weight(name, row[name]) for name in dict.fromkeys(names) if name in row]
    return math.prod(weights) if weights else None


def _weight(name: str, value: Any) -> float:
    """A weight in the loss: a number, or a truth value."""
    if not isinstance(value, int | float) or not (value == 0 or _SMALLEST <= value <= _LARGEST):
        raise ValueError(
            f"{name} is {_short(value)}; it must be 0, or a number from {_SMALLEST:g} to "
            f"{_LARGEST:g}"
        )
    return float(value)


def _call(content: Any) -> dict[str, Any]:
    """A tool call that is written as the text of a message."""
    try:
        call = json_text.parse(content) if isinstance(content, str) else content
    except ValueError:
        call = None
    if not isinstance(call, Mapping):
        raise ValueError(f"a call of a function is {_short(content)}; it must be a JSON object")
    return {"type": "function", "function": dict(call)}


def _tools(value: Any) -> list[Any]:
    """Definitions of tools: a list, or a list as JSON."""
    try:
        tools = json_text.parse(value) if isinstance(value, str) and value.strip() else value
    except ValueError as error:
        raise ValueError(f"tools is not JSON: {error}") from None
    if not tools:
        return []
    if not isinstance(tools, list):
        raise ValueError(f"tools is {_short(tools)}; it must be a list")
    return tools


def _content(name: str, value: Any) -> str:
    """A message's text: text, or a list of parts, all of them text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_short(value)}; it must be text")
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise ValueError(f"{name} has a part of type {_short(kind)} that is no text; remove it")
        texts.append(text)
    return "".join(texts)


def _label(name: str, value: Any) -> str:
    """An id or a category; pandas writes integers as 17.0 in a column with gaps."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{name} is {_short(value)}; it must be text or an integer")
    return str(value)


def _find(row: Row, name: str, fields: FieldsConfig) -> Any:
    """The value of a field; None if the row has none."""
    return row.get(_name(row, name, fields))


def _name(row: Row, name: str, fields: FieldsConfig) -> str:
    """The name of a field in this row. Raises ValueError if several are possible."""
    given = getattr(fields, name, "")
    names = [given] if given else [usual for usual in _USUAL[name] if usual in row]
    if len(names) > 1:
        raise ValueError(f"it has both {' and '.join(names)}; name one of them in fields.{name}")
    return names[0] if names else _USUAL[name][0]


def _short(value: Any) -> str:
    """A value as errors show it: on one line, and cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_short(value)}; it must be text")
    return value


def _present(row: Row) -> dict[str, Any]:
    """The row without nulls, and without NaN, which pandas writes for a missing value."""
    return {k: v for k, v in row.items() if v is not None and v == v}


def _refuse_media(row: Row) -> None:
    for name in _MEDIA:
        if row.get(name):
            raise ValueError(f"it has {name}; only text can be learned")

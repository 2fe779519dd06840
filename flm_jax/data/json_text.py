"""JSON that comes from users, and JSON that goes to them.

Reading turns every fault of a text into one ValueError. Writing gives JSON that every reader takes.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from flm_jax.errors import UserError
from flm_jax.runtime import regular

_BOM = b"\xef\xbb\xbf"
# Deeper values would be read or not depending on how deep the calls are that read them.
_DEEPEST = 200
_STRICT_DEPTH = 120
_LONGEST_ROW = 256 << 20  # bytes
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(text: str | bytes, strict: bool = False) -> Any:
    """Parses one JSON value.

    Args:
      text: the value; bytes are UTF-8, with or without a byte order mark.
      strict: refuse what only some readers of JSON accept: a byte order mark, a key that an object
        has twice, NaN and infinity, and more than `_STRICT_DEPTH` levels.

    Raises:
      ValueError: it is not JSON, not UTF-8, nested too deeply, or holds half of a surrogate pair,
        which no encoding can write (a text that was cut at a UTF-16 unit).

    >>> parse('{"a": ["one", 2]}')
    {'a': ['one', 2]}
    """
    data = check_text(text).encode("utf-8") if isinstance(text, str) else text
    deepest = _STRICT_DEPTH if strict else _DEEPEST
    try:
        if strict:
            value = _STRICT.decode(data.decode("utf-8"))
        else:
            value = json.loads(data.removeprefix(_BOM).decode("utf-8"))
        if _SURROGATE.search(data):
            check_text(json.dumps(value, ensure_ascii=False))
        if data.count(b"[") + data.count(b"{") > deepest and _too_deep(value, deepest):
            raise RecursionError
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        # The library's message has a line number of its own, beside that of the file.
        where = f"at character {error.pos + 1}" if error.doc[error.pos :].strip() else "at its end"
        raise ValueError(f"{error.msg.removesuffix(' at')}, {where}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has a key twice")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _too_deep(value: Any, deepest: int) -> bool:
    """Whether lists and objects are nested in each other more than `deepest` times."""
    level = [value]
    for _ in range(deepest + 1):
        nested = [v for v in level if isinstance(v, dict | list)]
        if not nested:
            return False
        level = [x for v in nested for x in (v.values() if isinstance(v, dict) else v)]
    return True


def check_text(text: str) -> str:
    """Returns the text. Raises ValueError if it holds half of a surrogate pair.

    >>> check_text("cut \\ud83d")
    Traceback (most recent call last):
        ...
    ValueError: it holds half of a surrogate pair, U+D83D, which is no character
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise ValueError(
            f"it holds half of a surrogate pair, U+{half:04X}, which is no character"
        ) from None
    return text


def read_object(path: pathlib.Path, advice: str = "fetch it again") -> dict[str, Any]:
    """Reads a file with one JSON object.

    Args:
      path: the file.
      advice: what to do about a file that has none, for the error.

    Raises:
      UserError: the file cannot be read, or has something else in it; names the file.
    """
    try:
        value = parse(regular.read(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: no JSON object; {advice}")
    return value


def rows(path: pathlib.Path, advice: str) -> Iterator[tuple[int, Any]]:
    """Reads a JSONL file: one value per line. Only a line feed ends a line.

    Args:
      path: the file; a byte order mark and empty lines are skipped.
      advice: what to do about a line that cannot be read, for the error.

    Returns:
      Line numbers, from 1, and values.

    Raises:
      UserError: a line is not JSON; the error names file and line.
    """
    with regular.opened(path) as file:
        yield from rows_of(file, path, advice)


def rows_of(file: BinaryIO, path: pathlib.Path, advice: str) -> Iterator[tuple[int, Any]]:
    """Does the same as `rows` for an open file, which may be compressed."""
    for number, line in lines(file):
        try:
            value = parse(line)
        except ValueError as error:
            if line.startswith(b"["):
                raise UserError(
                    f"{path}, line {number}: a JSON array over several lines begins here, and one "
                    f"object per line (JSONL) is read; {advice}"
                ) from error
            raise UserError(f"{path}, line {number}: {error}; {advice}") from error
        yield number, value


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Reads the lines that are not empty, with their numbers from 1, without white space around.

    Raises UserError for a line that is too long to be a row.
    """
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_ROW + 1), b""), start=1):
        if len(line) > _LONGEST_ROW:
            raise UserError(
                f"line {number} has more than {_LONGEST_ROW:,} bytes, the most of a row; give rows "
                "of JSON, one per line"
            )
        text = (line.removeprefix(_BOM) if number == 1 else line).strip()
        if text:
            yield number, text


def dump(value: Any, indent: int | None = None) -> str:
    """Writes a value as JSON; a number that JSON does not have (NaN, infinity) becomes null.

    >>> dump({"loss": float("nan"), "steps": (1, 2)})
    '{"loss": null, "steps": [1, 2]}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return value

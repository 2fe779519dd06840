"""Files of conversations: JSONL, or one JSON array; also compressed with gzip."""

from __future__ import annotations

import contextlib
import functools
import gzip
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.runtime import paths, regular

_ENDINGS = ("*.jsonl", "*.jsonl.gz"), ("*.json", "*.json.gz")
# The first bytes of files that are often given, and that hold no lines of JSON.
_OTHER_KINDS = {
    b"PAR1": "a Parquet file",
    b"ARROW": "an Arrow file",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"BZh": "compressed with bzip2",
    b"\xfd7zX": "compressed with xz",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_SPACE = re.compile(r"[ \t\r\n]*")


def files(given: str) -> list[pathlib.Path]:
    """Returns the file itself, or a folder's .jsonl files, or else its .json files, sorted.

    Files of a folder may also end with .gz.

    Raises:
      UserError: there is no such file.
    """
    path = paths.of(given)
    paths.check_bucket(path)
    if path.exists() and not path.is_dir():
        return [path]
    inside = sorted(paths.files(path)) if path.is_dir() else []
    for endings in _ENDINGS:
        if found := [file for file in inside if any(map(file.match, endings))]:
            return found
    raise UserError(f"{given} is neither a file nor a folder with .jsonl files; give conversations")


def rows(path: pathlib.Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Reads a file: one JSON value per line, or one array of values.

    Only a line feed ends a line. A byte order mark and empty lines are skipped.

    Args:
      path: a file; what begins as gzip does is decompressed.

    Returns:
      The line on which each row begins, from 1, and a function that parses the row. The function
      raises ValueError if the row is malformed.

    Raises:
      UserError: the file is damaged, or the array is not JSON; the error names file and line.
    """
    try:
        with _opened(path) as file:
            lines = json_text.lines(file)
            first = next(lines, None)
            if first is not None and first[1].startswith(b"["):
                file.seek(0)
                yield from _elements(path, regular.whole(file, path, regular.DATA_BYTES))
            elif first is not None:
                for number, line in itertools.chain([first], lines):
                    yield number, functools.partial(_parse_line, line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {error}; fetch the file again, or remove it") from error


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[BinaryIO]:
    with regular.opened(path) as file:
        start = file.read(5)
    for signature, kind in _OTHER_KINDS.items():
        if start.startswith(signature):
            raise UserError(f"{path} is {kind}; convert it to JSONL in UTF-8")
    compressed = start.startswith(b"\x1f\x8b")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(regular.opened(path))
        if compressed:
            file = cast(BinaryIO, stack.enter_context(gzip.open(file)))
        yield file


def _parse_line(line: bytes) -> Any:
    if line == b"{":
        raise ValueError("an object over several lines begins here; write each object on one line")
    return json_text.parse(line)


def _elements(path: pathlib.Path, data: bytes) -> Iterator[tuple[int, Callable[[], Any]]]:
    """The elements of a JSON array."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: {error}; convert the file to UTF-8") from error
    decoder = json.JSONDecoder()
    line, counted = 1, 0

    def after_space(place: int) -> int:
        match = _SPACE.match(text, place)
        return match.end() if match else place

    def wrong(place: int, problem: str) -> UserError:
        number = text.count("\n", 0, place) + 1
        return UserError(f"{path}, line {number}: {problem}; fix this JSON array")

    place = after_space(after_space(0) + 1)
    while not text.startswith("]", place):
        try:
            _, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise wrong(error.pos, error.msg) from error
        except RecursionError:
            raise wrong(place, "it is nested too deeply") from None
        except ValueError as error:  # a number of thousands of digits
            raise wrong(place, str(error)) from error
        line, counted = line + text.count("\n", counted, place), place
        yield line, functools.partial(json_text.parse, text[place:end])
        place = after_space(end)
        if text.startswith(",", place):
            place = after_space(place + 1)
        elif not text.startswith("]", place):
            raise wrong(place, "expecting ',' or ']' after an element")
    if after_space(place + 1) != len(text):
        raise wrong(after_space(place + 1), "more follows after the end of the array")

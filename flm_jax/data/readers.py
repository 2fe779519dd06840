"""Reads the texts of one file of the user's: text, JSONL, JSON, Parquet; plain or compressed.

What a file decompresses to is bounded, and every fault is one line that names the file.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from flm_jax import extras
from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.runtime import paths, regular

TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".html", ".htm", ".css", ".xml",
    ".log", ".py", ".pyi", ".js", ".jsx", ".ts", ".tsx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
    ".java", ".kt", ".scala", ".go", ".rs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml",
    ".swift", ".sh", ".sql", ".yaml", ".yml", ".toml", ".ini", ".cfg",
))  # fmt: skip
KIND_OF_SUFFIX = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")
READ = ".txt .md .py (and other plain text), .jsonl, .json, .parquet, and .gz or .zst of these"

# Text rarely shrinks to less than a hundredth; a file made to fill the memory shrinks further.
_MOST_RATIO, _LEAST_LIMIT = 200, 64 << 20
_ROWS_AT_ONCE = 256

Texts = Iterator[tuple[int, str]]


def kind_of(name: str) -> str:
    """Returns how a file is read, by its suffix: a name of `READERS`, or "text"; "": it is not.

    >>> kind_of("a.txt"), kind_of("b.JSONL.gz"), kind_of("c.png")
    ('text', 'jsonl', '')
    """
    path = pathlib.PurePosixPath(name.lower())
    if path.suffix in COMPRESSIONS:
        path = path.with_suffix("")
    return "text" if path.suffix in TEXT_SUFFIXES else KIND_OF_SUFFIX.get(path.suffix, "")


def opened(path: pathlib.Path) -> BinaryIO:
    """Opens a file, decompressed by its suffix, to be read once from its start.

    Raises:
      UserError: it cannot be opened; or, while it is read, it is damaged or holds too much.
    """
    suffix = path.suffix.lower()
    if suffix == ".zst":
        with extras.named(f"{path}: reading Zstandard", "decompress it"):
            import pyarrow
    file = regular.opened(path)
    if suffix == ".gz":
        source: Any = gzip.GzipFile(fileobj=file)
    elif suffix == ".zst":
        source = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
    else:
        return file
    size = paths.size(path)
    most = min(regular.DATA_BYTES, max(_MOST_RATIO * size, _LEAST_LIMIT))
    return cast(BinaryIO, io.BufferedReader(_Bounded(source, file, path, most), 1 << 20))


class _Bounded(io.RawIOBase):
    """What a compressed file holds, up to a limit."""

    def __init__(self, source: Any, file: BinaryIO, path: pathlib.Path, most: int) -> None:
        super().__init__()
        self._source, self._file, self._path, self._left = source, file, path, most

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()  # neither library closes it
        super().close()

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(len(buffer))
        except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's are OSErrors
            raise UserError(
                f"{self._path}: damaged or not compressed as its suffix says ({error}); fetch it "
                "again"
            ) from error
        self._left -= len(data)
        if self._left < 0:
            raise UserError(
                f"{self._path} decompresses to more than {_MOST_RATIO} times its size, or "
                f"{regular.DATA_BYTES:,} bytes; decompress it yourself if this is right"
            )
        buffer[: len(data)] = data
        return len(data)


def text(path: pathlib.Path) -> bytes:
    """Reads a file of text in UTF-8, without its byte order mark.

    Raises:
      UserError: it cannot be read, or is not UTF-8; names file, line and byte.
    """
    if path.suffix.lower() in COMPRESSIONS:
        with opened(path) as file:
            data = regular.whole(file, path, regular.DATA_BYTES)
    else:
        data = regular.read(path, regular.DATA_BYTES)
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8 text (byte 0x{data[error.start]:02X} in line {line}); convert or "
            "remove this file"
        ) from error
    return data


def is_jsonl(data: bytes) -> bool:
    """Whether a text is JSONL: its first two lines, or its only one, are JSON objects."""
    first = [line for line in data[: 1 << 20].splitlines()[:2] if line.strip()]
    return bool(first) and all(line.startswith(b"{") and _is_object(line) for line in first)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json_text.parse(line), dict)
    except ValueError:
        return False


def jsonl(path: pathlib.Path, field: str) -> Texts:
    """Yields the number and the text of every row of a JSONL file.

    Args:
      path: the file.
      field: the field of a row that holds its text.

    Raises:
      UserError: a row is not JSON, or has no text; names file and line.
    """
    with opened(path) as file:
        for number, row in json_text.rows_of(file, path, _advice(field)):
            yield number, _text_of(row, field, f"{path}, line {number}")


def json(path: pathlib.Path, field: str) -> Texts:
    """Yields the texts of a JSON file: of a list of objects or texts, or of one object.

    A file with one object per line is read as JSONL. Raises UserError as `jsonl`.
    """
    with opened(path) as file:
        data = regular.whole(file, path, regular.JSON_BYTES)
    try:
        value = json_text.parse(data)
    except ValueError as error:
        if is_jsonl(data):
            yield from jsonl(path, field)
            return
        raise UserError(f"{path}: not JSON ({error}); {_advice(field)}") from error
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"{path}, item {number}"
        if isinstance(row, str):
            yield number, row
        else:
            yield number, _text_of(row, field, where)


def parquet(path: pathlib.Path, field: str) -> Texts:
    """Yields the texts in a column of a Parquet file. Raises UserError as `jsonl`."""
    with extras.named(f"{path}: reading Parquet", "convert it to JSONL"):
        import pyarrow
        from pyarrow import parquet as pq

    with opened(path) as file:
        source = file if file.seekable() else io.BytesIO(file.read())
        size = source.seek(0, os.SEEK_END)
        left = min(regular.DATA_BYTES, max(_MOST_RATIO * size, _LEAST_LIMIT))
        source.seek(0)
        try:
            names = pq.read_schema(source).names
            if field not in names:
                raise UserError(f"{path}: it has columns {', '.join(names)}; {_advice(field)}")
            table = pq.ParquetFile(source, read_dictionary=[field])
            number = 0
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[field]):
                for cell in batch.column(0):
                    number += 1
                    value = _text_of({field: cell.as_py()}, field, f"{path}, row {number}")
                    left -= len(value)
                    if left < 0:
                        raise UserError(
                            f"{path} holds more than {_MOST_RATIO} times its size in text, or "
                            f"{regular.DATA_BYTES:,} bytes; convert it to JSONL if this is right"
                        )
                    yield number, value
        except UserError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: no Parquet file ({error}); fetch it again") from error


def _text_of(row: Any, field: str, where: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise UserError(f"{where}: it has no such text; {_advice(field)}")
    return value


def _advice(field: str) -> str:
    return f"make every row a JSON object with text in its field {field!r} (DataConfig.text_field)"


# Kinds of files with several texts: their readers take the file and the field with the text.
READERS: dict[str, Callable[[pathlib.Path, str], Texts]] = {
    "jsonl": jsonl,
    "json": json,
    "parquet": parquet,
}

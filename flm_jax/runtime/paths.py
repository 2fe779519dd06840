"""Paths that a user gives: a folder or file of this machine, or of a bucket (`gs://`, `s3://`).

This module alone turns text into a path. What it returns has the methods of `pathlib.Path`; on a
bucket, `etils.epath` provides them through the bucket's client (gcsfs, s3fs).
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, cast

from flm_jax import extras
from flm_jax.errors import UserError

# The package that is the client of each scheme.
_CLIENTS = {"gs": "gcsfs", "s3": "s3fs"}
_SMALL_BYTES = 64 << 20
_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # of Linux, in bytes; some is left for names below
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(gs|s3):/")


def of(given: str | os.PathLike[str], argument: str = "") -> pathlib.Path:
    """Returns the path that a user means; touches no disk and no bucket.

    Args:
      given: a path, with "~" for the user's home; or SCHEME://BUCKET/PATH.
      argument: the flag or field that gives it, for errors.

    Returns:
      A path. It is an `epath.Path` on a bucket.

    Raises:
      UserError: no client can open it: an unknown scheme, no bucket's name, a missing package. Or
        no file can have this path.
    """
    text = os.fspath(given)
    found = _SCHEME.match(text)
    if not found:
        return _local(text, argument)
    scheme = found[1] or found[2]
    name = f"{argument} {text}" if argument else text
    if scheme not in _CLIENTS:
        known = ", ".join(f"{name}://" for name in _CLIENTS)
        raise UserError(
            f"{name}: no client for {scheme}://; give a path of this machine, or one of {known}",
            argument=argument,
        )
    if not re.match(rf"{scheme}://[^/]", text):
        raise UserError(f"{name}: give {scheme}://BUCKET/PATH", argument=argument)
    with extras.named(f"{name}: {scheme}://"):
        _prepare(_CLIENTS[scheme])
        from etils import epath

    return cast(pathlib.Path, epath.Path(text))


def is_name(text: str) -> bool:
    """Whether a file can have this name: without it, every question about the file is an error."""
    try:
        return "\0" not in text and len(os.fsencode(text)) <= _LONGEST_NAME
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _local(text: str, argument: str) -> pathlib.Path:
    if len(text) > _LONGEST_PATH or not all(map(is_name, text.split("/"))):
        problem = "it is too long, or has a null character; give another"
        raise UserError(f"{argument} {text!r} is no path: {problem}".strip(), argument=argument)
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{argument} {text!r}: {error}; give a path without ~".strip(), argument=argument
        ) from error


@functools.cache
def _prepare(package: str) -> None:
    """Loads a client; raises ImportError without it."""
    # Otherwise epath would use TensorFlow, which has no client for S3.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # It says of each bucket without a hierarchy that it found none.
    logging.getLogger("gcsfs").setLevel(logging.ERROR)
    __import__(package)
    import fsspec.config

    # Other processes, and tensorstore, write into the same bucket: a listing is never kept.
    fsspec.config.conf.setdefault(package.removesuffix("fs"), {})["use_listings_cache"] = False


def scheme(path: pathlib.PurePath) -> str:
    """Returns "gs" or "s3" for a path on a bucket; "" for one of this machine.

    >>> scheme(pathlib.Path("runs/demo"))
    ''
    """
    found = _SCHEME.match(os.fspath(path))
    return found[1] or found[2] if found else ""


def remote(path: pathlib.PurePath) -> bool:
    """Whether a path is on a bucket."""
    return bool(scheme(path))


def bucket(path: pathlib.PurePath) -> tuple[str, str]:
    """Splits a path on a bucket into the bucket's name and the path in it."""
    name, _, key = os.fspath(path).partition("://")[2].partition("/")
    return name, key


def absolute(path: pathlib.Path) -> pathlib.Path:
    """Returns the path from the root; one on a bucket has it already."""
    return path if remote(path) else path.absolute()


def same(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two paths name the same file, links followed."""
    return remote(one) == remote(other) and (
        one == other if remote(one) else one.resolve() == other.resolve()
    )


def size(path: pathlib.Path) -> int:
    """Returns the size of a file in bytes."""
    found = path.stat()
    return int(found.length if remote(path) else found.st_size)  # type: ignore[attr-defined]


def unbuffered(path: pathlib.Path) -> io.RawIOBase:
    """Opens a file for reading parts of it: each read asks for what it returns and no more."""
    if remote(path):
        import fsspec

        client = fsspec.filesystem(scheme(path))
        return cast(io.RawIOBase, client.open(os.fspath(path), "rb", cache_type="none"))
    return open(path, "rb", buffering=0)


def slug(name: str) -> str:
    """A name of a folder or file for any name: its letters and digits, with - between them.

    >>> slug("tile + stack, 2x")
    'tile-stack-2x'
    """
    return "-".join(re.findall(r"[^\W_]+|_", name)) or "unnamed"


def check_bucket(path: pathlib.Path, argument: str = "") -> None:
    """Checks that the bucket of a path can be read; does nothing for a path of this machine.

    Raises UserError if there is no such bucket, no permission, or no connection.
    """
    if not remote(path):
        return
    name = bucket(path)[0]
    where = f"{argument} {path}" if argument else str(path)
    try:
        _list_one(scheme(path), name)
    except Exception as error:  # each client has its own errors
        reason = reason_of(error)
        status = str(getattr(error, "code", "")) or str(
            getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", "")
        )
        if isinstance(error, FileNotFoundError) or status == "404":
            advice = f"there is no bucket {name}; create it, or give another"
        elif status in ("401", "403") or "Forbidden" in reason:
            advice = f"no permission to list bucket {name} ({reason}); log in, or ask its owner"
        else:
            advice = f"bucket {name} cannot be reached ({reason}); fix this, then call again"
        raise UserError(f"{where}: {advice}", argument=argument) from error


def reason_of(error: Exception) -> str:
    """Returns what a client or the system says, in one line."""
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.split())[:200] or type(error).__name__


def _list_one(kind: str, name: str) -> None:
    """Asks a bucket for at most one of its objects."""
    import fsspec

    client: Any = fsspec.filesystem(kind)
    if kind == "gs":
        client.call("GET", "b/{}/o", name, maxResults=1, json_out=True)
    else:
        client.call_s3("list_objects_v2", Bucket=name, MaxKeys=1)


@functools.lru_cache
def fetched(path: pathlib.Path) -> pathlib.Path:
    """Returns a path of this machine, for a library that reads only such: a tokenizer's files.

    A bucket's file is copied once for this process, and of a folder its small files
    (`_SMALL_BYTES`): the weights beside a tokenizer stay where they are.
    """
    if not remote(path):
        return path
    target = pathlib.Path(_fetched_files().name) / str(len(os.listdir(_fetched_files().name)))
    target = target / path.name
    target.parent.mkdir()
    if not path.is_dir():
        if path.exists():
            copy(path, target)
        return target
    for file, num_bytes in sized(path):
        if num_bytes <= _SMALL_BYTES:
            copy(file, target / file.relative_to(path))
    return target


@functools.cache
def _fetched_files() -> tempfile.TemporaryDirectory[str]:
    """The folder of the copies; removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="flm_jax-")


def check_local(path: pathlib.Path, kind: str) -> None:
    """Raises UserError for a file on a bucket that a library maps into memory."""
    if remote(path):
        raise UserError(f"{path}: {kind} are read from a disk; copy the file to one")


@contextlib.contextmanager
def staged(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new folder to fill; at the end it becomes the target, or is copied to its bucket.

    On this machine the folder is beside the target. After an error nothing is left.
    """
    if not remote(target):
        partial = target.absolute().with_name(f".{target.name}.converting")
        remove(partial)  # left by a killed process
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.replace(target.absolute())
        finally:
            remove(partial)
        return
    with tempfile.TemporaryDirectory(prefix="flm_jax-") as folder:
        yield pathlib.Path(folder)
        copy(pathlib.Path(folder), target)


def listed(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns what is in a folder; nothing if the folder does not exist."""
    return list(folder.iterdir()) if folder.is_dir() else []


def files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the files in a folder and in all folders below it."""
    return (path for path, _ in sized(folder))


def sized(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, int]]:
    """Yields the files in a folder and in all folders below it, with their sizes in bytes."""
    if remote(folder):
        import fsspec

        kind = scheme(folder)
        found = fsspec.filesystem(kind).find(os.fspath(folder), detail=True)
        yield from ((of(f"{kind}://{name}"), info["size"]) for name, info in found.items())
    else:
        yield from ((path, size(path)) for path in folder.rglob("*") if path.is_file())


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file, or a folder with all in it, between this machine and buckets.

    Within one kind of bucket, the data does not pass through this machine.
    """
    import fsspec

    if source.is_dir():
        for path in files(source):
            copy(path, target / path.relative_to(source))
        return
    if not remote(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    if scheme(source) == scheme(target):
        fsspec.filesystem(scheme(source) or "file").copy(os.fspath(source), os.fspath(target))
    elif remote(source) and remote(target):
        with source.open("rb") as read, target.open("wb") as write:
            while block := read.read(1 << 24):
                write.write(block)
    elif remote(source):
        fsspec.filesystem(scheme(source)).get_file(os.fspath(source), os.fspath(target))
    else:
        fsspec.filesystem(scheme(target)).put_file(os.fspath(source), os.fspath(target))


def remove(path: pathlib.Path) -> None:
    """Removes a file, or a folder with all in it, if it exists."""
    if remote(path):
        if path.exists():
            path.rmtree()  # type: ignore[attr-defined]
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

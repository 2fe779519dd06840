"""Reads files that somebody else made: only regular ones, and no more of them than fits.

A named pipe blocks whoever opens it, a device never ends or does something when it is opened, and a
sparse file of a terabyte takes no space on the disk that it came from.
"""

from __future__ import annotations

import os
import pathlib
import stat
from typing import BinaryIO, cast

from flm_jax.errors import UserError

JSON_BYTES = 256 << 20  # the largest tokenizer.json known has 35 MB
_PIECE_BYTES = 1 << 20
DATA_BYTES = 8 << 30  # of a file that is read whole, as one text


def opened(path: pathlib.Path) -> BinaryIO:
    """Opens a file for reading; one on a bucket is always regular.

    Raises:
      UserError: it is a folder, a pipe, a socket or a device, or cannot be read; names the file.
    """
    if not isinstance(path, pathlib.Path):
        return cast(BinaryIO, path.open("rb"))
    try:
        _check(path, os.stat(path).st_mode)
        # It may have been exchanged since: opening a pipe then does not wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read ({reason}); fetch it again") from error
    try:
        _check(path, os.fstat(descriptor).st_mode)
    except UserError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _check(path: pathlib.Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
        }  # fmt: skip
        kind = kinds.get(stat.S_IFMT(mode), "no file")
        raise UserError(f"{path} is {kind}, and a regular file is read; fetch it again")


def read(path: pathlib.Path, most: int = JSON_BYTES) -> bytes:
    """Reads a whole file.

    Args:
      path: the file.
      most: the largest size in bytes.

    Raises:
      UserError: as `opened`, or the file is larger.
    """
    with opened(path) as file:
        if isinstance(path, pathlib.Path) and os.fstat(file.fileno()).st_size > most:
            raise _too_large(path, most)
        return whole(file, path, most)


def whole(file: BinaryIO, path: pathlib.Path, most: int) -> bytes:
    """Reads what is left of an open file, which may be compressed; raises UserError as `read`."""
    pieces, left = [], most
    while left >= 0 and (piece := file.read(min(left + 1, _PIECE_BYTES))):
        pieces.append(piece)
        left -= len(piece)
    if left < 0:
        raise _too_large(path, most)
    return b"".join(pieces)


def _too_large(path: pathlib.Path, most: int) -> UserError:
    return UserError(
        f"{path} has more than {most:,} bytes, the most that is read; give a smaller file"
    )


def text(path: pathlib.Path, most: int = JSON_BYTES) -> str:
    """Reads a whole file of text in UTF-8.

    Raises:
      UserError: as `read`, or it is not UTF-8.
    """
    try:
        return read(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); restore it") from error


def check_tree(folder: pathlib.Path) -> None:
    """Checks that a folder can be copied: it has only regular files, folders, and links to such.

    Raises:
      UserError: something else is in it, or a link that leads nowhere or back; names it.
    """
    if not isinstance(folder, pathlib.Path):
        return  # on a bucket
    for path in folder.rglob("*"):
        if (
            path.is_symlink()
            and path.is_dir()
            and path.parent.resolve().is_relative_to(path.resolve())
        ):
            raise UserError(f"{path} is a link back to {path.resolve()}; remove it")
        if not path.is_dir():
            opened(path).close()

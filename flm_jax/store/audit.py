"""Reads a checkpoint to find out whether it is intact: all of it, in bounded memory."""

from __future__ import annotations

import concurrent.futures
import pathlib

from flm_jax.errors import DamageError
from flm_jax.runtime import processes
from flm_jax.store import integrity
from flm_jax.store.chunked import CheckpointReader, cells

_THREADS = 4  # each holds one chunk


def damage(path: pathlib.Path, together: bool = False) -> dict[str, str]:
    """Finds what is damaged in a checkpoint.

    A value that is NaN or infinite counts as damage: no run can continue from it.

    Args:
      path: the checkpoint's folder.
      together: several processes call this, and each reads its share.

    Returns:
      What is damaged -> how: leaves by name, or "" for the whole; of the caller's share.

    Raises:
      UserError: there is no checkpoint, or its disk does not answer.
    """
    try:
        reader = CheckpointReader(path)
    except DamageError as error:
        return {"": str(error)}
    pieces = [
        (name, piece)
        for name, leaf in reader.leaves.items()
        if leaf.size
        for piece in cells(leaf.shape, reader.chunk(name))
    ]
    if together:
        pieces = list(processes.share(pieces))

    def check(piece: tuple[str, tuple[slice, ...]]) -> tuple[str, str]:
        name, cut = piece
        try:
            integrity.check_finite(path, name, reader.read(name, cut))
        except DamageError as error:
            return name, str(error)
        return name, ""

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return {name: what for name, what in pool.map(check, pieces) if what}


def check_together(path: pathlib.Path) -> None:
    """Checks a checkpoint that all processes are about to read: each of them reads a share.

    A process that found damage alone would leave the others waiting for it.

    Raises:
      DamageError: in all processes, if one of them found damage.
    """
    everywhere = processes.everyone(damage(path, together=True))
    found = [what for each in everywhere for what in each.values()]
    if found:
        raise DamageError(found[0], path)

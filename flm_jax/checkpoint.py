"""The checkpoints of one stage, through orbax. The only place that imports it."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from flm_jax import axes
from flm_jax.errors import UserError

Tree = TypeVar("Tree")


class Checkpoints:
    """Train states by step, each with a small JSON-able `progress` (data position, counters)."""

    def __init__(self, directory: pathlib.Path, keep: int | None = None):
        """`keep`: the latest so many stay; None: all."""
        policies = ocp.training
        self.directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            # The training loop decides when; orbax would skip a step that is due too early.
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def path(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Writes in the background; a checkpoint appears only when it is complete."""
        self._checkpointer.save_async(step, state, custom_metadata=progress)

    def restore(self, step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """Reads a state back, onto the shardings of `like`.

        Args:
          step: of a checkpoint.
          like: a tree of `ShapeDtypeStruct`s with shardings.

        Returns: the state and its progress.

        Raises:
          UserError: the checkpoint holds other leaves, shapes or dtypes; nothing is filled in.
        """
        metadata = self._checkpointer.metadata(step)
        have, want = _described(metadata.metadata), _described(like)
        for name in dict.fromkeys([*want, *have]):
            if have.get(name) != want.get(name):
                raise UserError(
                    f"{self.path(step)}: {name} is {have.get(name, 'missing')}, the config needs "
                    f"{want.get(name, 'no such leaf')}; use the config of this checkpoint, or "
                    "grow it (python -m experiments.grow)"
                )
        return self._checkpointer.load(step, like), dict(metadata.custom_metadata)

    def wait(self) -> None:
        """Until the checkpoint under way is complete on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()


def _described(tree: Any) -> dict[str, str]:
    """Leaf name -> 'float32[4, 8]'. Orbax's own metadata uses keys for attributes and indices."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        "/".join(_key(k) for k in path): f"{np.dtype(x.dtype).name}{list(x.shape)}"
        for path, x in leaves
    }


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def params_digest(params: Any, piece_bytes: int = 1 << 30) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: equal exactly for bit-equal parameters.

    Wherever the parameters are: pieces of at most `piece_bytes` are brought to every process.
    """
    hashed = hashlib.sha256()
    for path, value in sorted(axes.flatten(params)):
        hashed.update(f"{path} {value.dtype.name} {value.shape}".encode())
        for piece in _pieces(value, piece_bytes):
            hashed.update(piece.tobytes())
    return hashed.hexdigest()


def _pieces(array: jax.Array, most: int) -> Iterator[np.ndarray]:
    """The array's bytes in C order, in numpy arrays of at most `most` bytes (or one entry)."""
    if array.nbytes <= most or not array.ndim:
        yield multihost_utils.process_allgather(array, tiled=True)
        return
    rows = max(most * len(array) // array.nbytes, 1)
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        yield from _pieces(part[0] if rows == 1 else part, most)

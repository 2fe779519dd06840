"""The checkpoints of one stage, through orbax. The only place that imports it."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import numpy as np
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
        self._check(step, _described(metadata.metadata), _described(like))
        return self._checkpointer.load(step, like), dict(metadata.custom_metadata)

    def restore_params(self, step: int, like: Tree) -> Tree:
        """Reads only the parameters, of a checkpoint that may hold a whole state or nothing else.

        Args:
          step: of a checkpoint.
          like: a tree of `ShapeDtypeStruct`s with shardings, of the parameters.

        Raises:
          UserError: the checkpoint holds other parameters, shapes or dtypes.
        """
        have = _described(self._checkpointer.metadata(step).metadata)
        own = {name: what for name, what in have.items() if name.startswith("params/")}
        self._check(step, own, _described({"params": like}))
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return self._checkpointer.load(step, {"params": like})["params"]

    def _check(self, step: int, have: dict[str, str], want: dict[str, str]) -> None:
        for name in dict.fromkeys([*want, *have]):
            if have.get(name) != want.get(name):
                raise UserError(
                    f"{self.path(step)}: {name} is {have.get(name, 'missing')}, the config needs "
                    f"{want.get(name, 'no such leaf')}; use the config of this checkpoint, or "
                    "grow it (python -m experiments.grow)"
                )

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


def params_digest(params: Any) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: equal exactly for bit-equal parameters."""
    return digest_of_leaves(
        (path, value, [np.asarray(jax.device_get(value))]) for path, value in axes.flatten(params)
    )


def digest_of_leaves(leaves: Iterable[tuple[str, Any, Iterable[np.ndarray]]]) -> str:
    """`params_digest`, in pieces.

    Args: of each leaf its path, what has its dtype and shape, and its entries in C order.
    """
    hashed = hashlib.sha256()
    for path, leaf, pieces in sorted(leaves, key=lambda entry: entry[0]):
        hashed.update(f"{path} {np.dtype(leaf.dtype).name} {leaf.shape}".encode())
        for piece in pieces:
            hashed.update(np.ascontiguousarray(piece).data)
    return hashed.hexdigest()

"""The checkpoints of one stage, through orbax. The only place that imports it.

Leaves are read and written slice by slice, without orbax in between, in `leaves.py`.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from flm_jax.errors import UserError
from flm_jax.params import axes, trees

Tree = TypeVar("Tree")

STATE = "state"  # the folder of the train state in a checkpoint, as orbax names it
CHUNK_BYTES = 32 << 20  # of a leaf, at most, in one piece on disk


class Checkpoints:
    """Train states by step, each with a small JSON-able `progress` (data position, counters)."""

    def __init__(self, directory: pathlib.Path, keep: int | None = None):
        """`keep`: the latest so many stay; None: all. The one with the lowest loss stays too."""
        policies = ocp.training
        self.directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            context=_context(),
            # The training loop decides when; orbax would skip a step that is due too early.
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.AnyPreservationPolicy(
                [
                    policies.preservation_policies.LatestN(keep),
                    policies.preservation_policies.BestN(
                        get_metric_fn=_goodness, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def best(self) -> int | None:
        """The step of the lowest loss, the later one of two; without losses the newest."""
        measured = [c for c in self._checkpointer.checkpoints if c.metrics is not None]
        # As orbax ranks them, so that it is a checkpoint that stayed.
        ranked = sorted(measured, key=lambda c: _goodness(c.metrics))
        return ranked[-1].step if ranked else self.latest

    def path(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def save(
        self, step: int, state: Any, progress: dict[str, Any], loss: float | None = None
    ) -> None:
        """Writes in the background; a checkpoint appears only when it is complete.

        `loss`: what the `best` one is chosen by.
        """
        metrics = None if loss is None else {"loss": loss}
        self._checkpointer.save_async(step, state, metrics=metrics, custom_metadata=progress)

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
        check_fits(self.path(step), shapes(metadata.metadata), shapes(like))
        return self._checkpointer.load(step, like), dict(metadata.custom_metadata)

    def wait(self) -> None:
        """Until the checkpoint under way is complete on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()


def _goodness(metrics: Any) -> float:
    return -float(metrics["loss"])


def _context() -> ocp.Context:
    """Large leaves in chunks, so that a part can be read without the rest (`leaves.py`).

    Uncompressed: zstd leaves 92% of a trained state (`configs/demo.py:smoke`), at a price.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _chunks
    return context


def _chunks(path: Any, leaf: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
    if leaf.nbytes <= CHUNK_BYTES:
        return None
    param = axes.TABLE.get("/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey)))
    stacked = param is not None and param.roles[0] is axes.Role.STACK
    return ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ()
    )


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves by name, as "opt_state/1/mu/layers/mlp/up", in the tree's order.

    Keys, indices and attributes count alike: orbax's own metadata has keys for all of them.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_key(k) for k in path): x for path, x in leaves}


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the leaves, by name."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in by_name(tree).items()}


def check_fits(
    path: pathlib.Path,
    have: dict[str, jax.ShapeDtypeStruct],
    want: dict[str, jax.ShapeDtypeStruct],
) -> None:
    """Raises UserError if a checkpoint's leaves are not those that a config needs."""

    def text(leaves: dict[str, jax.ShapeDtypeStruct], name: str) -> str | None:
        x = leaves.get(name)
        return None if x is None else f"{np.dtype(x.dtype).name}{list(x.shape)}"

    for name in dict.fromkeys([*want, *have]):
        if text(have, name) != text(want, name):
            raise UserError(
                f"{path}: {name} is {text(have, name) or 'missing'}, the config needs "
                f"{text(want, name) or 'no such leaf'}; use the config of this checkpoint, or "
                "grow it (flm train)"
            )


def describe(path: pathlib.Path) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """A checkpoint's leaves, by name, and its progress; reads no array.

    Raises UserError if there is no complete checkpoint.
    """
    try:
        metadata = ocp.metadata(path.absolute())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no checkpoint; give a folder as checkpoints/STEP") from error
    leaves = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in by_name(metadata.metadata).items()
    }
    return leaves, dict(metadata.custom_metadata or {})


def write_skeleton(path: pathlib.Path, like: Any, progress: dict[str, Any]) -> None:
    """A checkpoint of the tree `like`, in which every array has one entry.

    Orbax's metadata says how the leaves are nested, and leaves their sizes to the arrays: with
    other arrays in place of these it is a checkpoint of them. Each is a folder in zarr's format.
    """
    context = ocp.Context()
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = False
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.array_metadata_store = None
    ones = jax.tree.map(lambda x: jnp.zeros((1,) * len(x.shape), x.dtype), like)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns that there is no OCDBT to merge
    try:
        with context:
            ocp.save(path.absolute(), ones, custom_metadata=progress)
    finally:
        logging.set_verbosity(verbosity)


def params_digest(params: Any, piece_bytes: int = 1 << 30) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: equal exactly for bit-equal parameters.

    Wherever the parameters are: pieces of at most `piece_bytes` are brought to every process.
    """
    return digest_of_leaves(
        (path, value, _pieces(value, piece_bytes)) for path, value in trees.flatten(params)
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


def _pieces(array: jax.Array, most: int) -> Iterator[np.ndarray]:
    """The array's bytes in C order, in numpy arrays of at most `most` bytes (or one entry)."""
    if array.nbytes <= most or not array.ndim:
        yield multihost_utils.process_allgather(array, tiled=True)
        return
    rows = max(most * len(array) // array.nbytes, 1)
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        yield from _pieces(part[0] if rows == 1 else part, most)

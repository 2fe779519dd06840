"""Checkpoints of one stage. This is the only module that imports orbax.

Orbax writes them, and says which there are. Arrays are read by `chunked.CheckpointReader` alone, in
whole or in part; `integrity.py` says what it checks.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from flm_jax.errors import UserError
from flm_jax.runtime import paths
from flm_jax.store import integrity
from flm_jax.store.earlier import as_stored, upgraded

Tree = TypeVar("Tree")

STATE = "state"  # orbax's name for the folder of the train state in a checkpoint
DESCRIPTION = "_CHECKPOINT_METADATA"  # orbax's name for the file of a checkpoint's JSON values
EMPTY = "empty_leaves"  # key beside the progress: leaves without entries, which orbax cannot save
COMMITTED = "commit_success.txt"  # orbax's mark of a complete checkpoint on a bucket
_READERS = 8  # leaves that are read at once
CHUNK_BYTES = 32 << 20  # the largest chunk of a leaf on disk


class Checkpoints:
    """Train states by step, each with a small `progress` of JSON values (data position, time)."""

    def __init__(self, directory: pathlib.Path, keep: int | None = None):
        """Opens a folder of checkpoints; creates it if it does not exist.

        Args:
          directory: the folder.
          keep: number of latest checkpoints to keep; None: all. The best one is kept too.
        """
        self.directory, self._keep = directory, keep
        self.open()

    def open(self) -> None:
        """Reads which checkpoints there are; after `close` and a change of the folder.

        Raises DamageError if the loss beside a state is damaged.
        """
        policies = ocp.training
        for path in paths.listed(self.directory):
            if path.name.isdigit():
                check_loss(path)  # orbax reads it now, and does not say where it failed
        self._checkpointer = ocp.training.Checkpointer(
            paths.absolute(self.directory),
            context=_context(),
            # The training loop decides when to save; orbax itself never skips a step.
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.AnyPreservationPolicy(
                [
                    policies.preservation_policies.LatestN(self._keep),
                    policies.preservation_policies.BestN(
                        get_metric_fn=_goodness, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )
        self.last_saved = self.latest  # the newest step, complete or still being written

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def best(self) -> int | None:
        """The step with the lowest loss (of equal losses the later step); else the latest step."""
        measured = [c for c in self._checkpointer.checkpoints if c.metrics is not None]
        # The same order as orbax's, so the result is a checkpoint that orbax kept.
        ranked = sorted(measured, key=lambda c: _goodness(c.metrics))
        return ranked[-1].step if ranked else self.latest

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return [c.step for c in self._checkpointer.checkpoints]

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints after a step, the newest first. All processes call it."""
        for later in reversed([s for s in self.steps if s > step]):
            self._checkpointer.delete(later)
        self.last_saved = self.latest

    def path(self, step: int) -> pathlib.Path:
        """Returns the folder of a checkpoint, which may not exist."""
        return self.directory / str(step)

    def save(
        self, step: int, state: Any, progress: dict[str, Any], loss: float | None = None
    ) -> None:
        """Writes a checkpoint in the background; it appears atomically.

        Args:
          step: the global step; it names the checkpoint.
          state: a tree of arrays, the train state.
          progress: JSON values to store with the state.
          loss: `best` is the step with the lowest loss; None: the step does not take part.
        """
        metrics = None if loss is None else {"loss": loss}
        stored, metadata = pack(state, progress, loss)
        self._checkpointer.save_async(step, stored, metrics=metrics, custom_metadata=metadata)
        self.last_saved = step

    def restore(self, step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """Reads a state onto the shardings of `like`.

        Args:
          step: the checkpoint's step.
          like: a tree of `ShapeDtypeStruct`s with shardings; see `train_step.abstract_state`.

        Returns:
          The state and its progress.

        Raises:
          DamageError: a file of the checkpoint is not what was written, or a value is not finite.
          UserError: the checkpoint has other leaves, shapes or dtypes than `like`.
        """
        from flm_jax.store.chunked import CheckpointReader  # it imports this module

        reader = CheckpointReader(self.path(step))
        like = as_stored(like, reader.leaves)
        check_fits(reader.path, reader.leaves, shapes(like))

        def read(name: str, want: Any) -> jax.Array:
            if not want.size:
                return jnp.zeros(want.shape, want.dtype, device=want.sharding)

            @functools.cache  # devices may hold copies of one part
            def part(cut: tuple[tuple[int | None, int | None], ...]) -> np.ndarray:
                values = reader.read(name, [slice(*ends) for ends in cut])
                integrity.check_finite(reader.path, name, values)
                return values

            def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
                return part(tuple((cut.start, cut.stop) for cut in index or ()))

            return jax.make_array_from_callback(want.shape, want.sharding, of_device)

        names = list(by_name(like))
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            leaves = list(pool.map(read, names, jax.tree.leaves(like)))
        state: Tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return upgraded(state), reader.progress

    def wait(self) -> None:
        """Waits until the current checkpoint is complete on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits until the current checkpoint is complete, and releases resources."""
        self._checkpointer.close()


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Moves a damaged checkpoint out of `checkpoints`, to `damaged/STEP`; returns the new path.

    Orbax does not see it there: nothing counts or deletes it, and its step can be saved again.
    """
    folder = path.parent.parent / "damaged"
    names = itertools.chain([path.name], (f"{path.name}-{n}" for n in itertools.count(2)))
    target = next(p for p in map(folder.joinpath, names) if not p.exists())
    if paths.remote(path):  # a bucket renames nothing
        paths.copy(path, target)
        paths.remove(path)
    else:
        folder.mkdir(exist_ok=True)
        path.rename(target)
    return target


def pack(
    tree: Tree, progress: dict[str, Any], loss: float | None = None
) -> tuple[Tree, dict[str, Any]]:
    """Takes out the leaves without entries (a model without layers); returns what to store.

    Args:
      tree: arrays or `ShapeDtypeStruct`s.
      progress: JSON values.
      loss: the loss that is stored beside the state; None: none.

    Returns:
      The tree with None for such leaves, and the progress with their shapes and dtypes, sealed
      (`integrity.sealed`).
    """
    empty = {
        name: [np.dtype(x.dtype).name, list(x.shape)]
        for name, x in by_name(tree).items()
        if not x.size
    }
    filled: Tree = jax.tree.map(lambda x: x if x.size else None, tree)
    metadata = progress | ({EMPTY: empty} if empty else {})
    return filled, integrity.sealed(metadata, shapes(tree), loss)


def empty_leaves(metadata: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves without entries, as `pack` recorded them."""
    return {
        name: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
        for name, (dtype, shape) in (metadata or {}).get(EMPTY, {}).items()
    }


def check_loss(path: pathlib.Path) -> None:
    """Raises DamageError if the loss beside a state is not the sealed one, or no loss."""
    file = path / "metrics" / "metrics"
    try:
        loss = json.loads(file.read_text())["loss"] if file.exists() else None
        good = loss is None or isinstance(loss, float | int)
    except (ValueError, TypeError, KeyError):
        good = False
    with contextlib.suppress(ValueError, OSError):  # reported when the state is read
        metadata = json.loads((path / DESCRIPTION).read_text())["custom_metadata"]
        good = good and (not integrity.is_sealed(metadata) or metadata["seal"]["loss"] == loss)
    if not good:
        raise integrity.damaged(path, "metrics/metrics is not the loss that was saved")


def _goodness(metrics: Any) -> float:
    """Returns a number that is higher for a better checkpoint."""
    return -float(metrics["loss"])


def _context() -> ocp.Context:
    """Returns orbax's settings: large leaves are written in chunks, without compression.

    `chunked.py` can then read a part of a leaf without the rest. zstd would take time, and its
    output still has 92% of the size of a trained state (measured with `configs/demo.py:smoke`).
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.use_zarr3 = True  # version 2 has no checksums
    context.array.saving.scoped_storage_options_creator = _chunks
    return context


def _with_checksums(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Adds the checksum of each chunk to what orbax builds to describe an array."""

    @functools.wraps(build)
    def described(*args: Any, **kwargs: Any) -> dict[str, Any]:
        array = build(*args, **kwargs)
        array["codecs"][0]["configuration"]["codecs"].append(integrity.CHECKSUM)
        return array

    return described


# Orbax has no setting for it. A test checks what is on disk.
tensorstore_utils._build_zarr3_metadata = _with_checksums(tensorstore_utils._build_zarr3_metadata)


def _chunks(path: Any, leaf: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
    """Returns how orbax cuts a leaf; None: one chunk."""
    del path  # orbax passes it; the leaf's size decides alone
    if leaf.nbytes <= CHUNK_BYTES:
        return None
    # Along the first axis where possible: one layer, or some rows, can then be read alone.
    return ocp.options.ArrayOptions.Saving.StorageOptions(
        chunk_byte_size=CHUNK_BYTES, shard_axes=(0,)
    )


def by_name(tree: Any) -> dict[str, Any]:
    """Returns the leaves by name, such as "opt_state/1/mu/layers/mlp/up", in the tree's order.

    A name does not tell keys, indices and attributes apart: orbax's metadata has keys for all.

    >>> by_name({"params": {"up": 1}, "opt_state": (2, 3)})
    {'opt_state/0': 2, 'opt_state/1': 3, 'params/up': 1}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_key(k) for k in path): x for path, x in leaves}


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of each leaf, by name."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in by_name(tree).items()}


def check_fits(
    path: pathlib.Path,
    have: dict[str, jax.ShapeDtypeStruct],
    want: dict[str, jax.ShapeDtypeStruct],
) -> None:
    """Checks that a checkpoint has the leaves that a config needs.

    Args:
      path: the checkpoint's folder, for the error.
      have: the checkpoint's leaves: name -> shape and dtype.
      want: the leaves that the config needs: name -> shape and dtype.

    Raises:
      UserError: a leaf is missing or unknown, or has another shape or dtype.
    """

    def text(leaves: dict[str, jax.ShapeDtypeStruct], name: str) -> str | None:
        return integrity.text_of(leaves[name]) if name in leaves else None

    for name in dict.fromkeys([*want, *have]):
        if text(have, name) != text(want, name):
            raise UserError(
                f"{path}: {name} is {text(have, name) or 'missing'}, the config needs "
                f"{text(want, name) or 'no such leaf'}; use the config of this checkpoint, or "
                "grow it"
            )


def complete(path: pathlib.Path) -> bool:
    """Whether a checkpoint is complete; on a bucket an incomplete one has its final path."""
    return (path / COMMITTED).exists() if paths.remote(path) else path.exists()


def mark_complete(path: pathlib.Path) -> None:
    """Marks a checkpoint whose files are all there as complete; does nothing on a disk."""
    if paths.remote(path):
        for folder in (path / STATE, path):
            (folder / COMMITTED).write_text(f"commit_success to {folder}")


def write_skeleton(path: pathlib.Path, like: Any, progress: dict[str, Any]) -> None:
    """Writes a checkpoint in which every array has one entry.

    Orbax's metadata describes how leaves are nested, not their sizes, so `CheckpointWriter` can
    put arrays of other sizes in their place. It says that they are in zarr's format, version 3, in
    a database (OCDBT). All processes call this together.

    Args:
      path: the checkpoint's folder, which does not exist yet.
      like: a tree of `ShapeDtypeStruct`s.
      progress: JSON values to store with the state.
    """
    context = ocp.Context()
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.array_metadata_store = None
    ones = jax.tree.map(lambda x: np.zeros((1,) * len(x.shape), x.dtype), like)
    with context:
        ocp.save(paths.absolute(path), ones, custom_metadata=progress)

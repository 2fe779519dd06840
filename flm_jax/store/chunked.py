"""Checkpoints as chunked arrays, on a disk or a bucket: leaves are read slice by slice.

Memory stays bounded. `CheckpointReader` reads the checkpoints of `Checkpoints` and of
`chunk_writer.CheckpointWriter`; `Checkpoints.restore` reads those of `CheckpointWriter`. Orbax
describes the tree (`checkpoint.py`), and tensorstore stores the arrays. Several threads may share a
reader. `checkpoint.by_name` names the leaves: "params/layers/mlp/up", "opt_state/1/mu/embedding".
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from flm_jax.checks import require_version
from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.runtime import paths, regular
from flm_jax.store import entries, integrity
from flm_jax.store.checkpoint import DESCRIPTION, EMPTY, STATE, complete, empty_leaves

# The part of a leaf to read or write: for each dimension a slice, or the indices of its entries.
Slices = Sequence[slice | np.ndarray]


def chunk_shape(
    shape: Sequence[int], itemsize: int, limit: int, whole: Collection[int] = ()
) -> tuple[int, ...]:
    """Cuts an array into consecutive pieces of bounded size, as even as possible.

    Args:
      shape: the array's shape.
      itemsize: bytes of one entry.
      limit: largest size of one piece, in bytes.
      whole: dimensions that are not cut. The pieces are then not consecutive, and may be larger
        than the limit.

    Returns:
      The shape of one piece; the last piece along a dimension may be smaller.

    >>> chunk_shape((10, 8), itemsize=4, limit=128)
    (4, 8)
    >>> chunk_shape((10, 8), itemsize=4, limit=128, whole=[0])
    (10, 3)
    """
    chunk = list(shape)
    for dim, size in enumerate(shape):
        if itemsize * math.prod(chunk) <= limit:
            break
        if dim not in whole:
            rows = limit // (itemsize * math.prod(chunk[:dim] + chunk[dim + 1 :]))
            chunk[dim] = math.ceil(size / math.ceil(size / max(rows, 1)))
    return tuple(max(size, 1) for size in chunk)


def cells(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yields the pieces of an array as slices, in C order.

    Args:
      shape: the array's shape.
      chunk: the shape of one piece; see `chunk_shape`.

    >>> list(cells((3, 2), (2, 2)))
    [(slice(0, 2, None), slice(0, 2, None)), (slice(2, 3, None), slice(0, 2, None))]
    """
    grid = [math.ceil(n / c) for n, c in zip(shape, chunk, strict=True)]
    for cell in np.ndindex(*grid):
        yield tuple(
            slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(cell, chunk, shape, strict=True)
        )


@functools.cache
def context() -> ts.Context:
    """Returns tensorstore's settings."""
    # Files are not synced one by one: a checkpoint is synced once, before it appears.
    return ts.Context({"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}})


def folder_of(name: str) -> str:
    """Returns the folder of a leaf's array, as orbax names it.

    >>> folder_of("params/layers/mlp/up")
    'params.layers.mlp.up/'
    """
    return name.replace("/", ".") + "/"


def _open(state: pathlib.Path, name: str, driver: str) -> ts.TensorStore:
    """Opens the array of a leaf for reading."""
    kvstore = integrity.kvstore_of(state)
    kvstore["path"] += folder_of(name)
    # A chunk that is not there is an error, and not zeros.
    spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
    return ts.open(spec, context=context(), open=True).result()


# Types of value in orbax's _METADATA that have no array: leaves without entries, and empty nodes,
# such as the state of an optimizer that has none.
_NO_ARRAY = ("None", "Dict", "List", "Tuple", "NamedTuple")


def _is_array(leaf: Any) -> bool:
    """Whether a leaf in orbax's _METADATA has an array."""
    return str(leaf["value_metadata"]["value_type"]) not in _NO_ARRAY


def _name(leaf: Any) -> str:
    """A leaf's name, as `checkpoint.by_name` makes it, from orbax's _METADATA."""
    return "/".join(str(part["key"]) for part in leaf["key_metadata"])


@contextlib.contextmanager
def disk_refusals(what: str) -> Iterator[None]:
    """Turns an error of the disk into a UserError that starts with `what`.

    Tensorstore's message holds the system's error number.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        number = re.search(r"os_error_code='(\d+)'", str(error))
        code = int(number[1]) if number else getattr(error, "errno", None)
        if code is None:
            raise
        raise UserError(
            f"{what} ({os.strerror(code)}); fix this, then call again to continue"
        ) from error


def check_space(
    root: pathlib.Path, leaves: Iterable[Any], held: pathlib.Path | None = None
) -> None:
    """Checks that a disk has space for arrays.

    Args:
      root: the folder to write to.
      leaves: the arrays, or `ShapeDtypeStruct`s.
      held: a folder that holds a part of them already.

    Raises:
      UserError: it has not; the message has both sizes.
    """
    if paths.remote(root):  # a bucket is never full
        return
    needed = sum(x.size * x.dtype.itemsize for x in leaves)
    needed -= sum(p.stat().st_size for p in held.rglob("*") if p.is_file()) if held else 0
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"target {root} needs {needed:,} more bytes, but its disk has {free:,} left; free some "
            "space, or give another disk"
        )


class CheckpointReader:
    """Reads a complete checkpoint.

    Attributes:
      path: the checkpoint's folder, such as `checkpoints/1000`.
      leaves: name -> shape and dtype.
      progress: the JSON values that were saved with the state.
      verifiable: whether it has checksums; one of an earlier version has none.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Raises UserError if there is no complete checkpoint, DamageError if it is damaged."""
        self.path = paths.of(path)
        state = paths.absolute(self.path) / STATE
        if not complete(self.path) or not (state.exists() or (self.path / DESCRIPTION).exists()):
            raise UserError(f"{path} is no checkpoint; give a folder checkpoints/STEP")
        with integrity.reading(self.path, "_METADATA"):
            tree = self._object(state / "_METADATA")
            driver = "zarr3" if tree["use_zarr3"] else "zarr"
            names = [_name(leaf) for leaf in tree["tree_metadata"].values() if _is_array(leaf)]
        self._arrays = {}
        for name in names:
            with integrity.reading(self.path, name):
                self._arrays[name] = _open(state, name, driver)
        with integrity.reading(self.path, DESCRIPTION):
            metadata = self._object(self.path / DESCRIPTION).get("custom_metadata")
            filled = {
                name: jax.ShapeDtypeStruct(x.shape, x.dtype.numpy_dtype)
                for name, x in self._arrays.items()
            }
            self.leaves = filled | empty_leaves(metadata)
        checksums = any(map(integrity.has_checksums, self._arrays.values()))
        self.progress = integrity.opened(self.path, metadata, self.leaves, checksums)
        self.progress.pop(EMPTY, None)
        require_version(f"{self.path}, its position", self.progress, entries.VERSION)
        self.verifiable = checksums

    def _object(self, file: pathlib.Path) -> dict[str, Any]:
        """Reads one of orbax's JSON files. Raises ValueError if it is something else."""
        if not file.exists():
            raise integrity.damaged(self.path, f"{file.name} is missing")
        value = json_text.parse(regular.read(file))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value

    def read(self, name: str, slices: Slices | None = None) -> np.ndarray:
        """Reads a part of a leaf.

        Args:
          name: the leaf's name.
          slices: for each dimension a slice, or the indices of its entries; they are combined as
            in `np.ix_`. None: the whole leaf.

        Returns:
          The entries, in the leaf's dtype.

        Raises:
          DamageError: a chunk is not what was written.
          UserError: the disk fails.
        """
        leaf = self.leaves[name]
        if not leaf.size:
            cuts = slices or [slice(None)] * len(leaf.shape)
            sizes = [len(np.arange(n)[cut]) for n, cut in zip(leaf.shape, cuts, strict=True)]
            return np.zeros(sizes, leaf.dtype)
        array = self._arrays[name]
        with integrity.reading(self.path, name):
            return (array if slices is None else array.oindex[tuple(slices)]).read().result()

    def chunk(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the smallest piece of the leaf that can be read alone."""
        if not self.leaves[name].size:
            return tuple(max(n, 1) for n in self.leaves[name].shape)
        sizes = self._arrays[name].chunk_layout.read_chunk.shape or ()
        return tuple(int(size or 1) for size in sizes)

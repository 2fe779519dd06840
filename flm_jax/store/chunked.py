"""Checkpoints as chunked arrays on disk: leaves are read and written slice by slice.

Memory stays bounded. `CheckpointReader` reads the checkpoints of `Checkpoints` and of
`CheckpointWriter`; `Checkpoints.restore` reads those of `CheckpointWriter`. Orbax describes the
tree (`checkpoint.py`), and tensorstore stores the arrays. Several threads may share an object of
either class. `checkpoint.by_name` names the leaves: "params/layers/mlp/up",
"opt_state/1/mu/embedding".
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from flm_jax.errors import UserError
from flm_jax.store.checkpoint import CHUNK_BYTES, STATE, describe, pack, shapes, write_skeleton

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
def _context() -> ts.Context:
    """Returns tensorstore's settings."""
    # Files are not synced one by one: a checkpoint is synced once, before it appears.
    return ts.Context({"file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}})


def _open(state: pathlib.Path, name: str, **options: Any) -> ts.TensorStore:
    """Opens or creates the array of a leaf; `options` are those of `ts.open`, and the driver."""
    folder = name.replace("/", ".") + "/"
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{state}/{folder}"}
    if (state / "manifest.ocdbt").exists():
        base = {"driver": "file", "path": f"{state}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": folder}
    driver = options.pop("driver")
    # Zeros are written too: the chunk's file shows that the chunk is done.
    spec = {"driver": driver, "kvstore": kvstore, "store_data_equal_to_fill_value": True}
    return ts.open(spec | options.pop("spec", {}), context=_context(), **options).result()


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
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Raises UserError if there is no complete checkpoint."""
        self.path = pathlib.Path(path)
        self.leaves, self.progress = describe(self.path)
        state = self.path.absolute() / STATE
        zarr3 = json.loads((state / "_METADATA").read_text())["use_zarr3"]
        driver = "zarr3" if zarr3 else "zarr"
        self._arrays = {
            name: _open(state, name, driver=driver, open=True)
            for name, x in self.leaves.items()
            if x.size
        }

    def read(self, name: str, slices: Slices | None = None) -> np.ndarray:
        """Reads a part of a leaf.

        Args:
          name: the leaf's name.
          slices: for each dimension a slice, or the indices of its entries; they are combined as
            in `np.ix_`. None: the whole leaf.

        Returns:
          The entries, in the leaf's dtype.

        Raises:
          UserError: the disk fails.
        """
        leaf = self.leaves[name]
        if not leaf.size:
            cuts = slices or [slice(None)] * len(leaf.shape)
            sizes = [len(np.arange(n)[cut]) for n, cut in zip(leaf.shape, cuts, strict=True)]
            return np.zeros(sizes, leaf.dtype)
        array = self._arrays[name]
        with disk_refusals(f"{self.path}: {name} cannot be read"):
            return (array if slices is None else array.oindex[tuple(slices)]).read().result()

    def chunk(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the smallest piece of the leaf that can be read alone."""
        if not self.leaves[name].size:
            return tuple(max(n, 1) for n in self.leaves[name].shape)
        sizes = self._arrays[name].chunk_layout.read_chunk.shape or ()
        return tuple(int(size or 1) for size in sizes)


class CheckpointWriter:
    """Writes a checkpoint at PATH.partial; `finish` renames it to PATH.

    After a kill, a new writer continues the same checkpoint: `holds` tells which chunks are done.

    Attributes:
      path: the checkpoint's folder, such as `checkpoints/1000`.
      leaves: name -> shape and dtype.
      chunks: name -> shape of one chunk.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        like: Any,
        progress: dict[str, Any],
        chunks: Mapping[str, Sequence[int]] | None = None,
    ):
        """Starts a checkpoint, or continues one that was started with the same arguments.

        Args:
          path: the checkpoint's folder; its name is the step.
          like: a tree of `ShapeDtypeStruct`s.
          progress: JSON values to store with the state.
          chunks: name -> shape of one chunk; the other leaves get the shape of `chunk_shape`.

        Raises:
          UserError: the path exists, another checkpoint was started there, or the disk fails.
        """
        self.path = pathlib.Path(path)
        self.leaves = shapes(like)
        self.chunks = {
            name: tuple(
                (chunks or {}).get(name) or chunk_shape(x.shape, x.dtype.itemsize, CHUNK_BYTES)
            )
            for name, x in self.leaves.items()
        }
        self._partial = self.path.absolute().with_name(self.path.name + ".partial")
        if self.path.exists():
            raise UserError(f"{self.path} exists; give another folder, or remove it")
        if not self._partial.exists():
            self._begin(like, progress)
        self._check(progress)
        self._arrays = {
            name: _open(self._partial / STATE, name, driver="zarr", open=True)
            for name, x in self.leaves.items()
            if x.size
        }

    def _begin(self, like: Any, progress: dict[str, Any]) -> None:
        """Atomically creates the empty checkpoint: all arrays, no chunk."""
        created = self._partial.with_name(self.path.name + ".begun")
        self._clear(created)
        try:
            with disk_refusals(f"{self.path} cannot be written"):
                created.parent.mkdir(parents=True, exist_ok=True)
                write_skeleton(created, *pack(like, progress))
                for name, x in self.leaves.items():
                    if not x.size:
                        continue
                    _open(
                        created / STATE,
                        name,
                        driver="zarr",
                        spec={"metadata": {"compressor": None}},
                        create=True,
                        delete_existing=True,
                        dtype=ts.dtype(x.dtype),
                        shape=x.shape,
                        chunk_layout=ts.ChunkLayout(chunk_shape=self.chunks[name]),
                    )
                created.rename(self._partial)
        except UserError:
            self._clear(created)
            raise

    @staticmethod
    def _clear(folder: pathlib.Path) -> None:
        """Removes the incomplete folder of a killed or refused process."""
        for path in folder.parent.glob(folder.name + "*"):  # orbax adds a temporary suffix
            shutil.rmtree(path)

    def _check(self, progress: dict[str, Any]) -> None:
        """Raises UserError if the partial checkpoint was started with other arguments."""
        have = CheckpointReader(self._partial)
        same = have.leaves == self.leaves and have.progress == progress
        if not same or any(
            have.chunk(n) != self.chunks[n] for n, x in have.leaves.items() if x.size
        ):
            raise UserError(
                f"{self._partial}: another checkpoint was started here; remove it to start again"
            )

    def _file(self, name: str, cell: Sequence[int]) -> pathlib.Path:
        """Returns the file of the chunk at a position in the grid (zarr format, version 2)."""
        folder = self._partial / STATE / name.replace("/", ".")
        return folder / (".".join(map(str, cell)) or "0")

    def pieces(self, name: str) -> Iterator[tuple[slice, ...]]:
        """Yields the leaf's chunks as slices, in C order."""
        return cells(self.leaves[name].shape, self.chunks[name])

    def holds(self, name: str, piece: Sequence[slice]) -> bool:
        """Tells whether a piece of `pieces` is written, by this process or an earlier one."""
        cell = [s.start // c for s, c in zip(piece, self.chunks[name], strict=True)]
        return self._file(name, cell).exists()

    def held_bytes(self) -> int:
        """Returns the size of the pieces that are written, in bytes."""
        return sum(
            self.leaves[name].dtype.itemsize * math.prod(s.stop - s.start for s in piece)
            for name in self.leaves
            for piece in self.pieces(name)
            if self.holds(name, piece)
        )

    def write(self, name: str, slices: Slices | None, values: np.ndarray) -> None:
        """Writes a part of a leaf.

        Args:
          name: the leaf's name.
          slices: for each dimension a slice; a piece of `pieces` is fastest. None: the whole leaf.
          values: the entries, in the leaf's dtype; the array must not change afterwards.

        Raises:
          UserError: the disk fails.
        """
        if not self.leaves[name].size:
            return
        array = self._arrays[name]
        target = array if slices is None else array[tuple(slices)]
        with disk_refusals(f"{self.path}: {name} cannot be written"):
            target.write(values, can_reference_source_data_indefinitely=True).result()

    def finish(self) -> None:
        """Syncs the checkpoint to disk and renames it to its final path.

        Raises ValueError if a piece was not written, UserError if the disk fails.
        """
        for name in self.leaves:
            for piece in self.pieces(name):
                if not self.holds(name, piece):
                    raise ValueError(f"{self.path}: {name} was never written at {piece}")
        with disk_refusals(f"{self.path} cannot be written"):
            for folder, _, files in os.walk(self._partial, topdown=False):
                for file in [*files, "."]:
                    _sync(pathlib.Path(folder, file))
            self._partial.rename(self.path)
            _sync(self.path.parent)


def _sync(path: pathlib.Path) -> None:
    """Waits until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

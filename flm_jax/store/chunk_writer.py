"""Writes a checkpoint piece by piece, in several processes at once, into few large files.

Each process collects pieces until they fill a batch, and commits the batch to a database of its own
(OCDBT, the format in which orbax stores arrays): one data file, then the list of what it holds.
A piece counts as written once its batch is committed, so after a kill any number of processes
continues with the pieces that no database holds. At the end the first process joins the databases
into one, which refers to the same data files, and the checkpoint appears.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from flm_jax.errors import UserError
from flm_jax.runtime import paths, processes
from flm_jax.store import objects
from flm_jax.store.checkpoint import (
    CHUNK_BYTES,
    COMMITTED,
    STATE,
    complete,
    mark_complete,
    pack,
    shapes,
    write_skeleton,
)
from flm_jax.store.chunked import (
    cells,
    chunk_shape,
    context,
    disk_refusals,
    folder_of,
)
from flm_jax.store.files import sync
from flm_jax.store.integrity import CHECKSUM

BATCH_BYTES = 128 << 20  # of one data file, where the caller does not say
_BEGUN = "growing.json"  # in an incomplete checkpoint: what it will hold
_DATABASES = "ocdbt.process_"  # orbax's name for the databases of single processes


class CheckpointWriter:
    """Writes a checkpoint at PATH.partial; `finish` renames it to PATH.

    A bucket renames nothing. There it is written at PATH, and `finish` adds the object that orbax
    requires of a complete checkpoint.

    All processes of a run create the writer together; each writes pieces of its own
    (`processes.share`), and they finish together. Threads may share a writer. After a kill, a new
    writer continues the same checkpoint: `holds` tells which pieces are done.

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
        batch_bytes: int = BATCH_BYTES,
    ):
        """Starts a checkpoint, or continues one that was started with the same arguments.

        Args:
          path: the checkpoint's folder; its name is the step.
          like: a tree of `ShapeDtypeStruct`s.
          progress: JSON values to store with the state.
          chunks: name -> shape of one chunk; the other leaves get the shape of `chunk_shape`.
          batch_bytes: bytes of pieces that are committed at once. Up to twice as many are held.

        Raises:
          UserError: the path exists, another checkpoint was started there, or the disk fails.
        """
        self.path = path = paths.of(path)
        self.leaves = shapes(like)
        self.chunks = {
            name: tuple(
                (chunks or {}).get(name) or chunk_shape(x.shape, x.dtype.itemsize, CHUNK_BYTES)
            )
            for name, x in self.leaves.items()
        }
        self._partial = path if paths.remote(path) else path.with_name(path.name + ".partial")
        self._state = paths.absolute(self._partial) / STATE
        description = {
            "format": "zarr3",
            "progress": progress,
            "leaves": {
                name: [x.dtype.name, list(x.shape), list(self.chunks[name])]
                for name, x in self.leaves.items()
            },
        }
        if not processes.once(lambda: self._is_begun(description)):
            self._begin(like, progress, description)
        self._held = set(processes.once(self._written))
        own = self._state / f"{_DATABASES}{processes.index()}"
        # The descriptions of the arrays are in the first process's database.
        self._arrays = {
            name: _open(own, name, self._metadata(name), open=True, assume_metadata=True)
            for name, x in self.leaves.items()
            if x.size
        }
        self._batches = _Batches(batch_bytes, self._held)

    def _is_begun(self, description: dict[str, Any]) -> bool:
        """Whether an earlier call created it. Raises UserError if there is another checkpoint."""
        if complete(self.path):
            raise UserError(f"{self.path} exists; give another folder, or remove it")
        begun = self._partial / _BEGUN
        if not begun.exists():
            return False
        if json.loads(begun.read_text()) != json.loads(json.dumps(description)):
            raise UserError(
                f"{self._partial}: another checkpoint was started here; remove it to start again"
            )
        return True

    def _begin(self, like: Any, progress: dict[str, Any], description: dict[str, Any]) -> None:
        """Creates the checkpoint without any piece, beside its place; then it appears there."""
        created = self.path.with_name(self.path.name + ".begun")

        def clear() -> None:
            for left in paths.listed(created.parent):  # orbax adds a temporary suffix
                if left.name.startswith(created.name):
                    paths.remove(left)

        processes.once(clear)
        with disk_refusals(f"{self.path} cannot be written"):
            try:
                write_skeleton(created, *pack(like, progress))
                processes.once(lambda: self._appear(created, description))
            except BaseException:
                if processes.first():
                    clear()
                raise

    def _appear(self, created: pathlib.Path, description: dict[str, Any]) -> None:
        """Completes a skeleton, and moves it to the place of the incomplete checkpoint."""
        for part in ("manifest.ocdbt", "d", f"{_DATABASES}0"):
            paths.remove(created / STATE / part)
        if paths.remote(self.path):
            paths.remove(self._partial)
            for file in paths.files(created):
                if file.name != COMMITTED:
                    paths.copy(file, self._partial / file.relative_to(created))
            paths.remove(created)
            created = self._partial
        together = ts.Transaction()  # one file describes all arrays
        for name, x in self.leaves.items():
            if x.size:
                options = {"create": True, "open": True, "transaction": together}
                at = paths.absolute(created) / STATE / f"{_DATABASES}0"
                _open(at, name, self._metadata(name), **options)
        together.commit_async().result()
        (created / _BEGUN).write_text(json.dumps(description))
        if created != self._partial:
            paths.remove(self._partial)
            created.rename(self._partial)

    def _metadata(self, name: str) -> dict[str, Any]:
        """Describes an array in zarr's format, version 3: without compression, with checksums."""
        leaf = self.leaves[name]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(leaf.shape),
            "data_type": ts.dtype(leaf.dtype).to_json(),
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": list(self.chunks[name])},
            },
            "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, CHECKSUM],
            "fill_value": ts.dtype(leaf.dtype).type(0).item(),
        }

    def _databases(self) -> list[pathlib.Path]:
        return [p for p in paths.listed(self._state) if p.name.startswith(_DATABASES)]

    def _written(self) -> list[str]:
        """Lists the pieces that some database holds."""
        with disk_refusals(f"{self.path} cannot be read"):
            return [bytes(key).decode() for at in self._databases() for key in _listed(at)]

    def _key(self, name: str, piece: Sequence[slice]) -> str:
        """Returns a piece's key in a database."""
        cell = [s.start // c for s, c in zip(piece, self.chunks[name], strict=True)]
        return folder_of(name) + (".".join(map(str, cell)) or "0")

    def pieces(self, name: str) -> Iterator[tuple[slice, ...]]:
        """Yields the leaf's chunks as slices, in C order."""
        return cells(self.leaves[name].shape, self.chunks[name])

    def holds(self, name: str, piece: Sequence[slice]) -> bool:
        """Tells whether a piece was written before this writer began, or since then by it."""
        return self._key(name, piece) in self._held

    def held_bytes(self) -> int:
        """Returns the size of the pieces that `holds` tells of, in bytes."""
        return sum(
            self.leaves[name].dtype.itemsize * math.prod(s.stop - s.start for s in piece)
            for name in self.leaves
            for piece in self.pieces(name)
            if self.holds(name, piece)
        )

    def write(self, name: str, slices: Sequence[slice] | None, values: np.ndarray) -> None:
        """Writes a part of a leaf; it may be on disk only after `finish`.

        Args:
          name: the leaf's name.
          slices: for each dimension a slice: a piece of `pieces`. None: the whole leaf.
          values: the entries, in the leaf's dtype.

        Raises:
          UserError: the disk fails.
        """
        if not self.leaves[name].size:
            return
        target = self._arrays[name]
        with disk_refusals(f"{self.path}: {name} cannot be written"):
            cut = tuple(slice(0, n) for n in target.shape) if slices is None else tuple(slices)
            self._batches.write(target, cut, values, self._key(name, cut))

    def finish(self) -> None:
        """Waits for all processes, syncs the checkpoint and lets it appear at its final path.

        Raises ValueError if a piece was not written, UserError if the disk fails.
        """
        with disk_refusals(f"{self.path} cannot be written"):
            self._batches.commit()
            own = self._state / f"{_DATABASES}{processes.index()}"
            if not paths.remote(own) and own.exists():
                _sync_tree(own)
        processes.wait()
        processes.once(self._publish)

    def _publish(self) -> None:
        """Joins the databases, and shows the checkpoint as complete."""
        written = set(self._written())
        for name in self.leaves:
            for piece in self.pieces(name):
                if self.leaves[name].size and self._key(name, piece) not in written:
                    raise ValueError(f"{self.path}: {name} was never written at {piece}")
        with disk_refusals(f"{self.path} cannot be written"):
            together = ts.Transaction(atomic=True)
            joined = _database(self._state).with_transaction(together)
            for at in self._databases():
                _database(at).experimental_copy_range_to(joined).result()
            together.commit_async().result()
            (self._partial / _BEGUN).unlink()
            if paths.remote(self.path):
                mark_complete(self.path)
                return
            _sync_tree(self._partial)
            self._partial.rename(self.path)
            sync(self.path.parent)


class _Batch:
    """Pieces that are committed together."""

    def __init__(self) -> None:
        self.transaction = ts.Transaction()
        self.keys: list[str] = []
        self.bytes = 0
        self.writers = 0  # threads that are adding a piece

    def commit(self) -> list[str]:
        """Waits until the pieces are written; returns their keys."""
        if self.bytes:
            self.transaction.commit_async().result()
        return self.keys


class _Batches:
    """Collects pieces, and commits them when a batch is full; one more fills meanwhile."""

    def __init__(self, most: int, written: set[str]):
        """Commits `most` bytes at once; adds the keys of written pieces to `written`."""
        self._most, self._written = most, written
        self._changed = threading.Condition()
        self._filling = _Batch()
        self._committing = False

    def write(
        self, array: ts.TensorStore, cut: tuple[Any, ...], values: np.ndarray, key: str
    ) -> None:
        with self._changed:
            # A full batch waits until the one before is on disk: no more than two are held.
            self._changed.wait_for(lambda: self._filling.bytes < self._most)
            batch = self._filling
            batch.bytes += values.nbytes
            batch.keys.append(key)
            batch.writers += 1
        try:
            array.with_transaction(batch.transaction)[cut].write(values).copy.result()
        finally:
            with self._changed:
                batch.writers -= 1
                self._changed.notify_all()
        self._commit_full()

    def _commit_full(self) -> None:
        """Commits the batch if it is full, and then the next one if that has become full."""
        failed: Exception | None = None
        while True:
            with self._changed:
                batch = self._filling
                if batch.bytes < self._most or batch.writers or self._committing:
                    break
                self._filling, self._committing = _Batch(), True
                self._changed.notify_all()
            try:
                self._written.update(batch.commit())
            except Exception as error:  # other threads wait for the next batch all the same
                failed = error
            with self._changed:
                self._committing = False
                self._changed.notify_all()
        if failed:
            raise failed

    def commit(self) -> None:
        """Commits what is left; no other thread writes any more."""
        batch, self._filling = self._filling, _Batch()
        self._written.update(batch.commit())


def _kvstore(at: pathlib.Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": objects.kvstore(at)}


def _database(at: pathlib.Path) -> ts.KvStore:
    return ts.KvStore.open(_kvstore(at), context=context()).result()


def _listed(at: pathlib.Path) -> list[bytes]:
    keys: list[bytes] = _database(at).list().result()
    return keys


def _open(at: pathlib.Path, name: str, metadata: dict[str, Any], **options: Any) -> ts.TensorStore:
    """Opens or creates an array in a database."""
    spec = {
        "driver": "zarr3",
        "kvstore": {**_kvstore(at), "path": folder_of(name)},
        "metadata": metadata,
        # Zeros are written too: that a chunk is there shows that it is done.
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, context=context(), **options).result()


def _sync_tree(folder: pathlib.Path) -> None:
    """Waits until all files of a folder are on disk."""
    for at, _, files in os.walk(folder, topdown=False):
        for file in [*files, "."]:
            sync(pathlib.Path(at, file))

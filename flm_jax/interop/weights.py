"""One interface to a model's parameters, read block by block from disk or memory.

A `Weights` is a Hugging Face folder, a checkpoint, or a tree in memory, or a wrapper that changes
one of these: it folds in masks or multipliers, or changes the size of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.growth.folding import Masks, fold_block, folded_model
from flm_jax.interop import hf_config, names
from flm_jax.interop.gguf_files import GgufFile, is_gguf
from flm_jax.interop.names import Index
from flm_jax.interop.tensor_files import Tensors
from flm_jax.interop.tokenizer_files import with_padding
from flm_jax.params import axes, mup, trees
from flm_jax.params.axes import Role
from flm_jax.params.dtypes import wide
from flm_jax.store.chunked import CheckpointReader


class Weights(Protocol):
    """All parameters of one model."""

    @property
    def config(self) -> TransformerConfig:
        """Config of these parameters."""

    def read(self, path: str, index: Index) -> np.ndarray:
        """Reads a block of a parameter.

        Args:
          path: path of the parameter in the axis table.
          index: one slice per axis, with a step of 1.

        Returns:
          The block in the axis table's layout, in float32 (float64 if it is stored in float64).
        """


def whole(path: str, config: TransformerConfig) -> Index:
    """Returns the index that covers a whole parameter."""
    return tuple(slice(0, size) for size in mup.spec(config).shape(path))


def load(weights: Weights) -> dict[str, Any]:
    """Reads all parameters as nested dicts of numpy arrays."""
    config = weights.config
    table = axes.table(config)
    return trees.unflatten({path: weights.read(path, whole(path, config)) for path in table})


def place(weights: Weights, shardings: Any) -> dict[str, Any]:
    """Reads all parameters onto devices; every process reads only its own part.

    Args:
      weights: the parameters.
      shardings: nested dicts with a sharding for each parameter.

    Returns:
      Nested dicts of arrays, with the structure of `shardings`.
    """
    config = weights.config
    spec = mup.spec(config)

    def placed(path: str, sharding: jax.sharding.Sharding) -> jax.Array:
        shape = spec.shape(path)

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            cuts = (cut.indices(size) for cut, size in zip(index, shape, strict=True))
            block = weights.read(path, tuple(slice(start, stop) for start, stop, _ in cuts))
            return block.astype(wide(config.dtype), copy=False)

        return jax.make_array_from_callback(shape, sharding, read)

    return trees.unflatten({path: placed(path, s) for path, s in trees.flatten(shardings)})


class HuggingFace:
    """A folder with config.json and safetensors or .bin files, or a GGUF file.

    Attributes:
      described: contents of its config.json.
      tensors: its weight files.
      config: config of the model. As in transformers, a head in the files that is not the embedding
        stays, even if config.json says that they are tied.
      notes: what is unusual about the files.
    """

    def __init__(self, folder: pathlib.Path):
        """Reads config.json and the files' headers; also the head's values, if it may be tied.

        Raises:
          UserError: a file is missing or damaged, or the tensors are not those of the
            architecture. The message names file and tensor.
        """
        if is_gguf(folder):
            file = GgufFile(folder)
            self.described = hf_config.described(file.values, folder)
            self.tensors = Tensors(folder, file)
        else:
            self.described = hf_config.read(folder)
            self.tensors = Tensors(folder)
        self.config = with_padding(self.described.config, self.described.values)
        self.notes = [*self.described.notes, *self.tensors.notes]
        if self.config.num_layers > len(self.tensors.files):
            raise UserError(  # before a list of names is made for so many
                f"{folder}: config.json says num_hidden_layers {self.config.num_layers}, but the "
                f"files have {len(self.tensors.files)} tensors in all; fix config.json"
            )
        self._lay_out()
        expected = names.shapes(self._table, self._sizes)
        if self.config.tied and {_HEAD, _EMBEDDING} & set(self.tensors.files) == {_HEAD}:
            expected[_HEAD] = expected.pop(_EMBEDDING)
            self.tensors.check(expected)
            self._of["embedding"] = dataclasses.replace(self._of["embedding"], name=_HEAD)
            self.notes.append(
                f"config.json says tie_word_embeddings, and the files have {_HEAD} alone; it is "
                f"also {_EMBEDDING}, as in transformers"
            )
        elif self.config.tied and _HEAD in self.tensors.files:
            self.tensors.check({**expected, _HEAD: expected[_EMBEDDING]})
            if not self._head_is_embedding():
                self.config = dataclasses.replace(self.config, tied=False)
                self._lay_out()
                self.notes.append(
                    f"config.json says tie_word_embeddings, but {_HEAD} differs from {_EMBEDDING}; "
                    "both are kept, as in transformers"
                )
        else:
            self.tensors.check(expected)

    def _lay_out(self) -> None:
        self._table, self._sizes = axes.table(self.config), axes.axis_sizes(self.config)
        self._of = names.tensors(self._table)

    def _head_is_embedding(self) -> bool:
        """Compares the two tensors by rows."""
        rows = self.config.vocab_size
        step = max(1, _COMPARED_BYTES // (8 * self.config.d_model))
        blocks = ((start, min(start + step, rows)) for start in range(0, rows, step))
        return all(
            np.array_equal(self.tensors.read(_HEAD, *b), self.tensors.read(_EMBEDDING, *b))
            for b in blocks
        )

    def read(self, path: str, index: Index) -> np.ndarray:
        if self._table[path].stacked:
            layers, *own = index
            read = [self._read(path, i, tuple(own)) for i in range(layers.start, layers.stop)]
            return read[0][None] if len(read) == 1 else np.stack(read)
        return self._read(path, 0, index)

    def _read(self, path: str, layer: int, index: Index) -> np.ndarray:
        """Reads the rows of one tensor that `index` needs, then cuts its other axes."""
        tensor, param = self._of[path], self._table[path]
        own = names.own_axes(param)
        dim, row_size = own.index(tensor.rows), tensor.row_size(self._sizes)
        name = tensor.name.format(layer=layer)
        rows = self.tensors.read(name, index[dim].start * row_size, index[dim].stop * row_size)
        if not np.isfinite(rows).all():
            raise UserError(
                f"{self.tensors.files[name].path}: {name} has values that are NaN or infinite; "
                "fetch the file again, or train the model again"
            )
        sizes = self._sizes | {tensor.rows: index[dim].stop - index[dim].start}
        x = names.from_rows(rows, param, tensor, sizes)
        others = tuple(slice(None) if d == dim else cut for d, cut in enumerate(index))
        # The order in memory stays: writing in the same layout again then copies nothing.
        x = x[others].astype(wide(rows.dtype), order="K", copy=False)
        offset = self.described.family.gain_offset
        return x + np.asarray(offset, x.dtype) if offset and Role.GAIN in param.roles else x


_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The parameters in a checkpoint of this library, without its optimizer state."""

    reader: CheckpointReader
    config: TransformerConfig

    def __post_init__(self) -> None:
        """Raises UserError if the checkpoint's parameters do not match the config."""
        spec = mup.spec(self.config)
        for path in spec.table:
            leaf = self.reader.leaves.get(f"params/{path}")
            have, want = leaf and list(leaf.shape), list(spec.shape(path))
            if have != want:
                raise UserError(
                    f"{self.reader.path}: params/{path} is {have or 'missing'}, config.json of its "
                    f"stage says {want}; restore this checkpoint"
                )

    def read(self, path: str, index: Index) -> np.ndarray:
        return self.reader.read(f"params/{path}", index)


@dataclasses.dataclass(frozen=True)
class Tree:
    """Parameters in memory, as nested dicts of arrays."""

    params: Any
    config: TransformerConfig

    def __post_init__(self) -> None:
        """Raises UserError if the parameters do not match the config."""
        leaves, spec = dict(trees.flatten(self.params)), mup.spec(self.config)
        for path in dict.fromkeys([*spec.table, *leaves]):
            have = leaves[path].shape if path in leaves else "missing"
            want = spec.shape(path) if path in spec.table else "absent"
            if have != want:
                raise UserError(
                    f"parameter {path!r} is {have}, its config says {want}; give the config of "
                    "these parameters"
                )

    def read(self, path: str, index: Index) -> np.ndarray:
        return np.asarray(dict(trees.flatten(self.params))[path][index])


@dataclasses.dataclass(frozen=True)
class Changed:
    """Weights with a function applied to each block; shapes do not change."""

    inner: Weights
    config: TransformerConfig
    change: Callable[[np.ndarray, str, Index], np.ndarray]

    def read(self, path: str, index: Index) -> np.ndarray:
        return self.change(self.inner.read(path, index), path, index)


def scaled(weights: Weights, config: TransformerConfig, scales: Mapping[str, float]) -> Weights:
    """Multiplies parameters by a factor each.

    Args:
      weights: the parameters.
      config: config of the result.
      scales: the factor for each path; a path that is not in it keeps its values.
    """

    def change(x: np.ndarray, path: str, index: Index) -> np.ndarray:
        return x * np.asarray(scales[path], x.dtype) if path in scales else x

    return Changed(weights, config, change)


def without_offset(weights: Weights, offset: float) -> Weights:
    """Subtracts `offset` from the norms' gains, as a family's files have them."""
    gains = hf_config.gain_paths(weights.config)

    def change(x: np.ndarray, path: str, index: Index) -> np.ndarray:
        return x - np.asarray(offset, x.dtype) if offset and path in gains else x

    return Changed(weights, weights.config, change)


def folded(weights: Weights, masks: Masks) -> Weights:
    """Folds run-time masks into the parameters; see `growth/folding.py`."""
    table = axes.table(weights.config)
    return Changed(
        weights,
        folded_model(weights.config, masks),
        lambda x, path, index: fold_block(x, table[path], masks, index),
    )


class Rounded:
    """Weights in another dtype.

    Attributes:
      dtype: of the blocks.
      notes: says that values were rounded, and by how much at most so far.
    """

    def __init__(self, inner: Weights, dtype: np.dtype, called: Mapping[str, str] | None = None):
        """`called`: what errors call a parameter, with {layer} for its layer; None: its path."""
        self._inner, self.config, self.dtype = inner, inner.config, dtype
        self._called = called or {}
        self._largest, self._lock = 0.0, threading.Lock()

    def read(self, path: str, index: Index) -> np.ndarray:
        """Reads a block. Raises UserError if a value is not finite, or the dtype cannot hold it."""
        x = self._inner.read(path, index)
        with np.errstate(over="ignore"):
            rounded = x.astype(self.dtype, copy=False)
        if not np.isfinite(rounded).all():
            name = self._called.get(path, path).format(layer=index[0].start)
            if not np.isfinite(x).all():
                raise UserError(
                    f"{name} has values that are NaN or infinite; take an earlier checkpoint, or "
                    "train the model again"
                )
            wider = "float32" if self.dtype.name != "float16" else "bfloat16 or float32"
            raise UserError(
                f"{name} has values that {self.dtype.name} cannot hold; choose {wider}",
                argument="dtype",
            )
        if rounded.dtype.itemsize < x.dtype.itemsize:
            change = np.abs(rounded.astype(x.dtype) - x).max(initial=0)
            with self._lock:
                self._largest = max(self._largest, float(change))
        return rounded

    @property
    def notes(self) -> list[str]:
        if not self._largest:
            return []
        return [f"parameters are rounded to {self.dtype.name}, by at most {self._largest:.2g}"]


@dataclasses.dataclass(frozen=True)
class Resized:
    """Weights with another vocabulary size: zero rows are added at the end, or rows removed."""

    inner: Weights
    config: TransformerConfig

    def read(self, path: str, index: Index) -> np.ndarray:
        axis_names = axes.table(self.config)[path].axes
        if "vocab" not in axis_names:
            return self.inner.read(path, index)
        dim, have = axis_names.index("vocab"), self.inner.config.vocab_size
        wanted = index[dim]
        kept = slice(min(wanted.start, have), min(wanted.stop, have))
        x = self.inner.read(path, (*index[:dim], kept, *index[dim + 1 :]))
        padding = [(0, 0)] * x.ndim
        padding[dim] = (0, (wanted.stop - wanted.start) - (kept.stop - kept.start))
        return np.pad(x, padding)

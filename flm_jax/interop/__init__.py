"""Weights in and out: Hugging Face's Llama, TeleFLM and Granite, and the runs of this library.

torch and transformers are not needed, but for torch's older .bin files.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
import numpy as np

from flm_jax.config import TransformerConfig
from flm_jax.interop.converter import DTYPES, FORMATS, MEMORY, convert, write_hf
from flm_jax.interop.sources import open_huggingface, open_source, source_of
from flm_jax.interop.tokenizer_files import Vocabulary
from flm_jax.interop.weights import Tree, Weights, whole
from flm_jax.params import axes, mup, trees
from flm_jax.params.dtypes import wide

__all__ = [
    "DTYPES",
    "FORMATS",
    "MEMORY",
    "convert",
    "load",
    "load_hf",
    "open_source",
    "place",
    "save_hf",
    "source_of",
]


def load_hf(path: str | os.PathLike[str]) -> tuple[dict[str, Any], TransformerConfig]:
    """Reads a folder of Hugging Face files: config.json, and safetensors or .bin.

    Returns: parameters as numpy arrays, float32 (float64 where stored so), and their config.

    Raises:
      UserError: naming file, tensor or key: missing or damaged files, another architecture.
    """
    weights = open_huggingface(pathlib.Path(path)).weights
    return load(weights), weights.config


def load(weights: Weights) -> dict[str, Any]:
    """All parameters as nested dicts of numpy arrays."""
    config = weights.config
    return trees.unflatten(
        {path: weights.read(path, whole(path, config)) for path in axes.table(config)}
    )


def place(weights: Weights, shardings: Any) -> dict[str, Any]:
    """All parameters as arrays on devices; every process reads its own part alone.

    Args: `shardings`: of each parameter, in the same nested dicts.
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


def save_hf(
    path: str | os.PathLike[str],
    params: Any,
    config: TransformerConfig,
    format: str,
    *,
    dtype: str = "float32",
    vocabulary: str = "",
    context: int = 0,
) -> list[str]:
    """Writes a folder that transformers opens.

    Args:
      path: of a folder that does not exist.
      params: nested dicts, as the axis table names them; arrays of jax or numpy.
      config: theirs.
      format: "llama" (multipliers are multiplied into embedding and head), "teleflm" or "granite".
      dtype: of the files: float32, bfloat16 or float16.
      vocabulary: a folder whose tokenizer files and config.json keys come along, a SentencePiece
        model, "bytes", or "": none.
      context: the longest sequence, where that config.json does not say; 0: 2048.

    Returns: notes on what was changed.

    Raises:
      UserError: the format has no such model; the path exists or cannot be written.
    """
    _, notes = write_hf(
        pathlib.Path(path), Tree(params, config), format, dtype, Vocabulary(vocabulary),
        context=context,
    )  # fmt: skip
    return notes

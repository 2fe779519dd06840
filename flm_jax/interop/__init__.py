"""Weights in and out: Hugging Face's Llama, TeleFLM and Granite, and the runs of this library.

Neither torch nor transformers is needed, except torch for older .bin files.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.interop.converter import DTYPES, FORMATS, MEMORY, convert, write_hf
from flm_jax.interop.opening import open_huggingface, open_model
from flm_jax.interop.tokenizer_files import Vocabulary
from flm_jax.interop.weights import Tree, load

__all__ = [
    "DTYPES",
    "FORMATS",
    "MEMORY",
    "convert",
    "load_hf",
    "open_model",
    "save_hf",
]


def load_hf(path: str | os.PathLike[str]) -> tuple[dict[str, Any], TransformerConfig]:
    """Reads a folder of Hugging Face files: config.json, and safetensors or .bin.

    Returns:
      Parameters as numpy arrays, float32 (float64 where stored so), and their config.

    Raises:
      UserError: naming file, tensor or key: missing or damaged files, another architecture.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path is {path!r} of type {type(path).__name__}; give a folder's path")
    weights = open_huggingface(pathlib.Path(path)).weights
    return load(weights), weights.config


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
      path: a folder that does not exist.
      params: nested dicts as the axis table names them; arrays of jax or numpy.
      config: the config of these parameters.
      format: "llama" (multipliers are multiplied into embedding and head), "teleflm" or "granite".
      dtype: of the files: float32, bfloat16 or float16.
      vocabulary: a folder whose tokenizer files and config.json keys come along, a SentencePiece
        model, "bytes", or "": none.
      context: the longest sequence, where that config.json does not say; 0: 2048.

    Returns:
      Notes on what was changed.

    Raises:
      UserError: the format has no such model; the path exists or cannot be written.
    """
    _, notes = write_hf(
        pathlib.Path(path), Tree(params, config), format, dtype, Vocabulary(vocabulary),
        context=context,
    )  # fmt: skip
    return notes

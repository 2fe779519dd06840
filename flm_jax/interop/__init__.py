"""Reads and writes weights: Hugging Face's Llama, TeleFLM and Granite, and this library's runs.

It does not need transformers. It needs torch only for older .bin files.
"""

from __future__ import annotations

import os
from typing import Any

from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.interop.converter import DTYPES, FORMATS, MEMORY, convert, write_hf
from flm_jax.interop.opening import open_huggingface, open_model
from flm_jax.interop.tokenizer_files import Vocabulary
from flm_jax.interop.weights import Tree, load
from flm_jax.runtime import paths

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

    Args:
      path: the folder.

    Returns:
      The parameters, as nested dicts of numpy arrays in float32 (float64 if the files are in
      float64), and their config.

    Raises:
      UserError: a file is missing or damaged, or the architecture is another one. The message
        names the file, tensor or key.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path is {path!r} of type {type(path).__name__}; give a folder's path")
    weights = open_huggingface(paths.of(path)).weights
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
      path: a folder that does not exist yet.
      params: nested dicts with the paths of the axis table; jax or numpy arrays.
      config: the config of these parameters.
      format: a family of `families.FAMILIES`; it must have what the model has, except multipliers,
        which are folded into the parameters.
      dtype: dtype of the files: float32, bfloat16 or float16.
      vocabulary: a folder whose tokenizer files and other config.json keys are copied, a
        SentencePiece model, "bytes", or "" for none.
      context: the longest sequence in tokens, used if that config.json does not give one; 0 means
        2048.

    Returns:
      One note for each change to the parameters.

    Raises:
      UserError: the format cannot express this model, or the path exists or cannot be written.
    """
    _, notes = write_hf(
        paths.of(path), Tree(params, config), format, dtype, Vocabulary(vocabulary),
        context=context,
    )  # fmt: skip
    return notes

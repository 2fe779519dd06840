"""Text as packed batches of tokens: seqio tasks behind an iterator whose position can be saved.

This is the only package that loads seqio and TensorFlow. Loading takes seconds, so it happens when
a function is called, not when this package is imported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from flm_jax import extras
from flm_jax.config import DataConfig

if TYPE_CHECKING:
    from flm_jax.data.pipeline import Corpus

__all__ = ["open_corpus", "train_sentencepiece"]

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def open_corpus(config: DataConfig, whole: bool = False) -> Corpus:
    """Opens documents and their vocabulary.

    Args:
      config: names the task, its path and the vocabulary.
      whole: read the user's files as one split, "all", instead of train and validation. One
        document is then enough.

    Returns:
      The opened corpus; nothing is tokenised yet.

    Raises:
      UserError: the task, the path, a document or the vocabulary is missing or malformed.
    """
    corpus: Corpus = _pipeline().open_corpus(config, whole)
    return corpus


def train_sentencepiece(config: DataConfig, vocab_size: int, output_path: str) -> None:
    """Trains a SentencePiece model on the training split and writes it to a file.

    Decoding gives the text back unchanged: see `flm_jax.data.pipeline.train_sentencepiece`.

    Args:
      config: the data; its own vocabulary is not used.
      vocab_size: number of tokens, the 3 special and 256 byte tokens included.
      output_path: the model's file; missing folders are created.

    Raises:
      UserError: the data cannot be opened, or `vocab_size` does not fit it.
    """
    _pipeline().train_sentencepiece(config, vocab_size, output_path)


def _pipeline() -> ModuleType:
    with extras.named("reading text"), _silent_stderr():
        from flm_jax.data import pipeline
    return pipeline


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hides what TensorFlow's C++ prints about missing CUDA while it loads, at any log level."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)

"""Documents -> windows of tokens -> packed batches, with a place that can be saved and restored.

Letters in array names: B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import sentencepiece
import seqio
import tensorflow as tf

from flm_jax.config import DataConfig
from flm_jax.data import tasks
from flm_jax.data.stream import Batch, BatchStream, require_positive
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError

# Documents that are concatenated before they are cut into windows.
GROUP_DOCUMENTS = 256
# Of the order in which validation windows are drawn: the same for every config.
VALIDATION_SEED = 0


class Corpus:
    """Opened documents and their vocabulary. Made by `open_corpus`.

    Attributes:
      config: what it was opened from.
      vocab_size: number of tokens, special ones included.
      token_bytes: int32 [vocab_size], UTF-8 bytes that each token stands for, 0 for special ones.
        Over a document they add up to its length in bytes, for the byte vocabulary, for models
        by `train_sentencepiece`, and for byte-level tokenizers that do not normalise.
        (SentencePiece itself reads U+2581 as a space, and counts 1.)
      start_id: the input at a segment's start.
      fingerprint: SHA-256, hex, of documents and vocabulary.
      num_documents: per split, None where the task does not know.
      num_bytes: per split, empty where the task does not know.
    """

    def __init__(self, config: DataConfig, whole: bool = False) -> None:
        if config.seed < 0:
            raise UserError(f"DataConfig.seed is {config.seed}; it must be 0 or more")
        self.config = config
        tokenizer = open_tokenizer(config.vocabulary)
        self.task = tasks.make_task(config, tokenizer, whole)
        self.vocabulary = self.task.output_features["targets"].vocabulary
        self.vocab_size = int(self.vocabulary.vocab_size)
        self.start_id, self.token_bytes = tokenizer.start_id, tokenizer.token_bytes
        parts = (tasks.fingerprint(self.task), tasks.vocabulary_digest(self.vocabulary))
        self.fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        splits = ("all",) if whole else ("train", "validation")
        self.num_documents = {s: _num_documents(self.task, s) for s in splits}
        self.num_bytes: dict[str, int] = {}
        source = getattr(self.task, "source", None)  # a mixture has none
        if isinstance(source, tasks.DocumentSource):
            self.num_bytes = {s: sum(len(d.text) for d in source.documents[s]) for s in splits}

    def train(self, batch_size: int, host_index: int = 0, host_count: int = 1) -> BatchIterator:
        """The endless training stream, from its start.

        Args:
          batch_size: sequences per global batch.
          host_index, host_count: this host gets its equal share of each global batch's rows.

        Raises:
          UserError: the global batch cannot be shared equally.
        """
        return BatchIterator(self, batch_size, host_index, host_count)

    def validation(self, batch_size: int, num_sequences: int) -> list[Batch]:
        """The same `num_sequences` of the validation split (or all, if fewer) at every call.

        They are drawn from all its documents: the first in order would be of one or two. All
        batches have `batch_size` rows; rows that are missing from the last have weight 0.
        """
        require_positive(batch_size=batch_size, num_sequences=num_sequences)
        windows = _windows(self.documents("validation"), self.config.window)
        buffer = self._window_buffer()
        windows = windows.shuffle(buffer, seed=VALIDATION_SEED, reshuffle_each_iteration=False)
        windows = _cut(windows, self.config)
        return list(self._batches(windows.take(num_sequences), batch_size))

    def sequences(self, split: str, batch_size: int) -> Iterator[Batch]:
        """All of a split once, in order, packed as in training; the last batch as above."""
        require_positive(batch_size=batch_size)
        windows = _cut(_windows(self.documents(split), self.config.window), self.config)
        return self._batches(windows, batch_size)

    def _batches(self, windows: tf.data.Dataset, batch_size: int) -> Iterator[Batch]:
        batches = windows.batch(batch_size).map(self.features)
        return (_pad_rows(batch, batch_size) for batch in batches.as_numpy_iterator())

    def documents(self, split: str, shuffle_seed: int | None = None) -> tf.data.Dataset:
        """One pass over the split: int32 [tokens] per document, shuffled only with a seed."""
        try:
            dataset = self.task.get_dataset(
                sequence_length=None,
                split=split,
                shuffle=shuffle_seed is not None,
                seed=shuffle_seed or 0,
                num_epochs=1,
                try_in_mem_cache=False,  # each pass is a new dataset: nothing would hit the cache
            )
        except ValueError as error:
            raise UserError(f"DataConfig.task is {self.config.task!r}: {error}") from error
        return dataset.map(lambda example: tf.cast(example["targets"], tf.int32))

    def epoch(self, epoch: int) -> tf.data.Dataset:
        """All sequences of one epoch, in its order: `targets` and `positions`, int32 [T]."""
        config = self.config
        seed = int(np.random.SeedSequence((config.seed, epoch)).generate_state(1)[0])
        windows = _windows(self.documents("train", seed), config.window)
        windows = windows.shuffle(self._window_buffer(), seed=seed, reshuffle_each_iteration=False)
        return _cut(windows, config)

    def features(self, windows: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The model's features of a batch of windows, all [B, T]; see `BatchIterator`."""
        targets, positions = windows["targets"], windows["positions"]
        inside = positions >= 0
        segment_ids = tf.cumsum(tf.cast(positions == 0, tf.int32), axis=1)
        shifted = tf.pad(targets[:, :-1], [[0, 0], [1, 0]])
        starts = tf.where(inside, self.start_id, 0)
        return {
            "tokens": tf.where(positions > 0, shifted, starts),
            "targets": targets,
            "segment_ids": tf.where(inside, segment_ids, 0),
            "positions": tf.maximum(positions, 0),
            "weights": tf.cast(inside, tf.float32),
        }

    def with_length(self, config: DataConfig) -> Corpus:
        """The same opened documents, read in another sequence length."""
        other = copy.copy(self)
        other.config = config
        return other

    def _window_buffer(self) -> int:
        return max(1, self.config.shuffle_tokens // self.config.window)


def open_corpus(config: DataConfig, whole: bool = False) -> Corpus:
    """See `flm_jax.data.open_corpus`."""
    return Corpus(config, whole)


class BatchIterator(BatchStream):
    """An endless stream of packed text.

    A batch is a dict of numpy arrays [B, T], B being this process's share of the global batch:
      targets: int32, the tokens to predict, each document's EOS included; 0 for padding.
      tokens: int32, `targets` shifted right in each segment, `start_id` at its start; 0 for
        padding.
      segment_ids: int32, 1, 2, .. for each document in the window; 0 for padding.
      positions: int32, from 0 in each segment; 0 for padding.
      weights: float32, 1 for a target; 0 for padding.

    A document that a window boundary cuts starts a new segment, at position 0, in its next window.
    """

    def __init__(self, corpus: Corpus, batch_size: int, host_index: int, host_count: int) -> None:
        identity = {
            "seed": corpus.config.seed,
            "window_length": corpus.config.window,
            "fingerprint": corpus.fingerprint,
        }
        super().__init__(batch_size, identity, host_index, host_count)
        self._corpus = corpus
        self._length = corpus.config.sequence_length
        self._epoch, self._offset, self._sequences = 0, 0, 0
        self._stream: Iterator[Batch] | None = None  # of this epoch, from `_offset` when opened
        self._rows: Batch | None = None  # read from the stream, not handed out yet

    def __next__(self) -> Batch:
        parts: list[Batch] = []
        missing = self.batch_size
        while missing:
            rows = self._next_rows()
            taken = min(missing, _num_rows(rows))
            parts.append({name: x[:taken] for name, x in rows.items()})
            self._rows = {name: x[taken:] for name, x in rows.items()}
            self._offset += taken
            missing -= taken
        self._sequences += self.batch_size
        return {
            name: np.concatenate([part[name] for part in parts])[self.host_rows]
            for name in parts[0]
        }

    def _next_rows(self) -> Batch:
        """Rows of the stream that were not handed out yet, one or more; opens the next epoch."""
        if self._rows is not None and _num_rows(self._rows):
            return self._rows
        if self._stream is None:
            self._stream = self._open_stream()
        rows = next(self._stream, None)
        if rows is None:
            if self._offset == 0:
                raise UserError(
                    f"DataConfig.task is {self._corpus.config.task!r}, whose training split is "
                    "empty; add documents"
                )
            self._epoch, self._offset = self._epoch + 1, 0
            self._stream = self._open_stream()
            return self._next_rows()
        return rows

    def _open_stream(self) -> Iterator[Batch]:
        windows = self._corpus.epoch(self._epoch).skip(self._offset)
        batches = windows.batch(self.batch_size).map(self._corpus.features)
        rows: Iterator[Batch] = batches.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
        return rows

    def _position(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "offset": self._offset,  # sequences of this epoch
            "sequences": self._sequences,  # of all epochs
            "sequence_length": self._length,
        }

    def _seek(self, state: Mapping[str, Any]) -> None:
        """The sequence length may differ, over the same windows: part of a sequence is skipped.

        Skipped sequences of the epoch are read and tokenised again.
        """
        self._epoch = state["epoch"]
        self._offset = -(-state["offset"] * state["sequence_length"] // self._length)
        self._sequences = state["sequences"]
        self._stream, self._rows = None, None


def train_sentencepiece(
    config: DataConfig, vocab_size: int, output_path: str, max_bytes: int = 1 << 28
) -> None:
    """Trains a BPE SentencePiece model on the training split and writes it to `output_path`.

    Text comes back from its tokens as it was: no normalisation, no dummy prefix, whitespace kept,
    bytes for what the vocabulary lacks. Ids 0, 1, 2 are padding, end of sequence, unknown. The
    same documents give the same model.

    Args:
      config: the data; its own vocabulary is not used.
      vocab_size: number of tokens, the 3 special and 256 byte tokens included.
      output_path: the model's file; folders are made.
      max_bytes: documents after this many bytes are left out.

    Raises:
      UserError: the data cannot be opened, or `vocab_size` does not fit it.
    """
    vocabulary_config = dataclasses.replace(config, vocabulary="bytes")
    documents = open_corpus(vocabulary_config).documents("train")

    def texts() -> Iterator[str]:
        total = 0
        for tokens in documents.as_numpy_iterator():
            data = _text_of_bytes(tokens)
            total += len(data)
            if total > max_bytes:
                return
            yield data.decode("utf-8")

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            byte_fallback=True,
            max_sentence_length=1 << 30,  # a sentence is a document; longer ones are dropped
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"vocab_size is {vocab_size}, which SentencePiece cannot train on this data: {error}"
        ) from error
    path = pathlib.Path(output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    partial.replace(path)


def _num_rows(batch: Batch) -> int:
    return len(batch["targets"])


def _pad_rows(batch: Batch, rows: int) -> Batch:
    return {
        name: np.pad(x, ((0, rows - len(x)), (0, 0))) if len(x) < rows else x
        for name, x in batch.items()
    }


def _text_of_bytes(tokens: np.ndarray) -> bytes:
    """UTF-8 of byte tokens (seqio: byte + 3); special tokens are left out."""
    return (tokens[tokens >= 3] - 3).astype(np.uint8).tobytes()


def _num_documents(task: seqio.Task | seqio.Mixture, split: str) -> int | None:
    counts = [part.num_input_examples(split) for part in seqio.get_subtasks(task)]
    return None if None in counts else sum(counts)


def _windows(documents: tf.data.Dataset, sequence_length: int) -> tf.data.Dataset:
    """Groups of documents, concatenated and cut: `targets` and `positions`, int32 [T].

    Positions count from 0 in each segment, and are -1 for padding, which only the last window of a
    group has.
    """

    def cut(group: tf.RaggedTensor) -> dict[str, tf.Tensor]:
        starts = tf.gather(group.row_starts(), group.value_rowids())
        total = tf.size(group.values)
        in_document = tf.range(total) - tf.cast(starts, tf.int32)
        padding = [[0, -total % sequence_length]]
        shape = [-1, sequence_length]
        targets = tf.reshape(tf.pad(group.values, padding), shape)
        in_document = tf.reshape(tf.pad(in_document, padding, constant_values=-1), shape)
        # A document that began before the window would be further on than the window is.
        return {
            "targets": targets,
            "positions": tf.minimum(in_document, tf.range(sequence_length)),
        }

    groups = documents.ragged_batch(GROUP_DOCUMENTS)
    return groups.map(cut, num_parallel_calls=tf.data.AUTOTUNE).unbatch()


def _cut(windows: tf.data.Dataset, config: DataConfig) -> tf.data.Dataset:
    """Windows cut into sequences, in order. A sequence begins a new segment."""
    if config.window == config.sequence_length:
        return windows

    def pieces(window: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        shape = [config.window // config.sequence_length, config.sequence_length]
        targets, positions = (tf.reshape(window[n], shape) for n in ("targets", "positions"))
        positions = tf.minimum(positions, tf.range(config.sequence_length))
        return {"targets": targets, "positions": positions}

    return windows.map(pieces, num_parallel_calls=tf.data.AUTOTUNE).unbatch()

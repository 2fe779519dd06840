"""Documents -> windows of tokens -> packed batches, with a position that can be saved.

Letters in array names: B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import io
from collections.abc import Iterator

import numpy as np
import sentencepiece
import seqio
import tensorflow as tf

from flm_jax.config import DataConfig
from flm_jax.data import tasks
from flm_jax.data.iterator import BatchIterator
from flm_jax.data.stream import Batch, require_positive
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError
from flm_jax.runtime import paths

# Documents that are concatenated before they are cut into windows.
GROUP_DOCUMENTS = 256
# Documents of a mixture's part whose mean length is measured.
MEASURED_DOCUMENTS = 1024
# Seed of the order of validation windows: the same for every config.
VALIDATION_SEED = 0


class Corpus:
    """Opened documents and their vocabulary; `open_corpus` creates it.

    Attributes:
      config: the config it was opened with.
      task: the seqio task or mixture.
      parts: the tasks of a mixture that have a rate above 0; the task alone if it is none.
      rates: the share of the training documents that each part gives; they sum to 1.
      vocabulary: the task's seqio vocabulary.
      vocab_size: number of tokens, special tokens included.
      token_bytes: int32 [vocab_size], number of UTF-8 bytes of each token, 0 for special tokens.
        Summed over a document's tokens they give its length in bytes. This holds for the byte
        vocabulary, for models from `train_sentencepiece`, and for byte-level tokenizers that do
        not normalise. (SentencePiece itself reads U+2581 as a space, and counts 1 byte.)
      start_id: the input token at the start of a segment.
      fingerprint: SHA-256, hex, of documents and vocabulary.
      num_documents: split -> number of documents; None if the task does not know it.
      num_bytes: split -> bytes of text; empty if the task does not know them.
      num_texts: split -> number of documents, however many pieces long ones were cut into; empty as
        `num_bytes`.
      unread: names of files that were found and not read.
    """

    def __init__(self, config: DataConfig, whole: bool = False) -> None:
        if config.seed < 0:
            raise UserError(f"DataConfig.seed is {config.seed}; it must be 0 or more")
        if config.train_vocabulary:
            raise UserError(
                f"DataConfig.train_vocabulary is {config.train_vocabulary}, and only a run trains "
                "its vocabulary; train one with flm vocabulary, and set DataConfig.vocabulary to it"
            )
        self.config = config
        tokenizer = open_tokenizer(config.vocabulary)
        self.task = tasks.make_task(config, tokenizer, whole)
        self.parts, self.rates = tasks.parts_of(self.task)
        self.vocabulary = self.task.output_features["targets"].vocabulary
        self.vocab_size = int(self.vocabulary.vocab_size)
        self.start_id, self.token_bytes = tokenizer.start_id, tokenizer.token_bytes
        parts = (tasks.fingerprint(self.task), tasks.vocabulary_digest(self.vocabulary))
        self.fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        splits = ("all",) if whole else ("train", "validation")
        self.num_documents = {s: _num_documents(self.task, s) for s in splits}
        self.num_bytes: dict[str, int] = {}
        self.num_texts: dict[str, int] = {}
        self.unread: tuple[str, ...] = ()
        source = getattr(self.task, "source", None)  # a mixture has no source
        if isinstance(source, tasks.DocumentSource):
            self.num_bytes = {s: sum(len(d.text) for d in source.documents[s]) for s in splits}
            self.num_texts = {s: source.num_texts(s) for s in splits}
            self.unread = source.unread

    def num_tokens(self, split: str) -> int:
        """Counts the tokens of a split whose bytes are known, end-of-sequence tokens included.

        It encodes the split, which is then kept for training.
        """
        return int(self.task.source.num_tokens(split))

    def train(self, batch_size: int, host_index: int = 0, host_count: int = 1) -> BatchIterator:
        """Opens the endless training stream at its start.

        Args:
          batch_size: sequences in a global batch.
          host_index: index of this process.
          host_count: number of processes; each reads an equal share of the rows of every batch.

        Raises:
          UserError: the processes cannot share the batch equally.
        """
        return BatchIterator(self, batch_size, host_index, host_count)

    @functools.cached_property
    def shares(self) -> list[float]:
        """The share of the training tokens that each part gives; they sum to 1.

        It is the part's rate times the mean length of the part's first training documents.
        """
        lengths = []
        for part in self.parts:
            documents = self._part_documents(part, "train").take(MEASURED_DOCUMENTS)
            tokens = [len(document) for document in documents.as_numpy_iterator()]
            lengths.append(np.mean(tokens) if tokens else 0.0)
        weights = np.array(self.rates) * lengths
        if not all(weights):
            raise UserError(
                f"DataConfig.task is {self.config.task!r}, but the training split of "
                f"{self.parts[int(weights.argmin())].name!r} is empty; add documents"
            )
        return [float(share) for share in weights / weights.sum()]

    def validation(self, batch_size: int, num_sequences: int) -> list[Batch]:
        """Reads a fixed sample of the validation split: the same sequences at every call.

        The sequences are drawn from all documents; the first ones in order would come from only
        one or two documents.

        Args:
          batch_size: rows of every batch. The last batch is filled up with rows of weight 0.
          num_sequences: sequences to read; all, if the split has fewer.

        Returns:
          Batches with the features of `BatchIterator`, [B, T].

        Raises:
          UserError: a number is below 1.
        """
        require_positive(batch_size=batch_size, num_sequences=num_sequences)
        windows = _windows(self.documents("validation"), self.config.window)
        buffer = self._window_buffer()
        windows = windows.shuffle(buffer, seed=VALIDATION_SEED, reshuffle_each_iteration=False)
        windows = _cut(windows, self.config)
        return list(self._batches(windows.take(num_sequences), batch_size))

    def sequences(self, split: str, batch_size: int) -> Iterator[Batch]:
        """Yields a whole split once, in order, packed as in training.

        Args:
          split: a split of the task.
          batch_size: rows of every batch. The last batch is filled up with rows of weight 0.

        Returns:
          Batches with the features of `BatchIterator`, [B, T].

        Raises:
          UserError: `batch_size` is below 1.
        """
        require_positive(batch_size=batch_size)
        windows = _cut(_windows(self.documents(split), self.config.window), self.config)
        return self._batches(windows, batch_size)

    def _batches(self, windows: tf.data.Dataset, batch_size: int) -> Iterator[Batch]:
        batches = windows.batch(batch_size).map(self.features)
        return (_pad_rows(batch, batch_size) for batch in batches.as_numpy_iterator())

    def documents(self, split: str) -> tf.data.Dataset:
        """Yields the tokens of every document of the split once: int32 [tokens], EOS included.

        The parts of a mixture are drawn from by their rates, until all are at their ends.

        Args:
          split: a split of the task.

        Raises:
          UserError: the task cannot give the split.
        """
        parts = [self._part_documents(part, split) for part in self.parts]
        if len(parts) == 1:
            return parts[0]
        return tf.data.Dataset.sample_from_datasets(
            parts, self.rates, seed=VALIDATION_SEED, stop_on_empty_dataset=False
        )

    def _part_documents(
        self, part: seqio.Task, split: str, shuffle_seed: int | None = None
    ) -> tf.data.Dataset:
        """The documents of one part; `shuffle_seed`: of their order; None: not shuffled."""
        try:
            dataset = part.get_dataset(
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

    def epoch(self, epoch: int, part: int = 0) -> tf.data.Dataset:
        """Yields all sequences of one epoch, in its order: `targets` and `positions`, int32 [T].

        Args:
          epoch: its number, from 0.
          part: index in `parts`; each part of a mixture has epochs of its own.
        """
        config = self.config
        entropy = (config.seed, epoch, part) if part else (config.seed, epoch)
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        windows = _windows(self._part_documents(self.parts[part], "train", seed), config.window)
        windows = windows.shuffle(self._window_buffer(), seed=seed, reshuffle_each_iteration=False)
        return _cut(windows, config)

    def features(self, windows: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Computes the model's features from a batch of windows; all [B, T], see `BatchIterator`.

        Args:
          windows: `targets` and `positions`, int32 [B, T]; positions are -1 for padding.
        """
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
        """Returns a view of the same documents that reads sequences of another length.

        Args:
          config: as this corpus's, except for sequence_length, window_length, shuffle_tokens and
            seed.
        """
        other = copy.copy(self)
        other.config = config
        return other

    def _window_buffer(self) -> int:
        return max(1, self.config.shuffle_tokens // self.config.window)


def open_corpus(config: DataConfig, whole: bool = False) -> Corpus:
    """Opens a corpus; see `flm_jax.data.open_corpus`."""
    return Corpus(config, whole)


def train_sentencepiece(
    config: DataConfig, vocab_size: int, output_path: str, max_bytes: int = 1 << 28
) -> None:
    """Trains a BPE SentencePiece model on the training split and writes it to a file.

    Decoding gives the text back unchanged: there is no normalisation and no dummy prefix,
    whitespace is kept, and bytes encode characters that the vocabulary lacks. Ids 0, 1, 2 are
    padding, end of sequence, unknown. The same documents give the same model.

    Args:
      config: the data; its own vocabulary is not used.
      vocab_size: number of tokens, the 3 special and 256 byte tokens included.
      output_path: the model's file; missing folders are created.
      max_bytes: training stops reading after this many bytes of documents.

    Raises:
      UserError: the data cannot be opened, or `vocab_size` does not fit it.
    """
    vocabulary_config = dataclasses.replace(config, vocabulary="bytes", train_vocabulary=0)
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
            f"vocab_size is {vocab_size}, which SentencePiece cannot train on this data: {error}; "
            "give another vocab_size, or more data",
            argument="vocab_size",
        ) from error
    path = paths.of(output_path)
    if paths.remote(path):
        path.write_bytes(model.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    partial.replace(path)


def _pad_rows(batch: Batch, rows: int) -> Batch:
    return {
        name: np.pad(x, ((0, rows - len(x)), (0, 0))) if len(x) < rows else x
        for name, x in batch.items()
    }


def _text_of_bytes(tokens: np.ndarray) -> bytes:
    """The text of byte tokens (seqio: byte + 3), without special tokens."""
    return (tokens[tokens >= 3] - 3).astype(np.uint8).tobytes()


def _num_documents(task: seqio.Task | seqio.Mixture, split: str) -> int | None:
    counts = [part.num_input_examples(split) for part in seqio.get_subtasks(task)]
    return None if None in counts else sum(counts)


def _windows(documents: tf.data.Dataset, sequence_length: int) -> tf.data.Dataset:
    """Concatenates groups of documents and cuts windows: `targets` and `positions`, int32 [T].

    Positions count from 0 in each segment and are -1 for padding. Only the last window of a group
    has padding.
    """

    def cut(group: tf.RaggedTensor) -> dict[str, tf.Tensor]:
        starts = tf.gather(group.row_starts(), group.value_rowids())
        total = tf.size(group.values)
        in_document = tf.range(total) - tf.cast(starts, tf.int32)
        padding = [[0, -total % sequence_length]]
        shape = [-1, sequence_length]
        targets = tf.reshape(tf.pad(group.values, padding), shape)
        in_document = tf.reshape(tf.pad(in_document, padding, constant_values=-1), shape)
        # A document that started in an earlier window restarts at position 0 in this one.
        return {
            "targets": targets,
            "positions": tf.minimum(in_document, tf.range(sequence_length)),
        }

    groups = documents.ragged_batch(GROUP_DOCUMENTS)
    return groups.map(cut, num_parallel_calls=tf.data.AUTOTUNE).unbatch()


def _cut(windows: tf.data.Dataset, config: DataConfig) -> tf.data.Dataset:
    """Cuts windows into sequences, in order; every sequence starts a new segment."""
    if config.window == config.sequence_length:
        return windows

    def pieces(window: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        shape = [config.window // config.sequence_length, config.sequence_length]
        targets, positions = (tf.reshape(window[n], shape) for n in ("targets", "positions"))
        positions = tf.minimum(positions, tf.range(config.sequence_length))
        return {"targets": targets, "positions": positions}

    return windows.map(pieces, num_parallel_calls=tf.data.AUTOTUNE).unbatch()

"""seqio tasks: the Python standard library, the user's own files, C4, or any registered task.

Each task yields one example per document with a feature `targets`: its tokens, then EOS. Documents
from files are held in memory; for text that does not fit there, register a seqio task.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import sysconfig
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from flm_jax.config import DataConfig
from flm_jax.data import documents, files
from flm_jax.data.documents import Document
from flm_jax.data.tokenizer import Tokenizer
from flm_jax.errors import UserError

C4 = "c4/en:3.1.0"
# Folders beside the standard library's modules that hold tests or installed packages.
NOT_STDLIB = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "pydoc_data",
}

# Documents that a tokenizer encodes at once: its results take far more memory than the ids.
_ENCODED_AT_ONCE = 256

# TensorFlow must leave the accelerators to JAX.
tf.config.set_visible_devices([], "GPU")


class DocumentSource(seqio.DataSource):
    """Documents held in memory; shuffling permutes the whole split.

    No Python runs inside the tf.data graph: a process that exits while such a graph is partly read
    hangs.
    """

    def __init__(
        self,
        documents: Mapping[str, Sequence[Document]],
        tokenizer: Tokenizer | None = None,
        unread: Sequence[str] = (),
    ) -> None:
        """Holds the documents.

        Args:
          documents: split -> documents.
          tokenizer: encodes a split's documents when it is first read, so that examples are
            tokens; None: examples are text.
          unread: names of files that were found and not read.
        """
        self.documents, self.unread = documents, tuple(unread)
        self._tokenizer = tokenizer
        self._examples: dict[str, tf.Tensor | tf.RaggedTensor] = {}
        super().__init__(
            splits=tuple(documents),
            num_input_examples={split: len(rows) for split, rows in documents.items()},
            performs_internal_shuffling=True,
        )

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [split]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
    ) -> tf.data.Dataset:
        if shard_info and shard_info.num_shards > 1:
            raise ValueError("DocumentSource has one shard")
        examples = self._read(split)
        order = np.arange(len(self.documents[split]))
        if shuffle:
            order = np.random.default_rng(seed).permutation(order)
        dataset = tf.data.Dataset.from_tensor_slices(order)
        return dataset.map(lambda i: {"targets": tf.gather(examples, i)})

    def num_texts(self, split: str) -> int:
        """Number of texts of a split, however many pieces they were cut into."""
        return sum(row.piece == 0 for row in self.documents[split])

    def num_tokens(self, split: str) -> int:
        """Number of tokens of a split, with one end-of-sequence token for each document."""
        rows = self.documents[split]
        if self._tokenizer is None:
            return sum(len(row.text) for row in rows) + len(rows)
        return int(self._read(split).values.shape[0]) + len(rows)

    def _read(self, split: str) -> Any:
        if split not in self._examples:
            texts = [document.text for document in self.documents[split]]
            self._examples[split] = _examples(texts, self._tokenizer)
        return self._examples[split]


def _examples(texts: list[bytes], tokenizer: Tokenizer | None) -> tf.Tensor | tf.RaggedTensor:
    """The texts as strings, or as rows of int32 tokens."""
    if tokenizer is None:
        return tf.constant(texts)
    rows: list[np.ndarray] = []
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        block = [text.decode("utf-8") for text in texts[start : start + _ENCODED_AT_ONCE]]
        rows += (np.array(ids, np.int32) for ids in tokenizer.encode_batch(block, False, False))
    values = np.concatenate([np.zeros(0, np.int32), *rows])
    return tf.RaggedTensor.from_row_lengths(values, [len(row) for row in rows])


class HuggingFaceVocabulary(seqio.Vocabulary):
    """A tokenizer.json as a seqio vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.own = tokenizer
        super().__init__()

    @property
    def bos_id(self) -> int:
        return self.own.start_id

    @property
    def eos_id(self) -> int:
        return self.own.eos_id

    @property
    def unk_id(self) -> int | None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.own.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self.own.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.own.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        """Runs Python inside the graph. Documents from files are encoded before it instead."""

        def encode(text: Any) -> np.ndarray:
            data = np.asarray(text, object).item()  # bytes in a graph, an array outside
            return np.array(self.own.encode(data.decode("utf-8")), np.int32)

        encoded = tf.numpy_function(encode, [s], tf.int32)
        encoded.set_shape([None])
        return encoded

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(self.own.decode_bytes, [ids], tf.string)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HuggingFaceVocabulary) and self.own.digest == other.own.digest

    def __str__(self) -> str:
        return f"HuggingFaceVocabulary({self.own.name})"


def make_vocabulary(tokenizer: Tokenizer) -> seqio.Vocabulary:
    """Returns the tokenizer as a seqio vocabulary."""
    if tokenizer.name == "bytes":
        return seqio.ByteVocabulary()
    if tokenizer.name.endswith(".json"):
        return HuggingFaceVocabulary(tokenizer)
    return seqio.SentencePieceVocabulary(tokenizer.name)


def make_task(
    config: DataConfig, tokenizer: Tokenizer, whole: bool = False
) -> seqio.Task | seqio.Mixture:
    """Builds or finds a seqio task with a feature `targets` of int tokens.

    A task or mixture from seqio's registry brings its own vocabulary, which must be the one that
    `config.vocabulary` names. Its source must be able to shuffle by a seed.

    Args:
      config: names the task, its path and its vocabulary.
      tokenizer: of `config.vocabulary`.
      whole: a task over the user's files gets one split, "all", instead of train and validation.

    Raises:
      UserError: the task or its data does not exist, or the task has another vocabulary, or no
        split `train` or `validation`.
    """
    for name in ("path", "validation_path"):
        given = getattr(config, name)
        if given and config.task not in files.TASKS:
            raise UserError(
                f"DataConfig.{name} is {given!r}, but task {config.task!r} reads no path; set "
                f"DataConfig.task to {' or '.join(files.TASKS)}, or leave {name} empty"
            )
    vocabulary = make_vocabulary(tokenizer)
    if config.task in files.TASKS:
        splits, unread = files.splits(config, whole)
        return _document_task(config.task, splits, vocabulary, tokenizer, unread)
    if config.task == "python_stdlib":
        training, validation = documents.split(_stdlib_documents(), 2, "the standard library")
        splits = {"train": training, "validation": validation}
        return _document_task(config.task, splits, vocabulary, tokenizer)
    if config.task == "c4":
        task = _c4_task(vocabulary)
    elif config.task in (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()):
        task = seqio.get_mixture_or_task(config.task)
    else:
        known = ["python_stdlib", *files.TASKS, "c4", *seqio.TaskRegistry.names()]
        raise UserError(
            f"DataConfig.task is {config.task!r}; choose one of {', '.join(known)}, or first "
            "register a seqio task of that name"
        )
    for part in seqio.get_subtasks(task):
        _check_task(config, part, vocabulary)
    return task


def _check_task(config: DataConfig, task: seqio.Task, vocabulary: seqio.Vocabulary) -> None:
    """Raises UserError if a registered task has no data, or other splits, features or tokens."""
    if isinstance(task.source, seqio.TfdsDataSource):
        builder = task.source.tfds_dataset.builder
        if not builder.is_prepared():
            raise UserError(
                f"DataConfig.task is {config.task!r}, but TFDS has no data in {builder.data_dir}; "
                "prepare it there with TFDS, or set TFDS_DATA_DIR to where it is"
            )
    missing = {"train", "validation"} - set(task.splits)
    if missing:
        raise UserError(
            f"DataConfig.task is {config.task!r}: task {task.name!r} has splits "
            f"{sorted(task.splits)}; it needs train and validation"
        )
    if "targets" not in task.output_features:
        raise UserError(
            f"DataConfig.task is {config.task!r}: task {task.name!r} has features "
            f"{sorted(task.output_features)}; it needs one named targets"
        )
    own = task.output_features["targets"].vocabulary
    if vocabulary_digest(own) != vocabulary_digest(vocabulary):
        raise UserError(
            f"DataConfig.vocabulary is {config.vocabulary!r}, but task {task.name!r} has {own}; "
            "name the task's vocabulary"
        )


def vocabulary_digest(vocabulary: seqio.Vocabulary) -> str:
    """Returns a text that is equal for vocabularies that give the same tokens."""
    if isinstance(vocabulary, HuggingFaceVocabulary):
        return vocabulary.own.digest
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return hashlib.sha256(vocabulary.sp_model).hexdigest()
    return "bytes" if isinstance(vocabulary, seqio.ByteVocabulary) else str(vocabulary)


def parts_of(task: seqio.Task | seqio.Mixture) -> tuple[list[seqio.Task], list[float]]:
    """Returns a mixture's tasks with a rate above 0, and their rates; a task is its only part.

    Rates count documents, as in seqio, and sum to 1.

    Raises:
      UserError: a rate is below 0 or not finite, or all are 0.
    """
    if isinstance(task, seqio.Task):
        return [task], [1.0]
    rates = {part.name: float(task.get_rate(part)) for part in task.tasks}
    for name, rate in rates.items():
        if not 0 <= rate < float("inf"):
            raise UserError(
                f"DataConfig.task is {task.name!r}, a mixture that gives {name!r} the rate {rate}; "
                "give it 0 (not read) or more"
            )
    parts = [part for part in task.tasks if rates[part.name]]
    if not parts:
        raise UserError(
            f"DataConfig.task is {task.name!r}, a mixture without a rate above 0; give one"
        )
    total = sum(rates.values())
    return parts, [rates[part.name] / total for part in parts]


def fingerprint(task: seqio.Task | seqio.Mixture) -> str:
    """SHA-256, hex, of the task's data.

    It covers the name and content of every document for tasks over files; name, version and splits
    for TFDS; name, source and number of examples for other registered tasks.
    """
    if isinstance(task, seqio.Mixture):
        parts: Any = [(part.name, task.get_rate(part), fingerprint(part)) for part in task.tasks]
        parts.append("parts repeat by themselves")  # earlier versions had another order
    elif isinstance(task.source, DocumentSource):
        rows = [d for rows in task.source.documents.values() for d in rows]
        parts = sorted((d.name, documents.sha256(d.text)) for d in rows)
    elif isinstance(task.source, seqio.TfdsDataSource):
        info = task.source.tfds_dataset.info
        parts = [info.full_name]
        parts += [(s, task.source.num_input_examples(s)) for s in sorted(task.source.splits)]
    else:
        parts = [task.name, repr(task.source)]
        parts += [(s, task.source.num_input_examples(s)) for s in sorted(task.source.splits)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _document_task(
    name: str,
    splits: Mapping[str, list[Document]],
    vocabulary: seqio.Vocabulary,
    tokenizer: Tokenizer,
    unread: Sequence[str] = (),
) -> seqio.Task:
    """A task over documents in memory.

    The graph encodes bytes. Every other tokenizer encodes before it, by the same function as
    prompts: TensorFlow's SentencePiece breaks ties of a unigram model in another way.
    """
    if isinstance(vocabulary, seqio.ByteVocabulary):
        tokenize = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)
        source, tokenizing = DocumentSource(splits, unread=unread), [tokenize]
    else:
        source, tokenizing = DocumentSource(splits, tokenizer, unread), []
    return seqio.Task(
        name,
        source=source,
        preprocessors=[*tokenizing, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(vocabulary)},
        shuffle_buffer_size=None,  # the source permutes all documents
    )


def _c4_task(vocabulary: seqio.Vocabulary) -> seqio.Task:
    return seqio.Task(
        "c4",
        source=seqio.TfdsDataSource(C4, splits=("train", "validation"), read_only=True),
        preprocessors=[
            seqio.map_over_dataset(lambda row: {"targets": row["text"]}),
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(vocabulary)},
    )


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _stdlib_documents() -> list[Document]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if NOT_STDLIB.isdisjoint(relative.parts):
            data = path.read_bytes()
            if data and _is_utf8(data):
                found.append(documents.by_name(relative.as_posix(), data))
    return found

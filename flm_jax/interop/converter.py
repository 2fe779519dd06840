"""Writes a model in another format, block by block, within a memory limit."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from flm_jax import mapping
from flm_jax.config import DataConfig, ExperimentConfig, StageConfig, TransformerConfig
from flm_jax.data.chat_template import TemplateConfig
from flm_jax.errors import UserError
from flm_jax.interop import hf_config, model_card, names, tensor_files
from flm_jax.interop.families import FAMILIES
from flm_jax.interop.names import Index
from flm_jax.interop.opening import StoredModel, open_stored_model
from flm_jax.interop.tensor_files import TensorsWriter
from flm_jax.interop.tokenizer_files import (
    BYTES,
    Vocabulary,
    padding_of,
    write_chat_template,
    write_config,
)
from flm_jax.interop.weights import Resized, Rounded, Weights, scaled, without_offset
from flm_jax.params import axes, counts, trees
from flm_jax.params.digest import Piece, digest_of_pieces
from flm_jax.runtime import paths, processes
from flm_jax.runtime.display import Progress
from flm_jax.store.checkpoint import CHUNK_BYTES, mark_complete
from flm_jax.store.chunk_writer import CheckpointWriter
from flm_jax.store.chunked import CheckpointReader, cells, chunk_shape
from flm_jax.store.files import write_json
from flm_jax.store.lineage import RunFolder, StageFolder, identity

FORMATS = ("flm", *hf_config.FORMATS)
DTYPES = {d.name: d for d in tensor_files.DTYPES.values() if d.itemsize <= 4}
MEMORY = 1 << 30  # bytes
SHARD_BYTES = 5_000_000_000
_THREADS = 2  # one reads and lays out while the other writes
# A block is held four times: as read, as float32, in the new layout, and as written.
_COPIES = 4 * _THREADS
_IMPORTED = "imported"


@contextlib.contextmanager
def appearing(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a folder that becomes `target` at the end; see `paths.staged`.

    Raises:
      UserError: the target exists and is not empty, or it cannot be written.
    """
    paths.check_bucket(target, "target")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; give another target, or remove it")
    try:
        with paths.staged(target) as folder:
            yield folder
    except OSError as error:
        raise UserError(
            f"{error.filename or target}: {error.strerror or error}; {target} is not written: fix "
            "that and call again"
        ) from error


def convert(
    source: str,
    target: str,
    format: str,
    *,
    stage: str = "",
    step: int | None = None,
    dtype: str = "",
    vocab_size: int = 0,
    memory: int = MEMORY,
) -> dict[str, Any]:
    """Reads a model and writes it in another format.

    Args:
      source, stage, step: the model, as `open_stored_model` takes them.
      target: a folder that does not exist yet.
      format: one of `FORMATS`.
      dtype: dtype of the written parameters, one of `DTYPES`; "" keeps the source's. "flm" is
        always float32.
      vocab_size: number of rows of embedding and head. New rows are zero; only rows that belong to
        no token can be removed. 0 keeps the source's.
      memory: working memory in bytes, beyond what is already loaded. The limit holds if the rows
        of one key/value head in one layer take less than an eighth of it.

    Returns:
      A report with source, target, format, dtype, number of parameters, bytes, seconds, GB/s and
      notes on every difference from the source.

    Raises:
      UserError: the model cannot be read, or does not fit the format. No target is written.
    """
    opened = open_stored_model(source, stage, step)
    weights = opened.weights
    notes = list(opened.notes)
    if opened.masks is not None:
        notes.append(f"masks of the growth at {opened.masks:g} are folded into the parameters")
    if vocab_size:
        weights = with_vocab_size(opened, weights, vocab_size, memory)
    check_vocabulary(opened, weights.config)
    if opened.vocabulary.num_tokens() is None:
        notes.append(f"no tokenizer is written: no files at {opened.vocabulary.path!r}")
    began = time.monotonic()
    if format == "flm":
        if dtype not in ("", "float32"):
            raise UserError(f"dtype is {dtype!r}, but training keeps float32; leave it out")
        dtype = "float32"
        rounded = Rounded(weights, DTYPES[dtype])
        num_bytes = write_run(paths.of(target), rounded, opened, memory)
        notes += rounded.notes
    else:
        dtype = dtype or (opened.dtype.name if opened.dtype.name in DTYPES else "float32")
        num_bytes, more = write_hf(
            paths.of(target), weights, format, dtype, opened.vocabulary, memory,
            context=opened.context, source=opened, template=opened.template,
        )  # fmt: skip
        notes += more
    seconds = time.monotonic() - began
    return {
        "source": str(opened.path),
        "target": target,
        "format": format,
        "dtype": dtype,
        "params": counts.params(weights.config),
        "bytes_read": opened.num_bytes,
        "bytes_written": num_bytes,
        "seconds": seconds,
        "gb_per_s": (opened.num_bytes + num_bytes) / 1e9 / seconds,
        "notes": notes,
    }


def write_hf(
    target: pathlib.Path,
    weights: Weights,
    format: str,
    dtype: str,
    vocabulary: Vocabulary,
    memory: int = MEMORY,
    *,
    context: int = 0,
    shard_bytes: int = SHARD_BYTES,
    template: TemplateConfig | None = None,
    source: StoredModel | None = None,
) -> tuple[int, list[str]]:
    """Writes a folder that transformers opens.

    Args:
      target: a folder that does not exist yet.
      weights: the parameters.
      format: one of `hf_config.FORMATS`.
      dtype: dtype of the files, one of `DTYPES`.
      vocabulary: its files are copied, and the other keys of the config.json beside them.
      memory: working memory in bytes.
      context: the longest sequence in tokens, used if that config.json does not give one; 0 means
        2048.
      shard_bytes: largest size of one file, unless a single tensor is larger.
      template: the chat template of the model's fine-tuning; None: that of the vocabulary's files.
      source: the model that is converted, for the model card; None: parameters from memory.

    Returns:
      The size of the written parameters in bytes, and one note for each change to them.

    Raises:
      UserError: the format cannot express this model, or the target exists or cannot be written.
    """
    if format not in hf_config.FORMATS:
        raise UserError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    config, scales = hf_config.folded(weights.config, format)
    weights = scaled(weights, config, scales)
    weights = without_offset(weights, FAMILIES[format].gain_offset)
    table, sizes = axes.table(config), axes.axis_sizes(config)
    tensors = names.tensors(table)
    called = {path: tensor.name for path, tensor in tensors.items()}
    rounded = Rounded(weights, DTYPES[dtype], called)
    notes = [
        f"{path} is multiplied by {scale:.6g}: format {format!r} has no key for this factor"
        for path, scale in scales.items()
    ]
    carried = vocabulary.values()
    values = hf_config.write(config, format, dtype, carried, context or 2048)
    values |= vocabulary.special_tokens() | padding_of(config)
    with appearing(target) as folder:
        vocabulary.copy(folder, code=carried.get("model_type") == values["model_type"])
        if template is not None and vocabulary.num_tokens() is not None:
            write_chat_template(folder, vocabulary.template_text(template))
        writer = TensorsWriter(folder, names.shapes(table, sizes), DTYPES[dtype], shard_bytes)

        def write(path: str, index: Index) -> int:
            param, tensor, own = table[path], tensors[path], index
            block, layer = rounded.read(path, index), 0
            if param.stacked:
                block, layer, own = block[0], index[0].start, index[1:]
            first = own[names.own_axes(param).index(tensor.rows)].start
            rows = names.to_rows(block, param, tensor)
            writer.write(tensor.name.format(layer=layer), first * tensor.row_size(sizes), rows)
            return rows.size * DTYPES[dtype].itemsize

        blocks = names.blocks(table, sizes, memory // _COPIES)
        _in_threads(write, blocks, f"writing {target.name}", writer.num_bytes)
        writer.sync()
        notes += rounded.notes + write_config(folder, values)
        card = model_card.text(target.name, config, values["model_type"], dtype, notes, source)
        text = model_card.with_readme(card, vocabulary.readme())
        (folder / "README.md").write_text(text, encoding="utf-8")
    return writer.num_bytes, notes


def _in_threads(
    write: Callable[[str, Index], int], blocks: Iterable[tuple[str, Index]], name: str, total: int
) -> None:
    """Calls `write` for every block, in threads; its results, in bytes, advance a progress bar."""
    with (
        Progress(name, 0, total, "bytes") as progress,
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
    ):
        for num_bytes in pool.map(lambda block: write(*block), blocks):
            progress.add(num_bytes)


def write_run(
    target: pathlib.Path, weights: Weights, source: StoredModel, memory: int = MEMORY
) -> int:
    """Writes a run's folder with one finished stage that was not trained.

    Args:
      target: a folder that does not exist yet.
      weights: the parameters.
      source: the model that they come from; its tokenizer files are copied.
      memory: working memory in bytes.

    Returns:
      The size of the written parameters in bytes.

    Raises:
      UserError: the target exists or cannot be written.
    """
    RunFolder(target).check_client()
    with appearing(target) as folder:
        run = RunFolder(folder)
        stage = run.stage(0, _IMPORTED)
        files = stage.path / "source"
        files.mkdir(parents=True)
        vocabulary = source.vocabulary.path
        if vocabulary != BYTES:
            source.vocabulary.copy(files, code=True)
            if values := source.vocabulary.values():
                write_json(files / "config.json", values)
            vocabulary = str(paths.absolute(target) / files.relative_to(run.path))
        experiment = _imported(weights.config, source, vocabulary)
        saved = identity(experiment, 0, "")
        if source.template is not None:
            saved["sft"] = {"template": mapping.to_dict(source.template)}
        write_json(stage.config, saved)
        path = stage.checkpoints / "0"
        num_bytes = _write_checkpoint(path, weights, memory)
        digest = digest_on_disk(CheckpointReader(path), weights.config, memory)
        run.add_stage(untrained_entry(stage, saved, weights.config, digest))
    mark_complete(target / path.relative_to(folder))
    return num_bytes


def untrained_entry(
    stage: StageFolder, saved: Mapping[str, Any], model: TransformerConfig, digest: str
) -> dict[str, Any]:
    """Returns the entry in lineage.json of a first stage that was not trained.

    Args:
      stage: its folder, with a checkpoint of step 0.
      saved: the values of its config.json.
      model: its model.
      digest: of its parameters (`digest_on_disk`).
    """
    return {
        "index": 0,
        "name": saved["stage"]["name"],
        "parent": None,
        "config_digest": mapping.digest(dict(saved)),
        "plan_digest": None,
        "params": counts.params(model),
        "tokens": 0,
        "flops": 0,
        "wall_s": 0.0,
        "steps": 0,
        "eval": {"bpb_start": None, "bpb_end": None},
        "receipt": None,
        "params_digest": digest,
        "checkpoint": str((stage.checkpoints / "0").relative_to(stage.run.path)),
        "data_fingerprint": saved["data_fingerprint"],
    }


def _imported(model: TransformerConfig, source: StoredModel, vocabulary: str) -> ExperimentConfig:
    """The config of the stage: the run's, or else one with placeholder rates and batch size."""
    if source.config is not None:
        stage, data = source.config.stages[0], source.config.data_of(0)
    else:
        stage = StageConfig(
            _IMPORTED, model, steps=0, batch_size=1, learning_rate=1e-4, matrix_learning_rate=1e-4,
            source=str(source.path),
        )  # fmt: skip
        data = DataConfig(sequence_length=source.context or 2048)
    stage = dataclasses.replace(stage, name=_IMPORTED, model=model, steps=0)
    data = dataclasses.replace(data, vocabulary=vocabulary)
    return ExperimentConfig(stages=(stage,), data=data)


def _write_checkpoint(path: pathlib.Path, weights: Weights, memory: int) -> int:
    """Writes a checkpoint of the parameters alone; returns their size in bytes."""
    config = weights.config
    table, sizes = axes.table(config), axes.axis_sizes(config)
    like = {
        leaf: jax.ShapeDtypeStruct(param.shape(sizes), np.float32) for leaf, param in table.items()
    }
    chunks = {
        f"params/{leaf}": chunk
        for leaf, chunk in chunk_shapes(config, min(CHUNK_BYTES, memory // _COPIES)).items()
    }
    tree = {"params": trees.unflatten(like)}
    writer = CheckpointWriter(path, tree, {"data": {}, "wall_s": 0.0}, chunks, memory // _COPIES)
    write_parameters(writer, weights, f"writing {_IMPORTED}")
    writer.finish()
    return 4 * counts.params(config)


def chunk_shapes(config: TransformerConfig, most_bytes: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of a chunk of each parameter: a block that all formats read in one piece.

    Args:
      config: the model.
      most_bytes: size of a chunk, as for `names.blocks`.
    """
    chunks: dict[str, tuple[int, ...]] = {}
    for leaf, index in names.blocks(axes.table(config), axes.axis_sizes(config), most_bytes):
        chunks.setdefault(leaf, tuple(cut.stop - cut.start for cut in index))
    return chunks


def write_parameters(writer: CheckpointWriter, weights: Weights, name: str) -> None:
    """Writes the parameters of a checkpoint, chunk by chunk; those that it holds are skipped.

    With several processes each writes its share.

    Args:
      writer: a checkpoint with the leaves "params/PATH".
      weights: the parameters.
      name: the name of the progress bar.
    """
    names_of = {path: f"params/{path}" for path in axes.table(weights.config)}
    dtypes = {path: writer.leaves[leaf].dtype for path, leaf in names_of.items()}
    total = sum(writer.leaves[leaf].size * dtypes[path].itemsize for path, leaf in names_of.items())

    def write(path: str, piece: Index) -> int:
        block = weights.read(path, piece).astype(dtypes[path], copy=False)
        writer.write(f"params/{path}", piece, block)
        return block.nbytes

    pieces = [
        (path, piece)
        for path, leaf in names_of.items()
        for piece in writer.pieces(leaf)
        if not writer.holds(leaf, piece)
    ]
    _in_threads(write, processes.share(pieces), name, total)


def digest_on_disk(reader: CheckpointReader, config: TransformerConfig, memory: int) -> str:
    """Computes `params_digest` from a checkpoint on disk.

    Args:
      reader: the checkpoint.
      config: its model.
      memory: working memory in bytes.
    """
    paths = list(axes.table(config))
    leaves = [reader.leaves[f"params/{path}"] for path in paths]
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    with Progress("reading back", 0, total, "bytes") as progress:

        def pieces(name: str) -> Iterator[Piece]:
            leaf = reader.leaves[name]
            for index in cells(
                leaf.shape, chunk_shape(leaf.shape, leaf.dtype.itemsize, memory // _COPIES)
            ):
                piece = reader.read(name, index)
                progress.add(piece.nbytes)
                yield index, piece

        return digest_of_pieces(
            (path, reader.leaves[f"params/{path}"], pieces(f"params/{path}")) for path in paths
        )


def with_vocab_size(source: StoredModel, weights: Weights, vocab_size: int, memory: int) -> Weights:
    """Adds zero rows to embedding and head, or removes rows that belong to no token.

    Args:
      source: the model on disk; its tokenizer says how many rows are tokens.
      weights: the parameters to resize.
      vocab_size: the new number of rows.
      memory: working memory in bytes.

    Raises:
      UserError: a token would be removed, or the number of tokens is not known.
    """
    have, tokens = weights.config.vocab_size, source.vocabulary.num_tokens()
    if tokens is not None and vocab_size < tokens:
        raise UserError(
            f"vocab_size is {vocab_size}, but vocabulary {source.vocabulary.path!r} has "
            f"{tokens} tokens; give {tokens} or more"
        )
    if tokens is None and vocab_size < have and not _padding(weights, vocab_size, memory):
        raise UserError(
            f"vocab_size is {vocab_size}, but {source.path} has {have} rows, the removed ones are "
            "not zero, and no tokenizer says how many rows are tokens; give "
            f"{have} or more, or put the tokenizer's files beside the weights"
        )
    tokens = tokens or min(weights.config.tokens, vocab_size)
    plain = dataclasses.replace(weights.config, vocab_size=vocab_size, num_tokens=0)
    return Resized(weights, plain.with_tokens(tokens))


def _padding(weights: Weights, start: int, memory: int) -> bool:
    """Says whether the embedding's rows from `start` on are zero."""
    rows = (
        (path, index)
        for path, index in names.blocks(
            axes.table(weights.config), axes.axis_sizes(weights.config), memory // _COPIES
        )
        if path == "embedding" and index[0].stop > start
    )
    return not any(
        weights.read(path, (slice(max(start, rows.start), rows.stop), *others)).any()
        for path, (rows, *others) in rows
    )


def check_vocabulary(source: StoredModel, config: TransformerConfig) -> None:
    """Raises UserError if the tokenizer has more tokens than `config.vocab_size`."""
    tokens = source.vocabulary.num_tokens()
    if tokens is not None and tokens > config.vocab_size:
        raise UserError(
            f"{source.path}: vocabulary {source.vocabulary.path!r} has {tokens} tokens, but the "
            f"model's vocab_size is {config.vocab_size}; give the tokenizer of this model, or "
            f"vocab_size={tokens}", argument="vocab_size",
        )  # fmt: skip

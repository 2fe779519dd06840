r"""Bits per byte of a model on any text: a run, one of its checkpoints, or Hugging Face files.

  python -m experiments.evaluate --checkpoint=runs/demo --data=README.md
  python -m experiments.evaluate --checkpoint=runs/demo --stage=small --task=python_stdlib --json

--data reads all of a text file, of the files in a folder, or of the rows of a .jsonl file (field
--text_field). --task reads all of a split of a seqio task. Text is packed into sequences as in
training: a document's first token, and a sequence's, are predicted from the start token alone.
Bytes are those of the text; every token counts, each document's end included.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import rich.console
from absl import flags

from experiments import cli
from flm_jax import data
from flm_jax.config import DataConfig
from flm_jax.errors import UserError
from flm_jax.inference import evaluation
from flm_jax.interop.opening import open_model
from flm_jax.params import sharding
from flm_jax.runtime import host

# Of weights whose files allow more than a machine of any size can take at once.
LONGEST_DEFAULT = 4096

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run, checkpoint or Hugging Face folder.")
STAGE = flags.DEFINE_string("stage", "", "Of a run: index or name of a stage; else the last.")
DATA = flags.DEFINE_string("data", "", "Text file, folder of text files, or .jsonl file.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Field of a .jsonl row that holds the text.")
TASK = flags.DEFINE_string("task", "", "A seqio task, as python_stdlib.")
SPLIT = flags.DEFINE_string("split", "validation", "Split of --task.")
SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 0, f"Tokens of a sequence; 0: as trained, at most {LONGEST_DEFAULT}."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Sequences at once.", lower_bound=1)


def main(arguments: Sequence[str]) -> dict[str, Any]:
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; give text as --data=FILE")
    if not CHECKPOINT.value:
        raise UserError("--checkpoint is missing; give a run's folder or one of Hugging Face files")
    if bool(DATA.value) == bool(TASK.value):
        raise UserError("give either --data=FILE or --task=NAME")
    host.keep_freed()
    model = open_model(CHECKPOINT.value, STAGE.value)
    own = model.data or DataConfig(vocabulary=str(model.path))
    length = SEQUENCE_LENGTH.value or min(model.context or LONGEST_DEFAULT, LONGEST_DEFAULT)
    config = dataclasses.replace(own, sequence_length=length, window_length=0)
    if DATA.value:
        rows = pathlib.Path(DATA.value).suffix == ".jsonl"
        config = dataclasses.replace(
            config, task="jsonl_files" if rows else "text_files", path=DATA.value,
            text_field=TEXT_FIELD.value,
        )  # fmt: skip
    else:
        config = dataclasses.replace(config, task=TASK.value, path="")
    split = "all" if DATA.value else SPLIT.value
    corpus = data.open_corpus(config, whole=bool(DATA.value))
    if split not in corpus.num_documents:
        raise UserError(f"--split={split}: choose one of {', '.join(corpus.num_documents)}")
    if corpus.vocab_size > model.config.vocab_size:
        raise UserError(
            f"vocabulary {config.vocabulary!r} has {corpus.vocab_size} tokens, but the model has "
            f"vocab_size {model.config.vocab_size}; give the model's own tokenizer"
        )
    if corpus.num_bytes.get(split) == 0:
        raise UserError(f"--data={DATA.value} holds no text; give a file with some")
    mesh = sharding.one_device()
    with jax.set_mesh(mesh):
        found = evaluation.score(
            model.params, model.config, corpus.sequences(split, BATCH_SIZE.value),
            corpus.token_bytes, mesh,
        )  # fmt: skip
    # A tokenizer may change text a little; what is compared between models is the text's own size.
    found = dataclasses.replace(found, bytes=corpus.num_bytes.get(split, found.bytes))
    rich.console.Console(stderr=cli.json_wanted()).print(
        f"{found.bits_per_byte:.4f} bits per byte  ({found.loss:.4f} nats per token, "
        f"{found.tokens:,} tokens, {found.bytes:,} bytes, sequences of {length})"
    )
    return {
        "bits_per_byte": found.bits_per_byte,
        "loss": found.loss,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "sequence_length": length,
        "checkpoint": str(model.path),
    }


if __name__ == "__main__":
    cli.run(main, needs_config=False)

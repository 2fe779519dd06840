r"""Measures bits per byte of a model on any text.

  flm evaluate --checkpoint=runs/demo --data=README.md
  flm evaluate --checkpoint=runs/demo --stage=small --task=python_stdlib --json

A model is a run, one of its checkpoints, or a folder of Hugging Face files. --data reads all of a
text file, of the files in a folder, or of the rows of a .jsonl file (field --text_field). --task
reads all of a split of a seqio task. Text is packed into sequences as in training: a document's
first token, and a sequence's, are predicted from the start token alone. Bytes are those of the
text; every token counts, each document's end included.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from flm_jax import data
from flm_jax.commands.command import Call, Command, flag
from flm_jax.commands.model_flags import ModelFlags
from flm_jax.config import DataConfig
from flm_jax.data import readers
from flm_jax.errors import UserError
from flm_jax.inference import evaluation
from flm_jax.params import sharding

# Some files allow longer contexts than a machine can hold.
LONGEST_DEFAULT = 4096


@dataclasses.dataclass(frozen=True)
class Flags(ModelFlags):
    """The command's own flags."""

    data: str = flag("", "Text file, folder of text files, or .jsonl file.")
    text_field: str = flag("text", "Field of a .jsonl row that holds the text.")
    task: str = flag("", "A seqio task, as python_stdlib.")
    split: str = flag("validation", "Split of --task.")
    sequence_length: int = flag(
        0, f"Tokens of a sequence; 0: the trained context, at most {LONGEST_DEFAULT}."
    )
    batch_size: int = flag(8, "Sequences at once.", lower=1)


def main(call: Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    if bool(flags.data) == bool(flags.task):
        raise UserError("give either --data=FILE or --task=NAME")
    model = flags.open()
    base = model.data or DataConfig(vocabulary=str(model.path))
    length = flags.sequence_length or min(model.context or LONGEST_DEFAULT, LONGEST_DEFAULT)
    config = dataclasses.replace(base, sequence_length=length, window_length=0)
    if flags.data:
        rows = readers.kind_of(flags.data) in ("jsonl", "parquet")  # JSON is text itself
        config = dataclasses.replace(
            config, task="own_text" if rows else "text_files", path=flags.data,
            text_field=flags.text_field, validation_path="",
        )  # fmt: skip
    else:
        config = dataclasses.replace(config, task=flags.task, path="", validation_path="")
    split = "all" if flags.data else flags.split
    corpus = data.open_corpus(config, whole=bool(flags.data))
    if split not in corpus.num_documents:
        raise UserError(f"--split={split}: choose one of {', '.join(corpus.num_documents)}")
    if corpus.vocab_size > model.config.vocab_size:
        raise UserError(
            f"vocabulary {config.vocabulary!r} has {corpus.vocab_size} tokens, but the model has "
            f"vocab_size {model.config.vocab_size}; give the model's own tokenizer"
        )
    if corpus.num_bytes.get(split) == 0:
        raise UserError(f"--data={flags.data} holds no text; give a file with text")
    mesh = sharding.one_device()
    with jax.set_mesh(mesh):
        score = evaluation.score(
            model.params, model.config.with_tokens(corpus.vocab_size),
            corpus.sequences(split, flags.batch_size), corpus.token_bytes, mesh,
        )  # fmt: skip
    # A tokenizer may change the text a little. Bits per byte divide by the size of the text itself,
    # so that models with different tokenizers can be compared.
    score = dataclasses.replace(score, bytes=corpus.num_bytes.get(split, score.bytes))
    call.console().print(
        f"{score.bits_per_byte:.4f} bits per byte  ({score.loss:.4f} nats per token, "
        f"{score.tokens:,} tokens, {score.bytes:,} bytes, sequences of {length})"
    )
    return {
        "bits_per_byte": score.bits_per_byte,
        "loss": score.loss,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "sequence_length": length,
        "checkpoint": str(model.path),
    }


COMMAND = Command(
    main, Flags, config="none", argument="checkpoint", unexpected="give text as --data=FILE"
)

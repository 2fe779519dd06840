"""Trains a SentencePiece vocabulary on a config's training data.

  flm vocabulary --config=configs/demo.py --vocab_size=1024 --output=FILE

Point `config.data.vocabulary` at the file to use it.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from flm_jax import data
from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    vocab_size: int = flag(1024, "Number of tokens: 3 special ones, 256 bytes, and pieces.")
    output: str = flag(
        "",
        "File to write the vocabulary to.",
        required="give the file to write, as --output=vocab.model",
    )


EVAL_SEQUENCES = 4096


def main(call: Call[Flags]) -> dict[str, Any]:
    output = call.flags.output
    data_config = config_files.experiment(call.config).data
    data_config = dataclasses.replace(data_config, train_vocabulary=0)  # the flag gives the size
    data.train_sentencepiece(data_config, call.flags.vocab_size, output)
    corpus = data.open_corpus(dataclasses.replace(data_config, vocabulary=output))
    num_bytes = num_tokens = 0
    for batch in corpus.validation(64, EVAL_SEQUENCES):
        num_bytes += int(corpus.token_bytes[batch["targets"]].sum())
        num_tokens += int(batch["weights"].sum())
    bytes_per_token = num_bytes / num_tokens
    print(
        f"{output}: {corpus.vocab_size} tokens, {bytes_per_token:.2f} bytes per token of the "
        "validation split",
        file=sys.stderr if call.json else sys.stdout,
    )
    return {
        "vocabulary": output,
        "vocab_size": corpus.vocab_size,
        "bytes_per_token": round(bytes_per_token, 4),
    }


COMMAND = Command(main, Flags)

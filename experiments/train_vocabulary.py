"""Trains a SentencePiece vocabulary on the training split of a config's data.

  python -m experiments.train_vocabulary --config=configs/demo.py --vocab_size=1024 --output=FILE

Point `config.data.vocabulary` at the file to use it.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import ml_collections
from absl import flags

from experiments import cli
from flm_jax import data

VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 1024, "tokens: 3 special, 256 bytes, pieces")
OUTPUT = flags.DEFINE_string("output", None, "file to write the model to", required=True)

EVAL_SEQUENCES = 4096


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    data_config = cli.experiment(config).data
    data.train_sentencepiece(data_config, VOCAB_SIZE.value, OUTPUT.value)
    corpus = data.open_corpus(dataclasses.replace(data_config, vocabulary=OUTPUT.value))
    num_bytes = num_tokens = 0
    for batch in corpus.validation(64, EVAL_SEQUENCES):
        num_bytes += int(corpus.token_bytes[batch["targets"]].sum())
        num_tokens += int(batch["weights"].sum())
    bytes_per_token = num_bytes / num_tokens
    print(
        f"{OUTPUT.value}: {corpus.vocab_size} tokens, {bytes_per_token:.2f} bytes per token of the "
        "validation split",
        file=sys.stderr if cli.json_wanted() else sys.stdout,
    )
    return {
        "vocabulary": OUTPUT.value,
        "vocab_size": corpus.vocab_size,
        "bytes_per_token": round(bytes_per_token, 4),
    }


if __name__ == "__main__":
    cli.run(main)

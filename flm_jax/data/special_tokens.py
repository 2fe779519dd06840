"""The tokens that start and end a text: what the files beside a tokenizer say about them.

This is the only place that reads them. `tokenizer.py` combines them with the tokenizer's own
settings; training, generation, evaluation, comparison and the harness use the result.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from flm_jax.data import json_text

# Usual names of the end-of-sequence token, for a tokenizer without a file that names it.
USUAL_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>")


@dataclasses.dataclass(frozen=True)
class Named:
    """What the files in a tokenizer's folder say.

    Attributes:
      bos: names of the token that begins a text, the best one first.
      eos: names of the token that ends a text, the best one first.
      adds: whether the first is put before and the second after every text; None: not said. As
        in transformers, this is for SentencePiece models; a tokenizer.json has a post-processor.
      bos_ids: ids of the tokens that begin a text, of the model's config.
      eos_ids: ids of the tokens that end a text, of the model's config.
    """

    bos: tuple[str, ...]
    eos: tuple[str, ...]
    adds: tuple[bool, bool] | None
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]


def named(folder: pathlib.Path) -> Named:
    """Reads what the files in a tokenizer's folder say about special tokens.

    Raises:
      UserError: a file is not JSON.
    """
    config = object_in(folder / "tokenizer_config.json")
    files = [config, object_in(folder / "special_tokens_map.json")]
    keys = ("add_bos_token", "add_eos_token")
    adds = None
    if any(key in config for key in keys):
        adds = (bool(config.get(keys[0])), bool(config.get(keys[1])))
    return Named(
        bos=_names(files, "bos_token"),
        eos=_names(files, "eos_token"),
        adds=adds,
        bos_ids=() if "bos_token" in config else model_ids(folder, "bos_token_id"),
        eos_ids=model_ids(folder, "eos_token_id"),
    )


def model_ids(folder: pathlib.Path, key: str) -> tuple[int, ...]:
    """Reads token ids of a model: one, or a list.

    As in transformers, generation_config.json comes before config.json.

    Args:
      folder: the model's folder.
      key: "bos_token_id" or "eos_token_id".

    Raises:
      UserError: a file is not JSON.
    """
    for name in ("generation_config.json", "config.json"):
        values = object_in(folder / name)
        for value in (values.get(key), _inner(values).get(key)):
            ids = value if isinstance(value, list) else [value]
            found = tuple(i for i in ids if type(i) is int and 0 <= i < 2**31)  # -1: none
            if found:
                return found
    return ()


def _inner(values: dict[str, Any]) -> dict[str, Any]:
    """The config of the text model inside another model's config."""
    inner = values.get("text_config")
    return inner if isinstance(inner, dict) else {}


def _names(files: list[dict[str, Any]], key: str) -> tuple[str, ...]:
    tokens = [file.get(key) for file in files]
    names = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return tuple(name for name in names if isinstance(name, str))


def object_in(file: pathlib.Path) -> dict[str, Any]:
    """Reads a file with one JSON object; {} if there is no file. Raises UserError if damaged."""
    return json_text.read_object(file, "restore it") if file.exists() else {}

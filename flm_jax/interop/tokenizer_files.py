"""Copies what belongs to a model beside its weights: tokenizer files and generation settings."""

from __future__ import annotations

import fnmatch
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from flm_jax.config import TransformerConfig
from flm_jax.data import json_text
from flm_jax.data.chat_template import TemplateConfig, as_jinja
from flm_jax.data.tokenizer import BYTES_SPECIAL, byte_alphabet, open_tokenizer
from flm_jax.errors import UserError
from flm_jax.interop.gguf_files import GgufFile, tokenizer_config, tokenizer_of
from flm_jax.interop.hf_config import SPECIAL_IDS
from flm_jax.runtime import paths, regular

# Files that define how text becomes tokens, chat templates included.
_TOKENIZER = ("tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json",
              "vocab.json", "merges.txt", "tekken.json", "spiece.model", "*.tiktoken",
              "chat_template*")  # fmt: skip
_TEMPLATES = "additional_chat_templates"  # a folder
# Of the source. Its README becomes part of the new model card.
_TERMS = ("license*", "licence*", "copying*", "notice*", "use_policy*", "readme.md")
_CONFIG = "tokenizer_config.json"
_GENERATION = "generation_config.json"
_MODEL_CODE = ("configuration_*.py", "modeling_*.py")  # for models not in transformers
_NUM_TOKENS = "unpadded_vocab_size"  # of config.json: its vocab_size without padding rows
BYTES = "bytes"  # seqio's byte vocabulary: three special tokens, then the bytes


class Vocabulary:
    """The files of a tokenizer.

    Attributes:
      path: a folder, a SentencePiece model, "bytes", or "" for none.
    """

    def __init__(self, path: str):
        self.path = path
        self._folder = paths.fetched(paths.of(path)) if path and path != BYTES else None
        if self._folder and self._folder.name in ("tokenizer.json", "tokenizer.model"):
            self._folder = self._folder.parent

    def num_tokens(self) -> int | None:
        """Returns the largest token id plus 1, or None if no file lists the tokens."""
        if self.path == BYTES:
            return len(BYTES_SPECIAL) + 256
        if self._folder is None:
            return None
        if self._folder.is_file():
            return int(_sentencepiece(self._folder).vocab_size())
        ids = [-1]
        if (file := self._folder / "tokenizer.json").exists():
            ids += _tokenizer_json(file).get_vocab(with_added_tokens=True).values()
        elif (file := self._folder / "tokenizer.model").exists():
            ids.append(_sentencepiece(file).vocab_size() - 1)
        if (file := self._folder / "added_tokens.json").exists():
            ids += _added_ids(file)
        return max(ids) + 1 or None

    def special_tokens(self) -> dict[str, Any]:
        """Returns the special token ids for config.json; {} if one beside the files has them."""
        if not self.path or self.values():
            return {}
        tokenizer = open_tokenizer(self.path)
        return {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": 0 if tokenizer.start_id == 0 else None,
        }

    def values(self) -> dict[str, Any]:
        """Returns the values of the config.json beside the files; {} if there is none."""
        file = (self._folder or pathlib.Path()) / "config.json"
        return json_text.read_object(file) if self._folder and file.is_file() else {}

    def readme(self) -> str:
        """Returns the README.md beside the files; "" if there is none."""
        file = (self._folder or pathlib.Path()) / "README.md"
        return (
            regular.read(file).decode("utf-8", "replace") if self._folder and file.is_file() else ""
        )

    def copy(self, target: pathlib.Path, code: bool = False) -> None:
        """Copies the files into a folder; with `code`, also the model's own Python files."""
        if self.path == BYTES:
            _write_byte_tokenizer(target)
            return
        if self._folder is None:
            return
        if self._folder.is_file():
            _copy(self._folder, target / "tokenizer.model")
        else:
            patterns = (*_TOKENIZER, *_TERMS, _GENERATION, *(_MODEL_CODE if code else ()))
            for file in self._folder.iterdir():
                if file.is_file() and any(fnmatch.fnmatch(file.name.lower(), p) for p in patterns):
                    _copy(file, target / file.name)
            for file in (self._folder / _TEMPLATES).glob("*.jinja"):
                (target / _TEMPLATES).mkdir(exist_ok=True)
                _copy(file, target / _TEMPLATES / file.name)
        if not any((target / name).exists() for name in ("tokenizer.json", _CONFIG)):
            _name_special_tokens(target)

    def name_of(self, token: int) -> str:
        """Returns the name of a special token."""
        if self.path == BYTES:
            return BYTES_SPECIAL[token]
        assert self._folder is not None
        file = self._folder if self._folder.is_file() else self._folder / "tokenizer.json"
        if file.suffix == ".json" and file.is_file():
            return str(_tokenizer_json(file).id_to_token(token))
        file = file if file.is_file() else self._folder / "tokenizer.model"
        return str(_sentencepiece(file).id_to_piece(token))

    def template_text(self, template: TemplateConfig) -> str:
        """Writes a chat template in Jinja, with the names of this tokenizer's tokens.

        The start token precedes every conversation, as in training.
        """
        if template.jinja:
            return template.jinja
        tokenizer = open_tokenizer(self.path)
        names = (self.name_of(token) for token in (tokenizer.start_id, tokenizer.eos_id))
        return as_jinja(template, *names)


def write_chat_template(folder: pathlib.Path, text: str) -> None:
    """Writes a chat template into tokenizer_config.json, in place of every other one there."""
    for other in folder.glob("chat_template*"):
        other.unlink()
    shutil.rmtree(folder / _TEMPLATES, ignore_errors=True)
    file = folder / _CONFIG
    _write(file, {**(json_text.read_object(file) if file.exists() else {}), "chat_template": text})


class GgufVocabulary(Vocabulary):
    """The tokenizer inside a GGUF file."""

    def __init__(self, file: GgufFile):
        super().__init__("")
        self.path = str(file.path)
        self._file = file
        self._tokenizer = tokenizer_of(file)

    def num_tokens(self) -> int | None:
        return self._tokenizer.get_vocab_size() if self._tokenizer else None

    def special_tokens(self) -> dict[str, Any]:
        return {}

    def values(self) -> dict[str, Any]:
        return {key: self._file.values[key] for key in (*SPECIAL_IDS, "max_position_embeddings")}

    def copy(self, target: pathlib.Path, code: bool = False) -> None:
        if self._tokenizer:
            self._tokenizer.save(str(target / "tokenizer.json"))
            _write(target / _CONFIG, tokenizer_config(self._file))


def with_padding(config: TransformerConfig, values: Mapping[str, Any]) -> TransformerConfig:
    """Returns the config with the number of tokens that `padding_of` wrote to config.json."""
    tokens = values.get(_NUM_TOKENS)
    if isinstance(tokens, int) and 0 < tokens <= config.vocab_size:
        return config.with_tokens(tokens)
    return config


def padding_of(config: TransformerConfig) -> dict[str, Any]:
    """Returns what config.json says about padding rows; a value of None is left out."""
    return {_NUM_TOKENS: config.num_tokens or None}


def write_config(folder: pathlib.Path, values: Mapping[str, Any]) -> list[str]:
    """Writes config.json, and a generation_config.json that matches it.

    Returns:
      One note for each key with an id of a token that is left out because the vocabulary has no
      such row; transformers could not open the model with it, or never stop.
    """
    values = {key: value for key, value in values.items() if (key, value) != (_NUM_TOKENS, None)}
    rows, file = values["vocab_size"], folder / _GENERATION
    values, notes = _within(values, rows, "config.json")
    _write(folder / "config.json", values)
    generation = json_text.read_object(file) if file.exists() else {}
    generation, more = _within(generation, rows, _GENERATION)
    generation.pop("transformers_version", None)
    for key in SPECIAL_IDS:
        if key not in generation and values.get(key) is not None:
            generation[key] = values[key]
    longest, asked = values["max_position_embeddings"], generation.get("max_length")
    if isinstance(asked, int) and asked > longest:
        generation["max_length"] = longest
    _write(file, generation)
    return notes + [note for note in more if note not in notes]


def _within(values: Mapping[str, Any], rows: int, file: str) -> tuple[dict[str, Any], list[str]]:
    """Leaves out ids of tokens that the vocabulary has no row for, under keys like eos_token_id.

    Returns:
      The values that stay, and a note for each key that changes.
    """
    kept, notes = dict(values), []
    for key, value in values.items():
        if key.endswith("_token_id") and (ids := _ids_below(value, rows)) != value:
            kept[key] = ids
            notes.append(f"{file}: {key} {value!r} is left out: the vocabulary has {rows} rows")
    return kept, notes


def _ids_below(ids: Any, rows: int) -> Any:
    """The id, or those of a list, that the vocabulary has; None if it has none of them."""
    if isinstance(ids, list):
        return [one for one in ids if _ids_below(one, rows) is not None] or None
    return ids if isinstance(ids, int) and 0 <= ids < rows else None


def _write(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    file.write_text(json_text.dump(values, indent=2) + "\n", encoding="utf-8")


def _write_byte_tokenizer(folder: pathlib.Path) -> None:
    """Writes the byte vocabulary as a byte-level tokenizer.json without merges."""
    import tokenizers

    tokens = [*BYTES_SPECIAL, *byte_alphabet()]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges=[])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(BYTES_SPECIAL))
    pad, eos, unknown = BYTES_SPECIAL
    # Padding starts every document in training.
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{pad} $A", special_tokens=[(pad, 0)]
    )
    made.save(str(folder / "tokenizer.json"))
    special = {"bos_token": pad, "pad_token": pad, "eos_token": eos, "unk_token": unknown}
    _write(folder / _CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def _name_special_tokens(folder: pathlib.Path) -> None:
    """Writes tokenizer_config.json for a SentencePiece model whose padding starts documents."""
    file = folder / "tokenizer.model"
    library = _sentencepiece(file) if file.is_file() else None
    if library is None or library.pad_id() != 0 or library.eos_id() < 0:
        return
    ids = {"bos": 0, "pad": 0, "eos": library.eos_id(), "unk": library.unk_id()}
    names = {f"{role}_token": library.id_to_piece(token) for role, token in ids.items()}
    _write(folder / _CONFIG, {"add_bos_token": True, **names})


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file. As in a cache of Hugging Face's, it may be a link to another place."""
    target.write_bytes(regular.read(source))


def _added_ids(file: pathlib.Path) -> list[int]:
    """The ids in added_tokens.json. Raises UserError if a token's id is none."""
    ids = json_text.read_object(file)
    for name, token in ids.items():
        if type(token) is not int or not 0 <= token < 2**31:
            raise UserError(f"{file}: {name!r} has id {token!r}; it must be an integer from 0 on")
    return list(ids.values())


def _sentencepiece(file: pathlib.Path) -> Any:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(regular.read(file))
    except RuntimeError as error:
        raise UserError(f"{file}: no SentencePiece model ({error}); fetch it again") from None
    return model


def _tokenizer_json(file: pathlib.Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_buffer(regular.read(file))
    except UserError:
        raise
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{file}: no tokenizer ({error}); fetch it again") from None

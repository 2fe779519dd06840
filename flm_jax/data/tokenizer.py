"""Tokenizers without TensorFlow: bytes, SentencePiece models, Hugging Face's tokenizer.json.

Every token has its bytes; a special token has none. This one table per tokenizer decodes text,
token by token as it is generated, and counts the bytes for bits per byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flm_jax.errors import UserError

# SentencePiece's character for a space.
SPACE = "\u2581"
# Usual names of the end-of-sequence token, for a tokenizer.json without a file that names it.
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      name: "bytes", or the path of the file.
      pieces: the bytes of each id; b"" for special tokens. Joined over a document's tokens they
        give its text, unless the tokenizer changes text (Unicode normalisation, an added space).
      eos_id: the token that ends a document.
      start_id: the model's input at the start of a document: token 0 if it is padding, else the
        beginning-of-sequence token that the tokenizer adds, else `eos_id`.
      starts: the tokens that the tokenizer's own files put before every text.
      ends: the tokens that they put after every text.
      bos_id: the token that its files name as the beginning of a sequence; None: they name none.
      digest: SHA-256, hex, of the file; "bytes" for bytes.
      encode_batch: encodes several texts; the second argument is `special` of `encode`.
    """

    name: str
    pieces: tuple[bytes, ...]
    eos_id: int
    start_id: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    bos_id: int | None
    digest: str
    encode_batch: Callable[[Sequence[str], bool], list[list[int]]] = dataclasses.field(repr=False)

    @property
    def vocab_size(self) -> int:
        """Special tokens included."""
        return len(self.pieces)

    @property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: the number of bytes of each token."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Encodes a text, without a start or end token.

        Args:
          text: what to encode.
          special: encode names of special tokens in the text as these tokens, as a chat template
            needs (only a tokenizer.json); False: they are ordinary text.

        Returns:
          Token ids.

        >>> open_tokenizer("bytes").encode("ab")
        [100, 101]
        """
        return self.encode_batch([text], special)[0]

    def with_special(self, ids: Sequence[int]) -> list[int]:
        """Puts the start and end tokens around a text's tokens that the tokenizer's files add.

        Args:
          ids: tokens of a whole text, as `encode` returns them.

        Returns:
          The ids that the tokenizer's own library gives for the text.

        >>> open_tokenizer("bytes").with_special([100, 101])
        [0, 100, 101]
        """
        return [*self.starts, *ids, *self.ends]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decodes to bytes. Special tokens, and ids beyond the vocabulary, give nothing.

        (A model with a padded vocabulary can generate ids beyond the tokenizer's.)
        """
        return b"".join(self.pieces[i] for i in ids if i < len(self.pieces))

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes to text; U+FFFD replaces bytes that are not UTF-8.

        >>> open_tokenizer("bytes").decode([100, 101, 1])
        'ab'
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")


def open_tokenizer(vocabulary: str) -> Tokenizer:
    """Opens the tokenizer that `DataConfig.vocabulary` names.

    Args:
      vocabulary: "bytes"; a SentencePiece model; a tokenizer.json; or a folder with tokenizer.json
        or tokenizer.model.

    Raises:
      UserError: there is no such file, it is malformed, or it has no end-of-sequence token.
    """
    if vocabulary == "bytes":
        return _bytes()
    path = pathlib.Path(vocabulary).expanduser()
    where = f"DataConfig.vocabulary is {vocabulary!r}"
    if path.is_dir():
        files = [path / name for name in ("tokenizer.json", "tokenizer.model")]
        found = [file for file in files if file.is_file()]
        if not found:
            raise UserError(
                f"{where}, a folder without tokenizer.json and tokenizer.model; give a tokenizer's "
                "file or folder"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(
            f"{where}, but no such file exists; give 'bytes', a tokenizer.json, or a SentencePiece "
            "model (flm vocabulary trains one)"
        )
    read = _hugging_face if path.suffix == ".json" else _sentencepiece
    return read(path, where)


def _bytes() -> Tokenizer:
    """seqio's byte vocabulary: byte + 3; 0 is padding, 1 end of sequence, 2 unknown."""
    pieces = (b"", b"", b"", *(bytes([i]) for i in range(256)))

    def encode(texts: Sequence[str], special: bool) -> list[list[int]]:
        return [[byte + 3 for byte in text.encode("utf-8")] for text in texts]

    return Tokenizer("bytes", pieces, 1, 0, (0,), (), 0, "bytes", encode)


def _sentencepiece(path: pathlib.Path, where: str) -> Tokenizer:
    """Opens a SentencePiece model."""
    import sentencepiece

    data = path.read_bytes()
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.load_from_serialized_proto(data)
    except RuntimeError as error:
        raise UserError(
            f"{where}, which is not a SentencePiece model: {error}; give another file"
        ) from error
    if model.eos_id() < 0:
        raise UserError(f"{where}, a model without an end-of-sequence token; train it with eos_id")

    def piece(token: int) -> bytes:
        text = model.id_to_piece(token)
        if model.is_byte(token):
            return bytes([int(text[1:-1], 16)])  # <0x0A>
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            return b""
        return text.replace(SPACE, " ").encode("utf-8")

    def encode(texts: Sequence[str], special: bool) -> list[list[int]]:
        ids: list[list[int]] = model.encode(list(texts))
        return ids

    bos = model.bos_id() if model.bos_id() >= 0 else None
    start = 0 if model.pad_id() == 0 else model.eos_id() if bos is None else bos
    config = _beside(path, "tokenizer_config.json")
    if start == 0 and not config:  # trained here: padding starts every document
        bos, config = 0, {"add_bos_token": True}
    ids = {name: model.piece_to_id(name) for name in _names(path, "bos_token")}
    named = [token for name, token in ids.items() if model.id_to_piece(token) == name]
    return Tokenizer(
        name=str(path),
        pieces=tuple(piece(token) for token in range(model.get_piece_size())),
        eos_id=model.eos_id(),
        start_id=start,
        starts=(start,) if config.get("add_bos_token", False) else (),
        ends=(model.eos_id(),) if config.get("add_eos_token", False) else (),
        bos_id=next(iter(named), bos),
        digest=hashlib.sha256(data).hexdigest(),
        encode_batch=encode,
    )


def _hugging_face(path: pathlib.Path, where: str) -> Tokenizer:
    """Opens a tokenizer.json."""
    import tokenizers

    data = path.read_bytes()
    try:
        fields = json.loads(data)
        model = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(
            f"{where}, which is not a tokenizer.json: {error}; give another file"
        ) from error
    model.no_truncation()
    model.no_padding()
    added = {token["id"]: token for token in fields.get("added_tokens", ())}
    piece_of = _piece_reader(fields, where)
    size = max(model.get_vocab(with_added_tokens=True).values()) + 1

    def piece(token: int) -> bytes:
        if token in added:
            return b"" if added[token]["special"] else added[token]["content"].encode("utf-8")
        text = model.id_to_token(token)
        return b"" if text is None else piece_of(text)

    def encode(texts: Sequence[str], special: bool) -> list[list[int]]:
        model.encode_special_tokens = not special
        return [e.ids for e in model.encode_batch(list(texts), add_special_tokens=False)]

    eos = _eos_id(path, model, where)
    starts, ends = _added_tokens(model)
    named = [model.token_to_id(name) for name in _names(path, "bos_token")]
    return Tokenizer(
        name=str(path),
        pieces=tuple(piece(token) for token in range(size)),
        eos_id=eos,
        start_id=starts[0] if starts else eos,
        starts=starts,
        ends=ends,
        bos_id=next((i for i in named if i is not None), None),
        digest=hashlib.sha256(data).hexdigest(),
        encode_batch=encode,
    )


def _added_tokens(model: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the tokens that the post-processor puts before and after a text."""
    encoding = model.encode("a")
    added = list(zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    first, last = (
        tuple(token for token, _ in itertools.takewhile(lambda item: item[1], tokens))
        for tokens in (added, reversed(added))
    )
    return first, last[::-1] if len(first) < len(added) else ()


def _piece_reader(fields: dict[str, Any], where: str) -> Callable[[str], bytes]:
    """Returns the function from a token's text to its bytes.

    A file writes bytes either in GPT-2's alphabet or as SentencePiece does.
    """
    decoder = fields.get("decoder")
    text = json.dumps(decoder)
    if '"ByteLevel"' in text:
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}

        def byte_level(token: str) -> bytes:
            return bytes(byte_of[c] for c in token)

        return byte_level
    if '"ByteFallback"' not in text and '"Metaspace"' not in text and SPACE not in text:
        raise UserError(
            f"{where}, but the bytes of its tokens are not known (its decoder is "
            f"{(decoder or {}).get('type')}); give a byte-level or SentencePiece-like tokenizer"
        )

    def with_fallback(token: str) -> bytes:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[1:-1], 16)])
        return token.replace(SPACE, " ").encode("utf-8")

    return with_fallback


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte.

    It is the byte's own character if that prints, else the next unused one from U+0100.

    >>> alphabet = byte_alphabet()
    >>> alphabet[ord("A")], alphabet[ord(" ")]
    ('A', 'Ġ')
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _eos_id(path: pathlib.Path, model: Any, where: str) -> int:
    """Reads the end token from the files beside tokenizer.json, else finds it by a usual name."""
    for name in [*_names(path, "eos_token"), *_EOS_NAMES]:
        if model.token_to_id(name) is not None:
            return int(model.token_to_id(name))
    raise UserError(
        f"{where}, which has no end-of-sequence token: eos_token in tokenizer_config.json beside "
        f"it names none of its tokens, and it has none of {', '.join(_EOS_NAMES)}; add eos_token"
    )


def _names(path: pathlib.Path, role: str) -> list[str]:
    """Returns the names that the files beside the tokenizer give to a role, as "eos_token"."""
    names = []
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _beside(path, file).get(role)
        names.append(token.get("content") if isinstance(token, dict) else token)
    return [name for name in names if isinstance(name, str)]


def _beside(path: pathlib.Path, name: str) -> dict[str, Any]:
    """Reads the JSON object in another file of the same folder; empty if there is none."""
    file = path.with_name(name)
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}; restore it") from error
    return values if isinstance(values, dict) else {}

"""Tokenizers without TensorFlow: bytes, SentencePiece models, Hugging Face's tokenizer.json.

Every token has its bytes; a special token has none. This one table per tokenizer decodes text,
token by token as it is generated, and counts the bytes for bits per byte.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flm_jax.data import json_text, special_tokens
from flm_jax.errors import UserError
from flm_jax.runtime import paths, regular

# SentencePiece's character for a space.
SPACE = "\u2581"
_MOST_TOKENS = 1 << 22  # every id up to the largest has an entry in the table
# Names of the byte vocabulary's first tokens, as exported files give them.
BYTES_SPECIAL = ("<pad>", "</s>", "<unk>")
# (texts, special, inside) -> ids of each text; see `Tokenizer.encode`.
Encode = Callable[[Sequence[str], bool, bool], list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      name: "bytes", or the path of the file.
      pieces: the bytes of each id; b"" for special tokens. Joined over a document's tokens they
        give its text, unless the tokenizer changes text (Unicode normalisation, an added space).
      eos_id: the token that ends a document.
      stop_ids: the tokens that end a generated text: `eos_id`, and those of the model's config.
      start_id: the model's input at the start of a document: token 0 if it is padding, else the
        beginning-of-sequence token that the tokenizer adds, else `eos_id`.
      starts: the tokens that the tokenizer's own files put before every text.
      ends: the tokens that they put after every text.
      bos_id: the token that its files name as the beginning of a sequence; None: they name none.
      digest: SHA-256, hex, of the file; "bytes" for bytes.
      encode_batch: encodes several texts; the other arguments are `special` and `inside` of
        `encode`.
    """

    name: str
    pieces: tuple[bytes, ...]
    eos_id: int
    stop_ids: tuple[int, ...]
    start_id: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    bos_id: int | None
    digest: str
    encode_batch: Encode = dataclasses.field(repr=False)

    @property
    def vocab_size(self) -> int:
        """Special tokens included."""
        return len(self.pieces)

    @property
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: the number of bytes of each token."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    def encode(self, text: str, special: bool = False, inside: bool = False) -> list[int]:
        """Encodes a text, without a start or end token.

        Args:
          text: what to encode.
          special: encode names of special tokens in the text as these tokens, as a chat template
            needs; False: they are ordinary text.
          inside: other text comes before this one, so no space is added, as some tokenizers do at
            the beginning of a text (SentencePiece's dummy prefix).

        Returns:
          Token ids.

        Raises:
          UserError: the text holds half of a surrogate pair, which has no bytes.

        >>> open_tokenizer("bytes").encode("ab")
        [100, 101]
        """
        try:
            json_text.check_text(text)
        except ValueError as error:
            raise UserError(f"{text[:40]!a} cannot be encoded: {error}; remove it") from error
        return self.encode_batch([text], special, inside)[0]

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
        return b"".join(self.pieces[i] for i in ids if 0 <= i < len(self.pieces))

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
    path = paths.fetched(paths.of(vocabulary, "DataConfig.vocabulary"))
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
            "model (flm vocabulary trains one). To use a tokenizer of the Hugging Face hub, fetch "
            "its files (hf download NAME tokenizer.json tokenizer_config.json --local-dir FOLDER) "
            "and give FOLDER"
        )
    if path.suffix == ".gguf":
        raise UserError(
            f"{where}; a tokenizer inside a GGUF file is only converted: flm convert "
            f"--source={vocabulary} --target=FOLDER --format=llama, then give FOLDER as the source "
            "and as the vocabulary"
        )
    read = _hugging_face if path.suffix == ".json" else _sentencepiece
    return read(path, where)


def _bytes() -> Tokenizer:
    """seqio's byte vocabulary: byte + 3; 0 is padding, 1 end of sequence, 2 unknown."""
    pieces = (b"", b"", b"", *(bytes([i]) for i in range(256)))
    names = re.compile(f"({'|'.join(BYTES_SPECIAL)})")

    def with_names(text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(names.split(text)):
            ids += [BYTES_SPECIAL.index(part)] if number % 2 else (b + 3 for b in part.encode())
        return ids

    def encode(texts: Sequence[str], special: bool, inside: bool) -> list[list[int]]:
        if special:
            return [with_names(text) for text in texts]
        return [[byte + 3 for byte in text.encode("utf-8")] for text in texts]

    return Tokenizer(
        "bytes", pieces, eos_id=1, stop_ids=(1,), start_id=0, starts=(0,), ends=(), bos_id=0,
        digest="bytes", encode_batch=encode,
    )  # fmt: skip


def _sentencepiece(path: pathlib.Path, where: str) -> Tokenizer:
    """Opens a SentencePiece model."""
    import sentencepiece

    data = regular.read(path)
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.load_from_serialized_proto(data)
    except RuntimeError as error:
        text = "a text file, " if _is_text(data) else ""
        raise UserError(
            f"{where}, which is {text}not a SentencePiece model; give one (flm vocabulary trains "
            "it), a tokenizer.json, or 'bytes'"
        ) from error
    size = model.get_piece_size()

    def piece(token: int) -> bytes:
        text = model.id_to_piece(token)
        if model.is_byte(token):
            return bytes([int(text[1:-1], 16)])  # <0x0A>
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            return b""
        return text.replace(SPACE, " ").encode("utf-8")

    def id_of(name: str) -> int | None:
        token = model.piece_to_id(name)
        return token if model.id_to_piece(token) == name else None

    named = special_tokens.named(path.parent)
    own_eos = [model.eos_id()] if model.eos_id() >= 0 else []
    eos = _first(named.eos, id_of, [*own_eos, *named.eos_ids], size)
    if eos is None:
        raise UserError(f"{where}, a model without an end-of-sequence token; train it with eos_id")
    own_bos = [model.bos_id()] if model.bos_id() >= 0 else []
    bos = _first(named.bos, id_of, [*own_bos, *named.bos_ids], size)
    adds = named.adds or (False, False)
    if model.pad_id() == 0 and not named.adds and not named.bos:
        bos, adds = 0, (True, False)  # trained here: padding starts a document
    starts = (bos,) if adds[0] and bos is not None else ()
    ends = (eos,) if adds[1] else ()
    usual = 0 if model.pad_id() == 0 else eos if bos is None else bos
    return Tokenizer(
        name=str(path),
        pieces=tuple(piece(token) for token in range(size)),
        eos_id=eos,
        stop_ids=tuple(dict.fromkeys((eos, *named.eos_ids))),
        start_id=starts[0] if starts else usual,
        starts=starts,
        ends=ends,
        bos_id=bos,
        digest=hashlib.sha256(data).hexdigest(),
        encode_batch=_sentencepiece_encoder(model, data),
    )


def _is_text(data: bytes) -> bool:
    """Whether a file that should be a model is text: all of its first characters are printed."""
    start = data[:1000].decode("utf-8", "ignore")
    return bool(start) and all(c.isprintable() or c.isspace() for c in start)


def _sentencepiece_encoder(model: Any, data: bytes) -> Encode:
    """Returns the function that encodes with a SentencePiece model.

    SentencePiece itself never reads the name of a control token as this token, and always adds a
    dummy prefix if the model has one.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(data)
    proto.normalizer_spec.add_dummy_prefix = False
    without_prefix = sentencepiece.SentencePieceProcessor()
    without_prefix.load_from_serialized_proto(proto.SerializeToString())
    control = {
        model.id_to_piece(token): token
        for token in range(model.get_piece_size())
        if model.is_control(token)
    }
    longest_first = sorted(control, key=len, reverse=True)
    names = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    encode_inside = _inside(model.encode, without_prefix.encode)

    def with_control(text: str, inside: bool) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(names.split(text)):
            if number % 2:
                ids.append(control[part])
            elif part:
                ids += encode_inside(part) if inside or number else model.encode(part)
        return ids

    def encode(texts: Sequence[str], special: bool, inside: bool) -> list[list[int]]:
        if special and control:
            return [with_control(text, inside) for text in texts]
        if inside:
            return [encode_inside(text) for text in texts]
        ids: list[list[int]] = model.encode(list(texts))
        return ids

    return encode


def _hugging_face(path: pathlib.Path, where: str) -> Tokenizer:
    """Opens a tokenizer.json."""
    import tokenizers

    data = regular.read(path)
    try:
        fields = json_text.parse(data)
        model = tokenizers.Tokenizer.from_buffer(data)
        plain = _without_prefix(fields)
        without_prefix = (
            model if plain == fields else tokenizers.Tokenizer.from_str(json.dumps(plain))
        )
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(
            f"{where}, which is not a tokenizer.json: {error}; give another file"
        ) from error
    for library in (model, without_prefix):
        # Settings of the call that the file was saved after, not of the tokenizer.
        library.no_truncation()
        library.no_padding()
    added = {token["id"]: token for token in fields.get("added_tokens", ())}
    piece_of = _piece_reader(fields, where)
    size = max(model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > _MOST_TOKENS:
        raise UserError(f"{where}: it has a token with id {size - 1:,}; fetch the file again")

    def piece(token: int) -> bytes:
        if token in added:
            return b"" if added[token]["special"] else added[token]["content"].encode("utf-8")
        text = model.id_to_token(token)
        return b"" if text is None else piece_of(text)

    def ids_of(library: Any, text: str) -> list[int]:
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    encode_inside = _inside(
        functools.partial(ids_of, model), functools.partial(ids_of, without_prefix)
    )

    def encode(texts: Sequence[str], special: bool, inside: bool) -> list[list[int]]:
        model.encode_special_tokens = without_prefix.encode_special_tokens = not special
        if inside:
            return [encode_inside(text) for text in texts]
        return [e.ids for e in model.encode_batch(list(texts), add_special_tokens=False)]

    named = special_tokens.named(path.parent)
    eos = _first(named.eos, model.token_to_id, named.eos_ids, size)
    if eos is None:
        eos = _first(special_tokens.USUAL_ENDS, model.token_to_id, (), size)
    if eos is None:
        raise UserError(
            f"{where}, which has no end-of-sequence token: eos_token in tokenizer_config.json "
            "beside it names none of its tokens, and it has none of "
            f"{', '.join(special_tokens.USUAL_ENDS)}; add eos_token"
        )
    bos = _first(named.bos, model.token_to_id, named.bos_ids, size)
    starts, ends = _added_tokens(model)
    return Tokenizer(
        name=str(path),
        pieces=tuple(piece(token) for token in range(size)),
        eos_id=eos,
        stop_ids=tuple(dict.fromkeys((eos, *named.eos_ids))),
        start_id=starts[0] if starts else eos,
        starts=starts,
        ends=ends,
        bos_id=bos,
        digest=hashlib.sha256(data).hexdigest(),
        encode_batch=encode,
    )


def _inside(
    encode: Callable[[str], list[int]], without_prefix: Callable[[str], list[int]]
) -> Callable[[str], list[int]]:
    """Returns the function that encodes a text after another one.

    A tokenizer that removes white space around a text puts its own space back: it stands for the
    text's first space.

    Args:
      encode: encodes a whole text.
      without_prefix: the same, without an added space.
    """
    replaces = encode(" a") == encode("a") != without_prefix("a")

    def inside(text: str) -> list[int]:
        return encode(text) if replaces and text.startswith(" ") else without_prefix(text)

    return inside


def _first(
    names: Iterable[str], id_of: Callable[[str], int | None], ids: Iterable[int], size: int
) -> int | None:
    """Returns the id of the first name that is a token, else the first id below `size`."""
    by_name = (token for name in names if (token := id_of(name)) is not None)
    return next(itertools.chain(by_name, (i for i in ids if 0 <= i < size)), None)


def _added_tokens(model: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the tokens that the post-processor puts before and after a text."""
    encoding = model.encode("a")
    added = list(zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    first, last = (
        tuple(token for token, _ in itertools.takewhile(lambda item: item[1], tokens))
        for tokens in (added, reversed(added))
    )
    return first, last[::-1] if len(first) < len(added) else ()


def _without_prefix(value: Any) -> Any:
    """Returns (part of) a tokenizer.json that puts no space before a text."""
    if isinstance(value, list):
        return [_without_prefix(x) for x in value if not _is_prepend(x)]
    if not isinstance(value, dict):
        return value
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {
        key: (
            off[key]
            if key in off
            else None
            if _is_prepend(x)
            else x
            if key in ("model", "added_tokens")  # large, and without such settings
            else _without_prefix(x)
        )
        for key, x in value.items()
    }


def _is_prepend(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "Prepend"


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

"""Documents, and how they are split into training and validation."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from flm_jax.errors import UserError

VALIDATION_FRACTION = 0.04
# Bytes above which a text is cut: what is packed together has to fit into memory.
PIECE_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
      name: path inside the folder; for a row of a file with its number.
      text: UTF-8.
      split_hash: hex; its value puts the document into training or validation.
      piece: number of this piece, from 0, of a text that was cut.
    """

    name: str
    text: bytes
    split_hash: str
    piece: int = 0


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def by_name(name: str, text: bytes) -> Document:
    """A document whose name puts it into training or validation."""
    return Document(name, text, sha256(name.encode()))


def by_text(name: str, text: bytes) -> Document:
    """A document whose text puts it into training or validation: equal ones are on one side."""
    return Document(name, text, sha256(text))


def split(
    documents: Sequence[Document], fewest: int, where: str
) -> tuple[list[Document], list[Document]]:
    """Splits documents into training and validation.

    Args:
      documents: the documents.
      fewest: with fewer different documents than this, each is cut by position instead: its last
        4% are for validation. Otherwise about 4% of the documents are, chosen by hash, and at least
        one.
      where: what names the documents, for the error.

    Returns:
      Training and validation, each in the order of the names.

    Raises:
      UserError: there are too few bytes to cut.
    """
    documents = sorted(documents, key=lambda document: document.name)
    hashes = {document.split_hash for document in documents}
    if len(hashes) < fewest:
        return _by_position(documents, where)
    bound = f"{int(VALIDATION_FRACTION * 16**8):08x}"
    validation = {h for h in hashes if h < bound} or {min(hashes)}
    return (
        [d for d in documents if d.split_hash not in validation],
        [d for d in documents if d.split_hash in validation],
    )


def _by_position(
    documents: Sequence[Document], where: str
) -> tuple[list[Document], list[Document]]:
    training, validation = [], []
    for document in documents:
        at = cut_position(document.text)
        if at:
            training.append(dataclasses.replace(document, text=document.text[:at]))
            name = f"{document.name}, end"
            validation.append(dataclasses.replace(document, name=name, text=document.text[at:]))
        else:
            training.append(document)
    if not validation:
        size = sum(len(document.text) for document in documents)
        raise UserError(
            f"{where} holds {size} bytes of text in {len(documents)} documents, too few to split "
            "into training and validation; add text"
        )
    return training, validation


def cut_position(text: bytes) -> int:
    """Returns where the part for validation begins: about the last 4% of a text.

    It is the begin of a line if one is near, otherwise of a character; 0: the text is too short.

    >>> cut_position(b"a line" * 20), cut_position(b"a\\n" * 50), cut_position("é".encode())
    (115, 96, 0)
    """
    part = max(1, round(VALIDATION_FRACTION * len(text)))
    at = len(text) - part
    line = text.rfind(b"\n", max(0, at - part), at) + 1
    if line:
        return line
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:  # inside a character
        at -= 1
    return max(at, 0)


def pieces(document: Document) -> list[Document]:
    """Cuts a document of more than `PIECE_BYTES` at ends of lines, or else of characters."""
    text, found, start = document.text, [], 0
    while len(text) - start > PIECE_BYTES:
        end = start + PIECE_BYTES
        line = text.rfind(b"\n", start, end) + 1
        while not line and text[end] & 0xC0 == 0x80:
            end -= 1
        end = line or end
        found.append(text[start:end])
        start = end
    if not start:
        return [document]
    found.append(text[start:])
    return [
        dataclasses.replace(document, name=f"{document.name}+{n:08d}", text=piece, piece=n)
        for n, piece in enumerate(found)
    ]

"""The study's text: Python sources as one array of tokens, with a list of what it holds.

Built once, into files; later starts read these, so that a package that is installed meanwhile
changes nothing. Documents are in the order of their digests. Training reads windows of this order,
drawn without replacement; validation is whole documents that training does not have.

Letters in array names: K batches, B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from flm_jax import mapping
from flm_jax.data.stream import Batch
from flm_jax.data.tokenizer import Tokenizer, open_tokenizer
from flm_jax.errors import UserError
from flm_jax.runtime import paths
from flm_jax.store.files import write_json
from flm_jax.studies.growth_study.config import CorpusConfig

STDLIB = "stdlib"
NOT_STDLIB = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data")
)
MIN_LINE = 20  # characters of a line that can show a near duplicate
MIN_LINES = 5  # different such lines that two documents must share
BOILERPLATE = 10  # documents with a line that then shows nothing: licences, usual imports
DUPLICATE = 0.5  # share of a document's lines in one held-out document, or the other way round
MAX_HELD_OUT = 16_000  # bytes of a held-out document, so that no document dominates
MIN_PACKAGE = 8_000  # held-out bytes of a package that is listed by itself


@dataclasses.dataclass(frozen=True)
class Document:
    """One file: its package, its name in the package, and its text."""

    package: str
    name: str
    text: bytes

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text).hexdigest()

    @functools.cached_property
    def order(self) -> str:
        """Decides its place, and whether it is held out."""
        return hashlib.sha256(f"{self.package}/{self.name}".encode()).hexdigest()


def find(config: CorpusConfig) -> tuple[list[Document], dict[str, str]]:
    """Reads the documents, and the version of every package.

    Raises:
      UserError: a package is not installed, or the folder does not exist or has no text.
    """
    documents: list[Document] = []
    versions: dict[str, str] = {}
    if config.stdlib:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        ours = (p for p in root.rglob("*.py") if NOT_STDLIB.isdisjoint(p.relative_to(root).parts))
        documents += _read(STDLIB, ((p, p.relative_to(root).as_posix()) for p in ours), config)
        versions[STDLIB] = platform.python_version()
    for package in config.packages:
        try:
            found = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"CorpusConfig.packages has {package!r}, which is not installed; install it in the "
                "pinned version (constraints.txt), or leave it out"
            ) from error
        files = (f for f in found.files or () if f.suffix == ".py" and ".." not in f.parts)
        pairs = ((pathlib.Path(str(f.locate())), f.as_posix()) for f in files)
        documents += _read(package, pairs, config)
        versions[package] = found.version
    if config.path:
        root = paths.of(config.path, "corpus.path")
        paths.check_local(root, "a study's texts")
        pairs = ((p, p.relative_to(root).as_posix()) for p in root.rglob("*") if p.is_file())
        own = list(_read("path", pairs, config))
        if not own:
            raise UserError(
                f"CorpusConfig.path is {config.path!r}, which has no UTF-8 text of at most "
                f"max_file_bytes {config.max_file_bytes}; give a folder with text files"
            )
        documents += own
        versions["path"] = hashlib.sha256("".join(d.digest for d in own).encode()).hexdigest()[:12]
    return documents, versions


def _read(
    package: str, files: Iterator[tuple[pathlib.Path, str]], config: CorpusConfig
) -> Iterator[Document]:
    for path, name in sorted(files, key=lambda file: file[1]):
        try:
            if not 0 < path.stat().st_size <= config.max_file_bytes:
                continue
            text = path.read_bytes()
            text.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield Document(package, name, text)


def _lines(document: Document) -> set[bytes]:
    """The document's different long lines, without indentation."""
    lines = (line.strip() for line in document.text.split(b"\n"))
    return {line for line in lines if len(line) >= MIN_LINE}


def split(
    documents: list[Document], validation_bytes: int
) -> tuple[list[Document], list[Document], dict[str, int]]:
    """Splits documents into training and validation, without duplicates.

    Documents with the same text count once. The first ones by `order` are held out, until they have
    enough bytes; long ones are passed over. A training document is a near duplicate, and left out,
    if half of its long lines are in one held-out document, or half of that one's are in it. Lines
    that many documents have do not count.

    Returns:
      Training, validation, and the number of `duplicates` and `near_duplicates` left out.

    Raises:
      UserError: there is not enough text.
    """
    unique: dict[str, Document] = {}
    for document in sorted(documents, key=lambda d: d.order):
        unique.setdefault(document.digest, document)
    held_out: dict[str, Document] = {}
    size = 0
    for document in unique.values():
        if size >= validation_bytes:
            break
        if len(document.text) <= MAX_HELD_OUT:
            held_out[document.digest] = document
            size += len(document.text)
    rest = [d for d in unique.values() if d.digest not in held_out]
    if size < validation_bytes or sum(len(d.text) for d in rest) < validation_bytes:
        raise UserError(
            f"CorpusConfig.validation_bytes is {validation_bytes}, but the corpus has only "
            f"{sum(len(d.text) for d in unique.values())} bytes of different text; add packages, "
            "or lower it"
        )
    validation = list(held_out.values())
    owners: dict[bytes, list[int]] = {}
    for index, document in enumerate(validation):
        for line in _lines(document):
            owners.setdefault(line, []).append(index)
    lines = [_lines(d) for d in rest]
    seen = Counter(line for own in lines for line in own if line in owners)
    common = {line for line, count in seen.items() if count > BOILERPLATE}
    owners = {line: indices for line, indices in owners.items() if line not in common}
    sizes = Counter(index for indices in owners.values() for index in indices)
    train = [
        d
        for d, own in zip(rest, lines, strict=True)
        if not _near_duplicate(own - common, owners, sizes)
    ]
    counts = {
        "duplicates": len(documents) - len(unique),
        "near_duplicates": len(rest) - len(train),
    }
    return train, validation, counts


def _near_duplicate(lines: set[bytes], owners: dict[bytes, list[int]], sizes: Counter[int]) -> bool:
    shared = Counter(index for line in lines for index in owners.get(line, ()))
    return any(
        common >= MIN_LINES and common >= DUPLICATE * min(len(lines), sizes[index])
        for index, common in shared.items()
    )


def build(config: CorpusConfig, folder: pathlib.Path) -> None:
    """Writes the corpus into a folder, which appears when it is complete.

    Args:
      config: the corpus.
      folder: `train.npy`, `validation.npy` (tokens), `*_starts.npy` (first token of each document)
        and `manifest.json`.

    Raises:
      UserError: as in `find` and `split`.
    """
    documents, versions = find(config)
    train, validation, removed = split(documents, config.validation_bytes)
    tokenizer = open_tokenizer(config.vocabulary)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    hashed = hashlib.sha256(tokenizer.digest.encode())
    manifest: dict[str, Any] = {"config": mapping.to_dict(config), "removed": removed}
    for name, part in (("train", train), ("validation", validation)):
        tokens, starts = _encode(part, tokenizer)
        np.save(partial / f"{name}.npy", tokens)
        np.save(partial / f"{name}_starts.npy", starts)
        for array in (tokens, starts):
            hashed.update(np.ascontiguousarray(array).data)
        manifest[name] = {
            "documents": len(part),
            "bytes": sum(len(d.text) for d in part),
            "tokens": len(tokens),
        }
    size: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for document in (*train, *validation):
        size[document.package] += len(document.text)
        files[document.package] += 1
    manifest["packages"] = {
        name: {"version": version, "files": files[name], "bytes": size[name]}
        for name, version in versions.items()
    }
    manifest["validation"]["packages"] = [d.package for d in validation]
    manifest["digest"] = hashed.hexdigest()
    write_json(partial / "manifest.json", manifest)
    partial.replace(folder)


def _encode(documents: list[Document], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all documents, each with its end token, and where each begins."""
    dtype = np.dtype(np.uint16) if tokenizer.vocab_size <= 1 << 16 else np.dtype(np.int32)
    rows = []
    for document in documents:
        if tokenizer.name == "bytes":
            ids = np.frombuffer(document.text, np.uint8).astype(dtype)
            ids = ids + np.asarray(3, dtype)
        else:
            ids = np.array(tokenizer.encode(document.text.decode("utf-8")), dtype)
        rows.append(np.append(ids, np.asarray(tokenizer.eos_id, dtype)))
    lengths = [len(row) for row in rows]
    return np.concatenate(rows), np.cumsum([0, *lengths[:-1]])


class Corpus:
    """The corpus in a folder.

    Attributes:
      manifest: what it holds.
      digest: SHA-256 of its tokens.
      tokenizer: of its tokens.
      windows: number of training windows.
    """

    def __init__(self, folder: pathlib.Path, sequence_length: int):
        """Opens the corpus.

        Raises:
          UserError: the folder has no complete corpus.
        """
        if not (folder / "manifest.json").exists():
            raise UserError(f"{folder} has no corpus; start the study with a --config first")
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        self.digest: str = self.manifest["digest"]
        self.config = mapping.from_mapping(CorpusConfig, self.manifest["config"])
        self.tokenizer = open_tokenizer(self.config.vocabulary)
        self._folder, self._length = folder, sequence_length
        self._train = np.load(folder / "train.npy", mmap_mode="r")
        self._starts = np.load(folder / "train_starts.npy")
        self.windows = len(self._train) // sequence_length

    @property
    def available(self) -> int:
        """Tokens that training may read."""
        return self.windows * self._length * self.config.passes

    def batches(self, seed: int, step: int, count: int, batch_size: int) -> Batch:
        """Reads consecutive training batches.

        Args:
          seed: of the order of windows.
          step: number of the first batch.
          count: number of batches.
          batch_size: sequences in a batch.

        Returns:
          tokens, targets, segment_ids, positions, weights; all [K, B, T].

        Raises:
          UserError: the corpus has no more windows.
        """
        first, stop = step * batch_size, (step + count) * batch_size
        if stop > self.windows * self.config.passes:
            raise UserError(
                f"the corpus has {self.available} tokens for training, and step {step + count} "
                f"needs {stop * self._length}; lower the budget, or add packages"
            )
        numbers = np.arange(first, stop)
        rows = np.concatenate(
            [
                self._order(seed, n)[numbers[numbers // self.windows == n] % self.windows]
                for n in range(first // self.windows, (stop - 1) // self.windows + 1)
            ]
        )
        batch = self._features(self._train, self._starts, rows * self._length)
        return {k: v.reshape(count, batch_size, self._length) for k, v in batch.items()}

    @functools.lru_cache(maxsize=2)  # noqa: B019  (a worker has one corpus)
    def _order(self, seed: int, number: int) -> np.ndarray:
        """The order of windows in a pass."""
        return np.random.default_rng((seed, number)).permutation(self.windows)

    def _features(self, data: np.ndarray, starts: np.ndarray, first: np.ndarray) -> Batch:
        """The model's inputs for windows that begin at `first`: as `flm_jax.data` makes them."""
        at_NT = first[:, None] + np.arange(self._length)
        inside_NT = at_NT < len(data)
        targets_NT = np.where(inside_NT, data[np.minimum(at_NT, len(data) - 1)], 0).astype(np.int32)
        document_NT = np.searchsorted(starts, at_NT, side="right") - 1
        begin_NT = np.maximum(starts[document_NT], first[:, None])
        positions_NT = np.where(inside_NT, at_NT - begin_NT, 0).astype(np.int32)
        segments_NT = np.where(inside_NT, document_NT - document_NT[:, :1] + 1, 0).astype(np.int32)
        shifted_NT = np.pad(targets_NT[:, :-1], ((0, 0), (1, 0)))
        starts_NT = np.where(inside_NT, self.tokenizer.start_id, 0)
        return {
            "tokens": np.where(positions_NT > 0, shifted_NT, starts_NT).astype(np.int32),
            "targets": targets_NT,
            "segment_ids": segments_NT,
            "positions": positions_NT,
            "weights": inside_NT.astype(np.float32),
        }

    def validation(self, batch_size: int) -> dict[str, list[Batch]]:
        """The held-out documents as batches [B, T], by package.

        Packages with little held-out text are together in "others". Windows do not cross packages.
        The last batch of a package is filled up with rows of weight 0.
        """
        data = np.load(self._folder / "validation.npy")
        starts = np.load(self._folder / "validation_starts.npy")
        pieces = np.split(data, starts[1:])
        owners = self.manifest["validation"]["packages"]
        size: Counter[str] = Counter()
        for owner, piece in zip(owners, pieces, strict=True):
            size[owner] += len(piece)
        by_package: dict[str, list[np.ndarray]] = {}
        for owner, piece in zip(owners, pieces, strict=True):
            name = owner if size[owner] >= MIN_PACKAGE else "others"
            by_package.setdefault(name, []).append(piece)
        found = {}
        for name in sorted(by_package):
            rows = by_package[name]
            joined = np.concatenate(rows)
            begins = np.cumsum([0, *(len(row) for row in rows[:-1])])
            count = -(-len(joined) // (self._length * batch_size)) * batch_size
            windows = self._features(joined, begins, np.arange(count) * self._length)
            found[name] = [
                {k: v[n : n + batch_size] for k, v in windows.items()}
                for n in range(0, count, batch_size)
            ]
        return found

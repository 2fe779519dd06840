"""The files of text that a user names: a file, a folder, a pattern, or several with commas."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import pathlib
import re
from collections.abc import Callable, Iterator

from flm_jax.config import DataConfig
from flm_jax.data import documents, readers
from flm_jax.data.documents import Document
from flm_jax.errors import UserError
from flm_jax.runtime import paths

_PATTERN = re.compile(r"[*?\[]")
# Documents of which fewer are cut by position, each at its own end.
_FEWEST_TO_CHOOSE_FROM = 50


@dataclasses.dataclass(frozen=True)
class Found:
    """What a task read.

    Attributes:
      documents: the texts, without empty ones.
      unread: names of files in a folder that are no text.
    """

    documents: list[Document]
    unread: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Given:
    """What a user gives.

    Attributes:
      path: a file, a folder, a pattern, or several of them with commas.
      text_field: the field of a row that holds its text.
      argument: the field of the config that gives the path, for errors.
    """

    path: str
    text_field: str = "text"
    argument: str = "DataConfig.path"

    @property
    def where(self) -> str:
        return f"{self.argument} is {self.path!r}"


@dataclasses.dataclass(frozen=True)
class Task:
    """How a task reads what a user gives.

    Attributes:
      read: the reader.
      fewest: fewer different documents than this are split by position.
      cut: whether long texts are cut into pieces after the split.
    """

    read: Callable[[Given], Found]
    fewest: int
    cut: bool


def parts(given: str) -> list[str]:
    """Splits a path at its commas, unless a file has this name with them.

    >>> parts("a.txt, b/*.md")
    ['a.txt', 'b/*.md']
    """
    if "," not in given or _on_this_machine(paths.of(given)):
        return [given]
    return [part.strip() for part in given.split(",") if part.strip()]


def roots(given: str, argument: str) -> list[pathlib.Path]:
    """Returns the files and folders that a path names; of a pattern, its fixed beginning."""
    return [_root(part, argument)[0] for part in parts(given)] if given else []


def _root(part: str, argument: str) -> tuple[pathlib.Path, str]:
    """The fixed beginning of a path, and its pattern; "": it has none."""
    whole = paths.of(part, argument)
    if not _PATTERN.search(part) or _on_this_machine(whole):
        return whole, ""
    names = part.split("/")
    first = next(i for i, name in enumerate(names) if _PATTERN.search(name))
    beginning = "/".join(names[:first]) or ("/" if first else ".")
    return paths.of(beginning, argument), "/".join(names[first:])


def _on_this_machine(path: pathlib.Path) -> bool:
    """Whether a file of this machine has this name; no bucket is asked."""
    return not paths.remote(path) and _exists(path)


def _exists(path: pathlib.Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({paths.reason_of(error)}); give a path that you can read"
        ) from error


def _listed(given: Given, suffixes: str) -> Iterator[tuple[pathlib.Path, str, bool]]:
    """Yields (path, name, whether it is named itself) of files, in the order of the names.

    Of a folder, hidden and empty files are left out.

    Raises:
      UserError: there is no such file, or the folder or pattern has none.
    """
    where, argument = given.where, given.argument
    given_parts = parts(given.path) if given.path else []
    if not given_parts:
        raise UserError(f"{where}, but the task needs an existing file or folder; give its path")
    for number, part in enumerate(given_parts):
        root, pattern = _root(part, argument)
        paths.check_bucket(root, argument)
        if not _exists(root):
            raise UserError(
                f"{where}, but {root} does not exist, and the task needs an existing file or "
                "folder; give its path"
            )
        prefix = f"{number}/" if len(given_parts) > 1 else ""
        try:
            starts = sorted(root.glob(pattern)) if pattern else [root]
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{where}, which is no pattern ({error}); give another") from error
        found = sorted(_files(starts, root, pattern), key=lambda file: file[1])
        if not found:
            raise UserError(
                f"{where}, {'a pattern' if pattern else 'a folder'} without any file {suffixes} "
                "with text in it; add files, or give another path"
            )
        yield from ((path, prefix + name, alone) for path, name, alone in found)


def _files(
    starts: list[pathlib.Path], root: pathlib.Path, pattern: str
) -> Iterator[tuple[pathlib.Path, str, bool]]:
    for start in starts:
        if not start.is_dir():
            if not pattern:
                yield start, start.name, True
            elif start.is_file():
                alone = start.suffix != "" and pattern.endswith(start.suffix)  # as in *.dat
                yield start, start.relative_to(root).as_posix(), alone
            continue
        if not os.access(start, os.R_OK | os.X_OK) and not paths.remote(start):
            raise UserError(f"{start} cannot be read (Permission denied); give a folder you can")
        for path, size in paths.sized(start):
            relative = path.relative_to(start)
            if size > 0 and not any(part.startswith(".") for part in relative.parts):
                yield path, path.relative_to(root).as_posix(), False


def _own_text(given: Given) -> Found:
    """Reads every file by its suffix; a file that is named itself and has another is text."""
    found: list[Document] = []
    unread: list[str] = []
    done: set[pathlib.Path] = set()
    for path, name, alone in _listed(given, readers.READ):
        kind = readers.kind_of(path.name) or ("text" if alone else "")
        if not kind:
            unread.append(name)
        elif (real := path if paths.remote(path) else path.resolve()) not in done:
            done.add(real)
            found += _documents(path, name, kind, given.text_field)
    if not found:
        others = f" (it has {', '.join(unread[:3])})" if unread else ""
        raise UserError(
            f"{given.where}, which has no text{others}; give files that end in {readers.READ}"
        )
    return Found(found, unread)


def _documents(path: pathlib.Path, name: str, kind: str, field: str) -> Iterator[Document]:
    if kind == "text":
        data = readers.text(path)
        if readers.is_jsonl(data):
            raise UserError(f"{path}: this is JSONL; rename it so that it ends in .jsonl")
        rows = [(name, data)] if data else []
        yield from (documents.by_text(*row) for row in rows)
        return
    for number, text in readers.READERS[kind](path, field):
        if text:
            yield documents.by_text(f"{name}:{number}", text.encode("utf-8"))


def _text_files(given: Given) -> Found:
    """Reads every file of a folder as text."""
    files = _listed(given, "*")
    return Found([documents.by_name(name, readers.text(path)) for path, name, _ in files])


def _jsonl_files(given: Given) -> Found:
    """Reads the files *.jsonl of a folder."""
    files = [
        (path, name)
        for path, name, alone in _listed(given, "*.jsonl")
        if alone or fnmatch.fnmatch(path.name, "*.jsonl")
    ]
    if not files:
        raise UserError(
            f"{given.where}, a folder without any file *.jsonl with text in it; add files"
        )
    field = given.text_field
    return Found([d for path, name in files for d in _documents(path, name, "jsonl", field)])


# Tasks that read the user's own files. The last two are those of earlier versions.
TASKS = {
    "own_text": Task(_own_text, _FEWEST_TO_CHOOSE_FROM, cut=True),
    "text_files": Task(_text_files, 2, cut=False),
    "jsonl_files": Task(_jsonl_files, 2, cut=False),
}


def splits(config: DataConfig, whole: bool = False) -> tuple[dict[str, list[Document]], list[str]]:
    """Reads the texts that a config names, and splits them.

    Args:
      config: its task is one of `TASKS`.
      whole: one split, "all", instead of train and validation.

    Returns:
      Documents by split; names of files in a folder that were not read.

    Raises:
      UserError: there is no such file, or one is damaged or is not what its suffix says; or there
        is too little text to split.
    """
    task = TASKS[config.task]
    found = task.read(Given(config.path, config.text_field))
    by_split = {"all": found.documents} if whole else _split(config, task, found.documents)
    if task.cut:
        by_split = {
            name: [piece for document in rows for piece in documents.pieces(document)]
            for name, rows in by_split.items()
        }
    return by_split, found.unread


def _split(config: DataConfig, task: Task, found: list[Document]) -> dict[str, list[Document]]:
    """Training and validation; the latter from its own path, or a part of what was found."""
    given = Given(config.path, config.text_field)
    if config.validation_path:
        other = dataclasses.replace(
            given, path=config.validation_path, argument="DataConfig.validation_path"
        )
        validation = [
            dataclasses.replace(d, name=f"validation/{d.name}") for d in task.read(other).documents
        ]
        if not sum(len(d.text) for d in validation):
            raise UserError(f"{other.where}, which has no text; give another path")
        return {"train": found, "validation": validation}
    if config.task == "text_files" and len(found) == 1 and readers.is_jsonl(found[0].text):
        raise UserError(f"{given.where}: this is JSONL; set DataConfig.task to jsonl_files")
    training, validation = documents.split(found, task.fewest, given.where)
    return {"train": training, "validation": validation}

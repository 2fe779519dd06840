"""The study's folder: its identity, and one result for each history.

  study.json            config, corpus and machines
  frozen.json           what tuning decided (`phases.py`)
  corpus/               (`corpus.py`)
  pieces/ID/            result.json, plan.json, checkpoints/, lock
  compiled/             programs

A result appears atomically. A lock belongs to a living process, so a killed one leaves none behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import filelock

from flm_jax import mapping
from flm_jax.errors import UserError
from flm_jax.store.files import write_json
from flm_jax.studies.growth_study import environment
from flm_jax.studies.growth_study.config import GrowthStudyConfig
from flm_jax.studies.growth_study.histories import History, Lab

Row = dict[str, Any]
# Fields of a config that say which trials there are, and how they are shown, but not what one is.
_OPEN = ("name", "seeds", "change_seeds", "save_seconds")


@dataclasses.dataclass(frozen=True)
class StudyFolder:
    """A study's folder."""

    path: pathlib.Path

    @property
    def study(self) -> pathlib.Path:
        """The study's identity."""
        return self.path / "study.json"

    @property
    def frozen(self) -> pathlib.Path:
        """The decisions of tuning."""
        return self.path / "frozen.json"

    @property
    def corpus(self) -> pathlib.Path:
        """The corpus's folder."""
        return self.path / "corpus"

    def begin(self, config: GrowthStudyConfig, corpus: str, other_machine: bool = False) -> None:
        """Starts the study, or checks that this process may continue it.

        Args:
          config: the study.
          corpus: the corpus's digest.
          other_machine: whether a machine that differs from the study's is added to it.

        Raises:
          UserError: config, corpus, versions or machine differ; names the fields and both values.
        """
        mine: Row = {
            "config": mapping.to_dict(config),
            "corpus": corpus,
            "environments": [environment.environment()],
        }
        with self._locked("study.lock"):
            if not self.study.exists():
                write_json(self.study, mine)
                return
            study = self.read()
            old, new = (
                {k: v for k, v in x["config"].items() if k not in _OPEN} for x in (study, mine)
            )
            differing = mapping.differences(old, new)
            differing += mapping.differences(study["corpus"], corpus, "corpus")
            if differing:
                raise UserError(
                    f"{self.study}: the study was started with other settings: "
                    f"{'; '.join(differing[:3])}; give another --workdir",
                    argument="workdir",
                )
            (here,) = mine["environments"]
            if here in study["environments"]:
                return
            differing = mapping.differences(study["environments"][0], here, "environment")
            machine_only = all(line.startswith("environment.machine:") for line in differing)
            if not (other_machine and machine_only):
                advice = "add --other_machine (the report then counts trials by machine), or "
                raise UserError(
                    f"{self.study}: the study runs elsewhere or by other versions: "
                    f"{'; '.join(differing)}; {advice if machine_only else ''}give another "
                    "--workdir",
                    argument="workdir",
                )
            study["environments"].append(here)
            write_json(self.study, study)

    def read(self) -> Row:
        """The study's identity: config, corpus, environments.

        Raises:
          UserError: there is no study.
        """
        if not self.study.exists():
            raise UserError(
                f"{self.path} has no study.json; give the folder of a study that was started",
                argument="workdir",
            )
        row: Row = json.loads(self.study.read_text())
        return row

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.path / name):
            yield

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Holds the lock under which one process builds the corpus, or freezes the decisions."""
        with self._locked("build.lock"):
            yield


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The finished pieces of training.

    Attributes:
      folder: the study's.
      lab: names histories.
      environments: those that the study accepts.
    """

    folder: StudyFolder
    lab: Lab
    environments: tuple[Mapping[str, str], ...]

    def path(self, history: History) -> pathlib.Path:
        """The folder of a history."""
        return self.folder.path / "pieces" / self.lab.identity(history)

    def result(self, history: History) -> Row | None:
        """A finished history's result; None if it is not finished, or its file is torn.

        Raises:
          UserError: the result was made by another study, or on a machine or by versions that the
            study does not accept.
        """
        path = self.path(history) / "result.json"
        try:
            row: Row = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        wanted = {"id": self.lab.identity(history), "corpus": self.lab.corpus}
        for name, value in wanted.items():
            if row.get(name) != value:
                raise UserError(
                    f"{path}: {name} is {row.get(name)!r}, the study has {value!r}; remove this "
                    "folder, which another study made"
                )
        if row.get("environment") not in self.environments:
            raise UserError(
                f"{path}: made on {row.get('environment')}, which study.json does not list; remove "
                "this folder, or keep it with its own study"
            )
        return row

    def write(self, history: History, row: Row) -> None:
        """Writes a result; it is final."""
        row = {
            "id": self.lab.identity(history),
            "corpus": self.lab.corpus,
            "environment": environment.environment(),
            "history": mapping.to_dict(history),
            **row,
        }
        write_json(self.path(history) / "result.json", row)

    @contextlib.contextmanager
    def lock(self, history: History) -> Iterator[bool]:
        """Takes a history's lock; yields False if another living process has it."""
        path = self.path(history)
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / "lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

"""experiment.json: the config that a run was last started with, and where the run comes from.

A stage's config.json holds what affects its results. This file holds the rest too: stages that have
not begun, evaluation, checkpoints, meshes. A run of an earlier version does not have it; its config
is then put together from its stages. The tracker is left out: a folder that came from others must
not name code to run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flm_jax import config as config_lib
from flm_jax import mapping
from flm_jax.config import ExperimentConfig
from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.mapping import Checked
from flm_jax.store.files import write_json
from flm_jax.store.lineage import RunFolder

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Origin(Checked):
    """The state of another run that a run branched from.

    Attributes:
      run: the other run's folder.
      index, stage: the stage's index and name.
      step: the state's global step.
      params_digest: of its parameters.
      restarts_data: whether the new run's data differ, so that they are read from their start.
    """

    run: str
    index: int
    stage: str
    step: int
    params_digest: str
    restarts_data: bool

    def covers(self, index: int, end: int) -> bool:
        """Whether a stage that ends at a global step came as it is: no step was trained here."""
        return (index, end) <= (self.index, self.step)


@dataclasses.dataclass(frozen=True)
class Extension(Checked):
    """The latest extension of a run's last stage.

    Attributes:
      stage: the stage's name.
      step: the global step of the checkpoint that it continues from.
      steps: the number of steps that were added.
    """

    stage: str
    step: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The contents of experiment.json."""

    config: ExperimentConfig
    origin: Origin | None = None
    extension: Extension | None = None


def read(run: RunFolder) -> Experiment | None:
    """Reads a run's experiment.json; None if there is none.

    Raises:
      UserError: the file is damaged, or a value in it is wrong.
    """
    if not run.experiment.exists():
        return None
    advice = "restore the file"
    values = json_text.read_object(run.experiment, advice)
    try:
        if values.get("version") != VERSION:
            raise UserError(f"version is {values.get('version')!r}, not {VERSION}")
        config = values.get("config")
        if not isinstance(config, dict):
            raise UserError("config is no group of fields")
        return Experiment(
            config_lib.experiment({**config, "tracker": ""}),
            _optional(Origin, values, "origin"),
            _optional(Extension, values, "extension"),
        )
    except UserError as error:
        raise UserError(f"{run.experiment}: {error}; {advice}") from None


def _optional(cls: type[mapping.T], values: dict[str, Any], name: str) -> mapping.T | None:
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise UserError(f"{name} is no group of fields")
    return mapping.from_mapping(cls, value, name)


def write(run: RunFolder, experiment: Experiment) -> None:
    """Writes experiment.json, atomically."""
    config = dataclasses.replace(experiment.config, tracker="")
    experiment = dataclasses.replace(experiment, config=config)
    parts = {
        name: mapping.to_dict(value)
        for name in ("config", "origin", "extension")
        if (value := getattr(experiment, name)) is not None
    }
    write_json(run.experiment, {"version": VERSION, **parts})


def keep_config(run: RunFolder, config: ExperimentConfig) -> None:
    """Writes the config that a run is started with; keeps where the run comes from."""
    before = read(run) or Experiment(config)
    write(run, dataclasses.replace(before, config=config))


def origin_of(run: RunFolder) -> Origin | None:
    """Returns the state that a run branched from; None if it began by itself."""
    experiment = read(run)
    return experiment.origin if experiment else None


def config_of(run: RunFolder) -> ExperimentConfig:
    """Returns the config of a run.

    Without experiment.json it is put together from the stages that have begun. Evaluation,
    checkpoints and meshes then have their defaults.

    Raises:
      UserError: there is no run, or one of its files is damaged.
    """
    if experiment := read(run):
        return experiment.config
    folders = [stage for stage in run.begun() if "sft" not in stage.saved()]
    if not folders:
        raise UserError(f"{run.path} has no stage that was trained on text; give a run's folder")
    parts = [folder.experiment() for folder in folders]
    stages = tuple(part.stages[0] for part in parts)
    last = parts[-1]
    schedule = last.schedule
    if schedule.total_steps == sum(stage.steps for stage in stages):
        schedule = dataclasses.replace(schedule, total_steps=0)  # it follows the stages
    return dataclasses.replace(last, stages=stages, schedule=schedule)

"""A run's folder: which files it has, what they say, and that they belong to this config.

Every file is written whole or not at all. Of several processes one writes: the runner calls what
writes here through `processes.once`, except the metrics, for which nobody waits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from flm_jax import config as config_lib
from flm_jax import mapping
from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError
from flm_jax.store.files import MetricsFile, link, write_atomically, write_json

VERSION = 1


class StageFolder:
    """`DIR/stages/<index>-<name>/`."""

    def __init__(self, run: RunFolder, index: int, name: str):
        self.run, self.index = run, index
        self.path = run.path / "stages" / f"{index}-{name}"
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.json"
        self.plan = self.path / "plan.json"
        self.receipt = self.path / "receipt.json"
        self.metrics = MetricsFile(self.path / "metrics.jsonl")

    def keep_growth(self, plan: str, receipt: Mapping[str, Any]) -> None:
        write_atomically(self.plan, plan + "\n")
        write_json(self.receipt, receipt)

    @classmethod
    def of_checkpoint(cls, path: pathlib.Path) -> StageFolder:
        """The stage of `.../stages/<index>-<name>/checkpoints/<step>`.

        Raises UserError if that is not where the path lies.
        """
        stage, (index, _, name) = path.parent.parent, path.parent.parent.name.partition("-")
        folder = cls(RunFolder(stage.parent.parent), int(index), name) if index.isdigit() else None
        if folder is None or folder.checkpoints != path.parent or not folder.config.is_file():
            raise UserError(
                f"{path} is no checkpoint of a stage; give RUN/stages/INDEX-NAME/checkpoints/STEP"
            )
        return folder

    def experiment(self) -> ExperimentConfig:
        """What the stage was trained with, as an experiment of this stage alone.

        Raises UserError if config.json is not one of this code.
        """
        try:
            about = json.loads(self.config.read_text(encoding="utf-8"))
            stage = about["stage"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.config}: no config of a stage; restore the file") from None
        # Fine-tuning and the data say more there.
        fields = {field.name for field in dataclasses.fields(ExperimentConfig)}
        shared = {name: value for name, value in about.items() if name in fields}
        return config_lib.experiment({**shared, "stages": [stage]})

    def start(self) -> int:
        """Steps that the run had done when this stage began."""
        return sum(s["steps"] for s in self.run.stages() if s["index"] < self.index)


class RunFolder:
    """A run folder: `lineage.json`, `stages/`, `tensorboard/`, `report/`, `compiled/`."""

    def __init__(self, path: str | os.PathLike[str], compiled: pathlib.Path | None = None):
        """`compiled`: of runs that share their compiled programs; None: a folder of its own."""
        self.path = pathlib.Path(path)
        self.lineage = self.path / "lineage.json"
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report"
        self.compiled = compiled or self.path / "compiled"  # JAX's compilation cache

    def stage(self, index: int, name: str) -> StageFolder:
        return StageFolder(self, index, name)

    def open(self) -> None:
        """Creates the folder, or checks that it is a run's and can be written.

        Raises UserError, and changes nothing, if it cannot be written or holds other files.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".write-test"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"workdir {self.path} cannot be written ({error.strerror}); give a folder you own",
                argument="workdir",
            ) from error
        if any(self.path.iterdir()) and not (self.path / "stages").is_dir():
            raise UserError(
                f"workdir {self.path} holds files but no run; give an empty or new folder",
                argument="workdir",
            )

    def check_stage(self, folder: StageFolder, identity: Mapping[str, Any]) -> None:
        """Raises UserError if the stage's saved config differs; names the first difference."""
        if not folder.config.exists():
            return
        found = mapping.differences(json.loads(folder.config.read_text()), dict(identity))
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UserError(
                f"{folder.config}: the run has another value: {found[0]}{more}; "
                "restore the value, or give another folder",
                argument="workdir",
            )

    def begin_stage(self, folder: StageFolder, identity: Mapping[str, Any]) -> None:
        """Keeps what decides the stage's numbers. Raises UserError as `check_stage` does."""
        self.check_stage(folder, identity)
        write_json(folder.config, identity)

    def stages(self) -> list[dict[str, Any]]:
        """The finished stages, from lineage.json. Raises UserError on another version."""
        if not self.lineage.exists():
            return []
        data = json.loads(self.lineage.read_text(encoding="utf-8"))
        if data.get("version") != VERSION:
            raise UserError(
                f"{self.lineage}: version {data.get('version')}, but this code reads version "
                f"{VERSION}; use the code that wrote it"
            )
        return data["stages"]

    def finished_stage(self, stage: str = "") -> dict[str, Any]:
        """The entry of the last finished stage, or of the one with that index or name.

        Raises UserError if there is none.
        """
        finished = self.stages()
        if not finished:
            raise UserError(f"{self.path} has no finished stage (no lineage.json); train one first")
        chosen = [s for s in finished if stage in ("", str(s["index"]), s["name"])]
        if not chosen:
            names = ", ".join(s["name"] for s in finished)
            raise UserError(f"{self.path} has no finished stage {stage!r}; it has {names}")
        return chosen[-1]

    def branch(self, other: RunFolder, stages: int | None = None) -> None:
        """Makes `other` a run that goes on from this one's first finished stages (None: all).

        Files are hard links where that can be: a checkpoint never changes once it is complete.
        """
        if other.lineage.exists():
            return
        entries = self.stages()[:stages]
        for entry in entries:
            stage = self.stage(entry["index"], entry["name"])
            copy = other.stage(entry["index"], entry["name"])
            shutil.copytree(stage.path, copy.path, copy_function=link, dirs_exist_ok=True)
        write_json(other.lineage, {"version": VERSION, "stages": entries})

    def add_stage(self, entry: dict[str, Any]) -> None:
        earlier = [s for s in self.stages() if s["index"] < entry["index"]]
        write_json(self.lineage, {"version": VERSION, "stages": [*earlier, entry]})


def bits_per_byte(measured: dict[str, float | None]) -> str:
    """A stage's `eval` as text; an imported one has none."""
    start, end = measured["bpb_start"], measured["bpb_end"]
    return "not measured" if start is None else f"{start:.4f} -> {end:.4f}"


def identity(config: ExperimentConfig, index: int, fingerprint: str) -> dict[str, Any]:
    """What decides a stage's numbers: its own config, what all stages share, and the data.

    Meshes, layouts, evaluation and checkpoint settings may change when a run goes on.
    """
    shared = mapping.to_dict(config)
    for name in ("stages", "mesh", "layouts", "eval", "checkpoint"):
        del shared[name]
    shared["schedule"]["total_steps"] = config.schedule.total_steps or config.total_steps
    stage = mapping.to_dict(config.stages[index])
    del stage["mesh"]
    return {**shared, "stage": stage, "data_fingerprint": fingerprint}

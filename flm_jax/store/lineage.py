"""A run's folder: its files, and the check that they belong to a config.

Every file is written atomically. With several processes only the first one writes: a run calls
these functions through `processes.once`. Metrics are the exception: no process waits for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flm_jax import config as config_lib
from flm_jax import mapping
from flm_jax.config import DataConfig, ExperimentConfig
from flm_jax.data.chat_template import TemplateConfig
from flm_jax.errors import DamageError, UserError
from flm_jax.runtime import paths, processes, regular, stop
from flm_jax.store import entries, lock
from flm_jax.store.checkpoint import complete, mark_complete
from flm_jax.store.files import MetricsFile, link_tree, replacing, write_atomically, write_json

# A stage's settings that may change on resume: they change only rounding.
_MAY_CHANGE = (
    "accumulate", "model.remat", "model.loss_chunks", "model.splash", "model.cudnn_documents",
)  # fmt: skip
_PROBE = ".write-test-"  # begins the name of a file that only shows that the folder is writable


class StageFolder:
    """The folder of one stage: `RUN/stages/INDEX-NAME/`."""

    def __init__(self, run: RunFolder, index: int, name: str):
        """Names the folder's files; creates nothing.

        Args:
          run: the run's folder.
          index: the stage's index in lineage.json.
          name: the stage's name.
        """
        self.run, self.index, self.name = run, index, name
        self.path = run.path / "stages" / f"{index}-{name}"
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.json"
        self.plan = self.path / "plan.json"
        self.receipt = self.path / "receipt.json"
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self.time = MetricsFile(self.path / "time.jsonl")
        self.starts = MetricsFile(self.path / "starts.jsonl")

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in their order."""
        found = (path for path in paths.listed(self.checkpoints) if path.name.isdigit())
        return sorted(int(path.name) for path in found if complete(path))

    def require(self, *files: pathlib.Path) -> None:
        """Raises DamageError if one of the stage's files is missing.

        Call it where the stage has checkpoints: these files were written before them.
        """
        for file in files:
            if not file.exists():
                raise self.run.absent(file)

    def require_growth(self) -> None:
        """Raises DamageError if plan.json or receipt.json is missing; see `require`."""
        self.require(self.plan, self.receipt)

    def entry(self) -> dict[str, Any] | None:
        """Returns the stage's entry in lineage.json; None while it is not finished."""
        if not self.run.lineage.exists():
            return None
        for entry in self.run.stages():
            if (entry["index"], entry["name"]) == (self.index, self.name):
                return entry
        return None

    def recorded(self) -> bool:
        """Checks that config.json is the one in the stage's entry.

        Returns:
          Whether the stage grew out of another one, so that it has a plan and a receipt.

        Raises:
          DamageError: a file is missing, or the config has another digest.
        """
        self.require(self.config)
        entry = self.entry()
        if entry is None:
            grown = self.index > 0
        else:
            grown = entry["plan_digest"] is not None
            digest = mapping.digest(self.saved())
            if entry["config_digest"] not in ("", digest):
                raise DamageError(
                    f"{self.config} has the digest {digest[:12]}, lineage.json says "
                    f"{entry['config_digest'][:12]}; restore the file from a copy",
                    self.config,
                )
        if grown:
            self.require_growth()
        return grown

    def keep_growth(self, plan: str, receipt: Mapping[str, Any]) -> None:
        """Writes plan.json and receipt.json; `plan` is JSON text."""
        write_atomically(self.plan, plan + "\n")
        write_json(self.receipt, receipt)

    @classmethod
    def of_checkpoint(cls, path: pathlib.Path) -> StageFolder:
        """Returns the folder of the stage of a checkpoint.

        Args:
          path: `RUN/stages/INDEX-NAME/checkpoints/STEP`.

        Raises:
          UserError: the path has another form.
        """
        stage = path.parent.parent
        index, _, name = stage.name.partition("-")
        folder = cls(RunFolder(stage.parent.parent), int(index), name) if index.isdigit() else None
        if folder is not None and folder.checkpoints == path.parent and path.is_dir():
            folder.require(folder.config)
        if folder is None or folder.checkpoints != path.parent or not folder.config.is_file():
            raise UserError(
                f"{path} is no checkpoint of a stage; give RUN/stages/INDEX-NAME/checkpoints/STEP"
            )
        return folder

    def experiment(self) -> ExperimentConfig:
        """Returns the stage's config as an experiment with this stage alone.

        Raises UserError if config.json is not the config of a stage.
        """
        saved = self.saved()
        # Fine-tuning adds fields of its own, and so does the data (its fingerprint).
        fields = {field.name for field in dataclasses.fields(ExperimentConfig)}
        shared = {name: value for name, value in saved.items() if name in fields}
        config = config_lib.experiment({**shared, "stages": [saved["stage"]]})
        return dataclasses.replace(config, data=self.run.data(config.data))

    def saved(self) -> dict[str, Any]:
        """Reads config.json. Raises UserError if it is not the config of a stage."""
        return entries.saved_config(self.config)

    def saved_receipt(self) -> dict[str, Any]:
        """Reads receipt.json. Raises UserError if it is not the receipt of a growth."""
        return entries.saved_receipt(self.receipt)

    def plan_text(self) -> str:
        """Reads plan.json. Raises UserError if it is no file of text."""
        return regular.text(self.plan)

    def template(self) -> TemplateConfig | None:
        """Returns the chat template of the latest fine-tuning up to this stage; None without one.

        A chain that starts from the weights of a run has the template of that run.

        Raises UserError if a config.json is not the config of a stage.
        """
        for index in range(self.index, -1, -1):
            for file in self.path.parent.glob(f"{index}-*/config.json"):
                saved = StageFolder(self.run, index, file.parent.name.partition("-")[2]).saved()
                if "sft" in saved:
                    return mapping.from_mapping(TemplateConfig, saved["sft"]["template"])
                if source := saved["stage"].get("source"):
                    return _template_of(paths.of(source))
        return None

    def start(self) -> int:
        """Returns the global step at which this stage starts."""
        return sum(s["steps"] for s in self.run.stages() if s["index"] < self.index)


def _template_of(source: pathlib.Path) -> TemplateConfig | None:
    """The chat template of a chain's source; None if it is no run, or no longer there."""
    run = RunFolder(source)
    if run.lineage.exists():
        entry = run.finished_stage()
        return run.stage(entry["index"], entry["name"]).template()
    if source.parent.name == "checkpoints" and source.is_dir():
        return StageFolder.of_checkpoint(source).template()
    return None


class RunFolder:
    """A run folder: `lineage.json`, `stages/`, `tensorboard/`, `report/`, `compiled/`."""

    def __init__(self, path: str | os.PathLike[str], compiled: pathlib.Path | None = None):
        """Names the folder's files; creates nothing.

        Args:
          path: the folder.
          compiled: folder of compiled programs that runs share; None: a folder of this run.
        """
        self.path = paths.of(path)
        self.lineage = self.path / "lineage.json"
        self.experiment = self.path / "experiment.json"  # see `experiment_file`
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report"
        self.crashes = self.path / "crashes"  # tracebacks of bugs, and stacks of hangs
        self.compiled = compiled or self.path / "compiled"  # JAX's compilation cache
        self.vocabulary = self.path / "vocabulary.model"  # if the run trained one

    def stage(self, index: int, name: str) -> StageFolder:
        """Returns the folder of a stage, which may not exist."""
        return StageFolder(self, index, name)

    def data(self, config: DataConfig) -> DataConfig:
        """Returns a run's data with the vocabulary that the run trained, if it trains one.

        The run's own files name it by its size alone, so that the folder can be moved.
        """
        if not config.train_vocabulary:
            return config
        file = str(paths.absolute(self.vocabulary))
        return dataclasses.replace(config, vocabulary=file, train_vocabulary=0)

    def check_client(self) -> None:
        """Raises UserError for a place where no client writes checkpoints."""
        if paths.scheme(self.path) == "s3":
            raise UserError(
                f"workdir {self.path}: orbax writes no checkpoints to s3://; give a gs:// bucket, "
                "or a folder (s3:// serves data, sources and exports)",
                argument="workdir",
            )

    def open(self) -> None:
        """Creates the folder, or checks that it holds a run and is writable.

        Raises UserError, and changes nothing, if it is not writable or holds other files.
        """
        self.check_client()
        paths.check_bucket(self.path, "workdir")
        probe = self.path / f"{_PROBE}{os.getpid()}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except Exception as error:  # a bucket's client has its own errors
            if not (isinstance(error, OSError) or paths.remote(self.path)):
                raise
            raise UserError(
                f"workdir {self.path} cannot be written ({paths.reason_of(error)}); give a folder "
                "you own",
                argument="workdir",
            ) from error
        files = (self.crashes, self.vocabulary, self.experiment)
        # Also what a process left that was killed before the run's first file.
        own = (lock.NAME, _PROBE, *(file.name for file in files))
        others = (path for path in paths.listed(self.path) if not path.name.startswith(own))
        if any(others) and not (self.path / "stages").is_dir():
            raise UserError(
                f"workdir {self.path} holds files but no run; give an empty or new folder",
                argument="workdir",
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Opens the folder as its only writer, for all processes of this run.

        Raises UserError as `open`, or if another run is writing to it.
        """

        def acquire() -> None:
            self.open()
            held.append(lock.acquire(self.path))

        def release() -> None:
            while held:
                held.pop().release()

        held: list[lock.Lock] = []
        processes.once(acquire)
        try:
            with stop.at_end(release):
                yield
        finally:
            release()

    def check_stage(self, folder: StageFolder, identity: Mapping[str, Any]) -> list[str]:
        """Checks that a stage was started with the same settings, if it was started.

        How a stage is computed may differ (`accumulate`, `model.remat`, kernels): it changes only
        rounding.

        Args:
          folder: the stage's folder.
          identity: the settings that affect the stage's results; see `lineage.identity`.

        Returns:
          The allowed differences.

        Raises:
          UserError: the saved config differs; the error names the first difference.
        """
        if not folder.config.exists():
            if folder.steps():
                raise self.absent(folder.config)
            return []
        found = mapping.differences(folder.saved(), dict(identity))
        allowed = tuple(f"config.stage.{name}: " for name in _MAY_CHANGE)
        differences = [line for line in found if not line.startswith(allowed)]
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise UserError(
                f"{folder.config}: the run was started with another value: {differences[0]}{more}; "
                "restore the value, or give another workdir",
                argument="workdir",
            )
        return found

    def begin_stage(self, folder: StageFolder, identity: Mapping[str, Any]) -> None:
        """Writes config.json after `check_stage`, with its arguments and errors.

        A setting that changes on resume is recorded in metrics.jsonl, in a row of the kind
        "changed" at the step of the latest checkpoint.
        """
        if changes := self.check_stage(folder, identity):
            step = max(folder.steps(), default=folder.start())
            folder.metrics.append("changed", step, settings=changes)
            folder.metrics.publish()
        write_json(folder.config, identity)

    def stages(self) -> list[dict[str, Any]]:
        """Reads the finished stages of lineage.json; raises as `entries.read_lineage`.

        Raises DamageError if the file is missing, and a later stage than the first has started.
        """
        if not self.lineage.exists():
            if any(folder.index and folder.steps() for folder in self.folders()):
                raise self.absent(self.lineage)
            return []
        return entries.read_lineage(self.lineage)

    def folders(self) -> list[StageFolder]:
        """Returns the folders of all stages, finished or not, by index."""
        names = (path.name.partition("-") for path in paths.listed(self.path / "stages"))
        found = [self.stage(int(index), name) for index, _, name in names if index.isdigit()]
        return sorted(found, key=lambda folder: folder.index)

    def absent(self, file: pathlib.Path) -> DamageError:
        """Returns the error for a file that is missing beside checkpoints."""
        return DamageError(
            f"{file} is missing beside checkpoints that need it; flm inspect {self.path} --repair "
            "rebuilds what the other files allow, or restore it from a copy",
            file,
        )

    def finished_stage(self, stage: str = "") -> dict[str, Any]:
        """Returns the entry of one finished stage; see `pick_stage`."""
        return pick_stage(self.stages(), stage, self.path)

    def begun(self) -> list[StageFolder]:
        """Returns the folders of the stages that have begun, by index."""
        return [folder for folder in self.folders() if folder.config.is_file()]

    def branch(
        self,
        other: RunFolder,
        stages: int | None = None,
        origins: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Copies finished stages into a new run folder, where training can continue.

        Files are hard links where one disk has both: a complete checkpoint never changes.

        Args:
          other: the new run's folder; if it has finished stages already, nothing is done.
          stages: number of stages to copy, from the first one; None: all.
          origins: for each copied entry of lineage.json, what it says as `origin`; (): nothing.
        """
        if other.lineage.exists():
            return
        copied = self.stages()[:stages]
        for entry in copied:
            regular.check_tree(self.stage(entry["index"], entry["name"]).path)
        for entry in copied:
            stage = self.stage(entry["index"], entry["name"])
            copy = other.stage(entry["index"], entry["name"])
            link_tree(stage.path, copy.path)
            for step in paths.listed(copy.checkpoints):
                mark_complete(step)
        if origins:
            copied = [s | {"origin": dict(o)} for s, o in zip(copied, origins, strict=True)]
        if self.vocabulary.exists():
            paths.copy(self.vocabulary, other.vocabulary)
        write_json(other.lineage, {"version": entries.VERSION, "stages": copied})

    def add_stage(self, entry: dict[str, Any]) -> None:
        """Writes the entry of a finished stage, and deletes the entries of later stages."""
        with replacing(self.lineage) as write:
            earlier = [s for s in self.stages() if s["index"] < entry["index"]]
            write({"version": entries.VERSION, "stages": [*earlier, entry]})


def pick_stage(
    finished: Sequence[dict[str, Any]], stage: str, path: pathlib.Path
) -> dict[str, Any]:
    """Picks one finished stage.

    Args:
      finished: the entries of the finished stages in lineage.json.
      stage: the index or name of a stage; "": the last one.
      path: the run's folder, for the error.

    Returns:
      The stage's entry.

    Raises:
      UserError: no stage is finished, or none has that index or name.
    """
    if not finished:
        raise UserError(f"{path} has no finished stage (no lineage.json); train one first")
    chosen = [s for s in finished if stage in ("", str(s["index"]), s["name"])]
    if not chosen:
        names = ", ".join(f"{s['index']} ({s['name']})" for s in finished)
        raise UserError(f"{path} has no finished stage {stage!r}; it has {names}")
    return chosen[-1]


def bits_per_byte(measured: dict[str, float | None]) -> str:
    """Formats a stage's validation result.

    Args:
      measured: the field `eval` of the stage's entry; None values: a converted model.

    >>> bits_per_byte({"bpb_start": 3.5, "bpb_end": 2.25})
    '3.5000 -> 2.2500'
    """
    start, end = measured["bpb_start"], measured["bpb_end"]
    return "not measured" if start is None else f"{start:.4f} -> {end:.4f}"


def identity(config: ExperimentConfig, index: int, fingerprint: str) -> dict[str, Any]:
    """Returns the settings that affect a stage's results; they are compared on resume.

    These are the stage's own config, the settings that all stages share, and the data. Meshes,
    layouts, and the settings of evaluation, checkpoints, watchdog, numerics and tracker are left
    out: they may change on resume.

    Args:
      config: the chain.
      index: the stage's index in it.
      fingerprint: digest of the training data.

    Returns:
      JSON values, as they are written to config.json.
    """
    shared = mapping.to_dict(config)
    left_out = ("stages", "mesh", "eval", "checkpoint", "watchdog", "numerics", "tracker")
    for name in left_out:
        shared.pop(name, None)
    shared["schedule"]["total_steps"] = config.schedule.total_steps or config.total_steps
    stage = mapping.to_dict(dataclasses.replace(config.stages[index], layouts=()))
    del stage["mesh"]
    return {**shared, "stage": stage, "data_fingerprint": fingerprint}

"""A branch: a new run that starts from a state of another run.

Up to that state the new run is the other one: its finished stages are copied (as hard links), with
the optimizer's state and the position in the data. From there on the new run's config holds.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

from flm_jax import mapping
from flm_jax.config import DataConfig, ExperimentConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.interop.converter import digest_on_disk
from flm_jax.runs import chain
from flm_jax.runs.verify import MEMORY
from flm_jax.runtime import paths, processes, regular
from flm_jax.store import experiment_file
from flm_jax.store.checkpoint import mark_complete
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.experiment_file import Experiment, Origin
from flm_jax.store.files import link_tree, write_json
from flm_jax.store.lineage import RunFolder, StageFolder, identity

# Fields of a stage's model that say how it is computed; they may change where a stage continues.
_COMPUTED = (
    "dtype", "remat", "attention", "scan_unroll", "gradient_reduction", "loss_chunks", "splash",
    "cudnn_documents",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """A state of a run that can be branched from.

    Attributes:
      stage: the folder of its stage.
      start: the global step at which the stage starts.
      step: the state's global step.
      entry: the stage's entry in lineage.json; None: the stage is not finished.
    """

    stage: StageFolder
    start: int
    step: int
    entry: dict[str, Any] | None

    @property
    def run(self) -> RunFolder:
        """The run."""
        return self.stage.run

    @property
    def ends(self) -> bool:
        """Whether it is the end of a finished stage."""
        return self.entry is not None and self.step == self.start + self.entry["steps"]


def find(given: str) -> Point:
    """Finds the state that RUN:STAGE:STEP names.

    Args:
      given: RUN, RUN:STAGE or RUN:STAGE:STEP. STAGE is an index or a name ("": the last finished
        stage), STEP the global step of a checkpoint (without it: the stage's end).

    Raises:
      UserError: there is no such run, stage or step; names those that there are.
    """
    run, stage, step = _split(given)
    finished = run.stages()
    begun = run.begun()
    if not begun:
        raise UserError(f"{run.path} is no run; give RUN:STAGE or RUN:STAGE:STEP")
    known = {str(entry["index"]): entry["name"] for entry in finished}
    known |= {str(folder.index): folder.name for folder in begun}
    if not stage and not finished:
        raise UserError(f"{given}: no stage is finished; give RUN:STAGE:STEP")
    stage = stage or str(finished[-1]["index"])
    index = stage if stage in known else next((i for i, n in known.items() if n == stage), "")
    if not index:
        names = ", ".join(f"{i} ({name})" for i, name in known.items())
        raise UserError(f"{given}: {run.path} has no stage {stage!r}; it has {names}")
    return _point(given, run.stage(int(index), known[index]), finished, step)


def _point(given: str, folder: StageFolder, finished: list[dict[str, Any]], step: str) -> Point:
    """The state at `step` ("": the end) of the stage in `folder`."""
    name = folder.name
    if not folder.config.is_file():
        raise UserError(f"{given}: stage {name} was deleted: {folder.path} is gone; restore it")
    if "sft" in folder.saved():
        raise UserError(
            f"{given}: stage {name} was fine-tuned on conversations; give a stage trained on text"
        )
    entry = finished[folder.index] if folder.index < len(finished) else None
    kept = folder.steps()
    steps = ", ".join(map(str, kept)) or "none"
    if not step and entry is None:
        raise UserError(f"{given}: stage {name} is not finished; give one of its steps: {steps}")
    wanted = step or str(entry and entry["checkpoint"].rpartition("/")[2])
    if wanted not in map(str, kept):
        raise UserError(
            f"{given}: step {wanted} of stage {name} was not kept; it has {steps} "
            "(checkpoint.keep is the number of latest ones that are kept)"
        )
    start = sum(s["steps"] for s in finished[: folder.index])
    return Point(folder, start, int(wanted), entry)


def _split(given: str) -> tuple[RunFolder, str, str]:
    """Splits RUN:STAGE:STEP; a run's folder may have colons in its name, as gs:// has."""
    path, stage, step = given, "", ""
    for parts in range(3):
        head = given.rsplit(":", parts)
        run = RunFolder(paths.of(head[0]))
        if paths.listed(run.path / "stages"):
            path, stage, step = (*head, "", "")[:3]
            break
    return RunFolder(paths.of(path)), stage, step


def prepare(point: Point, config: ExperimentConfig, workdir: str | os.PathLike[str]) -> Origin:
    """Writes a new run that `chain.run` with the same config continues from a state.

    Called again with the same arguments, it completes what is missing. All processes call it.

    Args:
      point: the state.
      config: the new run's config. Its stages up to the state's are those of the other run; that
        of the state may have more steps: it then continues.
      workdir: the new run's folder: empty, new, or begun by the same call.

    Returns:
      Where the run comes from, as its lineage.json will say.

    Raises:
      UserError: the config does not fit the state, or the folder holds something else.
    """
    target = RunFolder(workdir)
    if paths.same(target.path, point.run.path):
        raise UserError(
            f"workdir {target.path} is the run to branch from; give a new one", argument="workdir"
        )
    chain.set_up(config)
    given = config
    config, _ = chain.on_devices(config, jax.devices())
    whole = _check_stages(point, config)
    with target.writing():
        values = processes.once(
            lambda: mapping.to_dict(_write(point, given, config, whole, target))
        )
    return mapping.from_mapping(Origin, values)


def _write(
    point: Point, given: ExperimentConfig, config: ExperimentConfig, whole: bool, target: RunFolder
) -> Origin:
    """Writes the new run's files; `whole`: the state's stage is finished here too."""
    index, name = point.stage.index, config.stages[point.stage.index].name
    before = experiment_file.read(target)
    if before is None and paths.listed(target.path / "stages"):
        raise UserError(
            f"workdir {target.path} is not empty: it holds another run; give a new folder",
            argument="workdir",
        )
    if before is None:
        origin = Origin(
            str(paths.absolute(point.run.path)), index, name, point.step, digest_at(point),
            _other_data(point, config),
        )  # fmt: skip
        experiment_file.write(target, Experiment(given, origin))
    else:
        origin = _same(before, point, given, target)
    stage = target.stage(index, name)
    last = target.lineage if whole else stage.config  # what is written last
    if last.exists():
        return origin
    if not whole:
        _copy_part(point, stage)
    copied = point.run.stages()[: index + whole]
    origins = [_origin_of_copy(origin, entry, copied) for entry in copied]
    point.run.branch(target, len(copied), origins)
    if not whole:
        write_json(stage.config, identity(config, index, _fingerprint(origin, point, config)))
    return origin


def _same(before: Experiment, point: Point, config: ExperimentConfig, target: RunFolder) -> Origin:
    """Returns a run's origin. Raises UserError unless it was branched by the same call."""
    origin = before.origin
    here = f"{paths.absolute(point.run.path)}:{point.stage.index}:{point.step}"
    have = f"{origin.run}:{origin.index}:{origin.step}" if origin else "none"
    new = dataclasses.replace(config, tracker="")  # the file has none
    differences = mapping.differences(mapping.to_dict(before.config), mapping.to_dict(new))
    if origin is None or have != here or differences:
        why = f"origin: {have} -> {here}" if origin is None or have != here else differences[0]
        raise UserError(
            f"workdir {target.path} is not empty: it holds another run ({why}); give a new folder",
            argument="workdir",
        )
    return origin


def _origin_of_copy(
    origin: Origin, entry: dict[str, Any], copied: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the entry of a copied stage says of where it is from."""
    end = sum(s["steps"] for s in copied[: entry["index"] + 1])
    return mapping.to_dict(
        dataclasses.replace(
            origin, index=entry["index"], stage=entry["name"], step=end,
            params_digest=entry["params_digest"], restarts_data=False,
        )
    )  # fmt: skip


def _copy_part(point: Point, stage: StageFolder) -> None:
    """Copies a stage up to the state: its growth, its metrics, and the state's checkpoint."""
    source = point.stage
    regular.check_tree(source.path)
    for file in (source.plan, source.receipt):
        if file.exists():
            paths.copy(file, stage.path / file.name)
    checkpoint = stage.checkpoints / str(point.step)
    # It appears under its name once it is complete.
    incoming = checkpoint if paths.remote(checkpoint) else stage.path / "incoming"
    if not checkpoint.exists():
        link_tree(source.checkpoints / str(point.step), incoming)
        if incoming != checkpoint:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            os.replace(incoming, checkpoint)
    mark_complete(checkpoint)
    stage.metrics.write([row for row in source.metrics.rows() if row["step"] <= point.step])


def digest_at(point: Point) -> str:
    """Returns the digest of the state's parameters; reads them unless lineage.json has it."""
    if point.entry and point.entry["checkpoint"].endswith(f"/{point.step}"):
        return str(point.entry["params_digest"])
    model = point.stage.experiment().stages[0].model
    return digest_on_disk(reader_of(point), model, MEMORY)


def reader_of(point: Point) -> CheckpointReader:
    """Opens the state's checkpoint."""
    return CheckpointReader(point.stage.checkpoints / str(point.step))


def _other_data(point: Point, config: ExperimentConfig) -> bool:
    """Whether the config has other data than the state was trained on, or another order."""
    position = reader_of(point).progress["data"]
    new = config.data_of(point.stage.index)
    if position.get("window_length") != new.window:
        return True
    old = point.stage.experiment().data
    return _content(old) != _content(point.run.data(new))


def _fingerprint(origin: Origin, point: Point, config: ExperimentConfig) -> str:
    """The fingerprint of the new run's data, which are opened only if they differ."""
    if not origin.restarts_data:
        return str(point.stage.saved()["data_fingerprint"])
    own = dataclasses.replace(config, data=point.run.data(config.data))
    return str(chain.corpus_of(own).fingerprint)


def _content(config: DataConfig) -> DataConfig:
    """What the data are, whatever the lengths in which they are read."""
    return dataclasses.replace(config, sequence_length=1, window_length=0, other_vocabulary=False)


def _check_stages(point: Point, config: ExperimentConfig) -> bool:
    """Checks that a config's stages up to a state are those of its run.

    Returns:
      Whether the state's stage is finished in the new run too, as it is.

    Raises:
      UserError: they are not; names the first difference.
    """
    index = point.stage.index
    if index >= len(config.stages):
        raise UserError(
            f"the config has {len(config.stages)} stages, but the state is of stage {index} "
            f"({point.stage.name}); give all stages up to it"
        )
    finished = point.run.stages()
    own, done = config.stages[index], point.step - point.start
    whole = point.ends and own.steps == done
    for entry in finished[: index + whole]:
        _check_stage(point.run.stage(entry["index"], entry["name"]), config, ())
    if whole:
        return True
    if own.steps < done:
        raise UserError(
            f"stage {own.name}: steps is {own.steps}, but the state is after {done} steps of it; "
            f"set config.stages[{index}].steps to {done} (it ends there) or more"
        )
    _check_stage(point.stage, config, _may_change(done))
    return False


def _may_change(done: int) -> tuple[str, ...]:
    """The fields in which a stage that continues after `done` steps may differ."""
    fields = [f.name for f in dataclasses.fields(StageConfig) if f.name not in ("name", "model")]
    if done:  # its tokens and FLOPs are those of all its steps
        fields = [f for f in fields if f not in ("batch_size", "sequence_length")]
    return (*fields, *(f"model.{name}" for name in _COMPUTED))


def _check_stage(
    folder: StageFolder, config: ExperimentConfig, may_change: tuple[str, ...]
) -> None:
    """Raises UserError if a stage of the other run differs in a field that may not change."""
    index = folder.index
    expected = identity(config, index, "")["stage"]
    path = f"config.stages[{index}]"
    found = mapping.differences(folder.saved()["stage"], expected, path)
    allowed = tuple(f"{path}.{name}" for name in may_change)
    for line in found:
        field = line.partition(": ")[0]
        if not any(field == a or field.startswith((f"{a}.", f"{a}[")) for a in allowed):
            raise UserError(
                f"{line}, but {folder.path} was trained before the branch; change it in a later "
                "stage, or branch from an earlier stage or step"
            )

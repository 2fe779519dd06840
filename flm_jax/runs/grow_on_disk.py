"""Grows a run's train state from disk to disk, into a run that continues from there.

The target gets, bit for bit, what training the same chain would have written: the finished stages,
and the next stage's config, plan and first checkpoint. Only the receipt stays incomplete, because
it needs the whole model in memory: `stage.begin` completes it before the stage trains.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import time
from typing import Any

import jax

from flm_jax import data, growth
from flm_jax.config import ExperimentConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.growth import measure, stream
from flm_jax.growth.operators import uses_distances
from flm_jax.growth.receipt import unmeasured
from flm_jax.runs import chain
from flm_jax.runs.stage import calibration_batch, plan_of
from flm_jax.runtime.display import Transfer
from flm_jax.store.checkpoint import by_name, check_fits, shapes
from flm_jax.store.chunked import CheckpointReader, CheckpointWriter, disk_refusals
from flm_jax.store.files import write_json
from flm_jax.store.lineage import RunFolder, StageFolder, identity
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState, abstract_state


@dataclasses.dataclass(frozen=True)
class _Job:
    """One growth from disk to disk.

    Attributes:
      config: the chain.
      index: of the stage to grow into.
      source, target: the run folders.
      entries: of lineage.json, the stages before that one.
      memory: bytes to work with at once.
    """

    config: ExperimentConfig
    index: int
    source: RunFolder
    target: RunFolder
    entries: list[dict[str, Any]]
    memory: int

    @property
    def stage(self) -> StageConfig:
        return self.config.stages[self.index]

    @property
    def small(self) -> StageConfig:
        return self.config.stages[self.index - 1]

    @property
    def folder(self) -> StageFolder:
        return self.target.stage(self.index, self.stage.name)

    @property
    def fingerprint(self) -> str:
        """Of the data that the source was trained on."""
        return str(self.entries[-1]["data_fingerprint"])

    @property
    def identity(self) -> dict[str, Any]:
        return identity(self.config, self.index, self.fingerprint)


def grow(
    config: ExperimentConfig,
    source_dir: str,
    target_dir: str,
    stage: str = "",
    memory: int = 1 << 30,
) -> dict[str, Any]:
    """Grows a finished stage of a run into the next stage of the chain.

    Args:
      config: the chain; the source has finished its first stages.
      source_dir: the source's run folder.
      target_dir: a run folder: new, or one that the same call started.
      stage: index or name of the finished stage to grow; "": the last one.
      memory: bytes to work with at once, in addition to what the process itself takes.

    Returns:
      The stage's name, source and checkpoint as paths, `bytes` of the grown state, and, unless it
      was there already, `bytes_written`, `seconds`, `bytes_per_s`, `plan_digest`, `exactness`.

    Raises:
      UserError: config, source or target do not fit, the plan needs whole leaves, or the disk
        fails. An incomplete checkpoint is never taken for a complete one; the same call continues.
    """
    job = _job(config, RunFolder(source_dir), RunFolder(target_dir), stage, memory)
    reader = CheckpointReader(job.source.path / job.entries[-1]["checkpoint"])
    tx = optim.optimizer(job.small, config.optimizer, schedules.steady)
    state = abstract_state(job.small.model, tx)
    check_fits(reader.path, reader.leaves, shapes(state))
    result = {"stage": job.stage.name, "source": str(reader.path)}
    done = _steps_on_disk(job.folder)
    if done:
        return {**result, "checkpoint": str(job.folder.checkpoints / str(min(done))), "bytes": 0}

    plan, distances = _plan(job, reader)
    key = jax.random.fold_in(jax.random.key(config.seed), job.index)
    grown = jax.eval_shape(lambda s: growth.grow(s, plan, key), state)
    chunks = stream.chunks(plan, shapes(grown), reader, memory)
    _prepare(job, plan, distances, grown)
    step = sum(s.steps for s in config.stages[: job.index])
    progress = {"data": reader.progress["data"], "wall_s": 0.0}
    writer = CheckpointWriter(job.folder.checkpoints / str(step), grown, progress, chunks)
    total = sum(x.size * x.dtype.itemsize for x in writer.leaves.values())
    names = jax.tree.unflatten(jax.tree.structure(state), list(by_name(state)))
    began = time.monotonic()
    with Transfer(f"growing {job.stage.name}", writer.held_bytes(), total) as shown:
        written = stream.grow(reader, writer, names, plan, key, shown.add)
    writer.finish()
    seconds = time.monotonic() - began
    return {
        **result,
        "checkpoint": str(writer.path),
        "plan_digest": plan.digest(),
        "exactness": plan.exactness,
        "bytes": total,
        "bytes_written": written,
        "seconds": seconds,
        "bytes_per_s": written / seconds,
    }


def _job(
    config: ExperimentConfig, source: RunFolder, target: RunFolder, stage: str, memory: int
) -> _Job:
    """Raises UserError if config, source and target do not fit each other."""
    if source.path.resolve() == target.path.resolve():
        raise UserError(f"source and target are both {source.path}; give another target")
    entry = source.finished_stage(stage)
    index = entry["index"] + 1
    if index >= len(config.stages):
        raise UserError(
            f"stage {entry['name']} is the config's last one; add the stage to grow into"
        )
    entries = source.stages()[:index]
    chain.check_finished(config, source, entries)
    job = _Job(config, index, source, target, entries, memory)
    stream.check(plan_of(job.small.model, job.stage))
    started = target.stages()[:index]
    if started and started != entries:
        raise UserError(f"{target.lineage}: its stages are not the source's; give another target")
    target.check_stage(job.folder, job.identity)
    return job


def _prepare(
    job: _Job, plan: growth.Plan, distances: tuple[float, ...] | None, grown: TrainState
) -> None:
    """Writes all that the target needs before its checkpoint."""
    folder, target = job.folder, job.target
    if folder.plan.exists() and growth.Plan.from_json(folder.plan.read_text()) != plan:
        raise UserError(f"{folder.plan}: another growth was started here; give another target")
    target.open()
    _check_space(target.path, folder, grown)
    with disk_refusals(f"{target.path} cannot be written"):
        job.source.branch(target, job.index)
        write_json(folder.config, job.identity)
        folder.keep_growth(plan.to_json(), unmeasured(plan, distances))


def _steps_on_disk(folder: StageFolder) -> list[int]:
    """The steps of the stage's complete checkpoints."""
    if not folder.checkpoints.is_dir():
        return []
    return [int(p.name) for p in folder.checkpoints.iterdir() if p.name.isdigit()]


def _plan(job: _Job, reader: CheckpointReader) -> tuple[growth.Plan, tuple[float, ...] | None]:
    """Returns the plan, and the layers' distances from the identity if it depends on them."""
    small, stage = job.small.model, job.stage
    if not uses_distances(stage.growth.recipe, small, stage.model):
        return plan_of(small, stage), None
    corpus = data.open_corpus(job.config.data_of(0))
    if corpus.fingerprint != job.fingerprint:
        raise UserError(
            f"config.data: its fingerprint is {corpus.fingerprint}, the source was trained on "
            f"{job.fingerprint}; restore the data"
        )
    about = job.config.data_of(job.index)
    batches = corpus.with_length(about).train(stage.growth.calibration_sequences)
    batch = calibration_batch(batches, reader.progress["data"])
    distances = measure.layer_distances(
        lambda path, slices: reader.read(f"params/{path}", slices), batch, small
    )
    return plan_of(small, stage, distances), distances


def _check_space(root: pathlib.Path, folder: StageFolder, grown: TrainState) -> None:
    """Raises UserError if the disk has no room for the grown state."""
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(grown))
    held = sum(p.stat().st_size for p in folder.path.rglob("*") if p.is_file())
    free = shutil.disk_usage(root).free
    if needed - held > free:
        raise UserError(
            f"target {root} needs {needed - held:,} more bytes, but its disk has {free:,} left; "
            "free some space, or give another disk"
        )

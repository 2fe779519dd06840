"""Grows a run's train state from disk to disk, into a run folder where training continues.

The target holds bit for bit the files that training the same chain would have written: the finished
stages, and the next stage's config, plan and first checkpoint. Only the receipt stays incomplete,
because it needs the whole model in memory: `stage.begin` completes it before the stage trains.

A model from elsewhere, which the chain names as its first stage's source, becomes that stage in the
target first (`first_stage.py`), and then grows from there.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any

import jax

from flm_jax import data, growth
from flm_jax.config import ExperimentConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.growth import measure, stream
from flm_jax.growth.operators import uses_distances
from flm_jax.growth.receipt import unmeasured
from flm_jax.runs import chain, first_stage
from flm_jax.runs.stage import calibration_batch, plan_of, with_derived
from flm_jax.runtime import paths, processes
from flm_jax.runtime.display import Progress
from flm_jax.store.checkpoint import by_name, check_fits, shapes
from flm_jax.store.chunk_writer import CheckpointWriter
from flm_jax.store.chunked import CheckpointReader, check_space, disk_refusals
from flm_jax.store.earlier import as_stored, upgraded
from flm_jax.store.files import write_json
from flm_jax.store.lineage import RunFolder, StageFolder, identity
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState, abstract_state


@dataclasses.dataclass(frozen=True)
class _DiskGrowth:
    """One growth from disk to disk.

    Attributes:
      config: the chain.
      index: the index of the stage to grow into.
      source: the run folder to read.
      target: the run folder to write.
      entries: the entries in lineage.json of the stages before that stage.
    """

    config: ExperimentConfig
    index: int
    source: RunFolder
    target: RunFolder
    entries: list[dict[str, Any]]

    @property
    def stage(self) -> StageConfig:
        """The config of the stage to grow into."""
        return self.config.stages[self.index]

    @property
    def small(self) -> StageConfig:
        """The config of the stage to grow."""
        return self.config.stages[self.index - 1]

    @property
    def folder(self) -> StageFolder:
        """The folder of the stage to grow into."""
        return self.target.stage(self.index, self.stage.name)

    @property
    def checkpoint(self) -> pathlib.Path:
        """The checkpoint to write; its step is the global step at which the stage starts."""
        step = sum(stage.steps for stage in self.config.stages[: self.index])
        return self.folder.checkpoints / str(step)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the source's training data."""
        return str(self.entries[-1]["data_fingerprint"])

    @property
    def identity(self) -> dict[str, Any]:
        """The new stage's settings for its config.json."""
        return identity(self.config, self.index, self.fingerprint)


def grow(
    config: ExperimentConfig,
    source_dir: str,
    target_dir: str,
    stage: str = "",
    memory: int = 1 << 30,
    topology: str = "",
) -> dict[str, Any]:
    """Grows a finished stage of a run, or a chain's source, into the next stage of the chain.

    With several processes (`processes.joined`), all call it, and each writes its share.

    Args:
      config: the chain.
      source_dir: a run folder that has finished the chain's first stages; or the source of its
        first stage, which then has no steps: a run, a checkpoint, or Hugging Face files.
      target_dir: a run folder: new, or one that the same call started.
      stage: index or name of the finished stage to grow; "": the last one. Not for a source.
      memory: bytes for the arrays in a process's memory at one time, without the process itself.
      topology: where the target will train: config.json gets the layouts for it. "": none.

    Returns:
      `stage` (the new stage's name), `source` and `checkpoint` (paths), and `bytes`, the size of
      the grown state. If the checkpoint existed already, `bytes` is 0. Otherwise there are also
      `bytes_written` (by all processes), `seconds`, `bytes_per_s`, `plan_digest` and `exactness`.

    Raises:
      UserError: config, source and target do not fit each other, the plan needs whole leaves, or
        the disk fails. A checkpoint that is not complete has another path; the same call
        continues it.
    """
    config = with_derived(config).on(topology)
    source, target = RunFolder(source_dir), RunFolder(target_dir)
    paths.check_bucket(source.path, "source")
    if paths.same(source.path, target.path):
        raise UserError(f"source and target are both {source.path}; give another target")
    if _is_source(config.stages[0], source.path):
        if stage:
            raise UserError(
                f"stage is {stage!r}, but {source_dir} is the source of stage "
                f"{config.stages[0].name}, which grows; leave stage out",
                argument="stage",
            )
        _require_next(config, 0)
        first_stage.write(config, target, memory)
        source, stage = target, "0"
    growing = _checked(config, source, target, stage)
    reader = CheckpointReader(growing.source.path / growing.entries[-1]["checkpoint"])
    tx = optim.optimizer(growing.small, config.optimizer, schedules.steady)
    state = as_stored(abstract_state(growing.small.model, tx), reader.leaves)
    check_fits(reader.path, reader.leaves, shapes(state))
    read_from = source_dir if growing.source is target else reader.path
    result = {"stage": growing.stage.name, "source": str(read_from)}
    if done := processes.once(growing.folder.steps):
        return {
            **result,
            "checkpoint": str(growing.folder.checkpoints / str(min(done))),
            "bytes": 0,
        }

    plan, distances = _plan(growing, reader)
    key = jax.random.fold_in(jax.random.key(config.seed), growing.index)
    grown = jax.eval_shape(lambda s: growth.grow(upgraded(s), plan, key), state)
    chunks = stream.chunks(plan, shapes(grown), reader, memory)
    names = jax.tree.unflatten(jax.tree.structure(state), list(by_name(state)))
    _check_plan(growing, plan)
    with target.writing():
        processes.once(lambda: _prepare(growing, plan, distances, grown))
        progress = {"data": reader.progress["data"], "wall_s": 0.0}
        batch = stream.batch_bytes(memory)
        writer = CheckpointWriter(growing.checkpoint, grown, progress, chunks, batch)
        return result | _write(growing.stage.name, reader, writer, names, plan, key)


def _checked(
    config: ExperimentConfig, source: RunFolder, target: RunFolder, stage: str
) -> _DiskGrowth:
    """Describes the growth. Raises UserError if config, source and target do not fit each other."""
    _require_run_of(config.stages[0], source)
    entry = source.finished_stage(stage)
    _require_next(config, entry["index"])
    index = entry["index"] + 1
    entries = source.stages()[:index]
    chain.check_finished(config, source, entries)
    growing = _DiskGrowth(config, index, source, target, entries)
    stream.check(plan_of(growing.small.model, growing.stage))
    # A call that was stopped while it copied stages left them without lineage.json.
    started = target.stages()[:index] if target.lineage.exists() else []
    if started and started != entries:
        raise UserError(
            f"{target.lineage}: its stages are not those of {source.lineage}; give another target"
        )
    target.check_stage(growing.folder, growing.identity)
    return growing


def _is_source(first: StageConfig, path: pathlib.Path) -> bool:
    """Whether a path is the source that a chain's first stage names."""
    if not first.source:
        return False
    return paths.same(paths.of(first.source), path)


def _require_next(config: ExperimentConfig, index: int) -> None:
    """Raises UserError unless the chain has a stage after the one at `index`."""
    if index + 1 >= len(config.stages):
        last = config.stages[-1].name
        raise UserError(f"stage {last} is the config's last one; add the stage to grow into")


def _require_run_of(first: StageConfig, source: RunFolder) -> None:
    """Raises UserError if the source is a model from elsewhere, and the chain does not name it."""
    stages = source.stages()
    imported = stages and stages[0].get("steps") == 0 and stages[0]["name"] != first.name
    if imported or (not stages and (source.path / "config.json").is_file()):
        raise UserError(
            f"source {source.path} is no run of this config, whose first stage has source "
            f"{first.source!r}; set config.stages[0].source to {source.path}, and its steps to 0"
        )


def _write(
    name: str,
    reader: CheckpointReader,
    writer: CheckpointWriter,
    names: Any,
    plan: growth.Plan,
    key: jax.Array,
) -> dict[str, Any]:
    """Grows leaf by leaf from the reader to the writer; returns checkpoint, sizes and speed."""
    total = sum(x.size * x.dtype.itemsize for x in writer.leaves.values())
    held, count = writer.held_bytes(), jax.process_count()
    start = time.monotonic()
    with Progress(f"growing {name}", held, total, "bytes") as shown:
        # All processes are about equally fast.
        stream.grow(reader, writer, names, plan, key, lambda done: shown.add(done * count))
    writer.finish()
    seconds = time.monotonic() - start
    return {
        "checkpoint": str(writer.path),
        "plan_digest": plan.digest(),
        "exactness": plan.exactness,
        "bytes": total,
        "bytes_written": total - held,
        "seconds": seconds,
        "bytes_per_s": (total - held) / seconds,
    }


def _check_plan(growing: _DiskGrowth, plan: growth.Plan) -> None:
    """Raises UserError if another growth was started in the target."""
    file = growing.folder.plan
    if file.exists() and growth.Plan.from_json(growing.folder.plan_text()) != plan:
        raise UserError(f"{file}: another growth was started here; give another target")


def _prepare(
    growing: _DiskGrowth, plan: growth.Plan, distances: tuple[float, ...] | None, grown: TrainState
) -> None:
    """Writes all files of the target except the checkpoint."""
    folder, target = growing.folder, growing.target
    check_space(target.path, jax.tree.leaves(grown), folder.path)
    with disk_refusals(f"{target.path} cannot be written"):
        growing.source.branch(target, growing.index)
        write_json(folder.config, growing.identity)
        folder.keep_growth(plan.to_json(), unmeasured(plan, distances))


def _plan(
    growing: _DiskGrowth, reader: CheckpointReader
) -> tuple[growth.Plan, tuple[float, ...] | None]:
    """Returns the plan, and the layers' distances from the identity if the plan uses them."""
    small, stage = growing.small.model, growing.stage
    if not uses_distances(stage.growth.recipe, small.num_layers, stage.model.num_layers):
        return plan_of(small, stage), None
    corpus = data.open_corpus(growing.source.data(growing.config.data_of(0)))
    if corpus.fingerprint != growing.fingerprint:
        raise UserError(
            f"config.data: its fingerprint is {corpus.fingerprint}, the source was trained on "
            f"{growing.fingerprint}; restore the data"
        )
    data_config = growing.config.data_of(growing.index)
    batches = corpus.with_length(data_config).train(stage.growth.calibration_sequences)
    batch = calibration_batch(batches, reader.progress["data"])
    distances = measure.layer_distances(
        lambda path, slices: reader.read(f"params/{path}", slices), batch, small
    )
    return plan_of(small, stage, distances), distances

"""Grows a run's last train state from disk to disk, into a run that goes on from there.

The target gets what the runner (`loop.py`) would have made of the same chain: the finished
stages, the next stage's config, plan and first checkpoint, bit for bit. Only its receipt is left
open: it needs the whole model, and the runner completes it before it trains.
"""

from __future__ import annotations

import pathlib
import shutil
import time
from typing import Any

import jax

from flm_jax.train import schedules
from flm_jax.runs import chain, loop
from flm_jax import data, growth
from flm_jax.growth import measure
from flm_jax.train import optim
from flm_jax.store.checkpoint import by_name, check_fits, shapes
from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError
from flm_jax.growth import stream
from flm_jax.growth.receipt import unmeasured
from flm_jax.store.leaves import CheckpointReader, CheckpointWriter, disk_refusals
from flm_jax.store.lineage import RunFolder, StageFolder, identity
from flm_jax.store.files import write_atomically, write_json
from flm_jax.runtime.display import Progress
from flm_jax.train.train_step import init_state


def grow(
    config: ExperimentConfig,
    source_dir: str,
    target_dir: str,
    stage: str = "",
    memory: int = 1 << 30,
) -> dict[str, Any]:
    """Grows a finished stage of a run into the next stage of the chain.

    Args:
      config: the chain, of which the source has finished the first stages.
      source_dir: its run folder.
      target_dir: a run folder: new, or one that this call began before.
      stage: index or name of the finished stage to grow; "": the last.
      memory: bytes that are worked with at once. The process itself comes on top.

    Returns: what was done: checkpoint, bytes, seconds.

    Raises:
      UserError: config, source or target do not fit, the plan needs whole leaves, the disk
        refuses. Nothing half-made is taken for complete; the same call goes on from there.
    """
    source, target = RunFolder(source_dir), RunFolder(target_dir)
    index = _next_stage(config, source, target, stage)
    entries = source.stages()[:index]
    stream.check(loop.plan_of(config.stages[index - 1].model, config.stages[index]))
    _check_target(target, entries)
    folder = target.stage(index, config.stages[index].name)
    about = identity(config, index, entries[-1]["data_fingerprint"])
    target.check_stage(folder, about)
    reader = CheckpointReader(source.path / entries[-1]["checkpoint"])
    state = _abstract_state(config, index - 1)
    check_fits(reader.path, reader.leaves, shapes(state))
    result = {"stage": config.stages[index].name, "source": str(reader.path)}
    done = _steps_on_disk(folder)
    if done:
        return {**result, "checkpoint": str(folder.checkpoints / str(min(done))), "bytes": 0}

    plan, distances = _plan(config, index, reader, entries[-1]["data_fingerprint"], memory)
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    grown = jax.eval_shape(lambda s: growth.grow(s, plan, key), state)
    chunks = stream.chunks(plan, shapes(grown), reader, memory)
    if folder.plan.exists() and growth.Plan.from_json(folder.plan.read_text()) != plan:
        raise UserError(f"{folder.plan}: another growth was begun here; give another --target")
    target.open()
    _check_space(target.path, folder, grown)
    with disk_refusals(f"{target.path} cannot be written"):
        source.branch(target, index)
        write_json(folder.config, about)
        write_atomically(folder.plan, plan.to_json() + "\n")
        write_json(folder.receipt, unmeasured(plan, distances))

    step = sum(s.steps for s in config.stages[:index])
    progress = {"data": reader.progress["data"], "wall_s": 0.0}
    writer = CheckpointWriter(folder.checkpoints / str(step), grown, progress, chunks)
    total = sum(x.size * x.dtype.itemsize for x in writer.leaves.values())
    names = jax.tree.unflatten(jax.tree.structure(state), list(by_name(state)))
    began = time.monotonic()
    name = f"growing {config.stages[index].name}"
    with Progress(name, writer.held_bytes(), total, "bytes") as shown:
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


def _next_stage(config: ExperimentConfig, source: RunFolder, target: RunFolder, stage: str) -> int:
    """The index of the stage to grow into."""
    if source.path.resolve() == target.path.resolve():
        raise UserError(f"--source and --target are both {source.path}; give another --target")
    finished = source.stages()
    if not finished:
        raise UserError(f"--source={source.path} has no finished stage (no lineage.json)")
    chosen = [s for s in finished if stage in ("", str(s["index"]), s["name"])]
    if not chosen:
        names = ", ".join(f"{s['index']} ({s['name']})" for s in finished)
        raise UserError(
            f"--stage={stage}: {source.path} has no such finished stage; it has {names}"
        )
    index = chosen[-1]["index"] + 1
    if index >= len(config.stages):
        raise UserError(
            f"stage {chosen[-1]['name']} is the config's last; add the stage to grow into"
        )
    chain.check_finished(config, source, finished[:index])
    return index


def _check_target(target: RunFolder, entries: list[dict[str, Any]]) -> None:
    begun = target.stages()[: len(entries)]
    if begun and begun != entries:
        raise UserError(
            f"{target.lineage}: its stages are not those of --source; give another --target"
        )


def _steps_on_disk(folder: StageFolder) -> list[int]:
    """Of complete checkpoints."""
    if not folder.checkpoints.is_dir():
        return []
    return [int(p.name) for p in folder.checkpoints.iterdir() if p.name.isdigit()]


def _abstract_state(config: ExperimentConfig, index: int) -> Any:
    stage = config.stages[index]
    tx = optim.optimizer(stage, config.optimizer, schedules.steady)
    return jax.eval_shape(lambda: init_state(stage.model, tx, jax.random.key(0)))


def _plan(
    config: ExperimentConfig, index: int, reader: CheckpointReader, fingerprint: str, memory: int
) -> tuple[growth.Plan, tuple[float, ...] | None]:
    """The plan, and the layers' distances from the identity, if it depends on them."""
    small, stage = config.stages[index - 1].model, config.stages[index]
    order = list(map(float, range(small.num_layers)))
    plan = loop.plan_of(small, stage, order)
    if plan == loop.plan_of(small, stage, order[::-1]):
        return plan, None
    corpus = data.open_corpus(config.data_of(0))
    if corpus.fingerprint != fingerprint:
        raise UserError(
            f"config.data: its fingerprint is {corpus.fingerprint}, the source was trained on "
            f"{fingerprint}; restore the data"
        )
    sequences = stage.growth.calibration_sequences
    batches = corpus.with_length(config.data_of(index)).train(sequences)
    batch = loop.calibration(batches, reader.progress["data"])
    distances = measure.layer_distances(
        lambda path, slices: reader.read(f"params/{path}", slices), batch, small
    )
    return loop.plan_of(small, stage, distances), distances


def _check_space(root: pathlib.Path, folder: StageFolder, grown: Any) -> None:
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(grown))
    held = sum(p.stat().st_size for p in folder.path.rglob("*") if p.is_file())
    free = shutil.disk_usage(root).free
    if needed - held > free:
        raise UserError(
            f"--target={root}: {needed - held:,} bytes are to be written, and its disk has "
            f"{free:,} left; free some, or give another disk"
        )

"""Writes the first stage of a chain from its source, disk to disk, in bounded memory.

The stage is not trained: it has the source's parameters and a new optimizer. Its checkpoint holds
bit for bit what training the same chain would have written. Only its evaluation is not measured,
because that needs the whole model in memory.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from flm_jax import growth
from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError
from flm_jax.growth import stream
from flm_jax.interop.converter import (
    chunk_shapes,
    digest_on_disk,
    untrained_entry,
    write_parameters,
)
from flm_jax.interop.opening import StoredModel
from flm_jax.interop.stage_source import open_stage_source
from flm_jax.params import axes
from flm_jax.runs import chain
from flm_jax.runs.stage import computed_by, plan_of
from flm_jax.runtime import processes
from flm_jax.store.checkpoint import CHUNK_BYTES, by_name, complete, shapes
from flm_jax.store.chunk_writer import CheckpointWriter
from flm_jax.store.chunked import CheckpointReader, check_space, disk_refusals
from flm_jax.store.lineage import RunFolder, identity
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState, abstract_state, init_state


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """The chunks of the checkpoint to write, by the names of its leaves."""

    shapes: dict[str, tuple[int, ...]]

    def chunk(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]


def write(config: ExperimentConfig, target: RunFolder, memory: int) -> None:
    """Writes the first stage of a chain as a finished stage, unless the target has it.

    Args:
      config: the chain; its first stage has a source and no steps, its second grows out of it.
      target: a run folder that this run writes: new, or one that the same call started.
      memory: bytes for the arrays in memory at one time, without the process itself.

    Raises:
      UserError: config, source and target do not fit each other, the second stage cannot grow from
        disk to disk in this memory, or the disk fails. A checkpoint that is not complete has
        another path; the same call continues it.
    """
    stage = config.stages[0]
    if stage.steps:
        raise UserError(
            f"stage {stage.name}: steps is {stage.steps}, but a source is grown from disk to disk "
            "untrained; set steps to 0, or train the stage (flm train) and give that run"
        )
    if processes.once(target.stages):
        return
    stored = open_stage_source(config)
    tx = optim.optimizer(stage, config.optimizer, schedules.steady)
    like = abstract_state(stage.model, tx)
    chunks = _chunks(like, stored, memory)
    grown = _grown(config, like, chunks, memory)
    corpus = chain.corpus_of(config)
    saved = identity(config, 0, corpus.fingerprint)
    folder = target.stage(0, stage.name)
    target.check_stage(folder, saved)
    path = folder.checkpoints / "0"

    def begin() -> bool:
        check_space(target.path, jax.tree.leaves((like, grown)), target.path)
        with disk_refusals(f"{target.path} cannot be written"):
            target.begin_stage(folder, saved)
        return complete(path)

    def end() -> None:
        digest = digest_on_disk(CheckpointReader(path), stage.model, memory)
        with disk_refusals(f"{target.path} cannot be written"):
            entry = untrained_entry(folder, saved, stage.model, digest)
            target.add_stage(entry | computed_by(stage.model))

    with target.writing():
        if not processes.once(begin):
            data = corpus.with_length(config.data_of(0)).train(1).get_state()
            writer = CheckpointWriter(
                path, like, {"data": data, "wall_s": 0.0}, chunks.shapes, stream.batch_bytes(memory)
            )
            _write_optimizer(writer, config, like)
            write_parameters(writer, stored.weights, f"writing {stage.name}")
            writer.finish()

        processes.once(end)


def _chunks(like: TrainState, stored: StoredModel, memory: int) -> _Chunks:
    """Chooses chunks that the source's files and the growth read in one piece."""
    config = stored.weights.config
    most = min(CHUNK_BYTES, stream.for_pieces(memory) // stream.HELD)
    by_path = chunk_shapes(config, most)
    leaves = stream.parameter_leaves(by_name(like), axes.table(config))
    return _Chunks({leaf.name: by_path[leaf.path] for leaf in leaves})


def _grown(config: ExperimentConfig, like: TrainState, chunks: _Chunks, memory: int) -> TrainState:
    """The state that the next stage starts with, without arrays. Raises UserError if it cannot."""
    plan = plan_of(config.stages[0].model, config.stages[1])
    stream.check(plan)
    key = jax.random.key(config.seed)
    grown: TrainState = jax.eval_shape(lambda state: growth.grow(state, plan, key), like)
    stream.chunks(plan, shapes(grown), chunks, memory)
    return grown


def _write_optimizer(writer: CheckpointWriter, config: ExperimentConfig, like: TrainState) -> None:
    """Writes all of a new train state but its parameters; moments are zero."""
    stage = config.stages[0]
    large = {x.name: x for x in stream.parameter_leaves(by_name(like), axes.table(stage.model))}

    @jax.jit
    def others(key: jax.Array) -> dict[str, jax.Array]:  # parameters and moments are not computed
        tx = optim.optimizer(stage, config.optimizer, schedules.steady)
        state = init_state(stage.model, tx, key)
        return {name: x for name, x in by_name(state).items() if name not in large}

    if processes.first():
        for name, value in others(jax.random.key(0)).items():
            writer.write(name, None, np.asarray(value))
    missing = [
        (name, piece)
        for name, leaf in large.items()
        if leaf.power
        for piece in writer.pieces(name)
        if not writer.holds(name, piece)
    ]
    for name, piece in processes.share(missing):
        size = [cut.stop - cut.start for cut in piece]
        writer.write(name, piece, np.zeros(size, writer.leaves[name].dtype))

"""A chain: the stages of an experiment, each grown out of the one before.

Whatever stops the run (`runner.py`), the same call goes on from the last complete checkpoint, to
the same bits: the state, the data position and the schedule are all functions of the step, and a
growth is a function of its parent checkpoint and the seed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from flm_jax.train import schedules
from flm_jax import mapping
from flm_jax import config as config_lib
from flm_jax import data, growth, interop
from flm_jax.runtime import host, processes
from flm_jax.train import optim
from flm_jax.params import axes
from flm_jax.params import sharding
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError
from flm_jax.inference.evaluation import bits_per_byte
from flm_jax.store.lineage import RunFolder, identity
from flm_jax.runs.loop import Position, plan_of, restore, run_jobs
from flm_jax.params.sharding import Layout
from flm_jax.train.train_step import init_state


def run(config: ExperimentConfig, workdir: str) -> list[dict[str, Any]]:
    """Runs what is left of the chain. Returns lineage.json's stages.

    Raises:
      UserError: the config, the data or the folder does not fit; nothing is overwritten.
      RunStopped: after SIGINT or SIGTERM, with a checkpoint written.
    """
    host.keep_freed()
    if config.quick_compile:
        host.compile_quickly()
    layouts = [
        sharding.make_layout(
            config.mesh_of(n), f"config.stages[{n}].mesh" if s.mesh else "config.mesh"
        )
        for n, s in enumerate(config.stages)
    ]
    check(config, layouts)
    processes.check_same("the config", mapping.digest(mapping.to_dict(config)))
    folder = RunFolder(workdir)
    done = processes.once(lambda: _open(config, folder))
    if len(done) >= len(config.stages):
        return done
    first = config.stages[0]
    if first.source and not folder.stage(0, first.name).config.exists():
        interop.source_of(first)  # raises if it does not fit

    corpus = data.open_corpus(config.data_of(0))
    if corpus.vocab_size > min(stage.model.vocab_size for stage in config.stages):
        raise UserError(
            f"config.model.vocab_size is {config.stages[0].model.vocab_size}, but vocabulary "
            f"{config.data.vocabulary!r} has {corpus.vocab_size} tokens; set vocab_size to "
            f"{corpus.vocab_size} or more"
        )
    jobs: list[_ChainJob] = []
    for index, layout in enumerate(layouts):
        before = jobs[-1] if jobs else None
        jobs.append(_ChainJob(config, index, corpus, folder, layout, before))
    run_jobs(jobs[len(done) :], folder)
    return processes.once(folder.stages)


def _open(config: ExperimentConfig, folder: RunFolder) -> list[dict[str, Any]]:
    """The finished stages. Raises UserError if the folder cannot be used or is another run's."""
    folder.open()
    done = folder.stages()
    check_finished(config, folder, done)
    return done


def check_finished(config: ExperimentConfig, folder: RunFolder, done: list[dict[str, Any]]) -> None:
    """Raises UserError if the finished stages are not the config's first ones.

    More stages may follow a complete chain: it was fine-tuned.
    """
    names = [stage.name for stage in config.stages]
    finished = [entry["name"] for entry in done]
    if finished[: len(names)] != names[: len(finished)]:
        raise UserError(
            f"{folder.lineage}: the run has stages {', '.join(finished)}, the config has "
            f"{', '.join(names)}; give another --workdir"
        )
    for index, entry in enumerate(done[: len(names)]):
        about = identity(config, index, entry["data_fingerprint"])
        folder.check_stage(folder.stage(index, entry["name"]), about)


def check(config: ExperimentConfig, layouts: Sequence[Layout]) -> None:
    """Raises UserError now for what would fail in a later stage; a layout for each."""
    for stage, (mesh, rules) in zip(config.stages, layouts, strict=True):
        rows = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
        sharding.check_divisible(stage.model, mesh, rules)
        if stage.batch_size // stage.accumulate % rows:
            raise UserError(
                f"stage {stage.name}: a microbatch of {stage.batch_size // stage.accumulate} "
                f"sequences cannot be split over {rows} devices (mesh data x fsdp); change one"
            )
    for before, after in zip(config.stages, config.stages[1:], strict=False):
        plan_of(before.model, after)


class _ChainJob:
    """A stage of a chain: text, the chain's schedule, validation bits per byte."""

    best_by = ""

    def __init__(
        self,
        config: ExperimentConfig,
        index: int,
        corpus: Any,
        folder: RunFolder,
        layout: Layout,
        before: _ChainJob | None,
    ):
        self.config, self.index, self.folder = config, index, folder
        self.layout, self.parent_layout = layout, before.layout if before else layout
        self.stage, self.before = config.stages[index], before
        self.start: int = before.start + before.stage.steps if before else 0
        self.parent = before.stage.name if before else None
        self.small = before.stage.model if before else self.stage.model
        about = config.data_of(index)
        self.sequence_length = about.sequence_length
        self.fingerprint = corpus.fingerprint
        self.corpus = corpus.with_length(about)

    def identity(self) -> dict[str, Any]:
        return identity(self.config, self.index, self.fingerprint)

    def optimizer(self) -> tuple[optax.GradientTransformation, schedules.Schedule]:
        shape = schedules.schedule_shape(self.config.schedule, self.config.total_steps)
        if self.before:
            g = self.stage.growth
            shape = schedules.rewarmed(shape, self.start, g.rewarmup_steps, g.rewarmup_ratio)
        grown_at = self.start if self.before else None
        return optim.optimizer(self.stage, self.config.optimizer, shape, grown_at), shape

    def batches(self, batch_size: int, index: int = 0, count: int = 1) -> Any:
        return self.corpus.train(batch_size, index, count)

    def fresh(self) -> Position:
        tx, _ = self.optimizer()
        key = jax.random.fold_in(jax.random.key(self.config.seed), 0)
        init = functools.partial(init_state, self.stage.model, tx)
        placed = sharding.shardings(
            jax.eval_shape(init, key), axes.table(self.stage.model), *self.layout
        )
        state = jax.jit(init, out_shardings=placed)(key)
        if self.stage.source:
            params = interop.place(interop.source_of(self.stage).weights, placed.params)
            state = dataclasses.replace(state, params=params)
        return Position(state, self.batches(1).get_state(), 0.0)

    def source(self) -> Position:
        assert self.before is not None
        folder = self.folder.stage(self.before.index, self.before.stage.name)
        ended = Checkpoints(folder.checkpoints, self.config.checkpoint.keep)
        position = restore(self.before, ended)
        ended.close()
        return position

    @functools.cached_property
    def validation(self) -> list[dict[str, np.ndarray]]:
        """The same tokens at every length."""
        if self.before and self.before.sequence_length == self.sequence_length:
            return self.before.validation
        settings, length = self.config.eval, self.sequence_length
        about = dataclasses.replace(self.config.data_of(0), sequence_length=length)
        windows = settings.sequences * self.config.data.sequence_length // length
        return self.corpus.with_length(about).validation(settings.batch_size, max(windows, 1))

    def evaluate(self, params: Any, plan: growth.Plan | None, mask: float | None) -> dict[str, Any]:
        bpb = bits_per_byte(
            params, self.stage.model, self.validation, self.corpus.token_bytes, self.layout.mesh,
            plan, mask,
        )  # fmt: skip
        return {"bpb": bpb}

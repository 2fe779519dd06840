"""A run of two stages with a growth, without corpus and command, so that a life takes seconds.

It uses all of the runner: the folder's lock, signals, checkpoints, growth, receipt, metrics.
"""

import dataclasses
import functools
import pathlib
import sys

import jax
import numpy as np

from flm_jax.config import (
    CheckpointConfig,
    EvalConfig,
    ExperimentConfig,
    GrowthConfig,
    MeshConfig,
    StageConfig,
    WatchdogConfig,
)
from flm_jax.errors import Exit, RunStopped, UserError
from flm_jax.params import sharding
from flm_jax.params.sharding import Layout
from flm_jax.runs.guarded import guarded
from flm_jax.runs.loop import run_stages
from flm_jax.runs.stage import Parent, Position, Stage, optimizer_of, restore
from flm_jax.runtime import joints, processes
from flm_jax.runtime.processes import Group
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.lineage import RunFolder, identity
from flm_jax.train.train_step import init_program
from tests.models import TINY, packed_batch

SMALL = functools.partial(StageConfig, learning_rate=1e-2, matrix_learning_rate=1e-2)
# Metrics have a row at step 10. The batch divides over one to three devices.
STEPS, EVERY, BATCH, LENGTH = 6, 2, 6, 9


def experiment() -> ExperimentConfig:
    small = dataclasses.replace(TINY, num_layers=1)
    large = dataclasses.replace(small, d_model=32, num_heads=8, d_ff=48)
    growth = GrowthConfig("msg", ramp_steps=2, calibration_sequences=BATCH)
    return ExperimentConfig(
        stages=(
            SMALL("small", small, STEPS, BATCH),
            SMALL("large", large, STEPS, BATCH, growth=growth),
        ),
        eval=EvalConfig(every_steps=EVERY),
        checkpoint=CheckpointConfig(every_steps=EVERY, keep=2),
    )


class Stream:
    """Random batches; the position is the number of batches read."""

    def __init__(self, config, batch_size, index=0, count=1):
        self._config, self._rows, self._index, self._count = config, batch_size, index, count
        self._place = 0

    def __iter__(self):
        return self

    def __next__(self):
        batch = packed_batch(self._config, self._place, self._rows, LENGTH)
        self._place += 1
        rows = self._rows // self._count
        part = slice(self._index * rows, (self._index + 1) * rows)
        return {name: np.array(x)[part] for name, x in batch.items()}

    def get_state(self):
        return {"place": self._place}

    def set_state(self, state):
        self._place = state["place"]


def measure(params, masks_at, mask_value):
    """Numbers that depend on all parameters, between two joints."""
    total = 0.0
    for leaf in joints.between(jax.tree.leaves(params)):
        total += float(np.abs(np.asarray(leaf, np.float64)).mean())
    return {"bpb": total}


def stages_of(config: ExperimentConfig, run: RunFolder) -> list[Stage]:
    mesh = sharding.make_mesh(MeshConfig(data=jax.device_count()))
    layout, stages = Layout(mesh), []
    for index, own in enumerate(config.stages):
        tx, schedule = optimizer_of(config, index)
        before = stages[-1] if stages else None
        batches = functools.partial(Stream, own.model)
        stages.append(
            Stage(
                config=own,
                experiment=config,
                index=index,
                start=before.end if before else 0,
                parent=Parent(before.name, before.config.model, layout) if before else None,
                layout=layout,
                sequence_length=LENGTH,
                identity=identity(config, index, "fingerprint"),
                tx=tx,
                schedule=schedule,
                batches=batches,
                source=functools.partial(_end, before, run)
                if before
                else functools.partial(_fresh, own.model, tx, layout),
                evaluate=measure,
            )
        )
    return stages


def _fresh(model, tx, layout):
    return Position(init_program(model, tx, layout)(jax.random.key(0)), {"place": 0}, 0.0)


def _end(before, run):
    checkpoints = Checkpoints(before.folder(run).checkpoints, before.experiment.checkpoint.keep)
    try:
        return restore(before, checkpoints)
    finally:
        checkpoints.close()


def train(workdir: pathlib.Path, compiled: pathlib.Path, group: Group = Group()) -> int:  # noqa: B008
    """Runs or resumes the chain; prints errors and returns a status as the command does."""
    config, run = experiment(), RunFolder(workdir, compiled)
    try:
        with processes.joined(group), guarded(run, "faults", WatchdogConfig(0.0)):
            done = processes.once(run.stages)
            if todo := stages_of(config, run)[len(done) :]:
                run_stages(todo, run)
        return Exit.OK
    except (UserError, RunStopped) as error:
        print(f"faults: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def result(workdir: pathlib.Path) -> list:
    """What a run must reach, whatever happened to it on the way."""
    names = ("name", "params_digest", "eval", "plan_digest", "receipt", "config_digest")
    return [{name: entry[name] for name in names} for entry in RunFolder(workdir).stages()]


def rows(workdir: pathlib.Path) -> list:
    """The steps of the evaluations, and of rows that are there twice.

    Which steps have a row of training losses depends on where lives begin.
    """
    run = RunFolder(workdir)
    found = [
        (entry["name"], row["kind"], row["step"])
        for entry in run.stages()
        for row in run.stage(entry["index"], entry["name"]).metrics.rows()
    ]
    losses = [row for row in found if row[1] == "train"]
    twice = [row for row in dict.fromkeys(losses) if losses.count(row) > 1]
    return [row for row in found if row[1] == "eval"] + twice

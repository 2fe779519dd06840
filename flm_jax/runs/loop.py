"""The runner: takes stages to their end, one after the other, from wherever they stand on disk.

A stage begins from a fresh model or grows out of the stage before, trains, and ends with a
checkpoint and its entry in lineage.json. What it begins from, trains on and is measured by comes
from its `Job`: a chain's (`chain.py`), or fine-tuning's (`sft/tune.py`).

Several processes (`processes.py`) run this together, over one mesh of all their devices. Every
line is run by all of them, but what is in `processes.once`, and the first alone shows and logs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import signal
import statistics
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache

from flm_jax.train import schedules
from flm_jax import mapping
from flm_jax import config as config_lib
from flm_jax.params import axes
from flm_jax.params import counts, sharding
from flm_jax import growth
from flm_jax.growth import ligo, measure
from flm_jax.train import optim
from flm_jax.runtime import processes
from flm_jax.store.checkpoint import Checkpoints, params_digest
from flm_jax.config import ExperimentConfig, StageConfig, TransformerConfig
from flm_jax.errors import RunStopped, UserError
from flm_jax.growth.receipt import Receipt, measured
from flm_jax.store.lineage import RunFolder, StageFolder
from flm_jax.store.metrics import TensorBoard
from flm_jax.runtime.display import Progress
from flm_jax.params.sharding import Layout
from flm_jax.train.train_step import TrainState
from flm_jax.runtime.stop import StopRequest
from flm_jax.train.train_step import init_state, make_train_step

LOG_EVERY = 10  # steps between rows of metrics.jsonl, and averaged in one


@dataclasses.dataclass
class Position:
    """Where a stage stands: what a checkpoint holds."""

    state: TrainState
    data: dict[str, Any]  # the data iterator's state
    wall_s: float  # spent on this stage

    @property
    def step(self) -> int:
        return int(self.state.step)

    def progress(self) -> dict[str, Any]:
        return {"data": self.data, "wall_s": self.wall_s}


class Job(Protocol):
    """One stage as the runner sees it: what it begins from, trains on and is measured by."""

    config: ExperimentConfig  # the run's: optimizer, evaluation, checkpoints, seed
    stage: StageConfig
    index: int  # in the lineage
    start: int  # global step at which the stage begins
    parent: str | None  # name of the stage that it grows out of
    small: TransformerConfig  # that stage's model
    sequence_length: int  # tokens
    fingerprint: str  # of the data
    layout: Layout  # of its state
    parent_layout: Layout  # of the state that it grows out of
    best_by: str  # a measure: the checkpoint where it is lowest is the stage's; "": the last is

    def identity(self) -> dict[str, Any]:
        """What decides the stage's numbers: its config.json."""

    def optimizer(self) -> tuple[optax.GradientTransformation, schedules.Schedule]:
        """The stage's optimizer, and its learning-rate factor by global step."""

    def batches(self, batch_size: int, index: int = 0, count: int = 1) -> Any:
        """The training stream from its start, as `data.BatchIterator`: a part of each batch."""

    def fresh(self) -> Position:
        """The start of a stage without a parent: drawn, or read from `StageConfig.source`."""

    def source(self) -> Position:
        """The parent's end: its state, and where this stage's data begins."""

    def evaluate(self, params: Any, plan: growth.Plan | None, mask: float | None) -> dict[str, Any]:
        """Measures by name, `bpb` (validation bits per byte) among them, at a mask value."""


def run_jobs(jobs: Sequence[Job], folder: RunFolder) -> None:
    """Runs stages one after the other, each from wherever it stands in the folder."""
    # A restart finds its compiled steps again instead of making them anew.
    jax.config.update("jax_compilation_cache_dir", str(folder.compiled.absolute()))
    compilation_cache.reset_cache()  # JAX asks for the folder once, at its first program
    runner = _Runner(folder)
    with StopRequest() as stop, TensorBoard(folder.tensorboard) as board:
        position = None
        for job in jobs:
            position = runner.stage(job, position, stop, board)


def plan_of(
    small: TransformerConfig, stage: StageConfig, distances: Sequence[float] | None = None
) -> growth.Plan:
    """The plan of a stage's growth out of `small`. Raises UserError if it cannot be done."""
    g = stage.growth
    return growth.plan(
        small, stage.model, g.recipe, moments=g.moments, rates=g.rates, noise_db=g.noise_db,
        layer_distances=distances,
    )  # fmt: skip


def calibration(batches: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The next sequences at a place in the training data; they are not consumed."""
    batches.set_state(state)
    return next(batches)


def restore(job: Job, checkpoints: Checkpoints, step: int | None = None) -> Position:
    """A stage's position from its checkpoint of a step, else from its latest."""
    step = checkpoints.latest if step is None else step
    assert step is not None
    tx, _ = job.optimizer()
    state = jax.eval_shape(lambda: init_state(job.stage.model, tx, jax.random.key(0)))
    placed = sharding.shardings(state, axes.table(job.stage.model), *job.layout)
    like = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), state, placed
    )
    restored, progress = checkpoints.restore(step, like)
    return Position(restored, progress["data"], progress["wall_s"])


class _Runner:
    def __init__(self, folder: RunFolder):
        self.folder = folder

    def stage(
        self, job: Job, before: Position | None, stop: StopRequest, board: TensorBoard
    ) -> Position:
        """Runs one stage to its end, from wherever it stands on disk."""
        folder = self.folder.stage(job.index, job.stage.name)
        processes.once(lambda: self.folder.begin_stage(folder, job.identity()))
        checkpoints = Checkpoints(folder.checkpoints, job.config.checkpoint.keep)
        try:
            with jax.set_mesh(job.layout.mesh):
                position = self.begin(job, before, folder, checkpoints)
                del before
                position = self.train(job, position, folder, checkpoints, stop, board)
            self.finish(job, position, folder, checkpoints)
        finally:
            checkpoints.close()
        return position

    def begin(
        self, job: Job, before: Position | None, folder: StageFolder, checkpoints: Checkpoints
    ) -> Position:
        """The stage's latest checkpoint, else its start: a fresh model or a grown one."""
        if checkpoints.latest is not None:
            position = restore(job, checkpoints)
            if job.parent and position.step == job.start:
                self.complete_receipt(job, position, folder)
            return position
        if job.parent is None:
            position = job.fresh()
            if job.stage.source:
                checkpoints.save(position.step, position.state, position.progress())
                checkpoints.wait()
            return position
        return self.grow(job, before or job.source(), folder, checkpoints)

    def grow(
        self, job: Job, before: Position, folder: StageFolder, checkpoints: Checkpoints
    ) -> Position:
        """Grows the parent's state; measures it; keeps plan, receipt and the grown checkpoint.

        The parent's state is consumed.
        """
        began = time.monotonic()
        stage, source = job.stage, job.parent_layout
        batch, old = self.before_growth(job, before)
        key = jax.random.fold_in(jax.random.key(job.config.seed), job.index)
        plan = plan_of(job.small, stage, tuple(float(d) for d in np.asarray(old["distances"])))
        if any(e.learned for e in plan.expansions):
            batches = job.batches(stage.batch_size)
            batches.set_state(before.data)
            with jax.set_mesh(source.mesh):
                plan = ligo.fit(plan, before.state.params, batches, source.mesh, stage.growth, key)
        state = growth.grow_on_mesh(before.state, plan, key, source, job.layout)
        self.keep_growth(job, old, batch, state, plan, folder)
        position = Position(state, before.data, time.monotonic() - began)
        checkpoints.save(position.step, state, position.progress())
        checkpoints.wait()
        return position

    def before_growth(
        self, job: Job, before: Position
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """The calibration batch, whole in every process, and `measure.source` of the parent."""
        batch = calibration(job.batches(job.stage.growth.calibration_sequences), before.data)
        with jax.set_mesh(job.parent_layout.mesh):
            return batch, measure.source(before.state.params, batch, job.small)

    def keep_growth(
        self,
        job: Job,
        old: dict[str, jax.Array],
        batch: dict[str, Any],
        state: TrainState,
        plan: growth.Plan,
        folder: StageFolder,
    ) -> None:
        """Measures the grown state against `old`; writes plan and receipt."""
        receipt = Receipt(
            operator=plan.recipe,
            exactness=plan.exactness,
            **measure.function_change(old, state.params, batch, plan),
            **measure.first_steps(state, batch, plan, job.stage, job.config.optimizer),
            layer_distances=tuple(float(d) for d in np.asarray(old["distances"])),
            layer_map=plan.layer_map,
        )
        processes.once(lambda: folder.keep_growth(plan.to_json(), dataclasses.asdict(receipt)))

    def complete_receipt(self, job: Job, position: Position, folder: StageFolder) -> None:
        """Measures a growth that was made on disk (`grow_checkpoint.py`), if it was not yet."""
        if measured(processes.once(lambda: json.loads(folder.receipt.read_text()))):
            return
        batch, old = self.before_growth(job, job.source())
        plan = self.plan(job, folder)
        assert plan is not None
        self.keep_growth(job, old, batch, position.state, plan, folder)

    def train(
        self,
        job: Job,
        position: Position,
        folder: StageFolder,
        checkpoints: Checkpoints,
        stop: StopRequest,
        board: TensorBoard,
    ) -> Position:
        stage, settings, length, start = job.stage, job.config, job.sequence_length, job.start
        end, step = start + stage.steps, position.step
        resumed_at, began, wall_before = step, time.monotonic(), position.wall_s

        plan = self.plan(job, folder)
        ramp = stage.growth.ramp_steps if plan and plan.masked else 0
        tx, shape = job.optimizer()
        mesh, rules = job.layout
        train_step = make_train_step(stage, tx, mesh, plan.masks if plan else None, rules)
        share = sharding.share_of_batch(stage.batch_size, mesh)
        state, batches = position.state, job.batches(stage.batch_size, *share)
        batches.set_state(position.data)
        rows = processes.once(lambda: folder.metrics.rewind(step))
        evaluated = {row["step"]: row for row in rows if row["kind"] == "eval"}
        last_good = checkpoints.latest
        recent: list[float] = []  # losses since the last row

        def mask_at(steps_done: int) -> float | None:
            return stage.growth.mask_at(steps_done) if ramp else None

        def position_now() -> Position:
            return Position(state, batches.get_state(), wall_before + time.monotonic() - began)

        def evaluate() -> None:
            mask = mask_at(step - start)
            evaluated[step] = found = job.evaluate(state.params, plan, mask)
            folder.metrics.append("eval", step, **found, mask=mask)
            more = {name: value for name, value in found.items() if name != "bpb"}
            board.write(step, validation_bits_per_byte=found["bpb"], **more)
            text = "".join(
                f", {name.replace('_', ' ')} {value:.4f}" for name, value in more.items()
            )
            bpb = f"{found['bpb']:.4f} bits per byte"
            progress.note(f"{stage.name}  step {step}/{end}  validation {bpb}{text}")

        def report(done: int, metrics: dict[str, jax.Array], asked: jax.Array) -> int:
            """Reads a step's results, after the next step was dispatched.

            Returns: the signal that asked some process to stop, or 0.
            """
            loss = float(metrics["loss"])
            if not math.isfinite(loss):
                raise UserError(
                    f"stage {stage.name}: loss is {loss} at step {done}; the last good checkpoint "
                    f"is {checkpoints.path(last_good) if last_good is not None else 'none'}; "
                    "lower learning_rate or raise warm-up, with a new --workdir"
                )
            tokens = (done - resumed_at) * stage.batch_size * length
            mask = mask_at(done - start)
            progress.update(done, loss, tokens, mask)
            recent.append(loss)
            if done % LOG_EVERY == 0:
                row = {
                    "loss": statistics.fmean(recent),
                    "grad_norm": float(metrics["grad_norm"]),
                    "learning_rate": float(stage.learning_rate * shape(jnp.int32(done - 1))),
                    "mask": 1.0 if mask is None else mask,
                }
                folder.metrics.append("train", done, **row)
                board.write(done, **row)
                recent.clear()
            return int(asked)

        with Progress(stage.name, step, end) as progress:
            pending: tuple[int, dict[str, jax.Array], jax.Array] | None = None
            asked = 0
            while True:
                due = step in (start, end, start + ramp) or (
                    (step - start) % settings.eval.every_steps == 0
                )
                if due and step not in evaluated:
                    evaluate()
                save = step == end or (step - start) % settings.checkpoint.every_steps == 0
                if step > resumed_at and (save or asked):
                    if pending:  # a state is saved only once its loss is known to be finite
                        asked = max(asked, report(*pending))
                        pending = None
                    now, found = position_now(), evaluated.get(step, {})
                    checkpoints.save(step, now.state, now.progress(), found.get(job.best_by))
                    last_good = step
                if step == end:
                    break
                if asked:
                    checkpoints.wait()
                    raise RunStopped(
                        f"{signal.Signals(asked).name}: stopped at step {step} of {end} in stage "
                        f"{stage.name}; the same command goes on from there"
                    )
                batch = sharding.place_batch(next(batches), mesh, *share)
                mask = mask_at(step - start + 1)
                if mask is None:
                    state, metrics = train_step(state, batch)
                else:
                    state, metrics = train_step(state, batch, np.float32(mask))
                step += 1
                asked = report(*pending) if pending else 0
                pending = (step, metrics, processes.largest(stop.requested))
        checkpoints.wait()
        return position_now()

    def plan(self, job: Job, folder: StageFolder) -> growth.Plan | None:
        """Of the stage's growth, as it is kept."""
        return growth.Plan.from_json(processes.once(folder.plan.read_text)) if job.parent else None

    def finish(
        self, job: Job, position: Position, folder: StageFolder, checkpoints: Checkpoints
    ) -> None:
        """Writes the stage's entry in lineage.json."""
        wall_s, step = position.wall_s, checkpoints.best
        if step != position.step:
            position = restore(job, checkpoints, step)
        checkpoint = str(checkpoints.path(position.step).relative_to(self.folder.path))
        plan, digest = self.plan(job, folder), params_digest(position.state.params)
        entry = functools.partial(
            self.entry, job, folder, plan, position.step, wall_s=wall_s, params_digest=digest,
            checkpoint=checkpoint,
        )  # fmt: skip
        processes.once(lambda: self.folder.add_stage(entry()))

    def entry(
        self, job: Job, folder: StageFolder, plan: growth.Plan | None, step: int, **more: Any
    ) -> dict[str, Any]:
        """A stage in lineage.json; `more` is added to what job and folder say."""
        stage = job.stage
        evals = folder.metrics.rows("eval")
        ends = {"start": evals[0], "end": next(row for row in evals if row["step"] == step)}
        tokens = stage.steps * stage.batch_size * job.sequence_length
        per_token = counts.flops_per_token_train(stage.model, job.sequence_length)
        return {
            "index": job.index,
            "name": stage.name,
            "parent": job.parent,
            "config_digest": mapping.digest(json.loads(folder.config.read_text())),
            "plan_digest": plan.digest() if plan else None,
            "params": counts.params(stage.model),
            "tokens": tokens,
            "flops": tokens * per_token,
            "steps": stage.steps,
            "eval": {
                f"{name}_{when}": row[name]
                for name in evals[0]
                if name not in ("kind", "step", "mask")
                for when, row in ends.items()
            },
            "receipt": json.loads(folder.receipt.read_text()) if job.parent else None,
            "data_fingerprint": job.fingerprint,
            **more,
        }

"""The runner: train, grow, train, grow, ... through all stages of a chain.

A stage begins from a fresh model or grows out of the stage before, trains, and ends with a
checkpoint and its entry in lineage.json. Whatever stops the run, the same call goes on from the
last complete checkpoint, to the same bits: the state, the data position and the schedule are all
functions of the step, and a growth is a function of its parent checkpoint and the seed.

What a stage begins from, trains on and is measured by comes from its `Job`: a chain's own here,
fine-tuning's in `sft/`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flm_jax import config as config_lib
from flm_jax import counts, data, growth, host, interop, ligo, measure, optim, sharding
from flm_jax.checkpoint import Checkpoints, params_digest
from flm_jax.config import ExperimentConfig, StageConfig, TransformerConfig
from flm_jax.errors import RunStopped, UserError
from flm_jax.evaluate import bits_per_byte
from flm_jax.growth.receipt import Receipt
from flm_jax.lineage import RunFolder, StageFolder, identity, write_atomically, write_json
from flm_jax.metrics import TensorBoard
from flm_jax.progress import Progress
from flm_jax.state import TrainState
from flm_jax.stop import StopRequest
from flm_jax.train import init_state, make_train_step

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


def run(config: ExperimentConfig, workdir: str) -> list[dict[str, Any]]:
    """Runs what is left of the chain. Returns lineage.json's stages.

    Raises:
      UserError: the config, the data or the folder does not fit; nothing is overwritten.
      RunStopped: after SIGINT or SIGTERM, with a checkpoint written.
    """
    host.keep_freed()
    if config.quick_compile:
        host.compile_quickly()
    mesh = sharding.make_mesh(config.mesh)
    check(config, mesh)
    folder = RunFolder(workdir)
    folder.open()
    done = folder.stages()
    check_finished(config, folder, done)
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
    for index in range(len(config.stages)):
        jobs.append(_ChainJob(config, index, corpus, folder, mesh, jobs[-1] if jobs else None))
    run_jobs(jobs[len(done) :], folder, mesh)
    return folder.stages()


def run_jobs(jobs: Sequence[Job], folder: RunFolder, mesh: Mesh) -> None:
    """Runs stages one after the other, each from wherever it stands in the folder."""
    # A restart finds its compiled steps again instead of making them anew.
    jax.config.update("jax_compilation_cache_dir", str(folder.compiled.absolute()))
    runner = _Runner(folder, mesh)
    with jax.set_mesh(mesh), StopRequest() as stop, TensorBoard(folder.tensorboard) as board:
        position = None
        for job in jobs:
            position = runner.stage(job, position, stop, board)


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


def check(config: ExperimentConfig, mesh: Mesh) -> None:
    """Raises UserError now for what would fail in a later stage."""
    rows = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
    for stage in config.stages:
        sharding.check_divisible(stage.model, mesh, config.mesh.rules)
        if stage.batch_size // stage.accumulate % rows:
            raise UserError(
                f"stage {stage.name}: a microbatch of {stage.batch_size // stage.accumulate} "
                f"sequences cannot be split over {rows} devices (mesh data x fsdp); change one"
            )
    for before, after in zip(config.stages, config.stages[1:], strict=False):
        plan_of(before.model, after)


def plan_of(
    small: TransformerConfig, stage: StageConfig, distances: Sequence[float] | None = None
) -> growth.Plan:
    """The plan of a stage's growth out of `small`. Raises UserError if it cannot be done."""
    g = stage.growth
    return growth.plan(
        small, stage.model, g.recipe, moments=g.moments, rates=g.rates, noise_db=g.noise_db,
        layer_distances=distances,
    )  # fmt: skip


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
    best_by: str  # a measure: the checkpoint where it is lowest is the stage's; "": the last is

    def identity(self) -> dict[str, Any]:
        """What decides the stage's numbers: its config.json."""

    def optimizer(self) -> tuple[optax.GradientTransformation, optim.Schedule]:
        """The stage's optimizer, and its learning-rate factor by global step."""

    def batches(self, batch_size: int = 0) -> Any:
        """The training stream from its start, as `data.BatchIterator`; 0: the stage's own size."""

    def fresh(self) -> Position:
        """The start of a stage without a parent: drawn, or read from `StageConfig.source`."""

    def source(self) -> Position:
        """The parent's end: its state, and where this stage's data begins."""

    def evaluate(self, params: Any, plan: growth.Plan | None, mask: float | None) -> dict[str, Any]:
        """Measures by name, `bpb` (validation bits per byte) among them, at a mask value."""


class _ChainJob:
    """A stage of a chain: text, the chain's schedule, validation bits per byte."""

    best_by = ""

    def __init__(
        self,
        config: ExperimentConfig,
        index: int,
        corpus: Any,
        folder: RunFolder,
        mesh: Mesh,
        before: _ChainJob | None,
    ):
        self.config, self.index, self.folder, self.mesh = config, index, folder, mesh
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

    def optimizer(self) -> tuple[optax.GradientTransformation, optim.Schedule]:
        shape = optim.schedule_shape(self.config.schedule, self.config.total_steps)
        if self.before:
            g = self.stage.growth
            shape = optim.rewarmed(shape, self.start, g.rewarmup_steps, g.rewarmup_ratio)
        grown_at = self.start if self.before else None
        return optim.optimizer(self.stage, self.config.optimizer, shape, grown_at), shape

    def batches(self, batch_size: int = 0) -> Any:
        if batch_size:
            return self.corpus.train(batch_size)
        return self.corpus.train(self.stage.batch_size, jax.process_index(), jax.process_count())

    def fresh(self) -> Position:
        tx, _ = self.optimizer()
        key = jax.random.fold_in(jax.random.key(self.config.seed), 0)
        init = functools.partial(init_state, self.stage.model, tx)
        placed = sharding.shardings(jax.eval_shape(init, key), self.mesh, self.config.mesh.rules)
        state = jax.jit(init, out_shardings=placed)(key)
        if self.stage.source:
            params = interop.place(interop.source_of(self.stage).weights, placed.params)
            state = dataclasses.replace(state, params=params)
        return Position(state, self.batches().get_state(), 0.0)

    def source(self) -> Position:
        assert self.before is not None
        folder = self.folder.stage(self.before.index, self.before.stage.name)
        ended = Checkpoints(folder.checkpoints, self.config.checkpoint.keep)
        position = restore(self.before, ended, self.mesh)
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
            params,
            self.stage.model,
            self.validation,
            self.corpus.token_bytes,
            self.mesh,
            plan,
            mask,
        )
        return {"bpb": bpb}


def restore(job: Job, checkpoints: Checkpoints, mesh: Mesh, step: int | None = None) -> Position:
    """A stage's position from its checkpoint of a step, else from its latest."""
    step = checkpoints.latest if step is None else step
    assert step is not None
    tx, _ = job.optimizer()
    state = jax.eval_shape(lambda: init_state(job.stage.model, tx, jax.random.key(0)))
    placed = sharding.shardings(state, mesh, job.config.mesh.rules)
    like = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), state, placed
    )
    restored, progress = checkpoints.restore(step, like)
    return Position(restored, progress["data"], progress["wall_s"])


class _Runner:
    def __init__(self, folder: RunFolder, mesh: Mesh):
        self.folder, self.mesh = folder, mesh

    def stage(
        self, job: Job, before: Position | None, stop: StopRequest, board: TensorBoard
    ) -> Position:
        """Runs one stage to its end, from wherever it stands on disk."""
        folder = self.folder.stage(job.index, job.stage.name)
        about = job.identity()
        self.folder.check_stage(folder, about)
        write_json(folder.config, about)
        checkpoints = Checkpoints(folder.checkpoints, job.config.checkpoint.keep)
        try:
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
            return restore(job, checkpoints, self.mesh)
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
        """Grows the parent's state; measures it; keeps plan, receipt and the grown checkpoint."""
        began = time.monotonic()
        stage = job.stage
        batch = self.calibration(job, before.data)
        key = jax.random.fold_in(jax.random.key(job.config.seed), job.index)
        old = measure.source(before.state.params, batch, job.small)
        distances = tuple(float(d) for d in old["distances"])
        plan = plan_of(job.small, stage, distances)
        if any(e.learned for e in plan.expansions):
            batches = job.batches()
            batches.set_state(before.data)
            plan = ligo.fit(plan, before.state.params, batches, self.mesh, stage.growth, key)

        grow = functools.partial(growth.grow, plan=plan)
        abstract = jax.eval_shape(grow, before.state, key=key)
        placed = sharding.shardings(abstract, self.mesh, job.config.mesh.rules)
        state = jax.jit(grow, out_shardings=placed)(before.state, key=key)
        receipt = Receipt(
            operator=plan.recipe,
            exactness=plan.exactness,
            **measure.function_change(old, state.params, batch, plan),
            **measure.first_steps(state, batch, plan, stage, job.config.optimizer),
            layer_distances=distances,
            layer_map=plan.layer_map,
        )
        write_atomically(folder.plan, plan.to_json() + "\n")
        write_json(folder.receipt, dataclasses.asdict(receipt))
        position = Position(state, before.data, time.monotonic() - began)
        checkpoints.save(position.step, state, position.progress())
        checkpoints.wait()
        return position

    def calibration(self, job: Job, state: dict[str, Any]) -> dict[str, jax.Array]:
        """The training data's next sequences, without consuming them."""
        batches = job.batches(job.stage.growth.calibration_sequences)
        batches.set_state(state)
        return jax.tree.map(jnp.asarray, next(batches))

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

        plan = growth.Plan.from_json(folder.plan.read_text()) if job.parent else None
        ramp = stage.growth.ramp_steps if plan and plan.masked else 0
        tx, shape = job.optimizer()
        train_step = make_train_step(stage, tx, self.mesh, plan, settings.mesh.rules)
        state, batches = position.state, job.batches()
        batches.set_state(position.data)
        folder.metrics.rewind(step)
        measured = {row["step"]: row for row in folder.metrics.rows("eval")}
        last_good = checkpoints.latest
        recent: list[float] = []  # losses since the last row

        def mask_at(steps_done: int) -> float | None:
            return stage.growth.mask_at(steps_done) if ramp else None

        def position_now() -> Position:
            return Position(state, batches.get_state(), wall_before + time.monotonic() - began)

        def evaluate() -> None:
            mask = mask_at(step - start)
            measured[step] = found = job.evaluate(state.params, plan, mask)
            folder.metrics.append("eval", step, **found, mask=mask)
            more = {name: value for name, value in found.items() if name != "bpb"}
            board.write(step, validation_bits_per_byte=found["bpb"], **more)
            text = "".join(
                f", {name.replace('_', ' ')} {value:.4f}" for name, value in more.items()
            )
            bpb = f"{found['bpb']:.4f} bits per byte"
            progress.note(f"{stage.name}  step {step}/{end}  validation {bpb}{text}")

        def report(done: int, metrics: dict[str, jax.Array]) -> None:
            """Reads a step's metrics, after the next step was dispatched."""
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

        with Progress(stage.name, step, end) as progress:
            pending: tuple[int, dict[str, jax.Array]] | None = None
            while True:
                due = step in (start, end, start + ramp) or (
                    (step - start) % settings.eval.every_steps == 0
                )
                if due and step not in measured:
                    evaluate()
                save = step == end or (step - start) % settings.checkpoint.every_steps == 0
                if step > resumed_at and (save or stop.requested):
                    if pending:
                        report(*pending)  # a state is saved only if its loss is finite
                        pending = None
                    now, found = position_now(), measured.get(step, {})
                    checkpoints.save(step, now.state, now.progress(), found.get(job.best_by))
                    last_good = step
                if step == end:
                    break
                if stop.requested:
                    checkpoints.wait()
                    raise RunStopped(
                        f"{stop.requested}: stopped at step {step} of {end} in stage "
                        f"{stage.name}; the same command goes on from there"
                    )
                batch = sharding.place_batch(next(batches), self.mesh)
                mask = mask_at(step - start + 1)
                if mask is None:
                    state, metrics = train_step(state, batch)
                else:
                    state, metrics = train_step(state, batch, np.float32(mask))
                step += 1
                if pending:
                    report(*pending)
                pending = (step, metrics)
        checkpoints.wait()
        return position_now()

    def finish(
        self, job: Job, position: Position, folder: StageFolder, checkpoints: Checkpoints
    ) -> None:
        """Writes the stage's entry in lineage.json."""
        stage, wall_s, step = job.stage, position.wall_s, checkpoints.best
        if step != position.step:
            position = restore(job, checkpoints, self.mesh, step)
        evals = folder.metrics.rows("eval")
        ends = {"start": evals[0], "end": next(row for row in evals if row["step"] == step)}
        receipt = json.loads(folder.receipt.read_text()) if job.parent else None
        plan = growth.Plan.from_json(folder.plan.read_text()) if job.parent else None
        tokens = stage.steps * stage.batch_size * job.sequence_length
        per_token = counts.flops_per_token_train(stage.model, job.sequence_length)
        self.folder.add_stage(
            {
                "index": job.index,
                "name": stage.name,
                "parent": job.parent,
                "config_digest": config_lib.digest(json.loads(folder.config.read_text())),
                "plan_digest": plan.digest() if plan else None,
                "params": counts.params(stage.model),
                "tokens": tokens,
                "flops": tokens * per_token,
                "wall_s": wall_s,
                "steps": stage.steps,
                "eval": {
                    f"{name}_{when}": row[name]
                    for name in evals[0]
                    if name not in ("kind", "step", "mask")
                    for when, row in ends.items()
                },
                "receipt": receipt,
                "params_digest": params_digest(position.state.params),
                "checkpoint": str(checkpoints.path(position.step).relative_to(self.folder.path)),
                "data_fingerprint": job.fingerprint,
            }
        )

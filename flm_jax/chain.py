"""The runner: train, grow, train, grow, ... through all stages of a chain.

A stage begins from a fresh model or grows out of the stage before, trains, and ends with a
checkpoint and its entry in lineage.json. Whatever stops the run, the same call goes on from the
last complete checkpoint, to the same bits: the state, the data position and the schedule are all
functions of the step, and a growth is a function of its parent checkpoint and the seed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flm_jax import config as config_lib
from flm_jax import counts, data, growth, host, ligo, measure, optim, sharding
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
    if len(done) == len(config.stages):
        return done

    corpus = data.open_corpus(config.data_of(0))
    if corpus.vocab_size > min(stage.model.vocab_size for stage in config.stages):
        raise UserError(
            f"config.model.vocab_size is {config.stages[0].model.vocab_size}, but vocabulary "
            f"{config.data.vocabulary!r} has {corpus.vocab_size} tokens; set vocab_size to "
            f"{corpus.vocab_size} or more"
        )
    # A restart finds its compiled steps again instead of making them anew.
    jax.config.update("jax_compilation_cache_dir", str(folder.compiled.absolute()))
    runner = _Runner(config, folder, corpus, mesh)
    with jax.set_mesh(mesh), StopRequest() as stop, TensorBoard(folder.tensorboard) as board:
        position = None
        for index in range(len(done), len(config.stages)):
            position = runner.stage(index, position, stop, board)
    return folder.stages()


def check_finished(config: ExperimentConfig, folder: RunFolder, done: list[dict[str, Any]]) -> None:
    """Raises UserError if the finished stages are not the config's first ones."""
    names = [stage.name for stage in config.stages]
    finished = [entry["name"] for entry in done]
    if finished != names[: len(finished)]:
        raise UserError(
            f"{folder.lineage}: the run has stages {', '.join(finished)}, the config has "
            f"{', '.join(names)}; give another --workdir"
        )
    for index, entry in enumerate(done):
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


class _Runner:
    def __init__(self, config: ExperimentConfig, folder: RunFolder, corpus: Any, mesh: Mesh):
        self.config, self.folder, self.corpus, self.mesh = config, folder, corpus, mesh
        self.rules = config.mesh.rules

    def corpus_of(self, index: int) -> Any:
        """The corpus in the stage's sequence length."""
        return self.corpus.with_length(self.config.data_of(index))

    @functools.cache  # noqa: B019  (one runner, a few lengths)
    def validation(self, sequence_length: int) -> list[dict[str, np.ndarray]]:
        """The same tokens at every length."""
        settings, about = self.config.eval, self.config.data_of(0)
        about = dataclasses.replace(about, sequence_length=sequence_length)
        windows = settings.sequences * self.config.data.sequence_length // sequence_length
        return self.corpus.with_length(about).validation(settings.batch_size, max(windows, 1))

    def start_of(self, index: int) -> int:
        return sum(stage.steps for stage in self.config.stages[:index])

    def optimizer(self, index: int) -> tuple[optax.GradientTransformation, optim.Schedule]:
        """The stage's optimizer, and its learning-rate factor by global step."""
        shape = optim.schedule_shape(self.config.schedule, self.config.total_steps)
        stage = self.config.stages[index]
        if index > 0:
            g = stage.growth
            shape = optim.rewarmed(shape, self.start_of(index), g.rewarmup_steps, g.rewarmup_ratio)
        grown_at = self.start_of(index) if index > 0 else None
        return optim.optimizer(stage, self.config.optimizer, shape, grown_at), shape

    def abstract_state(self, index: int) -> Any:
        """ShapeDtypeStructs with shardings."""
        tx, _ = self.optimizer(index)
        model = self.config.stages[index].model
        state = jax.eval_shape(lambda: init_state(model, tx, jax.random.key(0)))
        placed = sharding.shardings(state, self.mesh, self.rules)
        return jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), state, placed
        )

    def stage(
        self, index: int, before: Position | None, stop: StopRequest, board: TensorBoard
    ) -> Position:
        """Runs one stage to its end, from wherever it stands on disk."""
        stage = self.config.stages[index]
        folder = self.folder.stage(index, stage.name)
        about = identity(self.config, index, self.corpus.fingerprint)
        self.folder.check_stage(folder, about)
        write_json(folder.config, about)
        checkpoints = Checkpoints(folder.checkpoints, self.config.checkpoint.keep)
        try:
            position = self.begin(index, before, folder, checkpoints)
            del before
            position = self.train(index, position, folder, checkpoints, stop, board)
        finally:
            checkpoints.close()
        self.finish(index, position, folder, checkpoints)
        return position

    def begin(
        self, index: int, before: Position | None, folder: StageFolder, checkpoints: Checkpoints
    ) -> Position:
        """The stage's latest checkpoint, else its start: a fresh model or a grown one."""
        if checkpoints.latest is not None:
            return self.restore(index, checkpoints)
        if index == 0:
            tx, _ = self.optimizer(0)
            key = jax.random.fold_in(jax.random.key(self.config.seed), 0)
            init = functools.partial(init_state, self.config.stages[0].model, tx)
            placed = sharding.shardings(jax.eval_shape(init, key), self.mesh, self.rules)
            state = jax.jit(init, out_shardings=placed)(key)
            return Position(state, self.batches(0).get_state(), 0.0)
        if before is None:
            parent = self.folder.stage(index - 1, self.config.stages[index - 1].name)
            ended = Checkpoints(parent.checkpoints, self.config.checkpoint.keep)
            before = self.restore(index - 1, ended)
            ended.close()
        return self.grow(index, before, folder, checkpoints)

    def restore(self, index: int, checkpoints: Checkpoints) -> Position:
        step = checkpoints.latest
        assert step is not None
        state, progress = checkpoints.restore(step, self.abstract_state(index))
        return Position(state, progress["data"], progress["wall_s"])

    def batches(self, index: int) -> Any:
        return self.corpus_of(index).train(
            self.config.stages[index].batch_size, jax.process_index(), jax.process_count()
        )

    def grow(
        self, index: int, before: Position, folder: StageFolder, checkpoints: Checkpoints
    ) -> Position:
        """Grows the parent's state; measures it; keeps plan, receipt and the grown checkpoint."""
        began = time.monotonic()
        small, stage = self.config.stages[index - 1].model, self.config.stages[index]
        batch = self.calibration(index, before.data)
        key = jax.random.fold_in(jax.random.key(self.config.seed), index)
        old = measure.source(before.state.params, batch, small)
        distances = tuple(float(d) for d in old["distances"])
        plan = plan_of(small, stage, distances)
        if any(e.learned for e in plan.expansions):
            batches = self.batches(index)
            batches.set_state(before.data)
            plan = ligo.fit(plan, before.state.params, batches, self.mesh, stage.growth, key)

        grow = functools.partial(growth.grow, plan=plan)
        abstract = jax.eval_shape(grow, before.state, key=key)
        placed = sharding.shardings(abstract, self.mesh, self.rules)
        state = jax.jit(grow, out_shardings=placed)(before.state, key=key)
        receipt = Receipt(
            operator=plan.recipe,
            exactness=plan.exactness,
            **measure.function_change(old, state.params, batch, plan),
            **measure.first_steps(state, batch, plan, stage, self.config.optimizer),
            layer_distances=distances,
            layer_map=plan.layer_map,
        )
        write_atomically(folder.plan, plan.to_json() + "\n")
        write_json(folder.receipt, dataclasses.asdict(receipt))
        position = Position(state, before.data, time.monotonic() - began)
        checkpoints.save(position.step, state, position.progress())
        checkpoints.wait()
        return position

    def calibration(self, index: int, state: dict[str, Any]) -> dict[str, jax.Array]:
        """The training data's next sequences, without consuming them."""
        sequences = self.config.stages[index].growth.calibration_sequences
        batches = self.corpus_of(index).train(sequences)
        batches.set_state(state)
        return jax.tree.map(jnp.asarray, next(batches))

    def train(
        self,
        index: int,
        position: Position,
        folder: StageFolder,
        checkpoints: Checkpoints,
        stop: StopRequest,
        board: TensorBoard,
    ) -> Position:
        stage, settings = self.config.stages[index], self.config
        length = settings.data_of(index).sequence_length
        start = self.start_of(index)
        end, step = start + stage.steps, position.step
        resumed_at, began, wall_before = step, time.monotonic(), position.wall_s

        plan = growth.Plan.from_json(folder.plan.read_text()) if index > 0 else None
        ramp = stage.growth.ramp_steps if plan and plan.masked else 0
        tx, shape = self.optimizer(index)
        train_step = make_train_step(stage, tx, self.mesh, plan, self.rules)
        state, batches = position.state, self.batches(index)
        batches.set_state(position.data)
        folder.metrics.rewind(step)
        evaluated = {row["step"] for row in folder.metrics.rows("eval")}
        last_good = checkpoints.latest
        recent: list[float] = []  # losses since the last row

        def mask_at(steps_done: int) -> float | None:
            return stage.growth.mask_at(steps_done) if ramp else None

        def position_now() -> Position:
            return Position(state, batches.get_state(), wall_before + time.monotonic() - began)

        def evaluate() -> None:
            bpb = bits_per_byte(
                state.params, stage.model, self.validation(length), self.corpus.token_bytes,
                self.mesh, plan, mask_at(step - start),
            )  # fmt: skip
            folder.metrics.append("eval", step, bpb=bpb, mask=mask_at(step - start))
            board.write(step, validation_bits_per_byte=bpb)
            progress.note(f"{stage.name}  step {step}/{end}  validation {bpb:.4f} bits per byte")

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
                if due and step not in evaluated:
                    evaluate()
                if step == end:
                    break
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
                save = step == end or (step - start) % settings.checkpoint.every_steps == 0
                if save or stop.requested:
                    report(*pending)  # a state is saved only once its loss is known to be finite
                    pending = None
                    now = position_now()
                    checkpoints.save(step, now.state, now.progress())
                    last_good = step
                if stop.requested:
                    checkpoints.wait()
                    raise RunStopped(
                        f"{stop.requested}: stopped at step {step} of {end} in stage "
                        f"{stage.name}; the same command goes on from there"
                    )
        checkpoints.wait()
        return position_now()

    def finish(
        self, index: int, position: Position, folder: StageFolder, checkpoints: Checkpoints
    ) -> None:
        """Writes the stage's entry in lineage.json."""
        stage = self.config.stages[index]
        evals = folder.metrics.rows("eval")
        receipt = json.loads(folder.receipt.read_text()) if index > 0 else None
        plan = growth.Plan.from_json(folder.plan.read_text()) if index > 0 else None
        length = self.config.data_of(index).sequence_length
        tokens = stage.steps * stage.batch_size * length
        per_token = counts.flops_per_token_train(stage.model, length)
        self.folder.add_stage(
            {
                "index": index,
                "name": stage.name,
                "parent": self.config.stages[index - 1].name if index > 0 else None,
                "config_digest": config_lib.digest(json.loads(folder.config.read_text())),
                "plan_digest": plan.digest() if plan else None,
                "params": counts.params(stage.model),
                "tokens": tokens,
                "flops": tokens * per_token,
                "wall_s": position.wall_s,
                "steps": stage.steps,
                "eval": {"bpb_start": evals[0]["bpb"], "bpb_end": evals[-1]["bpb"]},
                "receipt": receipt,
                "params_digest": params_digest(position.state.params),
                "checkpoint": str(checkpoints.path(position.step).relative_to(self.folder.path)),
                "data_fingerprint": self.corpus.fingerprint,
            }
        )

"""The runner: train, grow, train, grow, ... through all stages of a chain.

A stage begins from a fresh model or grows out of the stage before, trains, and ends with a
checkpoint and its entry in lineage.json. Whatever stops the run, the same call goes on from the
last complete checkpoint, to the same bits: the state, the data position and the schedule are all
functions of the step, and a growth is a function of its parent checkpoint and the seed.

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from flm_jax import config as config_lib
from flm_jax import counts, data, growth, host, ligo, measure, optim, processes, sharding
from flm_jax.checkpoint import Checkpoints, params_digest
from flm_jax.config import ExperimentConfig, StageConfig, TransformerConfig
from flm_jax.errors import RunStopped, UserError
from flm_jax.evaluate import bits_per_byte
from flm_jax.growth.receipt import Receipt
from flm_jax.lineage import RunFolder, StageFolder, identity
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
    meshes = [
        sharding.make_mesh(
            config.mesh_of(n), f"config.stages[{n}].mesh" if s.mesh else "config.mesh"
        )
        for n, s in enumerate(config.stages)
    ]
    check(config, meshes)
    processes.check_same("the config", config_lib.digest(config_lib.to_dict(config)))
    folder = RunFolder(workdir)
    done = processes.once(lambda: _open(config, folder))
    if len(done) == len(config.stages):
        return done

    corpus = data.open_corpus(config.data_of(0))
    processes.check_same("the data's fingerprint", corpus.fingerprint)
    if corpus.vocab_size > min(stage.model.vocab_size for stage in config.stages):
        raise UserError(
            f"config.model.vocab_size is {config.stages[0].model.vocab_size}, but vocabulary "
            f"{config.data.vocabulary!r} has {corpus.vocab_size} tokens; set vocab_size to "
            f"{corpus.vocab_size} or more"
        )
    # A restart finds its compiled steps again instead of making them anew.
    jax.config.update("jax_compilation_cache_dir", str(folder.compiled.absolute()))
    compilation_cache.reset_cache()  # JAX asks for the folder once, at its first program
    runner = _Runner(config, folder, corpus, meshes)
    with StopRequest() as stop, TensorBoard(folder.tensorboard) as board:
        position = None
        for index in range(len(done), len(config.stages)):
            position = runner.stage(index, position, stop, board)
    return processes.once(folder.stages)


def _open(config: ExperimentConfig, folder: RunFolder) -> list[dict[str, Any]]:
    """The finished stages. Raises UserError if the folder cannot be used or is another run's."""
    folder.open()
    done = folder.stages()
    check_finished(config, folder, done)
    return done


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


def check(config: ExperimentConfig, meshes: Sequence[Mesh]) -> None:
    """Raises UserError now for what would fail in a later stage; a mesh for each."""
    for stage, mesh in zip(config.stages, meshes, strict=True):
        rows = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
        sharding.check_divisible(stage.model, mesh)
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
    def __init__(
        self, config: ExperimentConfig, folder: RunFolder, corpus: Any, meshes: Sequence[Mesh]
    ):
        self.config, self.folder, self.corpus, self.meshes = config, folder, corpus, meshes

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
        placed = sharding.shardings(state, self.meshes[index])
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
        processes.once(lambda: self.folder.begin_stage(folder, about))
        checkpoints = Checkpoints(folder.checkpoints, self.config.checkpoint.keep)
        try:
            with jax.set_mesh(self.meshes[index]):
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
            placed = sharding.shardings(jax.eval_shape(init, key), self.meshes[0])
            state = jax.jit(init, out_shardings=placed)(key)
            return Position(state, self.corpus_of(0).train(1).get_state(), 0.0)
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

    def grow(
        self, index: int, before: Position, folder: StageFolder, checkpoints: Checkpoints
    ) -> Position:
        """Grows the parent's state; measures it; keeps plan, receipt and the grown checkpoint.

        The parent's state is consumed.
        """
        began = time.monotonic()
        small, stage = self.config.stages[index - 1].model, self.config.stages[index]
        source, target = self.meshes[index - 1 : index + 1]
        batch = self.calibration(index, before.data)
        key = jax.random.fold_in(jax.random.key(self.config.seed), index)
        with jax.set_mesh(source):
            old = measure.source(before.state.params, batch, small)
            distances = tuple(float(d) for d in np.asarray(old["distances"]))
            plan = plan_of(small, stage, distances)
            if any(e.learned for e in plan.expansions):
                batches = self.corpus_of(index).train(stage.batch_size)
                batches.set_state(before.data)
                plan = ligo.fit(plan, before.state.params, batches, source, stage.growth, key)
        state = growth.grow_on_mesh(before.state, plan, key, source, target)
        receipt = Receipt(
            operator=plan.recipe,
            exactness=plan.exactness,
            **measure.function_change(old, state.params, batch, plan),
            **measure.first_steps(state, batch, plan, stage, self.config.optimizer),
            layer_distances=distances,
            layer_map=plan.layer_map,
        )
        processes.once(lambda: folder.keep_growth(plan.to_json(), dataclasses.asdict(receipt)))
        position = Position(state, before.data, time.monotonic() - began)
        checkpoints.save(position.step, state, position.progress())
        checkpoints.wait()
        return position

    def calibration(self, index: int, state: dict[str, Any]) -> dict[str, Any]:
        """The training data's next sequences, without consuming them; whole in every process."""
        sequences = self.config.stages[index].growth.calibration_sequences
        batches = self.corpus_of(index).train(sequences)
        batches.set_state(state)
        return next(batches)

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

        plan = self.plan(index, folder)
        ramp = stage.growth.ramp_steps if plan and plan.masked else 0
        tx, shape = self.optimizer(index)
        mesh = self.meshes[index]
        train_step = make_train_step(stage, tx, mesh, plan)
        share = sharding.share_of_batch(stage.batch_size, mesh)
        state, batches = position.state, self.corpus_of(index).train(stage.batch_size, *share)
        batches.set_state(position.data)
        rows = processes.once(lambda: folder.metrics.rewind(step))
        evaluated = {row["step"] for row in rows if row["kind"] == "eval"}
        last_good = checkpoints.latest
        recent: list[float] = []  # losses since the last row

        def mask_at(steps_done: int) -> float | None:
            return steps_done / ramp if steps_done < ramp else None

        def position_now() -> Position:
            return Position(state, batches.get_state(), wall_before + time.monotonic() - began)

        def evaluate() -> None:
            bpb = bits_per_byte(
                state.params, stage.model, self.validation(length), self.corpus.token_bytes,
                mesh, plan, mask_at(step - start),
            )  # fmt: skip
            folder.metrics.append("eval", step, bpb=bpb, mask=mask_at(step - start))
            board.write(step, validation_bits_per_byte=bpb)
            progress.note(f"{stage.name}  step {step}/{end}  validation {bpb:.4f} bits per byte")

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
            while True:
                due = step in (start, end, start + ramp) or (
                    (step - start) % settings.eval.every_steps == 0
                )
                if due and step not in evaluated:
                    evaluate()
                if step == end:
                    break
                batch = sharding.place_batch(next(batches), mesh, *share)
                mask = mask_at(step - start + 1)
                if mask is None:
                    state, metrics = train_step(state, batch)
                else:
                    state, metrics = train_step(state, batch, np.float32(mask))
                step += 1
                asked = report(*pending) if pending else 0
                pending = (step, metrics, processes.largest(stop.requested))
                save = step == end or (step - start) % settings.checkpoint.every_steps == 0
                if save or asked:
                    # A state is saved only once its loss is known to be finite.
                    asked = max(asked, report(*pending))
                    pending = None
                    now = position_now()
                    checkpoints.save(step, now.state, now.progress())
                    last_good = step
                if asked:
                    checkpoints.wait()
                    raise RunStopped(
                        f"{signal.Signals(asked).name}: stopped at step {step} of {end} in stage "
                        f"{stage.name}; the same command goes on from there"
                    )
        checkpoints.wait()
        return position_now()

    def plan(self, index: int, folder: StageFolder) -> growth.Plan | None:
        """Of the stage's growth, as it is kept."""
        return growth.Plan.from_json(processes.once(folder.plan.read_text)) if index > 0 else None

    def finish(
        self, index: int, position: Position, folder: StageFolder, checkpoints: Checkpoints
    ) -> None:
        """Writes the stage's entry in lineage.json."""
        checkpoint = str(checkpoints.path(position.step).relative_to(self.folder.path))
        plan, digest = self.plan(index, folder), params_digest(position.state.params)
        entry = functools.partial(
            self.entry, index, folder, plan, wall_s=position.wall_s, params_digest=digest,
            checkpoint=checkpoint,
        )  # fmt: skip
        processes.once(lambda: self.folder.add_stage(entry()))

    def entry(
        self, index: int, folder: StageFolder, plan: growth.Plan | None, **measured: Any
    ) -> dict[str, Any]:
        """A stage in lineage.json; `measured` is added to what config and folder say."""
        stage = self.config.stages[index]
        evals = folder.metrics.rows("eval")
        receipt = json.loads(folder.receipt.read_text()) if index > 0 else None
        length = self.config.data_of(index).sequence_length
        tokens = stage.steps * stage.batch_size * length
        per_token = counts.flops_per_token_train(stage.model, length)
        return {
            "index": index,
            "name": stage.name,
            "parent": self.config.stages[index - 1].name if index > 0 else None,
            "config_digest": config_lib.digest(json.loads(folder.config.read_text())),
            "plan_digest": plan.digest() if plan else None,
            "params": counts.params(stage.model),
            "tokens": tokens,
            "flops": tokens * per_token,
            "steps": stage.steps,
            "eval": {"bpb_start": evals[0]["bpb"], "bpb_end": evals[-1]["bpb"]},
            "receipt": receipt,
            "data_fingerprint": self.corpus.fingerprint,
            **measured,
        }

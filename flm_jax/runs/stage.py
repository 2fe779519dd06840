"""One stage of a run: its description, its start and its end.

A chain (`chain.py`) and fine-tuning (`sft/fine_tune.py`) build the same value, `Stage`. A stage
starts from its latest checkpoint, from fresh parameters, or by growing out of its parent
(`begin`); it trains (`loop.py`); it ends with an entry in lineage.json (`finish`).

With several processes, all of them run every line, except inside `processes.once`.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import optax

from flm_jax import growth, mapping
from flm_jax.config import ExperimentConfig, GrowthConfig, StageConfig, TransformerConfig
from flm_jax.errors import within
from flm_jax.growth import ligo, measure
from flm_jax.growth.receipt import Receipt, measured, unmeasured
from flm_jax.interop.stage_source import resolved
from flm_jax.params.digest import params_digest
from flm_jax.params.sharding import Layout
from flm_jax.runs import recovery
from flm_jax.runs.entry import entry_of
from flm_jax.runs.timing import StageTime
from flm_jax.runtime import display, joints, phases, processes, xla_flags
from flm_jax.store import audit, integrity
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.experiment_file import Origin
from flm_jax.store.lineage import RunFolder, StageFolder
from flm_jax.train import optim, schedules
from flm_jax.train.schedules import Schedule
from flm_jax.train.train_step import MasksAt, TrainState, abstract_state
from flm_jax.train.trained import AddedSlots


@dataclasses.dataclass(frozen=True)
class Position:
    """A position in a stage: the contents of a checkpoint.

    Attributes:
      state: the train state.
      data: the position in the training data.
      wall_s: seconds spent on this stage so far.
      past: losses and gradient norms of the last steps, by name; only kept to find spikes.
    """

    state: TrainState
    data: dict[str, Any]
    wall_s: float
    past: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    @property
    def step(self) -> int:
        """The global step; waits for the state."""
        return int(self.state.step)

    def progress(self) -> dict[str, Any]:
        """Returns the small values that a checkpoint stores with the state."""
        past = {"past": dict(self.past)} if self.past else {}
        return {"data": self.data, "wall_s": self.wall_s, **past}


class Batches(Iterator[dict[str, np.ndarray]], Protocol):
    """An endless training stream whose position can be saved."""

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last returned batch, as JSON values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves the stream to a position."""
        ...


@dataclasses.dataclass(frozen=True)
class Parent:
    """The stage that a stage grows out of."""

    name: str
    model: TransformerConfig
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run, ready to train.

    Attributes:
      config: the stage's own settings.
      experiment: the settings that a run's stages share: optimizer, evaluation, checkpoints, seed.
      index: the stage's index in lineage.json.
      start: the global step at which it starts.
      parent: the stage that it grows out of; None: it starts from `source` unchanged.
      layout: mesh and sharding of its train state.
      sequence_length: tokens.
      identity: the settings that affect its results: config.json, compared on resume.
      tx: the optimizer.
      schedule: global step -> factor of the learning rate.
      batches: (batch_size, index, count) -> the training stream from its start, part `index` of
        `count` of each batch.
      source: reads the parent's final position; without a parent it makes the first position.
      evaluate: (parameters, masks_at, mask_value) -> measurements by name, `bpb` (validation bits
        per byte) among them.
      sample: (parameters, the growth, mask_value) -> sample texts; None: none are asked for.
      best_by: a measurement's name; the checkpoint with its lowest value is the stage's result.
        "": the last checkpoint is.
      origin: the state of another run that it continues from; None: none.
    """

    config: StageConfig
    experiment: ExperimentConfig
    index: int
    start: int
    parent: Parent | None
    layout: Layout
    sequence_length: int
    identity: dict[str, Any]
    tx: optax.GradientTransformation
    schedule: Schedule
    batches: Callable[..., Batches]
    source: Callable[[], Position]
    evaluate: Callable[[Any, MasksAt | None, float | None], dict[str, float]]
    sample: Callable[[Any, growth.Plan | None, float | None], list[str]] | None = None
    best_by: str = ""
    origin: Origin | None = None

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.config.name

    @property
    def end(self) -> int:
        """The global step at which it ends."""
        return self.start + self.config.steps

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due at a global step by the number of steps."""
        every = self.experiment.checkpoint.every_steps
        return every > 0 and (step - self.start) % every == 0

    def folder(self, run: RunFolder) -> StageFolder:
        """Returns the stage's folder in a run."""
        return run.stage(self.index, self.name)


def restore(stage: Stage, checkpoints: Checkpoints, step: int | None = None) -> Position:
    """Reads a stage's position from a checkpoint.

    Args:
      stage: the stage, with the layout that the state gets.
      checkpoints: the stage's checkpoints; there is one or more.
      step: the checkpoint's step; None: the latest one.

    Raises:
      DamageError: a file of the checkpoint is damaged.
      UserError: the checkpoint has other leaves, shapes or dtypes than the stage.
    """
    step = checkpoints.latest if step is None else step
    assert step is not None
    path = checkpoints.path(step)
    if jax.process_count() > 1:
        audit.check_together(path)
    like = abstract_state(stage.config.model, stage.tx, stage.layout)
    state, progress = checkpoints.restore(step, like)
    with integrity.reading(path, "its position in the data"):
        position, wall_s = progress["data"], progress["wall_s"]
    if stage.origin and stage.origin.restarts_data and stage.origin.step == step:
        position = stage.batches(stage.config.batch_size).get_state()
    return Position(state, position, wall_s, progress.get("past", {}))


def begin(
    stage: Stage, before: Position | None, folder: StageFolder, checkpoints: Checkpoints
) -> Position:
    """Starts or resumes a stage: from its latest checkpoint, otherwise from its start.

    Args:
      stage: the stage to start or resume.
      before: its parent's final position, if it is in memory; its state is consumed.
      folder: the stage's folder.
      checkpoints: the stage's checkpoints.

    Returns:
      The position from which the stage trains.

    Raises:
      UserError: the latest checkpoint does not fit the stage, or the growth is impossible.
    """
    if checkpoints.latest is not None:
        if stage.parent:
            processes.once(folder.require_growth)
        if stage.parent and checkpoints.latest == stage.start:
            _complete_receipt(stage, stage.parent, folder, checkpoints)
        return restore(stage, checkpoints)
    if stage.parent:
        return _grow(stage, stage.parent, before or stage.source(), folder, checkpoints)
    position = stage.source()
    if stage.config.source:
        _save_start(position, checkpoints)
    return position


def with_derived(config: ExperimentConfig) -> ExperimentConfig:
    """Resolves what the chain takes from its source, then the fields that follow from each growth.

    The former is `interop.stage_source.resolved`, the latter `growth.derived`. A field that has the
    parent's value in the config follows; any other value stays as it is, and the growth refuses it
    unless it equals the derived one.

    Raises:
      UserError: the source does not give a model or a vocabulary, or a recipe cannot do its growth.
    """
    config = resolved(config)
    stages = [config.stages[0]]
    for parent, stage in itertools.pairwise(config.stages):
        small, model = stages[-1].model, stage.model
        inherited: dict[str, Any] = {
            name: getattr(small, name)
            for name in ("qk_norm_eps", "layer_kinds")
            if getattr(model, name) == getattr(parent.model, name)
        }
        model = dataclasses.replace(model, **inherited, rms_norm_eps=small.rms_norm_eps)
        with within(f"stage {stage.name}"):
            model = growth.derived(small, model, stage.growth.recipe)
        # Another eps is left to the growth, which names the one that it needs.
        if stage.model.rms_norm_eps != parent.model.rms_norm_eps:
            model = dataclasses.replace(model, rms_norm_eps=stage.model.rms_norm_eps)
        stages.append(dataclasses.replace(stage, model=model))
    return dataclasses.replace(config, stages=tuple(stages))


def plan_of(
    small: TransformerConfig, stage: StageConfig, distances: Sequence[float] | None = None
) -> growth.Plan:
    """Plans a stage's growth.

    Args:
      small: the parent's model.
      stage: the stage, with its model and its growth settings.
      distances: the parent's layer distances from the identity; see `growth.plan`.

    Raises:
      UserError: the recipe cannot do this growth.
    """
    g = stage.growth
    return growth.plan(
        small,
        stage.model,
        g.recipe,
        moments=g.moments,
        rates=g.rates,
        noise_db=g.noise_db,
        old_rate=g.old_rate,
        layer_distances=distances,
    )


def optimizer_of(
    config: ExperimentConfig, index: int
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer and the schedule of the chain's stage at `index`."""
    stage = config.stages[index]
    schedule = schedules.schedule_shape(config.schedule, config.total_steps)
    if index == 0:
        return optim.optimizer(stage, config.optimizer, schedule), schedule
    start, g = sum(before.steps for before in config.stages[:index]), stage.growth
    schedule = schedules.rewarmed(schedule, start, g.rewarmup_steps, g.rewarmup_ratio)
    return optim.optimizer(stage, config.optimizer, schedule, start), schedule


def read_plan(stage: Stage, folder: StageFolder) -> growth.Plan | None:
    """Reads the plan of a stage's growth; None if the stage has no parent."""
    if stage.parent is None:
        return None
    return growth.Plan.from_json(processes.once(folder.plan_text))


def read_added(stage: Stage, folder: StageFolder) -> AddedSlots | None:
    """Reads the slots that a stage's growth added; None if the stage has no parent."""
    plan = read_plan(stage, folder)
    return growth.added_slots(plan) if plan else None


@dataclasses.dataclass(frozen=True)
class Ramp:
    """The rise of a stage's run-time masks from 0 to 1.

    Attributes:
      plan: the stage's growth; None: it was not grown.
      start: the global step at which the stage starts.
      settings: the stage's growth settings.
    """

    plan: growth.Plan | None
    start: int
    settings: GrowthConfig

    @property
    def masks_at(self) -> MasksAt | None:
        """Mask value -> masks by axis; None: the stage has no masks."""
        return self.plan.masks if self.plan and self.plan.masked else None

    @property
    def end(self) -> int:
        """The global step from which all masks are 1."""
        return self.start + (self.settings.ramp_steps if self.masks_at else 0)

    def value(self, step: int) -> float | None:
        """Returns the masks' value after a global step; None: the stage has no masks."""
        return self.settings.mask_at(step - self.start) if self.masks_at else None


def read_ramp(stage: Stage, folder: StageFolder) -> Ramp:
    """Reads the ramp of a stage that `begin` has started."""
    return Ramp(read_plan(stage, folder), stage.start, stage.config.growth)


def calibration_batch(batches: Batches, data: dict[str, Any]) -> dict[str, Any]:
    """Reads the batch at a position in the training data.

    Args:
      batches: a stream of its own, because its position changes.
      data: the position, as `Batches.get_state` gives it.
    """
    batches.set_state(data)
    return next(batches)


def _grow(
    stage: Stage, parent: Parent, before: Position, folder: StageFolder, checkpoints: Checkpoints
) -> Position:
    """Measures the parent, plans, grows, and writes plan, checkpoint and receipt.

    The parent's state is consumed. The receipt's steps are taken in place, so that they need no
    more memory than training; the state is then read back from the checkpoint. If the process ends
    before the receipt is complete, `begin` completes it.
    """
    start_time = time.monotonic()
    config = stage.config
    with phases.phase(f"{stage.name}  measuring the parent"):
        batch, old = _measure_parent(stage, parent, before)
    key = jax.random.fold_in(jax.random.key(stage.experiment.seed), stage.index)
    plan = plan_of(parent.model, config, _floats(old["distances"]))
    if any(e.learned for e in plan.expansions):
        batches, mesh = stage.batches(config.batch_size), parent.layout.mesh
        batches.set_state(before.data)
        with jax.set_mesh(mesh):
            plan = ligo.fit(plan, before.state.params, batches, mesh, config.growth, key)
    state = growth.grow_on_mesh(before.state, plan, key, parent.layout, stage.layout)
    claimed = unmeasured(plan, _floats(old["distances"]))
    processes.once(lambda: folder.keep_growth(plan.to_json(), claimed))
    with phases.phase(f"{stage.name}  saving the grown state"):
        _save_start(Position(state, before.data, time.monotonic() - start_time), checkpoints)
    joints.check(f"after the growth of stage {stage.name}, before its receipt")
    with phases.phase(f"{stage.name}  measuring the growth"):
        _write_receipt(stage, old, batch, state, plan, folder)
    del state
    position = restore(stage, checkpoints)
    return dataclasses.replace(position, wall_s=time.monotonic() - start_time)


def _save_start(position: Position, checkpoints: Checkpoints) -> None:
    """Writes a stage's first checkpoint and waits until it is on disk."""
    checkpoints.save(position.step, position.state, position.progress())
    checkpoints.wait()


def _measure_parent(
    stage: Stage, parent: Parent, before: Position
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Returns the whole calibration batch (in every process), and `measure.source` on it."""
    batches = stage.batches(stage.config.growth.calibration_sequences)
    batch = calibration_batch(batches, before.data)
    with jax.set_mesh(parent.layout.mesh):
        return batch, measure.source(before.state.params, batch, parent.model)


def _write_receipt(
    stage: Stage,
    old: dict[str, jax.Array],
    batch: dict[str, Any],
    state: TrainState,
    plan: growth.Plan,
    folder: StageFolder,
) -> None:
    """Compares the grown state with `old`, the parent's measurements; writes the receipt.

    The state is consumed.
    """
    receipt = Receipt(
        operator=plan.recipe,
        exactness=plan.exactness,
        **measure.function_change(old, state.params, batch, plan),
        **measure.first_steps(state, batch, plan, stage.config, stage.experiment.optimizer),
        layer_distances=_floats(old["distances"]),
        layer_map=plan.layer_map,
    )
    processes.once(lambda: folder.keep_growth(plan.to_json(), dataclasses.asdict(receipt)))


def _complete_receipt(
    stage: Stage, parent: Parent, folder: StageFolder, checkpoints: Checkpoints
) -> None:
    """Completes the receipt of a growth on disk (`grow_on_disk.py`), or of an interrupted one."""
    if measured(processes.once(folder.saved_receipt)):
        return
    # The parent's state is gone before the grown one is read.
    batch, old = _measure_parent(stage, parent, stage.source())
    plan = read_plan(stage, folder)
    assert plan is not None
    _write_receipt(stage, old, batch, restore(stage, checkpoints).state, plan, folder)


def _floats(distances: jax.Array) -> tuple[float, ...]:
    """Converts an array to Python floats, which JSON can hold."""
    return tuple(float(d) for d in np.asarray(distances))


def finish(
    stage: Stage,
    position: Position,
    folder: StageFolder,
    checkpoints: Checkpoints,
    timing: StageTime,
) -> None:
    """Writes the stage's entry in lineage.json.

    Args:
      stage: the stage that was trained.
      position: the stage's final position.
      folder: the stage's folder.
      checkpoints: the stage's checkpoints; the entry names the best one.
      timing: accounts for the time.
    """
    wall_s = position.wall_s

    def best() -> Position:
        step = checkpoints.best
        return position if step == position.step else restore(stage, checkpoints, step)

    position = recovery.surviving(folder, checkpoints, best)
    path = checkpoints.path(position.step).relative_to(folder.run.path)
    plan = read_plan(stage, folder)
    digest = params_digest(position.state.params)
    parent = stage.parent.name if stage.parent else None
    timing.write(stage.end)

    def add() -> None:
        entry = entry_of(folder, parent, plan, stage.start, position.step)
        if None in entry["eval"].values():
            display.note(
                f"note: {folder.metrics.path}: rows of evaluations are missing; lineage.json has "
                "null for them"
            )
        more = {"wall_s": wall_s, "params_digest": digest, "checkpoint": str(path)}
        computed = computed_by(stage.config.model)
        if stage.origin:
            computed["origin"] = mapping.to_dict(stage.origin)
        folder.run.add_stage(entry | computed | more | {"goodput": timing.result()})

    processes.once(add)


def computed_by(model: TransformerConfig) -> dict[str, Any]:
    """Returns what a stage's entry says of how this process computes."""
    return {"gradient_reduction": model.gradient_dtype, "xla_flags": xla_flags.record()}

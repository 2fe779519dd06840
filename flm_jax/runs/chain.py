"""A chain: the stages of an experiment, each grown out of the one before.

After any stop, the same call continues from the last complete checkpoint and resumes
bit-identically: the state, the data position and the schedule are functions of the step, and a
growth is a function of its parent checkpoint and the seed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from flm_jax import data, growth, mapping
from flm_jax.checks import require_type
from flm_jax.config import DataConfig, ExperimentConfig, StageConfig, TransformerConfig
from flm_jax.data import files
from flm_jax.errors import UserError, within
from flm_jax.inference.evaluation import score
from flm_jax.interop.stage_source import open_stage_source
from flm_jax.interop.weights import place
from flm_jax.params import sharding
from flm_jax.params.mesh import mesh_of
from flm_jax.params.sharding import Layout
from flm_jax.params.topology import topology_of
from flm_jax.runs import announcement, limits
from flm_jax.runs.guarded import guarded
from flm_jax.runs.loop import run_stages
from flm_jax.runs.samples import sampler
from flm_jax.runs.stage import (
    Batches,
    Parent,
    Position,
    Stage,
    optimizer_of,
    plan_of,
    restore,
    with_derived,
)
from flm_jax.runtime import display, host, joints, paths, phases, processes, xla_flags
from flm_jax.store import experiment_file, tracker
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.lineage import RunFolder, identity
from flm_jax.train import schedules
from flm_jax.train.train_step import MasksAt, init_program
from flm_jax.train.trained import Trained

if TYPE_CHECKING:
    from flm_jax.data.pipeline import Corpus

# Sequence length in tokens -> validation batches.
Validation = Callable[[int], list[dict[str, np.ndarray]]]


def run(
    config: ExperimentConfig, workdir: str, compiled: pathlib.Path | None = None
) -> list[dict[str, Any]]:
    """Runs the stages of a chain that are not finished yet.

    Args:
      config: the chain.
      workdir: a run folder: new, or one that this config started.
      compiled: folder of compiled programs; see `RunFolder`.

    Returns:
      The stages' entries in lineage.json.

    Raises:
      UserError: the config, the data or the folder does not fit; nothing is overwritten.
      RunStopped: after a signal of `stop.SIGNALS`; what was trained is on disk.
    """
    require_type(config, ExperimentConfig, "run: config")
    set_up(config)
    given = config
    config, layouts = on_devices(config, jax.devices())
    limits.check_memory(config, jax.devices())
    processes.check_same("the config", mapping.digest(mapping.to_dict(config)))
    if config.tracker:
        tracker.find(config.tracker)  # raises before anything is written
    folder = RunFolder(workdir, compiled)
    first = config.stages[0]
    if first.source and not paths.listed(folder.path / "stages"):
        open_stage_source(config)  # raises if it does not fit, before anything is written
    for root in files.roots(config.data.path, "config.data.path"):
        paths.check_bucket(root, "config.data.path")
    name = ", ".join(stage.name for stage in config.stages)
    with guarded(folder, name, config.watchdog):
        done = processes.once(lambda: _finished(config, folder))
        if len(done) >= len(config.stages):
            return done
        if config.data.train_vocabulary:
            processes.once(lambda: _train_vocabulary(config.data, folder))
        with phases.before_mistakes("opening data"):
            corpus = corpus_of(dataclasses.replace(config, data=folder.data(config.data)))
            stages = stages_of(config, corpus, folder, layouts)[len(done) :]
            processes.once(lambda: _keep_config(given, stages, folder))
        for line in announcement.lines(config, layouts, corpus):
            display.note(line)
        for remark in limits.remarks(config):
            display.note(f"note: {remark}")
        run_stages(stages, folder)
        return processes.once(folder.stages)


def set_up(config: ExperimentConfig) -> None:
    """Makes a config's settings of this process. Call it before JAX compiles anything."""
    xla_flags.apply()
    host.keep_freed()
    if config.quick_compile:
        host.compile_quickly()
    processes.check_devices()


def _train_vocabulary(config: DataConfig, folder: RunFolder) -> None:
    """Trains the run's vocabulary before its first stage; a resumed run has it already."""
    if not folder.vocabulary.exists():
        size = config.train_vocabulary
        display.note(f"training a vocabulary of {size} tokens: {folder.vocabulary}")
        data.train_sentencepiece(config, size, str(folder.vocabulary))


def on_devices(
    config: ExperimentConfig, devices: Sequence[Any], last: int | None = None
) -> tuple[ExperimentConfig, list[Layout]]:
    """A chain as it runs on these devices, checked.

    The runner and ahead-of-time compilation both start here, so what compiles is what runs.

    Args:
      config: the chain.
      devices: all devices of the run, real or described.
      last: index of the last stage to check; None: the chain's last.

    Returns:
      The config, with what follows from source, growths and layouts; mesh and sharding of each
      stage up to `last`.

    Raises:
      UserError: the source, a mesh, a batch or a growth does not fit, or only some stages have a
        layout for these devices; names stage and field.
    """
    topology = str(topology_of(devices))
    last = len(config.stages) - 1 if last is None else last
    with_layout = [stage.has_layout(topology) for stage in config.stages[: last + 1]]
    if any(with_layout) and not all(with_layout):
        has, lacks = (config.stages[with_layout.index(x)].name for x in (True, False))
        raise UserError(
            f"stage {has} has a layout for {topology}, and stage {lacks} has none; add one to "
            f"its layouts, or run stage {lacks} on other devices"
        )
    config, layouts = with_derived(config).on(topology), []
    for index, stage in enumerate(config.stages[: last + 1]):
        name = f"config.stages[{index}].mesh" if stage.mesh else "config.mesh"
        if with_layout[index]:
            name = f"stage {stage.name}: the mesh of its layout for {topology}"
        mesh = config.mesh_of(index)
        layouts.append(Layout(mesh_of(mesh, devices, name), mesh.rules))
    check(config, layouts)
    return config, layouts


def check(config: ExperimentConfig, layouts: Sequence[Layout]) -> None:
    """Checks stages before the first one trains.

    Args:
      config: the chain.
      layouts: mesh and sharding of each stage to check: the first ones of the chain, or all.

    Raises:
      UserError: a stage's sizes or batch do not divide over its mesh, its growth is impossible, or
        the schedule is longer than the chain, or it would train nothing.
    """
    schedules.schedule_shape(config.schedule, config.total_steps)
    stages = config.stages[: len(layouts)]
    for stage, (mesh, rules) in zip(stages, layouts, strict=True):
        rows = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
        with within(f"stage {stage.name}"):
            sharding.check_divisible(stage.model, mesh, rules)
        if stage.batch_size // stage.accumulate % rows:
            raise UserError(
                f"stage {stage.name}: a microbatch of {stage.batch_size // stage.accumulate} "
                f"sequences (batch_size {stage.batch_size}, accumulate {stage.accumulate}) cannot "
                f"be split over {rows} devices (mesh data x fsdp); {_what_divides(stage, rows)}"
            )
    for before, after in zip((None, *stages), stages, strict=False):
        with within(f"stage {after.name}"):
            added = growth.added_slots(plan_of(before.model, after)) if before else None
            Trained.of(after).check(added)


def _what_divides(stage: StageConfig, rows: int) -> str:
    """What makes a batch divide over `rows` devices: other accumulations, else other batches."""
    batch = stage.batch_size
    if batch % rows == 0:
        good = [n for n in range(1, batch // rows + 1) if batch // rows % n == 0]
        return f"change one; accumulate may be {', '.join(map(str, good))}"
    below, above = batch // rows * rows, -(-batch // rows) * rows
    sizes = " or ".join(str(size) for size in (below, above) if size)
    return f"change one: batch_size {sizes} would, or a mesh over fewer devices"


def check_finished(config: ExperimentConfig, folder: RunFolder, done: list[dict[str, Any]]) -> None:
    """Checks that a run's finished stages are the first stages of a config.

    More stages may follow a complete chain, because fine-tuning adds one.

    Args:
      config: the chain.
      folder: the run's folder.
      done: the entries of the finished stages in lineage.json.

    Raises:
      UserError: the stages have other names, or a stage was trained with other settings.
    """
    names = [stage.name for stage in config.stages]
    finished = [entry["name"] for entry in done]
    if finished[: len(names)] != names[: len(finished)]:
        raise UserError(
            f"{folder.lineage}: the run has stages {', '.join(finished)}, the config has "
            f"{', '.join(names)}; give another workdir",
            argument="workdir",
        )
    start, origin = 0, experiment_file.origin_of(folder)
    for index, entry in enumerate(done[: len(names)]):
        expected = identity(config, index, entry["data_fingerprint"])
        stage = folder.stage(index, entry["name"])
        start += entry["steps"]
        if origin and origin.covers(index, start):
            expected = {**stage.saved(), "stage": expected["stage"]}
        folder.check_stage(stage, expected)
        if index:
            stage.require_growth()


def _keep_config(config: ExperimentConfig, stages: Sequence[Stage], folder: RunFolder) -> None:
    """Writes experiment.json. Raises UserError if a stage that has begun has another config."""
    for stage in stages:
        folder.check_stage(stage.folder(folder), stage.identity)
    experiment_file.keep_config(folder, config)


def stages_of(
    config: ExperimentConfig, corpus: Corpus, folder: RunFolder, layouts: Sequence[Layout]
) -> list[Stage]:
    """Builds the chain's stages, ready to train.

    Args:
      config: the chain.
      corpus: the chain's data.
      folder: the run's folder, from which a stage reads its parent's final state.
      layouts: mesh and sharding of each stage.
    """
    validation = functools.cache(functools.partial(_validation, config, corpus))
    origin = experiment_file.origin_of(folder)
    stages: list[Stage] = []
    for index, layout in enumerate(layouts):
        before = stages[-1] if stages else None
        stage = _stage(config, index, corpus, folder, layout, before, validation)
        if origin and origin.index == index:
            stage = dataclasses.replace(stage, origin=origin)
        stages.append(stage)
    return stages


def _finished(config: ExperimentConfig, folder: RunFolder) -> list[dict[str, Any]]:
    """Returns the finished stages. Raises UserError if the folder is another run's."""
    done = folder.stages()
    check_finished(config, folder, done)
    return done


def corpus_of(config: ExperimentConfig) -> Corpus:
    """Opens a chain's data. Raises UserError if a model's vocabulary is too small for it."""
    corpus = data.open_corpus(config.data_of(0))
    if corpus.vocab_size > min(stage.model.vocab_size for stage in config.stages):
        raise UserError(
            f"config.model.vocab_size is {config.stages[0].model.vocab_size}, but vocabulary "
            f"{config.data.vocabulary!r} has {corpus.vocab_size} tokens; set vocab_size to "
            f"{corpus.vocab_size} or more"
        )
    return corpus


def _stage(
    config: ExperimentConfig,
    index: int,
    corpus: Corpus,
    folder: RunFolder,
    layout: Layout,
    before: Stage | None,
    validation: Validation,
) -> Stage:
    """Builds one stage: its text, its part of the chain's schedule, its validation."""
    own, data_config = config.stages[index], config.data_of(index)
    start = before.end if before else 0
    tx, schedule = optimizer_of(config, index)
    batches = corpus.with_length(data_config).train
    text = functools.partial(validation, data_config.sequence_length)
    if before:
        source = functools.partial(_end_of, before, folder)
        parent = Parent(before.name, before.config.model, before.layout)
    else:
        source, parent = functools.partial(_fresh, config, own, tx, layout, batches), None
    return Stage(
        config=own,
        experiment=config,
        index=index,
        start=start,
        parent=parent,
        layout=layout,
        sequence_length=data_config.sequence_length,
        identity=identity(config, index, corpus.fingerprint),
        tx=tx,
        schedule=schedule,
        batches=batches,
        source=source,
        evaluate=functools.partial(_evaluate, own.model, layout, corpus, text),
        sample=sampler(config, corpus.config.vocabulary, own.model),
    )


def _fresh(
    config: ExperimentConfig,
    stage: StageConfig,
    tx: optax.GradientTransformation,
    layout: Layout,
    batches: Callable[[int], Batches],
) -> Position:
    """Initializes the first stage's state; its parameters come from `stage.source` if it is set."""
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    state = init_program(stage.model, tx, layout)(key)
    if stage.source:
        placed = jax.tree.map(lambda x: x.sharding, state.params)
        params = place(open_stage_source(config).weights, placed)
        state = dataclasses.replace(state, params=params)
    return Position(state, batches(1).get_state(), 0.0)


def _end_of(stage: Stage, run: RunFolder) -> Position:
    """Reads the final position of a finished stage."""
    checkpoints = Checkpoints(stage.folder(run).checkpoints, stage.experiment.checkpoint.keep)
    try:
        return restore(stage, checkpoints)
    finally:
        checkpoints.close()


def _validation(
    config: ExperimentConfig, corpus: Corpus, length: int
) -> list[dict[str, np.ndarray]]:
    """Reads the validation batches: the same tokens at every sequence length."""
    data_config = dataclasses.replace(config.data_of(0), sequence_length=length)
    windows = config.eval.sequences * config.data.sequence_length // length
    return corpus.with_length(data_config).validation(config.eval.batch_size, max(windows, 1))


def _evaluate(
    model: TransformerConfig,
    layout: Layout,
    corpus: Corpus,
    text: Callable[[], list[dict[str, np.ndarray]]],
    params: Any,
    masks_at: MasksAt | None,
    mask_value: float | None,
) -> dict[str, float]:
    """Measures bits per byte of the validation text. Raises CutShort if a signal comes."""
    mesh, batches = layout.mesh, joints.between(text())
    result = score(params, model, batches, corpus.token_bytes, mesh, masks_at, mask_value)
    return {"bpb": result.bits_per_byte}

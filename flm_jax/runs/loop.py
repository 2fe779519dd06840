"""The training loop: trains stages to their end, one after the other.

Read it in this order: `run_stages`, `_run_stage`, `train`; then the step itself,
`train/train_step.py`. `stage.py` starts and finishes a stage; `hooks.py` evaluates and logs.

With several processes (`runtime/processes.py`), all of them run every line over one mesh of all
their devices, except inside `processes.once`; only the first process shows and logs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import signal
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from flm_jax.errors import RunStopped, within
from flm_jax.params import counts, sharding
from flm_jax.runs import numerics, recovery, starts
from flm_jax.runs.hooks import Dispatched, Evaluation, Log, Report, announce
from flm_jax.runs.stage import Position, Stage, begin, finish, read_added, read_ramp
from flm_jax.runs.timing import SaveTimer, StageTime
from flm_jax.runtime import host, joints, paths, phases, processes, watch
from flm_jax.runtime.display import Progress
from flm_jax.runtime.stop import StopRequest, read_request, request
from flm_jax.store import tracker
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.lineage import RunFolder, StageFolder
from flm_jax.store.metrics import TensorBoard
from flm_jax.train.train_step import make_train_step


def run_stages(stages: Sequence[Stage], run: RunFolder) -> None:
    """Runs stages one after the other; each resumes from its latest checkpoint.

    Args:
      stages: the stages; the parent of each is finished or comes before it.
      run: the run's folder, which exists.

    Raises:
      UserError: the folder belongs to another config, or numbers are not finite.
      RunStopped: after a signal of `stop.SIGNALS`; a checkpoint was written.
    """
    # Parameters and both moments in float32.
    host.return_freed(max(12 * counts.params(stage.config.model) for stage in stages))
    # A restarted process finds its compiled programs here.
    jax.config.update("jax_compilation_cache_dir", str(paths.absolute(run.compiled)))
    compilation_cache.reset_cache()  # JAX reads the setting only once, at its first program
    experiment = stages[-1].experiment
    trackers = []
    if name := experiment.tracker:
        trackers.append(functools.partial(tracker.open_writer, name, run.path, experiment))
    with StopRequest(bounded=True) as stop, TensorBoard(run.tensorboard, trackers) as board:
        position = None
        for stage in stages:
            joints.check(f"before stage {stage.name}")
            with within(f"stage {stage.name}"):
                position = _run_stage(stage, position, run, stop, board)


def _run_stage(
    stage: Stage, before: Position | None, run: RunFolder, stop: StopRequest, board: TensorBoard
) -> Position:
    """Runs one stage to its end; `before` is its parent's final position, if it is in memory."""
    folder = stage.folder(run)
    watch.HERE.moved(stage=stage.name, phase="start")
    processes.once(lambda: run.begin_stage(folder, stage.identity))
    timing = StageTime(stage.name, folder.time)
    checkpoints = recovery.opened(folder, stage.experiment.checkpoint.keep)
    # Growing consumes the parent's position; a second attempt reads it again.
    given = itertools.chain([before], itertools.repeat(None))

    def started() -> Position:
        return begin(stage, next(given), folder, checkpoints)

    try:
        with jax.set_mesh(stage.layout.mesh):
            grows = stage.parent and checkpoints.latest in (None, stage.start)
            with timing.spend("growth" if grows else "start"):
                position = recovery.surviving(folder, checkpoints, started)
            begun = position.step
            processes.once(lambda: starts.note(folder, begun))
            while True:
                timing.write(position.step)
                try:
                    position = train(stage, position, folder, checkpoints, stop, board, timing)
                    break
                except numerics.Spike as found:
                    spike = found.with_traceback(None)  # its frames hold the state
                timing.write(spike.row["from_step"])
                with timing.spend("start"):
                    numerics.go_back(spike, stage, checkpoints)
                    position = recovery.surviving(folder, checkpoints, started)
                    numerics.record(spike, position, folder.metrics)
        with phases.phase(f"{stage.name}  finishing"):
            finish(stage, position, folder, checkpoints, timing)
    finally:
        checkpoints.close()
    return position


def train(
    stage: Stage,
    position: Position,
    folder: StageFolder,
    checkpoints: Checkpoints,
    stop: StopRequest,
    board: TensorBoard,
    timing: StageTime,
) -> Position:
    """Trains a stage to its end, and saves checkpoints on the way.

    Args:
      stage: the stage to train.
      position: where to start; its state is consumed.
      folder: the stage's folder.
      checkpoints: the stage's checkpoints.
      stop: tells whether a signal asked this process to stop.
      board: receives the training curves.
      timing: accounts for the time.

    Returns:
      The position at the stage's end.

    Raises:
      NumericsError: a loss, a gradient or an update is not finite, or spikes too often.
      Spike: a loss or a gradient norm spikes.
      RunStopped: after a signal of `stop.SIGNALS`; a checkpoint was written.
    """
    start_time = time.monotonic() - position.wall_s
    config, (mesh, rules) = stage.config, stage.layout
    ramp = read_ramp(stage, folder)
    added = read_added(stage, folder)
    train_step = make_train_step(
        config, stage.tx, mesh, ramp.masks_at, rules, added=added,
        guarded=numerics.guarded(stage.experiment.numerics),
    )  # fmt: skip
    share = sharding.share_of_batch(config.batch_size, mesh)
    batches = stage.batches(config.batch_size, *share)
    rows = processes.once(lambda: folder.metrics.rewind(position.step))
    batches.set_state(numerics.data_position(position, rows))
    judge = numerics.Numerics(stage, position, rows, folder.metrics, checkpoints)
    state, step, first = position.state, position.step, position.step
    timer = SaveTimer(stage.experiment.checkpoint.every_minutes)

    with Progress(stage.name, first, stage.end) as progress, timing.spend("steps"):
        log = Log(folder.metrics, board, progress, timing)
        if first == stage.start:
            announce(stage, folder, board)
        evaluate = Evaluation(stage, ramp, log, rows)
        report = Report(stage, ramp, log, first, judge)
        dispatched, signal_number, save = None, 0, False
        while True:
            if evaluate.due(step):
                jax.block_until_ready(state)  # so that the step's time does not count as evaluation
                with timing.spend("evaluation"):
                    signal_number = max(signal_number, evaluate(step, state.params))
            save = save or step == stage.end or stage.saves_at(step)
            if step > first and (save or signal_number):
                # A state is saved only once it is known to be finite.
                signal_number = max(signal_number, read_request(report(dispatched))[0])
                dispatched = None
                stop.saving = bool(signal_number)
                judge.check_state(step, state)
                wall_s = time.monotonic() - start_time
                position = Position(state, batches.get_state(), wall_s, judge.past)
                loss = evaluate.measured(step, stage.best_by)
                folder.metrics.publish()
                with timing.spend("save"):
                    checkpoints.save(step, state, position.progress(), loss)
                timing.write(step)
                timer.restart()
            if signal_number:
                with timing.spend("save"):
                    checkpoints.wait()
                timing.write(step)
                raise RunStopped(
                    f"{signal.Signals(signal_number).name}: stopped at step {step} of {stage.end} "
                    f"in stage {stage.name}; the same command continues from there",
                    signal_number,
                )
            if step == stage.end:
                break
            began = time.monotonic()
            with timing.spend("input"):
                batch = sharding.place_batch(next(batches), mesh, *share)
            mask = ramp.value(step + 1)
            # A step with masks is another program than one without them.
            new = step == first or (mask is None) != (ramp.value(step) is None)
            with timing.compiling() if new else contextlib.nullcontext():
                value = None if mask is None else np.float32(mask)
                state, metrics = train_step(state, batch, value)
            step += 1
            stop.unsaved = True
            # Of the previous step, while the devices run this one.
            signal_number, save = read_request(report(dispatched))
            timing.tick(step)
            stop.step_s = min(stop.step_s, time.monotonic() - began)
            # The first process's clock decides for all.
            asked = request(stop.requested, processes.first() and timer.due())
            dispatched = Dispatched(step, metrics, batches.get_state(), processes.largest(asked))
    with timing.spend("save"):
        checkpoints.wait()
    stop.unsaved = False
    return Position(state, batches.get_state(), time.monotonic() - start_time)

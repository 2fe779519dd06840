"""The training loop, on a stage of plain functions without corpus and command."""

import dataclasses
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from flm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    StageConfig,
)
from flm_jax.errors import RunStopped, UserError
from flm_jax.params import sharding
from flm_jax.params.sharding import Layout
from flm_jax.runs.loop import run_stages
from flm_jax.runs.stage import Position, Stage
from flm_jax.runtime import joints
from flm_jax.store.lineage import RunFolder, identity
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import init_state
from tests.models import SMALL, changed, packed_batch

MODEL = changed(SMALL, dtype="float32")
STEPS = 7


class Stream:
    """A stream of random batches; the position is the number of batches read."""

    def __init__(self, silent_at=-1, forgets=False):
        self._place, self._silent_at, self._forgets = 0, silent_at, forgets

    def __iter__(self):
        return self

    def __next__(self):
        batch = {k: np.array(x) for k, x in packed_batch(MODEL, self._place).items()}
        if self._place == self._silent_at:
            batch["weights"] *= 0  # a loss of 0 / 0
        self._place += 1
        return batch

    def get_state(self):
        return {"place": self._place}

    def set_state(self, state):
        self._place = 0 if self._forgets else state["place"]


class Measure:
    """An evaluation of two batches that returns given values.

    At a chosen call it fails, or a signal comes between its batches, once.
    """

    def __init__(self, values=(), fails_at=-1, signal_at=-1, number=signal.SIGTERM):
        self._values, self._fails_at, self.calls = dict(enumerate(values)), fails_at, 0
        self._signal_at, self._number = signal_at, number

    def __call__(self, params, masks_at, mask_value):
        assert masks_at is None and mask_value is None
        self.calls += 1
        if self.calls == self._fails_at:
            raise RuntimeError("killed")
        for batch in joints.between(range(2)):
            if batch == 0 and self.calls == self._signal_at:
                signal.raise_signal(self._number)
        return {"bpb": 1.0, "other": self._values.get(self.calls - 1, 9.0)}


def a_stage(measure, silent_at=-1, save_every=4, best_by="", minutes=0.0):
    own = StageConfig("s", MODEL, STEPS, 2, learning_rate=1e-2, matrix_learning_rate=1e-2)
    experiment = ExperimentConfig(
        (own,),
        data=DataConfig(sequence_length=9),
        eval=EvalConfig(every_steps=3),
        checkpoint=CheckpointConfig(save_every, keep=STEPS, every_minutes=minutes),
    )
    tx = optim.optimizer(own, experiment.optimizer, schedules.steady)

    def source():
        return Position(init_state(MODEL, tx, jax.random.key(0)), {"place": 0}, 0.0)

    return Stage(
        config=own,
        experiment=experiment,
        index=0,
        start=0,
        parent=None,
        layout=Layout(sharding.one_device()),
        sequence_length=9,
        identity=identity(experiment, 0, "fingerprint"),
        tx=tx,
        schedule=schedules.steady,
        batches=lambda batch_size, index=0, count=1: Stream(silent_at),
        source=source,
        evaluate=measure,
        best_by=best_by,
    )


def saved(run):
    return sorted(int(p.name) for p in (run.path / "stages/0-s/checkpoints").glob("[0-9]*"))


def evaluated(run):
    return [row["step"] for row in run.stage(0, "s").metrics.rows("eval")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not interrupted."""
    run = RunFolder(tmp_path_factory.mktemp("loop") / "run")
    run.open()
    run_stages([a_stage(Measure())], run)
    return run


def test_the_loop_evaluates_saves_and_writes_its_entry(whole):
    run = whole
    assert evaluated(run) == [0, 3, 6, 7]
    assert saved(run) == [4, 7]
    (entry,) = run.stages()
    assert entry["checkpoint"] == "stages/0-s/checkpoints/7" and entry["parent"] is None
    assert (entry["steps"], entry["tokens"]) == (STEPS, STEPS * 2 * 9)
    assert entry["eval"].keys() == {"bpb_start", "bpb_end", "other_start", "other_end"}


def test_the_best_checkpoint_is_the_result(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.open()
    # Measured at steps 0, 3, 6 and 7. Step 0 has the lowest value, but no checkpoint.
    run_stages([a_stage(Measure((1.0, 4.0, 2.0, 3.0)), save_every=1, best_by="other")], run)
    (entry,) = run.stages()
    assert entry["checkpoint"] == "stages/0-s/checkpoints/6" and entry["eval"]["other_end"] == 2.0


def test_checkpoints_by_wall_time_and_the_account_of_time(whole, tmp_path):
    """Always overdue: asked for with a step, and saved at the next one."""
    run = RunFolder(tmp_path / "run")
    run.open()
    began = time.monotonic()
    run_stages([a_stage(Measure(), save_every=0, minutes=1e-9)], run)
    elapsed = time.monotonic() - began
    assert saved(run) == [2, 4, 6, 7]
    (entry,) = run.stages()
    assert entry["params_digest"] == whole.stages()[0]["params_digest"]
    seconds = entry["goodput"]["seconds"]
    assert 0.9 * elapsed < sum(seconds.values()) <= elapsed
    used = ("steps", "compile", "input", "save", "evaluation", "start", "other")
    assert all(seconds[kind] > 0 for kind in used)
    assert seconds["redone"] == seconds["down"] == seconds["growth"] == 0


@pytest.mark.parametrize(
    ("silent_at", "save_every", "kept"),
    # A loss is read after the next step was dispatched, or before its state is saved.
    [(4, 1, [1, 2, 3, 4]), (4, 4, [4]), (3, 4, [])],
)
def test_a_state_without_a_finite_loss_is_never_saved(tmp_path, silent_at, save_every, kept):
    run = RunFolder(tmp_path / "run")
    run.open()
    good = f"checkpoints/{kept[-1]};" if kept else "is none;"
    with pytest.raises(UserError, match=f"loss is nan at step {silent_at + 1}; .*{good} lower"):
        run_stages([a_stage(Measure(), silent_at, save_every)], run)
    assert saved(run) == kept and not run.stages()


def test_a_killed_stage_resumes_bit_identically(whole, tmp_path):
    run = RunFolder(tmp_path / "run")
    measure = Measure(fails_at=3)  # at step 6
    run.open()
    with pytest.raises(RuntimeError, match="killed"):
        run_stages([a_stage(measure)], run)
    assert saved(run) == [4] and evaluated(run) == [0, 3]
    time.sleep(0.1)
    # Negative control: a stream that ignores the saved position gives another result.
    forgets = dataclasses.replace(a_stage(Measure()), batches=lambda *_: Stream(forgets=True))
    shutil.copytree(run.path, tmp_path / "forgets")
    run_stages([forgets], RunFolder(tmp_path / "forgets"))
    run_stages([a_stage(measure)], run)
    assert evaluated(run) == [0, 3, 6, 7]
    assert run.stages()[0]["goodput"]["seconds"]["down"] > 0.1
    want = whole.stages()[0]["params_digest"]
    assert run.stages()[0]["params_digest"] == want
    assert RunFolder(tmp_path / "forgets").stages()[0]["params_digest"] != want


@pytest.mark.parametrize(
    ("number", "call", "stopped", "kept"),
    [(signal.SIGHUP, 2, 3, [3]), (signal.SIGTERM, 4, 7, [4, 7])],  # within, and the last one
)
def test_an_evaluation_that_a_signal_cuts_short_is_repeated(
    whole, tmp_path, number, call, stopped, kept
):
    run = RunFolder(tmp_path / "run")
    measure = Measure(signal_at=call, number=number)
    run.open()
    with pytest.raises(RunStopped, match=f"at step {stopped} of 7") as error:
        run_stages([a_stage(measure)], run)
    assert error.value.status == 128 + number
    assert saved(run) == kept and stopped not in evaluated(run)
    run_stages([a_stage(measure)], run)
    assert evaluated(run) == [0, 3, 6, 7]
    assert run.stages()[0]["params_digest"] == whole.stages()[0]["params_digest"]


def test_a_lost_evaluation_is_null_and_said(whole, tmp_path, capsys):
    """Not the next one that there is: the start of the curve would then be a later step."""
    run = RunFolder(tmp_path / "run")
    run.open()
    with pytest.raises(RunStopped):
        run_stages([a_stage(Measure((5.0, 4.0, 3.0, 2.0), signal_at=4))], run)
    metrics = run.stage(0, "s").metrics.path
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"step": 0,' not in line))
    run_stages([a_stage(Measure((2.0,)))], run)
    (entry,) = run.stages()
    assert entry["params_digest"] == whole.stages()[0]["params_digest"]
    scores = {"bpb_start": None, "bpb_end": 1.0, "other_start": None, "other_end": 2.0}
    assert entry["eval"] == scores
    assert "rows of evaluations are missing" in " ".join(capsys.readouterr().err.split())


class Signals(Stream):
    """A stream of which one batch comes with a signal."""

    def __init__(self, at):
        super().__init__()
        self._at = at

    def __next__(self):
        if self._place == self._at:
            signal.raise_signal(signal.SIGUSR1)
        return super().__next__()


@pytest.mark.parametrize(("at", "kept"), [(0, [2]), (6, [4, 7])])
def test_a_signal_in_a_step_ends_the_run_soon_after_it_and_at_its_end(whole, tmp_path, at, kept):
    """Also in the first step and the last one: the stage is then finished by the next call."""
    run = RunFolder(tmp_path / "run")
    run.open()
    signalled = dataclasses.replace(a_stage(Measure()), batches=lambda *_: Signals(at))
    with pytest.raises(RunStopped, match="SIGUSR1: stopped at step"):
        run_stages([signalled], run)
    assert saved(run) == kept and not run.stages()
    run_stages([a_stage(Measure())], run)
    assert run.stages()[0]["params_digest"] == whole.stages()[0]["params_digest"]

"""Numbers that are not finite, and losses that spike, on a stage of plain functions.

`Stream` marks chosen batches, and `poisoned` gives these batches a NaN gradient under a finite
loss, or a loss and a gradient that are a million times too large.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flm_jax import growth
from flm_jax.config import MeshConfig, NumericsConfig, StageConfig
from flm_jax.errors import Exit, NumericsError
from flm_jax.params import sharding
from flm_jax.params.mesh import mesh_of
from flm_jax.params.sharding import Layout
from flm_jax.runs import numerics
from flm_jax.runs.loop import run_stages
from flm_jax.runs.stage import Position
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.lineage import RunFolder
from flm_jax.train import guard, optim, schedules, train_step
from flm_jax.train.train_step import TrainState, abstract_state, init_state, make_train_step
from tests.models import SMALL, changed, farthest, grow, packed_batch, random_params
from tests.test_loop import MODEL, STEPS, Measure, a_stage, saved

NAN, LOUD = 1.0, 2.0
summed_loss = train_step.summed_loss


def poisoned(params, batch, config, masks=None):
    """The loss; a batch marked NAN has a finite one with a gradient of NaN, LOUD a huge one."""
    total, tokens = summed_loss(params, batch, config, masks)
    mark = batch["mark"].max()
    # The root of 0 has an infinite slope, which is multiplied by 0.
    inner = jnp.where(mark == NAN, 0 * jnp.sum(params["final_norm"]), 1.0)
    total = total + jnp.sqrt(inner) - jnp.where(mark == NAN, 0.0, 1.0)
    return total * jnp.where(mark == LOUD, 1e6, 1.0), tokens


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setattr(train_step, "summed_loss", poisoned)


class Stream:
    """A stream of the random batches of given numbers; some are marked."""

    def __init__(self, marks, places):
        self._marks, self._places, self._place = marks, places, 0

    def __iter__(self):
        return self

    def __next__(self):
        number = self._places[self._place]
        batch = {k: np.array(x) for k, x in packed_batch(MODEL, number).items()}
        batch["mark"] = np.full_like(batch["weights"], self._marks.get(number, 0.0))
        self._place += 1
        return batch

    def get_state(self):
        return {"place": self._place}

    def set_state(self, state):
        self._place = state["place"]


def stage_with(marks, measure=None, places=range(99), save_every=4, minutes=0.0, **settings):
    made = a_stage(measure or Measure(), save_every=save_every, minutes=minutes)
    experiment = dataclasses.replace(made.experiment, numerics=NumericsConfig(**settings))
    return dataclasses.replace(
        made, experiment=experiment, batches=lambda *_: Stream(marks, list(places))
    )


def ran(path, *stages):
    """Runs a stage in a folder, which may have an unfinished one; returns the run."""
    run = RunFolder(path)
    run.open()
    run_stages(list(stages), run)
    return run


def rows(run, kind):
    return run.stage(0, "s").metrics.rows(kind)


def state_at(run, step):
    """Parameters and moments of a checkpoint."""
    stage = stage_with({})
    checkpoints = Checkpoints(run.stage(0, "s").checkpoints)
    state, _ = checkpoints.restore(step, abstract_state(MODEL, stage.tx, stage.layout))
    checkpoints.close()
    return state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The digest of a run without any mark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "summed_loss", poisoned)
        run = ran(tmp_path_factory.mktemp("whole") / "run", stage_with({}))
    return run.stages()[0]["params_digest"]


slow = pytest.mark.slow
LATE = pytest.param(STEPS, marks=slow)


# The first step, one that is saved, the last.
@pytest.mark.parametrize("step", [pytest.param(1, marks=slow), 4, LATE])
def test_a_gradient_that_is_not_finite_stops_before_its_state_is_saved(tmp_path, whole, step):
    path, good = tmp_path / "run", [s for s in (4, STEPS) if s < step]
    last = f"checkpoints/{good[-1]};" if good else "is none;"
    told = rf"grad norm is nan at step {step}; .*{last} .*numerics.on_nonfinite to 'skip'"
    with pytest.raises(NumericsError, match=told) as error:
        ran(path, stage_with({step - 1: NAN}))
    assert error.value.status == Exit.NUMERICS
    run = RunFolder(path)
    assert saved(run) == good and not run.stages()
    run_stages([stage_with({})], run)  # the state on disk was the last good one
    assert run.stages()[0]["params_digest"] == whole


def with_bad_update(stage, step):
    """The stage with an optimizer whose update is NaN at a step, from a finite gradient."""
    bad = optax.scale_by_schedule(lambda count: jnp.where(count == step - 1, jnp.nan, 1.0))
    tx = optax.chain(stage.tx, bad)

    def source():
        return Position(init_state(MODEL, tx, jax.random.key(0)), {"place": 0}, 0.0)

    return dataclasses.replace(stage, tx=tx, source=source)


@slow
def test_an_update_that_is_not_finite_is_found_at_the_save(tmp_path, monkeypatch):
    with pytest.raises(NumericsError, match=f"the update is not finite at step {STEPS}"):
        ran(tmp_path / "run", with_bad_update(stage_with({}), STEPS))
    assert saved(RunFolder(tmp_path / "run")) == [4]
    # Negative control: without the check, the run ends well, with NaN.
    monkeypatch.setattr(guard, "all_finite", lambda tree: True)
    run = ran(tmp_path / "run", with_bad_update(stage_with({}), STEPS))
    assert run.stages()[0]["steps"] == STEPS


@pytest.mark.parametrize("step", [1, LATE])
def test_a_skipped_step_keeps_every_bit_of_parameters_and_moments(tmp_path, step):
    run = ran(tmp_path / "run", stage_with({step - 1: NAN}, save_every=1, on_nonfinite="skip"))
    assert run.stages()[0]["numerics"] == {"skipped": 1, "rollback": 0}
    (row,) = rows(run, "skipped")
    assert row["step"] == step and math.isfinite(row["loss"]) and math.isnan(row["grad_norm"])
    assert saved(run) == list(range(1, STEPS + 1))
    after = state_at(run, step)
    assert int(after.step) == int(after.opt_state[1].steps) == step
    if step == 1:
        assert farthest(after.opt_state[1].mu, jax.tree.map(jnp.zeros_like, after.params)) == 0
    else:
        before = state_at(run, step - 1)
        for name in ("mu", "nu"):
            was, now = (getattr(x.opt_state[1], name) for x in (before, after))
            assert farthest(was, now) == 0
        assert farthest(after.params, before.params) == 0
        assert farthest(before.params, state_at(run, step - 2).params) > 0  # negative control


@slow
def test_a_bad_update_is_skipped_and_without_the_guard_is_not(tmp_path, monkeypatch):
    run = ran(tmp_path / "run", with_bad_update(stage_with({}, on_nonfinite="skip"), 2))
    assert [row["step"] for row in rows(run, "skipped")] == [2]
    monkeypatch.setattr(numerics, "guarded", lambda settings: False)
    with pytest.raises(NumericsError):
        ran(tmp_path / "other", with_bad_update(stage_with({}, on_nonfinite="skip"), 2))


@slow
def test_too_many_skips_in_a_row_stop_also_across_a_resume(tmp_path):
    marks = dict.fromkeys((1, 3, 4, 5), NAN)
    settings = {"on_nonfinite": "skip", "most_skipped": 2, "save_every": 1}
    with pytest.raises(NumericsError, match="3 steps in a row were skipped"):
        ran(tmp_path / "run", stage_with(marks, **settings))
    # Step 5 was saved, and is the second in a row: the next one stops at once.
    with pytest.raises(NumericsError, match="at step 6, and 3 steps in a row"):
        ran(tmp_path / "run", stage_with(marks, **settings))
    run = ran(tmp_path / "run", stage_with(marks, **{**settings, "most_skipped": 3}))
    assert run.stages()[0]["numerics"]["skipped"] == 4


@slow
@pytest.mark.parametrize("masked", [False, True])
def test_one_bad_microbatch_of_two_in_a_ramp_on_two_devices(masked):
    model = changed(SMALL, dtype="float32", vocab_size=24)
    plan = growth.plan(model, changed(model, d_model=18, d_ff=32))
    stage = StageConfig("s", plan.target, 3, 4, 1e-2, 1e-2, accumulate=2)
    mesh = mesh_of(MeshConfig(2), jax.devices()[:2])
    tx = optim.optimizer(stage, stage_with({}).experiment.optimizer, schedules.steady)
    value = np.float32(0.3) if masked else None
    results = {}
    for guarded in (False, True):
        params = grow(random_params(model, 5), plan, jax.random.key(1))
        state = TrainState(jnp.int32(0), params, tx.init(params))
        with jax.set_mesh(mesh):
            step = make_train_step(stage, tx, mesh, plan.masks, guarded=guarded)
            states = []
            for mark in (0.0, NAN):
                batch = {k: np.array(x) for k, x in packed_batch(model, batch=4).items()}
                batch["mark"] = np.zeros_like(batch["weights"])
                batch["mark"][-1] = mark  # in the second microbatch alone
                state, metrics = step(state, sharding.place_batch(batch, mesh), value)
                states.append(jax.device_get(state))
        results[guarded] = states, metrics
    (plain, _), (kept, metrics) = results[False], results[True]
    assert not metrics["finite"] and math.isfinite(metrics["loss"])
    assert int(kept[1].step) == int(kept[1].opt_state[1].steps) == 2  # counts go on
    assert farthest(kept[0].params, kept[1].params) == 0
    assert farthest(kept[0].opt_state[1].nu, kept[1].opt_state[1].nu) == 0
    # The same program up to rounding where all is finite, and broken where it is not.
    assert farthest(plain[0].params, kept[0].params) < 1e-5
    assert not bool(guard.all_finite(plain[1]))


# --- Spikes ------------------------------------------------------------------------------------

SPIKES = {"spike_z": 1e3, "window": 3}
LOUD_AT = {5: LOUD}  # the batch of step 6, after the checkpoint of step 4


@pytest.fixture(scope="module")
def past_the_spike(tmp_path_factory):
    """The digest of a run whose stream never had the batches of the steps that are undone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "summed_loss", poisoned)
        places = [0, 1, 2, 3, *range(6, 99)]
        run = ran(tmp_path_factory.mktemp("past") / "run", stage_with({}, places=places))
    return run.stages()[0]["params_digest"]


def test_a_spike_goes_back_and_its_batches_are_left_out(tmp_path, past_the_spike, whole):
    run = ran(tmp_path / "run", stage_with(LOUD_AT, **SPIKES))
    (entry,) = run.stages()
    assert entry["params_digest"] == past_the_spike != whole
    assert entry["numerics"] == {"skipped": 0, "rollback": 1}
    (row,) = rows(run, "rollback")
    assert (row["step"], row["from_step"], row["spiked"]) == (4, 6, "loss")
    assert row["data"] == {"place": 6} and row["z"] > 1e3
    assert [row["step"] for row in rows(run, "eval")] == [0, 3, 6, 7]
    assert entry["goodput"]["seconds"]["redone"] > 0
    # Negative control: without the setting, the spike stays in the result.
    other = ran(tmp_path / "other", stage_with(LOUD_AT))
    assert other.stages()[0]["params_digest"] not in (past_the_spike, whole)


@slow
@pytest.mark.parametrize("place", ["go_back", "record", "data_position", "evaluation"])
def test_a_rollback_that_is_killed_anywhere_ends_alike(
    tmp_path, monkeypatch, past_the_spike, place
):
    calls = itertools.count()

    def fails_once(function, *args):
        if next(calls) == (1 if place == "data_position" else 0):  # it is also called at the start
            raise RuntimeError("killed")
        return function(*args)

    measure = Measure(fails_at=3 if place == "evaluation" else -1)  # at step 6, after the rollback
    if place != "evaluation":
        real = getattr(numerics, place)
        monkeypatch.setattr(numerics, place, functools.partial(fails_once, real))
    with pytest.raises(RuntimeError, match="killed"):
        ran(tmp_path / "run", stage_with(LOUD_AT, measure, **SPIKES))
    run = ran(tmp_path / "run", stage_with(LOUD_AT, measure, **SPIKES))
    assert run.stages()[0]["params_digest"] == past_the_spike
    assert len(rows(run, "rollback")) == 1


@slow
def test_checkpoints_in_between_change_nothing(tmp_path, past_the_spike):
    """Saved by time after every second step; the rollback is still to step 4 of the two."""
    run = ran(tmp_path / "run", stage_with({4: LOUD}, minutes=1e-9, **SPIKES, save_every=4))
    assert rows(run, "rollback")[0]["step"] == 4
    loud = ran(tmp_path / "early", stage_with({3: LOUD}, minutes=1e-9, **SPIKES, save_every=4))
    (row,) = rows(loud, "rollback")
    assert (row["step"], row["from_step"]) == (0, 4)  # not to step 2, which time alone saved
    assert saved(loud)[-1] == STEPS


@slow
def test_too_many_rollbacks_stop(tmp_path):
    marks = dict.fromkeys(range(5, 99), LOUD)
    with pytest.raises(NumericsError, match=r"spikes at step 5 .* after 2 rollbacks") as error:
        ran(tmp_path / "run", stage_with(marks, **SPIKES, most_rollbacks=2))
    assert error.value.status == Exit.NUMERICS
    run = RunFolder(tmp_path / "run")
    assert saved(run) == [4] and len(rows(run, "rollback")) == 2
    assert [row["data"]["place"] for row in rows(run, "rollback")] == [6, 7]


@slow
def test_a_stage_on_two_devices_skips_and_goes_back(tmp_path):
    mesh = mesh_of(MeshConfig(2), jax.devices()[:2])
    marks = {1: NAN, **LOUD_AT}
    stage = stage_with(marks, **SPIKES, on_nonfinite="skip")
    run = ran(tmp_path / "run", dataclasses.replace(stage, layout=Layout(mesh)))
    assert run.stages()[0]["numerics"] == {"skipped": 1, "rollback": 1}

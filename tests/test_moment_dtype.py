"""Adam's moments in bfloat16: how far steps move, what growth and checkpoints keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.config import OptimizerConfig
from flm_jax.errors import UserError
from flm_jax.growth.moments import grow_moment
from flm_jax.params import sharding, trees
from flm_jax.params.axes import ModelSpec, Param
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.train import optim, schedules, train_step
from flm_jax.train.optim import SlotAdamState
from flm_jax.train.train_step import TrainState
from tests.models import (
    TINY,
    TINY_GROWN,
    changed,
    grow,
    packed_batch,
    random_params,
    stage_of,
)
from tests.states import assert_same_bits

BFLOAT16 = OptimizerConfig(moment_dtype="bfloat16")


def adam_of(opt_state):
    """Returns the slot-aged Adam's part of an optimizer state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SlotAdamState))
    return next(node for node in nodes if isinstance(node, SlotAdamState))


def test_a_step_rounds_the_stored_moments_once():
    """The moments of three steps each have errors of at most 3 times 2^-8."""
    spec = ModelSpec({"w": Param.of("embed:in mlp:out")}, {"embed": 40, "mlp": 30})
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((40, 30))}
    exact, rounded = (
        optim.scale_by_slot_adam(spec, 0.9, 0.95, 1e-8, moment_dtype=dtype)
        for dtype in ("", "bfloat16")
    )
    grads = [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        for _ in range(3)
    ]
    states = [tx.init(params) for tx in (exact, rounded)]
    updates = [jax.jit(tx.update) for tx in (exact, rounded)]
    for n, g in enumerate(grads):
        (want, states[0]), (got, states[1]) = (
            update(g, state) for update, state in zip(updates, states, strict=True)
        )
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        errors = [float(jnp.abs(x - y).max()) for x, y in pairs]
        if n == 0:
            assert max(errors) == 0  # a step uses its moments before they are rounded
            pairs = zip(jax.tree.leaves(states[1].nu), jax.tree.leaves(states[0].nu), strict=True)
            for x, y in pairs:
                np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))
    assert 1e-4 < max(errors) < 2**-6  # updates are of size 1
    assert {x.dtype for x in jax.tree.leaves((states[1].mu, states[1].nu))} == {
        jnp.dtype("bfloat16")
    }
    others = jax.tree.leaves(states[1]._replace(mu=None, nu=None))
    assert {x.dtype for x in others} == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.filterwarnings("ignore::flm_jax.growth.LockedCopiesWarning")
def test_growth_maps_moments_in_float32_and_rounds_once():
    plan = growth.plan(TINY, changed(TINY, d_ff=72), "tile")  # factors 1/3 and 1/9
    path = "layers/mlp/down"
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 16)), jnp.bfloat16)
    for power in (1, 2):
        got = grow_moment(x, path, plan, power)
        want = grow_moment(x.astype(jnp.float32), path, plan, power)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_settings_that_cannot_hold_are_refused():
    with pytest.raises(UserError, match=r"b2 is 0\.999 and moment_dtype 'bfloat16'.* below 0\.996"):
        OptimizerConfig(b2=0.999, moment_dtype="bfloat16")
    with pytest.raises(UserError, match=r"moment_dtype is 'float16'; choose"):
        OptimizerConfig(moment_dtype="float16")
    with pytest.raises(UserError, match=r"'float64', for exactness, and optimizer.moment_dtype"):
        optim.optimizer(stage_of(changed(TINY, dtype="float64")), BFLOAT16, schedules.steady)
    # The limit is that of the numbers: 2^-8 of a moment is lost, a little more is not.
    v = jnp.asarray(1 + 2**-7, jnp.bfloat16)
    step = [(v.astype(jnp.float32) * (1 - x)).astype(jnp.bfloat16) for x in (2**-9, 2**-8)]
    assert step[0] == v and step[1] < v


def steps_of(settings, steps, state=None, model=TINY):
    """Trains on random batches; returns the losses and the last state."""
    stage, mesh = stage_of(model), sharding.one_device()
    tx = optim.optimizer(stage, settings, schedules.steady)
    if state is None:
        params = random_params(model, 5)
        state = TrainState(jnp.int32(0), params, tx.init(params))
    losses = []
    with jax.set_mesh(mesh):
        step = train_step.make_train_step(stage, tx, mesh)
        state = jax.tree.map(jnp.copy, state)  # the step donates its state
        for n in range(steps):
            batch = packed_batch(model, seed=n % 4, batch=8)
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.mark.slow
def test_a_run_stays_near_the_one_with_float32_moments(tmp_path):
    want, _ = steps_of(OptimizerConfig(), 60)
    got, state = steps_of(BFLOAT16, 60)
    assert want[-4:].mean() < 0.6 * want[:4].mean()  # it learns
    np.testing.assert_allclose(got, want, rtol=0.01)
    assert np.abs(got - want).max() > 0  # negative control: it is another run
    # A checkpoint keeps every bit of it, and continues with the same bits.
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(60, state, {})
    checkpoints.wait()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    restored, _ = checkpoints.restore(60, like)
    checkpoints.close()
    assert_same_bits(restored, state)
    assert_same_bits(steps_of(BFLOAT16, 2, restored)[1], steps_of(BFLOAT16, 2, state)[1])
    # Growth: the values do not depend on the moments' dtype; moments map like float32 ones.
    plan = growth.plan(TINY, TINY_GROWN, "msg", moments="dual")
    grown = grow(state, plan, jax.random.key(0))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), adam_of(state.opt_state).mu)
    tx = optim.optimizer(stage_of(TINY), OptimizerConfig(), schedules.steady)
    plain = TrainState(state.step, state.params, tx.init(state.params))
    assert_same_bits(grown.params, grow(plain, plan, jax.random.key(0)).params)
    for path, x in trees.flatten(adam_of(grown.opt_state).mu):
        source = dict(trees.flatten(wide))[path]
        want_mu = grow_moment(source, path, plan, 1).astype(jnp.bfloat16)
        np.testing.assert_array_equal(x, want_mu, err_msg=path)
    losses, _ = steps_of(BFLOAT16, 8, grown, TINY_GROWN)
    assert np.isfinite(losses).all() and losses.mean() < want[:4].mean()

"""The optimizer: optax as the oracle, slot ages after a growth, schedules, µP groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flm_jax import growth
from flm_jax.config import OptimizerConfig, ScheduleConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.params import mup, trees
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState
from tests.models import SMALL, TABLE, changed, grow, random_params

BIG = changed(SMALL, d_model=18, d_ff=32, num_layers=3, num_heads=6, num_kv_heads=3)
KEY = jax.random.key(11)


def random_like(params, seed):
    return trees.unflatten(
        {
            path: jax.random.normal(jax.random.fold_in(jax.random.key(seed), n), x.shape, x.dtype)
            for n, (path, x) in enumerate(trees.flatten(params))
        }
    )


def assert_trees_close(a, b, atol):
    for (path, x), (_, y) in zip(trees.flatten(a), trees.flatten(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, err_msg=path)


def test_without_growth_it_is_optax_adam():
    with jax.enable_x64(True):
        params = random_params(SMALL, 5)
        ours = optim.scale_by_slot_adam(mup.spec(SMALL), 0.9, 0.95, 1e-8)
        theirs = optax.scale_by_adam(0.9, 0.95, 1e-8)
        state, reference = ours.init(params), theirs.init(params)
        update = jax.jit(ours.update)
        for seed in range(5):
            grads = random_like(params, seed)
            got, state = update(grads, state)
            with jax.numpy_dtype_promotion("standard"):
                want, reference = theirs.update(grads, reference)
            assert_trees_close(got, want, 1e-12)


def _grown_adam(b2, steps_before):
    """Optimizer state of SMALL after some steps of gradient 1, grown to BIG."""
    params = random_params(SMALL, 5)
    tx = optim.scale_by_slot_adam(mup.spec(SMALL), 0.9, b2, 1e-8)
    state = tx.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(tx.update)
    for _ in range(steps_before):
        _, state = update(ones, state)
    train_state = TrainState(jnp.int32(steps_before), params, (state,))
    return grow(train_state, growth.plan(SMALL, BIG), KEY)


def test_added_slots_take_steps_of_their_own_age():
    """With a constant gradient of 1, every update of Adam is 1, for old and added slots.

    With the old step count and beta2 = 0.999, added slots would get (1 - b1^n) / sqrt(1 - b2^n),
    which is at most 6.6.
    """
    with jax.enable_x64(True):
        grown = _grown_adam(0.999, steps_before=200)
        tx = optim.scale_by_slot_adam(mup.spec(BIG), 0.9, 0.999, 1e-8)
        ones = jax.tree.map(jnp.ones_like, grown.params)
        # The head's gradient moments were rescaled with its values; drop that entry's scale.
        state = grown.opt_state[0]
        shared = state._replace(
            steps=jnp.int32(100_000), born=jax.tree.map(jnp.zeros_like, state.born)
        )
        largest_shared = 0.0
        step = jax.jit(tx.update)
        for _ in range(20):
            update, state = step(ones, state)
            for path, u in trees.flatten(update):
                if path != "head":
                    np.testing.assert_allclose(u, 1, atol=1e-6, err_msg=path)
            update, shared = step(ones, shared)
            largest_shared = max(largest_shared, float(update["embedding"].max()))
        assert 6.4 < largest_shared < 6.7


def test_old_moments_stay_and_added_ones_start_at_zero():
    with jax.enable_x64(True):
        state = _grown_adam(0.95, steps_before=7).opt_state[0]
        assert int(state.steps) == 7
        np.testing.assert_array_equal(state.born["embed"], [0] * 12 + [7] * 6)
        np.testing.assert_array_equal(state.born["layers"], [0, 7, 0])
        m = 1 - 0.9**7
        np.testing.assert_allclose(state.mu["embedding"][:, :12], m, rtol=1e-12)
        assert (state.mu["embedding"][:, 12:] == 0).all()
        assert (state.nu["layers"]["mlp"]["up"][1] == 0).all()
        # The head's values were multiplied by its scale, so its gradients are divided by it.
        scale = growth.plan(SMALL, BIG).value_scale("head")
        assert scale != 1
        np.testing.assert_allclose(state.mu["head"][:12], m / scale, rtol=1e-12)
        np.testing.assert_allclose(state.nu["head"][:12], (1 - 0.95**7) / scale**2, rtol=1e-12)


def test_mup_groups_of_tele_flm():
    """Table 4 of arXiv 2404.16645: from the 512-wide proxy to 8192."""
    config = changed(
        SMALL, d_model=8192, mup_base_width=512, matrix_init_std=0.012 * 2**0.5,
        vector_init_std=4e-3, output_mult=0.5, dtype="float32",
    )  # fmt: skip
    stage = StageConfig("a", config, 1, 1, learning_rate=1.5e-4, matrix_learning_rate=2.4e-3)
    up, head = TABLE["layers/mlp/up"], TABLE["head"]
    assert up.matrix_like and not head.matrix_like and not TABLE["embedding"].matrix_like
    assert mup.init_std(up, config) == pytest.approx(4.242e-3, rel=1e-3)
    assert mup.init_std(head, config) == 4e-3
    rate = stage.matrix_learning_rate * mup.learning_rate_mult(up, config)
    assert rate == pytest.approx(1.5e-4)
    assert config.logit_mult == pytest.approx(0.5 / 16)
    assert mup.decay_mult(up, config) == 16
    assert mup.decay_mult(TABLE["final_norm"], config) == 0


def test_one_step_is_optax_adamw_when_mup_is_off():
    with jax.enable_x64(True):
        config = changed(SMALL, mup_base_width=0)
        params = random_params(config, 5)
        stage = StageConfig("a", config, 1, 1, learning_rate=1e-2, matrix_learning_rate=1e-2)
        ours = optim.optimizer(stage, OptimizerConfig(weight_decay=0.1), lambda step: jnp.ones(()))
        decayed = trees.unflatten({p: "norm" not in p for p in TABLE})
        theirs = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=decayed),
        )
        state, reference = ours.init(params), theirs.init(params)
        our_update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
        for seed in range(3):
            grads = random_like(params, seed)
            got, state = our_update(grads, state, params)
            with jax.numpy_dtype_promotion("standard"):
                want, reference = their_update(grads, reference, params)
            assert_trees_close(got, want, 1e-12)


def _curve(schedule, steps):
    return np.array([float(schedule(jnp.int32(s))) for s in range(steps)])


def test_schedules():
    cosine = schedules.schedule_shape(ScheduleConfig("cosine", 10, final_ratio=0.1), 110)
    curve = _curve(cosine, 111)
    np.testing.assert_allclose(curve[:10], np.arange(1, 11) / 10, rtol=1e-6)
    s = np.arange(10, 111)
    want = 0.1 + 0.9 * (1 + np.cos(np.pi * (s - 10) / 100)) / 2
    np.testing.assert_allclose(curve[10:], want, atol=1e-6)

    wsd = schedules.schedule_shape(ScheduleConfig("wsd", 5, decay_steps=20, final_ratio=0.0), 100)
    curve = _curve(wsd, 101)
    np.testing.assert_allclose(curve[4:81], 1)
    np.testing.assert_allclose(curve[80:], 1 - np.arange(21) / 20, atol=1e-6)

    again = schedules.rewarmed(wsd, start=40, steps=4, ratio=0.1)
    np.testing.assert_allclose(_curve(again, 46)[40:], [0.1, 0.325, 0.55, 0.775, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(_curve(again, 40), _curve(wsd, 40))


@pytest.mark.parametrize(
    ("schedule", "total", "message"),
    [
        ({"warmup_steps": 20}, 10, "warmup_steps is 20, more than the 10 steps"),
        ({"warmup_steps": 20, "total_steps": 10}, 500, "warmup_steps is 20, more than the 10"),
        ({"kind": "cosine", "warmup_steps": 11}, 10, "warmup_steps is 11, more than the 10 steps"),
        ({"kind": "constant", "warmup_steps": 11}, 10, "warmup_steps is 11, more than the 10"),
        ({"warmup_steps": 4, "decay_steps": 10}, 10, "4 and decay_steps 10, together 14, more"),
        ({"warmup_steps": -3}, 10, "warmup_steps is -3; it must be 0 or above"),
        ({"total_steps": -5}, 10, "total_steps is -5; it must be 0 or above"),
        ({"decay_steps": -4}, 10, "decay_steps is -4; it must be 0 or above"),
    ],
)
def test_schedules_that_cannot_be_meant_are_refused(schedule, total, message):
    with pytest.raises(UserError, match=message):
        schedules.schedule_shape(ScheduleConfig(**schedule), total)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_schedules_that_just_fit_reach_their_peak_and_their_end(kind):
    schedule = ScheduleConfig(kind, warmup_steps=4, decay_steps=6 * (kind == "wsd"))
    curve = _curve(schedules.schedule_shape(schedule, 10), 11)
    assert curve.max() == 1
    assert curve[10] == pytest.approx(1 if kind == "constant" else 0.1)

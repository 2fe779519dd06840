"""How a growth maps the optimizer state: moments, ages, rates; each with a negative control."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flm_jax import growth
from flm_jax.config import StageConfig
from flm_jax.params import axes, mup, trees
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState
from tests.models import (
    MUP,
    SMALL,
    TABLE,
    changed,
    farthest,
    grow,
    logits_of,
    packed_batch,
    random_params,
    trained,
)

KEY = jax.random.key(7)


WIDE = {"d_model": 36, "d_ff": 40, "num_heads": 8, "num_kv_heads": 4}


@pytest.fixture(scope="module")
def trajectory():
    """SMALL after 4 steps and after 20 more, with µP and without."""
    found = {}
    with jax.enable_x64(True):
        batches = [packed_batch(SMALL, seed) for seed in range(24)]
        for mup in MUP:
            small = changed(SMALL, **MUP[mup])
            start = trained(small, None, batches[:4])
            found[mup] = (start, trained(small, start, batches[4:]), batches[4:])
    return found


@pytest.mark.filterwarnings("ignore::flm_jax.growth.LockedCopiesWarning")
@pytest.mark.parametrize("mup", MUP)
@pytest.mark.slow
def test_a_tiled_model_follows_the_small_ones_adamw(trajectory, mup):
    """Width x3, units and heads x2, gradients with a large eps, decay: 20 steps to 1e-10."""
    start, end, batches = trajectory[mup]
    small = changed(SMALL, **MUP[mup])
    big = changed(small, **WIDE)
    with jax.enable_x64(True):
        plan = growth.plan(small, big, "tile", moments="dual", rates="carry")
        want = grow(end.params, plan, KEY)
        followed = trained(big, grow(start, plan, KEY), batches)
        assert farthest(followed.params, want) < 1e-10
        np.testing.assert_allclose(
            logits_of(big, followed.params, batches[0]),
            logits_of(small, end.params, batches[0]),
            atol=1e-10,
        )
        # Negative controls: moments mapped like parameters; rates and eps of the target.
        grown = grow(start, plan, KEY)
        adam = grown.opt_state[1]
        like_values = adam._replace(
            mu=grow(start.opt_state[1].mu, plan, KEY), nu=grow(start.opt_state[1].nu, plan, KEY)
        )
        opt_state = (grown.opt_state[0], like_values, *grown.opt_state[2:])
        other = trained(big, dataclasses.replace(grown, opt_state=opt_state), batches)
        assert farthest(other.params, want) > 1e-4
        unscaled = dataclasses.replace(plan, rates="target")
        other = trained(big, grow(start, unscaled, KEY), batches)
        assert farthest(other.params, want) > 1e-4


def test_mup_and_carried_rates_agree_when_all_widths_tile_equally():
    """LR / k and decay k are µP's own rules, so only eps must be carried."""
    small = changed(SMALL, num_kv_heads=4)
    big = changed(SMALL, d_model=24, d_ff=40, num_heads=8, num_kv_heads=8)
    with jax.enable_x64(True):
        tx = optim.scale_by_slot_adam(mup.spec(small), 0.9, 0.95, 1e-8)
        params = random_params(small, 1)
        state = TrainState(jnp.int32(0), params, (tx.init(params),))
        plan = growth.plan(small, big, "tile", rates="carry")
        adam = grow(state, plan, KEY).opt_state[0]
        for path, scale in zip(TABLE, adam.step_scale[0], strict=True):
            for kind, dims in TABLE[path].slots.items():
                if TABLE[path].roles[dims[0]] is axes.Role.IN:
                    scale = scale * adam.share[kind][0, 0]
            assert float(scale) == pytest.approx(1), path


def _update_sizes(model, adam, stage, growth_, seeds):
    """Root mean square of the last update of each parameter, on random gradients."""
    tx = optax.chain(
        optim.scale_by_slot_adam(mup.spec(model), 0.9, 0.95, 1e-12, growth_),
        optim.scale_by_mup_learning_rate(
            mup.spec(model), stage.learning_rate, stage.matrix_learning_rate, schedules.steady
        ),
    )
    rate = tx.init(random_params(model, 0))[1]
    state, step = (adam, rate), jax.jit(tx.update)
    for seed in seeds:
        update, state = step(random_params(model, seed), state)
    return dict(trees.flatten(update)), state[0]


@pytest.mark.filterwarnings("ignore::flm_jax.growth.LockedCopiesWarning")
@pytest.mark.parametrize("recipe", ["msg", "zero_pad", "tile"])
@pytest.mark.slow
def test_update_sizes_go_from_the_sources_to_the_target_widths(recipe):
    """With rates "ramp", old entries first take the mapped steps of the source. After the ramp, the
    updates of every role are as large as in a model that always had the target's width."""
    small = changed(SMALL, d_model=16, mup_base_width=8, vector_init_std=1.0, matrix_init_std=1.0)
    stage = StageConfig("a", small, 1, 1, learning_rate=0.01, matrix_learning_rate=0.02)
    big = changed(small, d_model=48)
    big = changed(big, rms_norm_eps=growth.norm_eps(small, big, recipe))
    with jax.enable_x64(True):
        tx = optim.scale_by_slot_adam(mup.spec(small), 0.9, 0.95, 1e-12)
        _, adam = _update_sizes(small, tx.init(random_params(small, 0)), stage, None, range(1, 60))
        plan = growth.plan(small, big, recipe, rates="ramp")
        grown = grow(TrainState(jnp.int32(59), random_params(small, 0), (adam,)), plan, KEY)
        since = optim.SinceGrowth(59, fade_steps=100)
        last_small, _ = _update_sizes(small, adam, stage, None, [60])
        always = optim.scale_by_slot_adam(mup.spec(big), 0.9, 0.95, 1e-12)
        reference, _ = _update_sizes(
            big, always.init(random_params(big, 0)), stage, None, range(1, 160)
        )

        def rms(x):
            return float(jnp.sqrt(jnp.mean(jnp.square(x))))

        first, _ = _update_sizes(big, grown.opt_state[0], stage, since, [60])
        last, _ = _update_sizes(big, grown.opt_state[0], stage, since, range(60, 160))
        for path, param in TABLE.items():
            old = first[path]
            for dim, axis in enumerate(param.axes):
                old = jnp.take(old, jnp.arange(axes.axis_sizes(small)[axis]), axis=dim)
            # A parameter's steps follow the map of its values.
            mapped = plan.value_scale(path) * plan.gain(path)
            if recipe == "tile" and param.has(axes.Role.IN, "embed"):
                mapped /= 3
            carried = rms(old) / (mapped * rms(last_small[path]))
            assert 0.75 < carried / 0.99 < 1.35, (path, carried)
            assert 0.8 < rms(last[path]) / rms(reference[path]) < 1.25, path
        # Negative control: without fading, a matrix still takes the narrow model's steps, or parts.
        stays, _ = _update_sizes(
            big, grown.opt_state[0], stage, optim.SinceGrowth(59), range(60, 160)
        )
        ratios = [rms(stays[p][..., :2, :2]) / rms(reference[p][..., :2, :2])
                  for p in TABLE if "norm" not in p]  # fmt: skip
        assert recipe == "tile" or max(ratios) > 2, ratios


def test_moments_policies():
    with jax.enable_x64(True):
        start = trained(SMALL, None, [packed_batch(SMALL, s) for s in range(3)])
        big = changed(SMALL, d_ff=60)
        adam = {}
        for moments in ("dual", "asym", "reset"):
            plan = growth.plan(SMALL, big, "uneven", moments=moments)
            adam[moments] = grow(start, plan, KEY).opt_state[1]
        up = start.opt_state[1].mu["layers"]["mlp"]["up"]
        dual, asym, reset = (adam[m].mu["layers"]["mlp"]["up"] for m in adam)
        weighted = jnp.concatenate([up / 6, up / 3, up / 2], axis=-1)
        np.testing.assert_allclose(dual, weighted, atol=1e-15)
        np.testing.assert_allclose(asym, weighted.at[..., 20:].set(0), atol=1e-15)
        assert not reset.any()
        assert adam["dual"].born["mlp"].tolist() == [0] * 60
        assert adam["asym"].born["mlp"].tolist() == [0] * 20 + [3] * 40
        assert adam["reset"].born["embed"].tolist() == [3] * 12


def test_added_slots_get_a_rate_of_their_own():
    """It rises linearly to the ratio. Old entries keep rate 1; so do slots of earlier growths."""
    with jax.enable_x64(True):
        spec = mup.spec(SMALL)
        tx = optim.scale_by_slot_adam(spec, 0.9, 0.95, 1e-8, optim.SinceGrowth(5, 1.3, 4))
        params = random_params(SMALL, 1)
        state = tx.init(params)._replace(steps=jnp.int32(5))
        born = state.born["mlp"].at[10:].set(5).at[5:10].set(2)
        state = state._replace(born={**state.born, "mlp": born})
        ones = jax.tree.map(jnp.ones_like, params)
        plain = optim.scale_by_slot_adam(spec, 0.9, 0.95, 1e-8)
        plain_state = state
        ours, theirs = jax.jit(tx.update), jax.jit(plain.update)
        for n in range(1, 7):
            got, state = ours(ones, state)
            want, plain_state = theirs(ones, plain_state)
            ratio = got["layers"]["mlp"]["up"] / want["layers"]["mlp"]["up"]
            np.testing.assert_allclose(ratio[..., :10], 1, rtol=1e-12)
            np.testing.assert_allclose(ratio[..., 10:], 1 + 0.3 * min(n / 4, 1), rtol=1e-12)

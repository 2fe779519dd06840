"""Folding masks into the parameters keeps the function; with negative controls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.errors import UserError
from flm_jax.growth.folding import fold_block, masks_of
from flm_jax.params import axes, trees
from tests.models import SMALL, TABLE, changed, grow, logits_of, packed_batch, random_params

BIG = changed(SMALL, d_model=18, d_ff=32, num_layers=4, num_heads=9, num_kv_heads=3)
TARGETS = {"embed": changed(SMALL, d_model=18), "all axes": BIG}


def masked_and_folded(target, value, seed=0):
    """Logits of a masked model with random parameters; folded config and parameters; batch."""
    plan = growth.plan(SMALL, target, "msg")
    params, batch = random_params(target, seed), packed_batch(SMALL, seed)
    masked = logits_of(target, params, batch, plan.masks(jnp.float32(value)))
    plain, config = growth.fold(params, plan, value)
    return masked, config, plain, batch


def distance(a, b):
    return float(jnp.max(jnp.abs(a - b)) / jnp.sqrt(jnp.mean(jnp.square(a))))


@pytest.mark.parametrize("grown", TARGETS)
@pytest.mark.parametrize("value", [0.0, 0.37])
def test_the_folded_model_is_the_masked_one(grown, value):
    with jax.enable_x64(True):
        masked, config, plain, batch = masked_and_folded(TARGETS[grown], value)
        assert distance(masked, logits_of(config, plain, batch)) < 1e-10
        assert {p: x.shape for p, x in trees.flatten(plain)} == {
            p: param.shape(axes.axis_sizes(config)) for p, param in TABLE.items()
        }


def test_a_wrong_fold_is_noticed():
    """If eps, or one parameter, is not changed, the function differs."""
    with jax.enable_x64(True):
        masked, config, plain, batch = masked_and_folded(BIG, 0.37)
        assert distance(masked, logits_of(BIG, plain, batch)) > 1e-4
        raw = random_params(BIG, 0)
        for path in ("final_norm", "layers/attention/out", "layers/mlp/down", "embedding"):
            leaves = dict(trees.flatten(plain))
            leaves[path] = dict(trees.flatten(raw))[path]
            broken = trees.unflatten(leaves)
            assert distance(masked, logits_of(config, broken, batch)) > 1e-4, path


def test_a_growth_folded_at_zero_is_the_model_before_it():
    with jax.enable_x64(True):
        params, batch = random_params(SMALL, 3), packed_batch(SMALL, 3)
        plan = growth.plan(SMALL, BIG, "msg")
        plain, config = growth.fold(grow(params, plan, jax.random.key(1)), plan, 0.0)
        assert distance(logits_of(SMALL, params, batch), logits_of(config, plain, batch)) < 1e-10


def test_blocks_are_folded_as_the_whole():
    plan = growth.plan(SMALL, BIG, "msg")
    masks = masks_of(plan, 0.25)
    rng = np.random.default_rng(0)
    for param in TABLE.values():
        x = rng.normal(size=param.shape(axes.axis_sizes(BIG)))
        index = tuple(slice(size // 3, size) for size in x.shape)
        whole = fold_block(x, param, masks)
        np.testing.assert_array_equal(whole[index], fold_block(x[index], param, masks, index))


def test_a_masked_vocabulary_is_refused():
    small = changed(SMALL, dtype="float32")
    plan = growth.plan(small, changed(small, vocab_size=30), "msg")
    params = random_params(plan.target, 0)
    with pytest.raises(UserError, match=r"axis 'vocab' is masked at 0.5"):
        growth.fold(params, plan, 0.5)
    plain, config = growth.fold(params, plan, 1.0)
    assert plain is not params
    assert config == plan.target

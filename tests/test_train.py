"""The train step: on a mesh, without recompiling during a ramp; checkpoints; evaluation."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.commands import config_files
from flm_jax.config import MeshConfig, OptimizerConfig, StageConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.inference.evaluation import bits_per_byte
from flm_jax.params import axes, sharding, trees
from flm_jax.store.checkpoint import Checkpoints, params_digest
from flm_jax.train import optim
from flm_jax.train.train_step import init_state, make_train_step
from tests.models import grow, packed_batch

MODEL = TransformerConfig(
    vocab_size=32, num_layers=2, d_model=16, num_heads=4, head_dim=4, d_ff=24, mup_base_width=8
)
BIG = dataclasses.replace(MODEL, num_layers=3, d_model=32, num_heads=8, d_ff=48)


def stage_of(model):
    return StageConfig("a", model, 8, 8, learning_rate=1e-2, matrix_learning_rate=1e-2)


def optimizer(stage):
    return optim.optimizer(stage, OptimizerConfig(), lambda step: jnp.float32(1))


def losses_on(mesh_config, plan=None, mask=None, steps=4):
    """Losses of a few steps from the same start, and the number of traces."""
    stage = stage_of(MODEL)
    tx = optimizer(stage)
    mesh = sharding.make_mesh(mesh_config)
    sharding.check_divisible(stage.model, mesh)
    with jax.set_mesh(mesh):
        state = init_state(MODEL, tx, jax.random.key(0))
        state = jax.device_put(state, sharding.shardings(state, mesh))
        step = make_train_step(stage, tx, mesh, None)
        losses = []
        for seed in range(steps):
            batch = jax.tree.map(np.asarray, packed_batch(MODEL, seed, batch=8))
            state, metrics = step(state, sharding.place_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def one_device():
    return losses_on(MeshConfig(data=8))


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(1, 8, 1), MeshConfig(2, 1, 4)])
def test_losses_do_not_depend_on_the_mesh(mesh, one_device):
    losses, state = losses_on(mesh)
    np.testing.assert_allclose(losses, one_device[0], rtol=2e-5)
    assert losses[-1] < losses[0] + 0.5  # it trains, and does not diverge
    up = state.params["layers"]["mlp"]["up"]
    assert up.addressable_shards[0].data.size == up.size // (mesh.fsdp * mesh.tensor)


def test_a_ramp_compiles_once():
    plan = growth.plan(MODEL, BIG)
    stage = stage_of(BIG)
    tx = optimizer(stage)
    mesh = sharding.make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        small = init_state(MODEL, optimizer(stage_of(MODEL)), jax.random.key(0))
        state = grow(small, plan, jax.random.key(1))
        state = jax.device_put(state, sharding.shardings(state, mesh))
        step = make_train_step(stage, tx, mesh, plan.masks)
        for local in range(1, 5):
            batch = jax.tree.map(np.asarray, packed_batch(MODEL, local, batch=8))
            batch = sharding.place_batch(batch, mesh)
            args = () if local == 4 else (np.float32(local / 4),)
            state, metrics = step(state, batch, *args)
            assert math.isfinite(float(metrics["loss"]))
        assert step._cache_size() == 2  # masked and plain


@pytest.mark.parametrize("recipe", ["msg", "zero_pad", "tile_pad,identity", "aki,stack", "tile"])
def test_growth_is_the_same_on_a_mesh_and_abstractly(recipe):
    """The same bits: of copies, of fresh entries and of the optimizer's state."""
    target = dataclasses.replace(BIG, num_layers=MODEL.num_layers) if recipe == "tile" else BIG
    if recipe == "tile":
        target = dataclasses.replace(
            target, d_model=3 * MODEL.d_model, d_ff=3 * MODEL.d_ff, num_heads=2 * MODEL.num_heads,
            num_kv_heads=2 * MODEL.kv_heads,
        )  # fmt: skip
    eps = growth.norm_eps(MODEL, target, recipe)
    plan = growth.plan(MODEL, dataclasses.replace(target, rms_norm_eps=eps), recipe)
    tx = optimizer(stage_of(MODEL))
    state = init_state(MODEL, tx, jax.random.key(0))
    here = grow(state, plan, jax.random.key(1))
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, sharding.shardings(state, mesh))
        shapes = jax.eval_shape(lambda s: growth.grow(s, plan, jax.random.key(1)), state)
        there = jax.jit(
            lambda s: growth.grow(s, plan, jax.random.key(1)),
            out_shardings=sharding.shardings(shapes, mesh),
        )(placed)
    chex.assert_trees_all_equal(jax.device_get(here), jax.device_get(there))
    want = jax.eval_shape(
        lambda: init_state(plan.target, optimizer(stage_of(plan.target)), jax.random.key(0))
    )
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(
        lambda s: (s.shape, s.dtype), want
    )


@pytest.mark.parametrize("recipe", ["msg", "zero_pad", "tile_pad,identity"])
def test_growth_to_1t_has_the_right_shapes(recipe):
    tele_flm_102b = config_files.shipped("tele_flm_102b")
    tele_flm_1t = config_files.shipped("tele_flm_1t")

    small, big = tele_flm_102b.stage().model, tele_flm_1t.stage().model
    big = dataclasses.replace(big, rms_norm_eps=growth.norm_eps(small, big, recipe))
    plan = growth.plan(small, big, recipe)
    tx = optimizer(tele_flm_102b.stage())
    state = jax.eval_shape(lambda: init_state(small, tx, jax.random.key(0)))
    grown = jax.eval_shape(lambda s: growth.grow(s, plan, jax.random.key(0)), state)
    sizes = {path: leaf.size for path, leaf in trees.flatten(grown.params)}
    assert sizes == axes.param_sizes(big)
    assert len(plan.to_json()) < 20_000


def test_checkpoint_returns_the_same_bits_and_refuses_other_shapes(tmp_path):
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    tx = optimizer(stage_of(MODEL))
    state = init_state(MODEL, tx, jax.random.key(0))
    placed = jax.device_put(state, sharding.shardings(state, mesh))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest is None
    for step in (1, 2, 3):
        checkpoints.save(step, placed, {"data": {"offset": step}})
    checkpoints.wait()
    assert checkpoints.latest == 3
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]

    other = sharding.make_mesh(MeshConfig(1, 8, 1))  # a different layout

    def like(model):
        abstract = jax.eval_shape(lambda: init_state(model, tx, jax.random.key(0)))
        placed = sharding.shardings(abstract, other)
        return jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), abstract, placed
        )

    back, progress = checkpoints.restore(3, like(MODEL))
    assert progress == {"data": {"offset": 3}}
    assert params_digest(back.params) == params_digest(state.params)
    chex.assert_trees_all_equal(jax.device_get(back), jax.device_get(state))
    deeper = dataclasses.replace(MODEL, num_layers=3)
    message = r"layers/attention/\w+ is float32\[2, .*, the config needs float32\[3, "
    with pytest.raises(UserError, match=message):
        checkpoints.restore(3, like(deeper))
    checkpoints.close()


def test_params_digest_sees_one_bit():
    params = init_state(MODEL, optimizer(stage_of(MODEL)), jax.random.key(0)).params
    before = params_digest(params)
    bits = np.asarray(params["head"]).copy()
    bits.view(np.uint32)[0, 0] ^= 1
    assert params_digest({**params, "head": jnp.asarray(bits)}) != before


def test_bits_per_byte_of_a_uniform_model():
    """With a zero head every token costs log2(vocabulary) bits; bytes are counted per token."""
    params = init_state(MODEL, optimizer(stage_of(MODEL)), jax.random.key(0)).params
    params = {**params, "head": jnp.zeros_like(params["head"])}
    batch = jax.tree.map(np.asarray, packed_batch(MODEL, batch=8))
    token_bytes = np.full(MODEL.vocab_size, 2)
    mesh = sharding.make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        got = bits_per_byte(params, MODEL, [batch, batch], token_bytes, mesh)
    assert got == pytest.approx(math.log2(32) / 2, rel=1e-6)

"""The train step on meshes, compilation during a ramp, checkpoints, evaluation."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.commands import config_files
from flm_jax.config import MeshConfig
from flm_jax.errors import UserError
from flm_jax.inference.evaluation import score
from flm_jax.params import axes, sharding, trees
from flm_jax.params.digest import params_digest
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.train.train_step import init_state, make_train_step
from tests.compilations import counted
from tests.models import TABLE, TINY, TINY_GROWN, grow, losses_on, optimizer, packed_batch, stage_of


@pytest.fixture(scope="module")
def data_parallel():
    return losses_on(MeshConfig(data=8), TINY)[0]


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(1, 8, 1), MeshConfig(2, 1, 4)])
def test_losses_do_not_depend_on_the_mesh(mesh, data_parallel):
    losses, state = losses_on(mesh, TINY)
    np.testing.assert_allclose(losses, data_parallel, rtol=2e-5)
    # The model learns: each step lowers the loss by much more than the tolerance.
    assert (np.diff(losses) < -0.05).all(), losses
    up = state.params["layers"]["mlp"]["up"]
    assert up.addressable_shards[0].data.size == up.size // (mesh.fsdp * mesh.tensor)


def test_a_ramp_compiles_once():
    plan = growth.plan(TINY, TINY_GROWN)
    stage = stage_of(TINY_GROWN)
    tx = optimizer(stage)
    mesh = sharding.make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        small = init_state(TINY, optimizer(stage_of(TINY)), jax.random.key(0))
        state = grow(small, plan, jax.random.key(1))
        state = jax.device_put(state, sharding.shardings(state, TABLE, mesh))
        step = make_train_step(stage, tx, mesh, plan.masks)
        with counted() as compiled:
            for local in range(1, 5):
                batch = jax.tree.map(np.asarray, packed_batch(TINY, local, batch=8))
                batch = sharding.place_batch(batch, mesh)
                args = () if local == 4 else (np.float32(local / 4),)
                state, metrics = step(state, batch, *args)
                assert math.isfinite(float(metrics["loss"]))
        assert compiled["step"] == 2  # masked and plain


@pytest.mark.parametrize("recipe", ["msg", "zero_pad", "tile_pad,identity", "aki,stack", "tile"])
def test_growth_is_the_same_on_a_mesh_and_abstractly(recipe):
    """Copies, fresh entries and the optimizer's state are bit-identical."""
    target = (
        dataclasses.replace(TINY_GROWN, num_layers=TINY.num_layers)
        if recipe == "tile"
        else TINY_GROWN
    )
    if recipe == "tile":
        target = dataclasses.replace(
            target,
            d_model=2 * TINY.d_model,
            d_ff=2 * TINY.d_ff,
            num_heads=2 * TINY.num_heads,
            num_kv_heads=2 * TINY.kv_heads,
        )
    eps = growth.norm_eps(TINY, target, recipe)
    plan = growth.plan(TINY, dataclasses.replace(target, rms_norm_eps=eps), recipe)
    tx = optimizer(stage_of(TINY))
    state = init_state(TINY, tx, jax.random.key(0))
    here = grow(state, plan, jax.random.key(1))
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, sharding.shardings(state, TABLE, mesh))
        shapes = jax.eval_shape(lambda s: growth.grow(s, plan, jax.random.key(1)), state)
        there = jax.jit(
            lambda s: growth.grow(s, plan, jax.random.key(1)),
            out_shardings=sharding.shardings(shapes, TABLE, mesh),
        )(placed)
    chex.assert_trees_all_equal(jax.device_get(here), jax.device_get(there))
    want = jax.eval_shape(
        lambda: init_state(plan.target, optimizer(stage_of(plan.target)), jax.random.key(0))
    )
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(
        lambda s: (s.shape, s.dtype), want
    )


@pytest.mark.filterwarnings("ignore::flm_jax.growth.LockedCopiesWarning")
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


def test_a_checkpoint_restores_bit_identically_and_refuses_other_shapes(tmp_path):
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    tx = optimizer(stage_of(TINY))
    state = init_state(TINY, tx, jax.random.key(0))
    placed = jax.device_put(state, sharding.shardings(state, TABLE, mesh))
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
        placed = sharding.shardings(abstract, TABLE, other)
        return jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), abstract, placed
        )

    back, progress = checkpoints.restore(3, like(TINY))
    assert progress == {"data": {"offset": 3}}
    assert params_digest(back.params) == params_digest(state.params)
    chex.assert_trees_all_equal(jax.device_get(back), jax.device_get(state))
    deeper = dataclasses.replace(TINY, num_layers=3)
    message = r"layers/attention/\w+ is float32\[2, .*, the config needs float32\[3, "
    with pytest.raises(UserError, match=message):
        checkpoints.restore(3, like(deeper))
    checkpoints.close()


def test_params_digest_sees_one_bit():
    params = init_state(TINY, optimizer(stage_of(TINY)), jax.random.key(0)).params
    before = params_digest(params)
    bits = np.asarray(params["head"]).copy()
    bits.view(np.uint32)[0, 0] ^= 1
    assert params_digest({**params, "head": jnp.asarray(bits)}) != before


def test_bits_per_byte_of_a_uniform_model():
    """With a zero head, every token costs log2(vocabulary) bits; bytes are counted per token."""
    params = init_state(TINY, optimizer(stage_of(TINY)), jax.random.key(0)).params
    params = {**params, "head": jnp.zeros_like(params["head"])}
    batch = jax.tree.map(np.asarray, packed_batch(TINY, batch=8))
    token_bytes = np.full(TINY.vocab_size, 2)
    mesh = sharding.make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        got = score(params, TINY, [batch, batch], token_bytes, mesh).bits_per_byte
    assert got == pytest.approx(math.log2(32) / 2, rel=1e-6)

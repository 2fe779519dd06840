"""The loss in chunks of the vocabulary equals the loss from all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flm_jax.config import MeshConfig
from flm_jax.errors import UserError
from flm_jax.models.readout import Readout, logits
from flm_jax.params import sharding, trees
from flm_jax.train.loss import token_nats
from tests.models import SMALL, TINY, changed, gradients, losses_on, packed_batch, random_params

MODEL = changed(SMALL, vocab_size=24, logit_softcap=2.0, output_mult=5.0)


def drawn(config, batch=2, length=5, masked=True):
    """Returns a random readout, and targets among the ids that are tokens."""
    rng = np.random.default_rng(0)
    mask_V = rng.uniform(0.1, 1, config.vocab_size)
    readout = Readout(
        jnp.asarray(rng.normal(size=(batch, length, config.d_model)), config.dtype),
        jnp.asarray(rng.normal(size=(config.d_model, config.vocab_size)), config.dtype),
        jnp.log(jnp.asarray(mask_V, config.dtype)) if masked else None,
    )
    targets_BT = rng.integers(0, config.tokens, (batch, length))
    return readout, jnp.asarray(targets_BT, jnp.int32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def weighted(readout, targets_BT, config, tokens=None):
    """Returns the gradient of a sum with unequal weights, and the nats of each target."""

    def total(readout):
        nats_BT = token_nats(readout, targets_BT, config, tokens)
        weights_BT = jnp.arange(nats_BT.size, dtype=nats_BT.dtype).reshape(nats_BT.shape)
        return jnp.sum(nats_BT * weights_BT), nats_BT

    return jax.grad(total, has_aux=True)(readout)


@pytest.mark.parametrize("masked", [True, False])
def test_chunks_give_the_same_loss_and_gradients(masked):
    with jax.enable_x64(True):
        readout, targets_BT = drawn(MODEL, masked=masked)
        grads, nats_BT = weighted(readout, targets_BT, MODEL)
        others, got_BT = weighted(readout, targets_BT, changed(MODEL, loss_chunks=6))
        np.testing.assert_allclose(got_BT, nats_BT, rtol=1e-12)
        assert [x is None for x in others] == [x is None for x in grads]
        for x, y in zip(jax.tree.leaves(others), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * jnp.abs(y).max())
        # Negative control: a slightly different factor is seen at this tolerance.
        near = changed(MODEL, loss_chunks=6, output_mult=MODEL.output_mult * (1 + 1e-9))
        moved, _ = weighted(readout, targets_BT, near)
        assert jnp.abs(moved.head_DV - grads.head_DV).max() > 1e-11 * jnp.abs(grads.head_DV).max()


def test_ids_that_are_no_tokens_are_left_out():
    """The oracle is optax's loss on the logits of the ids that are tokens."""
    with jax.enable_x64(True):
        config = changed(MODEL, num_tokens=13, loss_chunks=12)  # 13 cuts a chunk of two
        readout, targets_BT = drawn(config)
        grads, got_BT = weighted(readout, targets_BT, config, 13)
        logits_BTV = logits(readout, config)[..., :13]
        want_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
        np.testing.assert_allclose(got_BT, want_BT, rtol=1e-13)
        assert jnp.all(grads.head_DV[:, 13:] == 0) and jnp.all(grads.head_DV[:, :13] != 0)


def test_chunks_on_a_mesh_equal_the_loss_on_one_device():
    """Devices of axis tensor each compute a part of every chunk."""
    config = changed(MODEL, dtype="float32", loss_chunks=3)
    readout, targets_BT = drawn(config, batch=4)
    want, nats_BT = weighted(readout, targets_BT, changed(config, loss_chunks=0))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(2, 2, 2))):
        got, got_BT = weighted(readout, targets_BT, config)
    np.testing.assert_allclose(got_BT, nats_BT, rtol=1e-6)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * jnp.abs(y).max())


def test_chunks_that_do_not_divide_are_refused():
    config, mesh = (
        changed(MODEL, dtype="float32", loss_chunks=8),
        sharding.make_mesh(MeshConfig(4, 1, 2)),
    )
    named = pytest.raises(UserError, match=r"loss_chunks is 8 and vocab_size 24.* 2 devices")
    with jax.set_mesh(mesh), named:
        weighted(*drawn(config), config)
    with named:
        sharding.check_divisible(config, mesh)
    with pytest.raises(UserError, match=r"loss_chunks is -1"):
        changed(MODEL, loss_chunks=-1)


def test_there_is_no_array_of_tokens_by_vocabulary():
    config = changed(MODEL, dtype="float32", vocab_size=4096)
    readout, targets_BT = drawn(config, length=64)
    array = targets_BT.size * config.vocab_size * 4

    def temporary(chunks):
        compiled = weighted.lower(
            readout, targets_BT, changed(config, loss_chunks=chunks)
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(0) > array
    assert temporary(32) < array / 4


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_chunks_trains_alike_on_a_mesh(tied):
    model = changed(TINY, tied=tied)
    with jax.enable_x64(True):
        exact = changed(model, dtype="float64")
        params, batch = random_params(exact, 3), packed_batch(exact)
        want, grads, _ = gradients(params, batch, exact)
        got, others, _ = gradients(params, batch, changed(exact, loss_chunks=8))
        np.testing.assert_allclose(got, want, rtol=1e-12)
        for (path, x), (_, y) in zip(trees.flatten(others), trees.flatten(grads), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * jnp.abs(y).max(), err_msg=path)
    want, _ = losses_on(MeshConfig(data=8), model)
    got, _ = losses_on(MeshConfig(2, 2, 2), changed(model, loss_chunks=4))
    np.testing.assert_allclose(got, want, rtol=2e-6)

"""The decoder: against an independent numpy model, and its packing through gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.execution import SplashConfig
from flm_jax.models import Transformer, attention
from flm_jax.models.attention import Scoring
from flm_jax.params import trees
from tests.models import (
    SMALL,
    changed,
    gradients,
    logits_of,
    numpy_logits,
    packed_batch,
    random_params,
)

KV_HEADS = pytest.mark.parametrize(
    "kv_heads", [4, 2, 1], ids=["multi-head", "grouped", "multi-query"]
)


@KV_HEADS
def test_logits_equal_the_numpy_model(kv_heads):
    with jax.enable_x64(True):
        config = changed(SMALL, num_kv_heads=kv_heads)
        params = random_params(config, 1)
        batch = packed_batch(config)
        got = np.asarray(logits_of(config, params, batch))
        args = [np.asarray(batch[k]) for k in ("tokens", "segment_ids", "positions")]
        want = numpy_logits(config, params, *args)
        real = args[1] > 0
        np.testing.assert_allclose(got[real], want[real], atol=1e-12)
        # Negative control: without the segments the oracle's result differs.
        unpacked = numpy_logits(config, params, args[0], np.ones_like(args[1]), args[2])
        assert np.abs(got[real] - unpacked[real]).max() > 1e-3


@functools.partial(jax.jit, static_argnums=0)
def _token_gradients(config, params, positions, position, segment_ids):
    """Returns the norm of d(logits at one position) / d(embedding of each input position)."""
    length = positions.shape[1]
    # Distinct tokens, so that row i of the embedding's gradient belongs to position i alone.
    tokens = jnp.arange(length, dtype=jnp.int32)[None]

    def probe(p):
        logits = Transformer(config).apply({"params": p}, tokens, segment_ids, positions)
        return jnp.sum(jnp.sin(logits[0, position]))

    return jnp.abs(jax.grad(probe)(params)["embedding"][:length]).max(axis=1)


def test_attention_is_causal_and_stays_in_its_document():
    """Gradients come from all earlier tokens of the same document, and from no other token."""
    with jax.enable_x64(True):
        params = random_params(SMALL, 2)
        batch = packed_batch(SMALL, batch=1)
        positions, segment_ids = batch["positions"], batch["segment_ids"]
        segments = np.asarray(segment_ids[0])
        for position in np.flatnonzero(segments > 0):
            got = _token_gradients(SMALL, params, positions, position, segment_ids)
            visible = (segments == segments[position]) & (np.arange(len(segments)) <= position)
            assert (got[~visible] == 0).all()
            assert (got[visible] > 1e-8).all()
        # Negative control: as one document, tokens attend to the earlier document.
        one = jnp.ones_like(segment_ids)
        leaked = _token_gradients(SMALL, params, positions, 6, one)
        assert leaked[0] > 1e-8


@pytest.mark.parametrize(
    "options", [{"remat": "full"}, {"remat": "dots:0-0,qkv+attended:1-"}, {"scan_unroll": 2}]
)
def test_implementation_options_do_not_change_the_result(options):
    with jax.enable_x64(True):
        params = random_params(SMALL, 3)
        batch = packed_batch(SMALL)
        loss, grads, _ = gradients(params, batch, SMALL)
        other_loss, other_grads, _ = gradients(params, batch, changed(SMALL, **options))
        np.testing.assert_allclose(loss, other_loss, rtol=1e-12)
        for (path, a), (_, b) in zip(trees.flatten(grads), trees.flatten(other_grads), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12, err_msg=path)


def test_bfloat16_gives_float32_logits_near_the_exact_ones():
    config = changed(SMALL, dtype="bfloat16")
    params = random_params(config, 4)
    batch = packed_batch(config)
    logits = logits_of(config, params, batch)
    assert logits.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for _, leaf in trees.flatten(params))
    exact = logits_of(changed(config, dtype="float32"), params, batch)
    error = float(jnp.sqrt(jnp.mean(jnp.square(logits - exact))))
    scale = float(jnp.sqrt(jnp.mean(jnp.square(exact))))
    assert 2**-12 < error / scale < 2**-5  # a few dozen roundings, each of about 2^-9


def test_the_accumulated_gradient_equals_that_of_the_whole_batch():
    """The rows have different numbers of targets, so a mean of means would be wrong."""
    with jax.enable_x64(True):
        params = random_params(SMALL, 5)
        batch = packed_batch(SMALL, batch=4)
        batch["weights"] = batch["weights"].at[0, :5].set(0)
        loss, grads, tokens = gradients(params, batch, SMALL)
        loss2, grads2, tokens2 = gradients(params, batch, SMALL, accumulate=2)
        assert tokens == tokens2
        np.testing.assert_allclose(loss, loss2, rtol=1e-12)
        for (path, a), (_, b) in zip(trees.flatten(grads), trees.flatten(grads2), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-13, err_msg=path)
        halves = [
            gradients(params, {k: v[i : i + 2] for k, v in batch.items()}, SMALL)[0] for i in (0, 2)
        ]
        assert abs(float(sum(halves) / 2 - loss)) > 1e-4


@pytest.mark.parametrize(
    ("heads", "scoring"),
    [((2, 1), Scoring(128**-0.5)), ((1, 2), Scoring(0.05, softcap=1.5, window=70))],
    ids=["multi-head", "grouped, window, cap"],
)
def test_splash_attention_equals_plain_attention(heads, scoring):
    """The TPU's kernel, in interpret mode: forward and gradients, on packed documents."""
    K, G = heads
    rng = np.random.default_rng(0)
    q, out = (jnp.asarray(rng.normal(size=(2, 256, K, G, 128)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, 256, K, 128)), jnp.float32) for _ in range(2))
    ids = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 2]], [100, 60, 96], axis=1), jnp.int32)

    def through(compute):
        def total(q, k, v):
            return jnp.sum(compute(q, k, v, ids, scoring) * out)

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    value, grads = through(attention.plain)
    # With a window, tiles that differ from each other.
    tiles = SplashConfig(*(128, 256, 128, 256, 256, 128) if scoring.window else ())
    got, got_grads = through(functools.partial(attention.splash, tiles=tiles, interpret=True))
    np.testing.assert_allclose(got, value, rtol=1e-4)
    for a, b in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * float(jnp.abs(b).max()))
    # Negative controls: without documents, window or cap the result differs.
    want = attention.plain(q, k, v, ids, scoring)
    others = [attention.plain(q, k, v, jnp.ones_like(ids), scoring)]
    if scoring.window:
        others += [
            attention.plain(q, k, v, ids, dataclasses.replace(scoring, **{name: 0}))
            for name in ("window", "softcap")
        ]
    for other in others:
        assert float(jnp.abs(other - want).max()) > 0.03

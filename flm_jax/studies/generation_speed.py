"""How fast text is generated, with and without the key/value cache."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.config import TransformerConfig
from flm_jax.inference.generation import bucket, decode, prefill
from flm_jax.models import Cache, Transformer, by_layer
from flm_jax.params import counts
from flm_jax.runtime import host


@functools.partial(jax.jit, static_argnames="config")
def _uncached(
    params: Any, tokens_BT: jax.Array, last: jax.Array, config: TransformerConfig
) -> jax.Array:
    """The token after position `last`, by a forward pass over the whole text."""
    logits_BTV: jax.Array = Transformer(config).apply({"params": params}, tokens_BT)  # type: ignore[assignment]
    last_BV = jax.lax.dynamic_index_in_dim(logits_BTV, last, axis=1, keepdims=False)
    return jnp.argmax(last_BV, axis=-1).astype(jnp.int32)


def measure(
    config: TransformerConfig, batch: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """Times greedy steps of both kinds in turns, on random weights and random prompts.

    The cache has the rounded length of prompt and new tokens together, and the pass without a
    cache runs over that length: one program each.

    Returns: cached_tokens_per_s and uncached_tokens_per_s (batch over the median step), ratio,
    prefill_tokens_per_s (the prompt, once more after compilation), compile_s of prefill and step
    together, and the sizes.
    """
    host.keep_freed()
    key = jax.random.key(0)
    params = jax.jit(lambda k: Transformer(config).init(k, jnp.zeros((1, 1), jnp.int32))["params"])(
        key
    )
    own = by_layer(params, config)
    length = bucket(prompt_tokens + new_tokens)
    rng = np.random.default_rng(0)
    prompt_BT = rng.integers(0, config.vocab_size, (batch, prompt_tokens)).astype(np.int32)
    padding_B = jnp.zeros(batch, jnp.int32)
    keys_B = jax.random.split(key, batch)
    limits = jnp.float32(1), jnp.int32(1), jnp.float32(1)

    def read() -> Cache:
        return prefill(own, Cache.empty(config, batch, length), prompt_BT, padding_B, config)

    began = time.perf_counter()
    cache = jax.block_until_ready(read())
    last_B = jnp.asarray(prompt_BT[:, -1])
    decoded = decode(own, cache, last_B, padding_B, keys_B, limits, config, True)
    jax.block_until_ready(decoded)
    compile_s = time.perf_counter() - began
    text_BT = np.zeros((batch, length), np.int32)
    text_BT[:, :prompt_tokens] = prompt_BT
    _uncached(params, text_BT, jnp.int32(0), config).block_until_ready()

    began = time.perf_counter()
    cache = jax.block_until_ready(read())
    prefill_s = time.perf_counter() - began
    times: dict[str, list[float]] = {"cached": [], "uncached": []}
    for step in range(new_tokens):
        began = time.perf_counter()
        cache, last_B = decode(own, cache, last_B, padding_B, keys_B, limits, config, True)
        last_B.block_until_ready()
        times["cached"].append(time.perf_counter() - began)
        began = time.perf_counter()
        _uncached(params, text_BT, jnp.int32(prompt_tokens + step - 1), config).block_until_ready()
        times["uncached"].append(time.perf_counter() - began)
    cached, uncached = (batch / statistics.median(times[kind]) for kind in ("cached", "uncached"))
    return {
        "cached_tokens_per_s": cached,
        "uncached_tokens_per_s": uncached,
        "ratio": cached / uncached,
        "prefill_tokens_per_s": batch * prompt_tokens / prefill_s,
        "compile_s": compile_s,
        "params": counts.params(config),
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "slots": length,
        "device": jax.devices()[0].device_kind,
    }

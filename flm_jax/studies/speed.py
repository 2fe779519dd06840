"""Measures the speed of a train step, and of generation with and without a cache."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flm_jax import growth
from flm_jax.config import ExperimentConfig, StageConfig, TransformerConfig
from flm_jax.inference.generation import bucket, decode, prefill
from flm_jax.models import Cache, Transformer, by_layer
from flm_jax.params import counts, sharding
from flm_jax.params.topology import topology_of
from flm_jax.runtime import host
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import init_program, make_train_step

_PEAK_SIZE = 2048


def matmul_peak(dtype: str, seconds: float = 1.0) -> float:
    """Measures the FLOP/s of a square matrix product: the fastest of those run in `seconds`."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(_PEAK_SIZE,) * 2), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * _PEAK_SIZE**3 / best


def _half(model: TransformerConfig) -> TransformerConfig:
    """Returns a model of about half the size on every axis; the masks grow from it."""
    groups = max(model.kv_heads // 2, 1)
    return dataclasses.replace(
        model,
        num_layers=max(model.num_layers // 2, 1),
        d_model=max(model.d_model // 2, 1),
        d_ff=max(model.d_ff // 2, 1),
        num_kv_heads=groups,
        num_heads=groups * model.queries_per_kv,
        mup_base_width=0,  # the base may be wider than the half
        mup_base_depth=0,
    )


def _batch(stage: StageConfig, length: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Draws a batch of random tokens."""
    shape = (stage.batch_size, length)
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, stage.model.vocab_size, shape).astype(np.int32),
        "targets": rng.integers(0, stage.model.vocab_size, shape).astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (stage.batch_size, 1)),
        "weights": np.ones(shape, np.float32),
    }
    return sharding.place_batch(batch, mesh)


@dataclasses.dataclass
class _Timed:
    """One compiled variant of the step and its times."""

    step: Callable[..., Any]
    extra: tuple[Any, ...]
    compile_s: float
    peak_bytes: int
    times: list[float] = dataclasses.field(default_factory=list)


def _compile(step: Any, state: Any, batch: Any, extra: tuple[Any, ...]) -> _Timed:
    """Compiles the step, and reads the memory that it needs."""
    start = time.perf_counter()
    compiled = step.lower(state, batch, *extra).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return _Timed(compiled, extra, seconds, peak)


def measure_step(config: ExperimentConfig, index: int, steps: int) -> dict[str, Any]:
    """Times the train step of one stage on random tokens; plain and masked steps alternate.

    Args:
      config: the experiment.
      index: the stage's index.
      steps: number of timed steps of each kind.

    Returns:
      Of the plain step: tokens_per_s, step_s (median), compile_s, model_flops_per_s (without
      recomputation), matmul_peak_flops_per_s (measured in the same run, in the compute dtype),
      utilisation (the ratio of these two) and peak_bytes (arguments, outputs and temporaries of the
      compiled step, per device). Under "masked" the same of the masked step. mask_overhead is the
      ratio of the step times minus 1; device and devices are the device's kind and number.
    """
    host.keep_freed()
    config = config.on(str(topology_of(jax.devices())))
    stage, length = config.stages[index], config.data_of(index).sequence_length
    layout = sharding.make_layout(config.mesh_of(index))
    mesh, rules = layout
    sharding.check_divisible(stage.model, mesh, rules)
    shape = schedules.schedule_shape(config.schedule, config.total_steps)
    tx = optim.optimizer(stage, config.optimizer, shape)
    plan = growth.plan(_half(stage.model), stage.model)
    with jax.set_mesh(mesh):
        key = jax.random.key(0)
        state = init_program(stage.model, tx, layout)(key)
        batch = _batch(stage, length, mesh)
        masks_at, added = (plan.masks, growth.added_slots(plan)) if plan else (None, None)
        step = make_train_step(stage, tx, mesh, masks_at, rules, added=added)
        variants = [_compile(step, state, batch, extra) for extra in ((), (jnp.float32(0.5),))]
        peak = matmul_peak(stage.model.dtype)
        for repeat in range(steps + 1):  # the first is a warm-up
            for timed in variants:
                start = time.perf_counter()
                state, metrics = timed.step(state, batch, *timed.extra)
                jax.block_until_ready((state, metrics))
                if repeat:
                    timed.times.append(time.perf_counter() - start)
        peak = max(peak, matmul_peak(stage.model.dtype))
    tokens = stage.batch_size * length
    flops = tokens * counts.flops_per_token_train(stage.model, length)
    peak *= jax.device_count() if jax.default_backend() != "cpu" else 1
    plain, masked = (_result(timed, tokens, flops, peak) for timed in variants)
    return {
        **plain,
        "masked": masked,
        "mask_overhead": masked["step_s"] / plain["step_s"] - 1,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


def _result(timed: _Timed, tokens: int, flops: float, peak: float) -> dict[str, Any]:
    """Returns one kind of step's results."""
    step_s = statistics.median(timed.times)
    return {
        "tokens_per_s": tokens / step_s,
        "step_s": step_s,
        "compile_s": timed.compile_s,
        "model_flops_per_s": flops / step_s,
        "matmul_peak_flops_per_s": peak,
        "utilisation": flops / step_s / peak,
        "peak_bytes": timed.peak_bytes,
    }


@functools.partial(jax.jit, static_argnames="config")
def _uncached(
    params: Any, tokens_BT: jax.Array, last: jax.Array, config: TransformerConfig
) -> jax.Array:
    """Returns the most likely token after position `last`, int32 [B], by a full forward pass."""
    logits_BTV: jax.Array = Transformer(config).apply({"params": params}, tokens_BT)  # type: ignore[assignment]
    last_BV = jax.lax.dynamic_index_in_dim(logits_BTV, last, axis=1, keepdims=False)
    return jnp.argmax(last_BV, axis=-1).astype(jnp.int32)


def measure_generation(
    config: TransformerConfig, batch: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """Times greedy decoding with and without a cache, on random weights and random prompts.

    Steps of both kinds alternate. The cache has room for prompt and new tokens, rounded up, and the
    pass without a cache runs over the same length, so each kind is compiled once.

    Args:
      config: the model.
      batch: number of texts generated together.
      prompt_tokens: length of every prompt.
      new_tokens: number of timed steps of each kind.

    Returns:
      cached_tokens_per_s and uncached_tokens_per_s (batch over the median step), ratio,
      prefill_tokens_per_s (of the prompt, after compilation), compile_s (of prefill and cached step
      together), the numbers of parameters, texts, tokens and cache slots, and the device's kind.
    """
    host.keep_freed()
    key = jax.random.key(0)
    params = jax.jit(lambda k: Transformer(config).init(k, jnp.zeros((1, 1), jnp.int32))["params"])(
        key
    )
    length = bucket(prompt_tokens + new_tokens)
    rng = np.random.default_rng(0)
    prompt_BT = rng.integers(0, config.vocab_size, (batch, prompt_tokens)).astype(np.int32)
    times = _time_generation(params, prompt_BT, length, new_tokens, key, config)
    cached, uncached = (batch / statistics.median(t) for t in (times.cached, times.uncached))
    return {
        "cached_tokens_per_s": cached,
        "uncached_tokens_per_s": uncached,
        "ratio": cached / uncached,
        "prefill_tokens_per_s": batch * prompt_tokens / times.prefill_s,
        "compile_s": times.compile_s,
        "params": counts.params(config),
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "slots": length,
        "device": jax.devices()[0].device_kind,
    }


@dataclasses.dataclass(frozen=True)
class _GenerationTimes:
    """Seconds of compilation (with the first run), of the prefill, and of every step."""

    compile_s: float
    prefill_s: float
    cached: list[float]
    uncached: list[float]


def _time_generation(
    params: Any,
    prompt_BT: np.ndarray,
    length: int,
    new_tokens: int,
    key: jax.Array,
    config: TransformerConfig,
) -> _GenerationTimes:
    """Compiles and times prefill, cached steps and uncached steps; texts have `length` slots."""
    batch, prompt_tokens = prompt_BT.shape
    own = by_layer(params, config)
    padding_B = jnp.zeros(batch, jnp.int32)
    keys_B = jax.random.split(key, batch)
    limits = jnp.float32(1), jnp.int32(1), jnp.float32(1)

    def prompt_cache() -> Cache:
        empty = Cache.empty(config, batch, length)
        cache: Cache = prefill(own, empty, prompt_BT, padding_B, config)
        return cache

    start = time.perf_counter()
    cache = jax.block_until_ready(prompt_cache())
    last_B = jnp.asarray(prompt_BT[:, -1])
    decoded = decode(own, cache, last_B, padding_B, keys_B, limits, config, True)
    jax.block_until_ready(decoded)
    compile_s = time.perf_counter() - start
    text_BT = np.zeros((batch, length), np.int32)
    text_BT[:, :prompt_tokens] = prompt_BT
    _uncached(params, text_BT, jnp.int32(0), config).block_until_ready()

    start = time.perf_counter()
    cache = jax.block_until_ready(prompt_cache())
    prefill_s = time.perf_counter() - start
    times = _GenerationTimes(compile_s, prefill_s, [], [])
    for step in range(new_tokens):
        start = time.perf_counter()
        cache, last_B = decode(own, cache, last_B, padding_B, keys_B, limits, config, True)
        last_B.block_until_ready()
        times.cached.append(time.perf_counter() - start)
        start = time.perf_counter()
        _uncached(params, text_BT, jnp.int32(prompt_tokens + step - 1), config).block_until_ready()
        times.uncached.append(time.perf_counter() - start)
    return times

"""Learning-rate schedules: the factor in [0, 1] by global step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from flm_jax.config import ScheduleConfig

Schedule = Callable[[jax.Array], jax.Array]


def steady(step: jax.Array) -> jax.Array:
    """The schedule that stays at 1."""
    del step
    return jnp.ones((), jnp.float32)


def schedule_shape(schedule: ScheduleConfig, total_steps: int) -> Schedule:
    """The learning rate's factor in [0, 1] at a global step, without re-warm-ups."""
    total = schedule.total_steps or total_steps
    warmup = schedule.warmup_steps
    warm = optax.linear_schedule(0.0, 1.0, max(warmup, 1))
    if schedule.kind == "cosine":
        after = optax.cosine_decay_schedule(1.0, max(total - warmup, 1), schedule.final_ratio)
    elif schedule.kind == "wsd":
        stable = max(total - warmup - schedule.decay_steps, 0)
        after = optax.linear_schedule(
            1.0, schedule.final_ratio, max(schedule.decay_steps, 1), transition_begin=stable
        )
    else:
        after = optax.constant_schedule(1.0)
    # Step 0 is the first update, so that warm-up never wastes a step at zero.
    joined = optax.join_schedules([warm, after], [warmup])

    def shape(step: jax.Array) -> jax.Array:
        counted = jnp.where(step < warmup, step + 1, step).astype(jnp.float32)
        return jnp.asarray(joined(counted), jnp.float32)

    return shape


def rewarmed(shape: Schedule, start: int, steps: int, ratio: float) -> Schedule:
    """The schedule, rising again from `ratio` to its value over `steps` steps after `start`."""
    if steps == 0:
        return shape
    rise = optax.linear_schedule(ratio, 1.0, steps)

    def again(step: jax.Array) -> jax.Array:
        since = (step - start).astype(jnp.float32)
        return shape(step) * jnp.where(since < 0, 1.0, rise(since))

    return again

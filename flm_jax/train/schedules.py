"""Learning-rate schedules: a factor in [0, 1] for each global step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from flm_jax.config import ScheduleConfig
from flm_jax.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]


def steady(step: jax.Array) -> jax.Array:
    """The schedule that stays at 1."""
    del step
    return jnp.ones((), jnp.float32)


def schedule_shape(schedule: ScheduleConfig, total_steps: int) -> Schedule:
    """Makes the chain's schedule, without re-warm-ups.

    Args:
      schedule: its kind and lengths.
      total_steps: steps of the chain, for a schedule that does not give its own.

    Returns:
      Global step -> float32 factor in [0, 1].

    Raises:
      UserError: its parts are longer than the whole: it would never reach its peak or its end.
        The default warm-up alone may be longer.
    """
    total = schedule.total_steps or total_steps
    warmup = schedule.warmup_steps
    decay = schedule.decay_steps if schedule.kind == "wsd" else 0
    # Short chains, also those of earlier versions, may leave the default warm-up as it is.
    chosen = decay or warmup != ScheduleConfig.warmup_steps
    if total and chosen and warmup + decay > total:
        parts = f"ScheduleConfig.warmup_steps is {warmup}"
        if decay:
            parts += f" and decay_steps {decay}, together {warmup + decay}"
        raise UserError(
            f"{parts}, more than the {total} steps of the schedule; make them shorter, or train "
            "longer"
        )
    warm = optax.linear_schedule(0.0, 1.0, max(warmup, 1))
    if schedule.kind == "cosine":
        after = optax.cosine_decay_schedule(1.0, max(total - warmup, 1), schedule.final_ratio)
    elif schedule.kind == "wsd":
        stable = max(total - warmup - decay, 0)
        after = optax.linear_schedule(
            1.0, schedule.final_ratio, max(decay, 1), transition_begin=stable
        )
    else:
        after = optax.constant_schedule(1.0)
    # Warm-up counts from 1, so that the first update (step 0) is not wasted at a rate of zero.
    joined = optax.join_schedules([warm, after], [warmup])

    def shape(step: jax.Array) -> jax.Array:
        counted = jnp.where(step < warmup, step + 1, step).astype(jnp.float32)
        return jnp.asarray(joined(counted), jnp.float32)

    return shape


def rewarmed(shape: Schedule, start: int, steps: int, ratio: float) -> Schedule:
    """Adds a re-warm-up to a schedule.

    Args:
      shape: the schedule.
      start: global step of the growth.
      steps: length of the re-warm-up; 0: none.
      ratio: where it starts, as a fraction of the schedule's value.

    Returns:
      The schedule; from `start` on it is multiplied by a factor that rises from `ratio` to 1.
    """
    if steps == 0:
        return shape
    rise = optax.linear_schedule(ratio, 1.0, steps)

    def with_rise(step: jax.Array) -> jax.Array:
        since = (step - start).astype(jnp.float32)
        return shape(step) * jnp.where(since < 0, 1.0, rise(since))

    return with_rise

"""AdamW in µP groups, with an age for every slot, and the learning-rate schedule.

A slot that growth added has seen fewer steps than its neighbours, so its moments need their own
bias correction: with zero moments and the old step count, the first updates of beta2 = 0.999 are
up to 6.6 times the learning rate. Ages are kept per axis (one birth step for each slot) and
combined by broadcasting: an entry is as old as the youngest of its slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flm_jax import axes, mup
from flm_jax.config import (
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    TransformerConfig,
)
from flm_jax.precision import wide

Schedule = Callable[[jax.Array], jax.Array]


class SlotAdamState(NamedTuple):
    """Adam's state with one birth step for every slot of every axis."""

    steps: jax.Array  # int32: updates done
    mu: Any
    nu: Any
    born: dict[str, jax.Array]  # axis -> int32 [size]: `steps` when the slot was added


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    """Maps (param, leaf, ...) -> leaf over trees shaped like the axis table."""
    flat = [dict(axes.flatten(tree)) for tree in trees]
    return axes.unflatten(
        {path: function(param, *(f[path] for f in flat)) for path, param in axes.TABLE.items()}
    )


def _correction(param: axes.Param, decay: dict[str, jax.Array], dtype: Any) -> jax.Array:
    """1 - beta^age, broadcast over the parameter: the youngest slot has the largest beta^age."""
    ndim = len(param.axes)
    oldest = jnp.zeros((1,) * ndim, dtype)
    for dim, axis in enumerate(param.axes):
        shape = [-1 if d == dim else 1 for d in range(ndim)]
        oldest = jnp.maximum(oldest, decay[axis].astype(dtype).reshape(shape))
    return 1 - oldest


def scale_by_slot_adam(
    sizes: dict[str, int], b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980, algorithm 1) whose step count t is that of each slot.

    Equal to `optax.scale_by_adam` as long as no slot was added.

    Args:
      sizes: axis -> size.
      b1, b2, eps: Adam's.
    """

    def init(params: Any) -> SlotAdamState:
        return SlotAdamState(
            steps=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(jnp.zeros_like, params),
            born={axis: jnp.zeros(size, jnp.int32) for axis, size in sizes.items()},
        )

    def update(grads: Any, state: SlotAdamState, params: Any = None) -> tuple[Any, SlotAdamState]:
        del params
        steps = state.steps + 1
        # float64 states correct in float64; the power itself is taken on small vectors.
        dtype = wide(jax.tree.leaves(grads)[0].dtype)
        age = {axis: (steps - born).astype(dtype) for axis, born in state.born.items()}
        decay1 = {axis: jnp.asarray(b1, dtype) ** a for axis, a in age.items()}
        decay2 = {axis: jnp.asarray(b2, dtype) ** a for axis, a in age.items()}
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * jnp.square(g), grads, state.nu)

        def direction(param: axes.Param, m: jax.Array, v: jax.Array) -> jax.Array:
            m_hat = m / _correction(param, decay1, m.dtype)
            v_hat = v / _correction(param, decay2, v.dtype)
            return m_hat / (jnp.sqrt(v_hat) + eps)

        return _map(direction, mu, nu), SlotAdamState(steps, mu, nu, state.born)

    return optax.GradientTransformation(init, update)


def add_mup_decay(weight_decay: float, model: TransformerConfig) -> optax.GradientTransformation:
    """Adds weight_decay * decay_mult * parameter to the update (arXiv 1711.05101)."""

    def update(updates: Any, state: optax.EmptyState, params: Any) -> tuple[Any, optax.EmptyState]:
        def decayed(param: axes.Param, u: jax.Array, p: jax.Array) -> jax.Array:
            return u + weight_decay * mup.decay_mult(param, model) * p

        return _map(decayed, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_mup_learning_rate(stage: StageConfig, shape: Schedule) -> optax.GradientTransformation:
    """Multiplies by minus the learning rate: the stage's peak, µP's multiplier, the schedule."""

    def peak(param: axes.Param) -> float:
        base = stage.matrix_learning_rate if param.matrix_like else stage.learning_rate
        return base * mup.learning_rate_mult(param, stage.model)

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: optax.ScaleByScheduleState, params: Any = None
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        del params
        now = shape(state.count)
        scaled = _map(lambda param, u: u * (-peak(param) * now).astype(u.dtype), updates)
        return scaled, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


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


def optimizer(
    stage: StageConfig, settings: OptimizerConfig, shape: Schedule
) -> optax.GradientTransformation:
    """Clipping by global norm, slot-aged Adam, µP decay, µP learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        scale_by_slot_adam(axes.axis_sizes(stage.model), settings.b1, settings.b2, settings.eps),
        add_mup_decay(settings.weight_decay, stage.model),
        scale_by_mup_learning_rate(stage, shape),
    )

"""AdamW in µP groups, with an age for every slot.

A slot that growth added has seen fewer steps than its neighbours, so its moments need their own
bias correction: with zero moments and the old step count, the first updates with beta2 = 0.999
would be up to 6.6 times the learning rate. Ages are kept per axis (one birth step for each slot)
and combined by broadcasting: an entry is as old as the youngest of its slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flm_jax.config import OptimizerConfig, StageConfig, require_type
from flm_jax.params import axes, mup, trees
from flm_jax.params.axes import ModelSpec, Param, Role
from flm_jax.params.dtypes import wide
from flm_jax.params.trees import along
from flm_jax.train.schedules import Schedule


class SlotAdamState(NamedTuple):
    """Adam's state, with ages and multipliers that differ from slot to slot.

    The multipliers are all 1 until a growth with rates "carry" or "ramp" (`growth/moments.py`).
    Slots with `sourced` 0 are exempt from `step_scale` and `eps_scale`.
    """

    steps: jax.Array  # int32: updates done
    mu: Any
    nu: Any
    born: dict[str, jax.Array]  # axis -> int32 [size]: `steps` when the slot was added
    share: dict[str, jax.Array]  # axis -> [size]: factor on readers' steps and writers' eps
    sourced: dict[str, jax.Array]  # axis -> [size]: 1, or 0 for slots without a source
    step_scale: jax.Array  # [parameters], in the table's order: factor on steps
    eps_scale: jax.Array  # [parameters], in the table's order: factor on eps


class SinceGrowth(NamedTuple):
    """How the optimizer changes over the steps after a growth.

    Attributes:
      start: global step of the growth; slots born at this step or later count as added.
      added_rate: learning rate of added slots over that of old ones (SPARKLING, ICML 2026: 1.3).
      added_rate_steps: steps in which it rises linearly to this value (SPARKLING: 250).
      fade_steps: steps in which the state's multipliers fade geometrically to 1; 0: they stay.
    """

    start: int
    added_rate: float = 1.0
    added_rate_steps: int = 1
    fade_steps: int = 0


def _map(table: axes.Table, function: Callable[..., Any], *nested: Any) -> Any:
    """Maps `function(path, param, leaf, ...)` over trees shaped like the axis table."""
    flat = [dict(trees.flatten(tree)) for tree in nested]
    return trees.unflatten(
        {path: function(path, p, *(f[path] for f in flat)) for path, p in table.items()}
    )


def _combined(
    param: Param,
    vectors: dict[str, jax.Array],
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    applies: Callable[[Param, str, Role], bool] = lambda param, axis, role: True,
) -> jax.Array:
    """Combines per-axis vectors by broadcasting, over the parameter's axes that `applies` picks."""
    parts = [
        along(vectors[axis], dim, len(param.axes))
        for dim, (axis, role) in enumerate(zip(param.axes, param.roles, strict=True))
        if applies(param, axis, role)
    ]
    one = jnp.ones((1,) * len(param.axes), jax.tree.leaves(vectors)[0].dtype)
    return functools.reduce(combine, parts) if parts else one


def _shares_out(param: Param, axis: str, role: Role) -> bool:
    """Whether the parameter divides a slot's contribution among its copies."""
    return role is Role.IN or axis in param.carries


def _is_copied(param: Param, axis: str, role: Role) -> bool:
    """Whether a slot's copies in the parameter are equal, so that they divide its gradient."""
    return role in (Role.OUT, Role.GAIN) and axis not in param.carries


def scale_by_slot_adam(
    spec: ModelSpec, b1: float, b2: float, eps: float, growth: SinceGrowth | None = None
) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980, algorithm 1) in which every slot has its own step count t.

    An entry is as old as the youngest of its slots. The result equals `optax.scale_by_adam` as long
    as no slot was added. Multipliers act on the direction only: decoupled decay is added afterwards
    and is not affected.

    Args:
      spec: the model.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment.
      growth: how the steps after the stage's growth differ; None: multipliers stay as they are.

    Returns:
      The transformation; its state is a `SlotAdamState`.
    """
    table, sizes = spec.table, spec.sizes

    def init(params: Any) -> SlotAdamState:
        dtype = jax.tree.leaves(params)[0].dtype
        return SlotAdamState(
            steps=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(jnp.zeros_like, params),
            born={axis: jnp.zeros(size, jnp.int32) for axis, size in sizes.items()},
            share={axis: jnp.ones(size, dtype) for axis, size in sizes.items()},
            sourced={axis: jnp.ones(size, dtype) for axis, size in sizes.items()},
            step_scale=jnp.ones(len(table), dtype),
            eps_scale=jnp.ones(len(table), dtype),
        )

    def update(grads: Any, state: SlotAdamState, params: Any = None) -> tuple[Any, SlotAdamState]:
        del params
        steps = state.steps + 1
        # float64 states correct in float64; the power itself is taken on small vectors.
        dtype = wide(jax.tree.leaves(grads)[0].dtype)
        age = {axis: (steps - born).astype(dtype) for axis, born in state.born.items()}
        decay1 = {axis: jnp.asarray(b1, dtype) ** a for axis, a in age.items()}
        decay2 = {axis: jnp.asarray(b2, dtype) ** a for axis, a in age.items()}
        kept = jnp.ones((), dtype)  # exponent of the multipliers: 1 at first, 0 once they faded
        if growth and growth.fade_steps:
            kept = 1 - jnp.clip((steps - growth.start) / growth.fade_steps, 0, 1).astype(dtype)
        share = {axis: x**kept for axis, x in state.share.items()}
        step_scale, eps_scale = state.step_scale**kept, state.eps_scale**kept
        boosted = {
            axis: jnp.minimum(a / growth.added_rate_steps, 1)
            * (state.born[axis] >= growth.start).astype(dtype)
            for axis, a in age.items()
            if growth and growth.added_rate != 1
        }
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * jnp.square(g), grads, state.nu)
        row = {path: n for n, path in enumerate(table)}

        def direction(path: str, param: Param, m: jax.Array, v: jax.Array) -> jax.Array:
            # The youngest slot has the largest beta^age.
            m_hat = m / (1 - _combined(param, decay1, jnp.maximum).astype(m.dtype))
            v_hat = v / (1 - _combined(param, decay2, jnp.maximum).astype(v.dtype))
            sourced = _combined(param, state.sourced, jnp.multiply)
            scale = 1 + sourced * (step_scale[row[path]] - 1)
            scale = scale * _combined(param, share, jnp.multiply, _shares_out)
            eps_here = 1 + sourced * (eps_scale[row[path]] - 1)
            eps_here = eps * spec.scale(path).eps * eps_here
            eps_here = eps_here * _combined(param, share, jnp.multiply, _is_copied)
            if growth and boosted:
                progress = _combined(param, boosted, jnp.maximum)
                scale = scale * (1 + (growth.added_rate - 1) * progress)
            return scale.astype(m.dtype) * m_hat / (jnp.sqrt(v_hat) + eps_here)

        return _map(table, direction, mu, nu), state._replace(steps=steps, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def add_mup_decay(weight_decay: float, spec: ModelSpec) -> optax.GradientTransformation:
    """Adds decoupled weight decay (arXiv 1711.05101), times `Scale.decay`, to the updates."""

    def update(updates: Any, state: optax.EmptyState, params: Any) -> tuple[Any, optax.EmptyState]:
        def decayed(path: str, param: Param, u: jax.Array, p: jax.Array) -> jax.Array:
            del param
            return u + weight_decay * spec.scale(path).decay * p

        return _map(spec.table, decayed, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_mup_learning_rate(
    spec: ModelSpec, learning_rate: float, matrix_learning_rate: float, shape: Schedule
) -> optax.GradientTransformation:
    """Multiplies updates by minus the learning rate: peak times µP's factor times schedule.

    Args:
      spec: the model.
      learning_rate: peak, for vector-like parameters and readouts.
      matrix_learning_rate: peak, for matrix-like parameters at the µP base width.
      shape: factor on the learning rate, by global step.
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: optax.ScaleByScheduleState, params: Any = None
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        del params
        schedule_factor = shape(state.count)

        def scaled(path: str, param: Param, u: jax.Array) -> jax.Array:
            peak = matrix_learning_rate if param.matrix_like else learning_rate
            return u * (-(peak * spec.scale(path).rate) * schedule_factor).astype(u.dtype)

        updates = _map(spec.table, scaled, updates)
        return updates, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def optimizer(
    stage: StageConfig, settings: OptimizerConfig, shape: Schedule, grown_at: int | None = None
) -> optax.GradientTransformation:
    """AdamW in µP groups: clipping by global norm, slot-aged Adam, decay, learning rate.

    Args:
      stage: gives the model, the peak learning rates, and the rate of added slots.
      settings: Adam's betas and eps, weight decay, and the norm to clip at.
      shape: factor on the learning rate, by global step.
      grown_at: global step of the stage's growth; None: it did not grow.

    Raises:
      UserError: `stage` or `settings` is of the wrong type.
    """
    require_type(stage, StageConfig, "optimizer: stage")
    require_type(settings, OptimizerConfig, "optimizer: settings")
    g, spec = stage.growth, mup.spec(stage.model)
    growth = None
    if grown_at is not None:
        fade = g.ramp_steps if g.rates == "ramp" else 0
        growth = SinceGrowth(grown_at, g.added_rate, g.added_rate_steps, fade)
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        scale_by_slot_adam(spec, settings.b1, settings.b2, settings.eps, growth),
        add_mup_decay(settings.weight_decay, spec),
        scale_by_mup_learning_rate(spec, stage.learning_rate, stage.matrix_learning_rate, shape),
    )

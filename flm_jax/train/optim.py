"""AdamW in µP groups, with an age for every slot, and the learning-rate schedule.

A slot that growth added has seen fewer steps than its neighbours, so its moments need their own
bias correction: with zero moments and the old step count, the first updates of beta2 = 0.999 are
up to 6.6 times the learning rate. Ages are kept per axis (one birth step for each slot) and
combined by broadcasting: an entry is as old as the youngest of its slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flm_jax.config import OptimizerConfig, StageConfig, TransformerConfig
from flm_jax.params import axes, mup, trees
from flm_jax.params.dtypes import wide
from flm_jax.params.trees import along
from flm_jax.train.schedules import Schedule


class SlotAdamState(NamedTuple):
    """Adam's state, with ages and multipliers that differ from slot to slot.

    The multipliers are all 1 until a growth with rates "carry" or "ramp" (`growth/apply.py`).
    """

    steps: jax.Array  # int32: updates done
    mu: Any
    nu: Any
    born: dict[str, jax.Array]  # axis -> int32 [size]: `steps` when the slot was added
    share: dict[str, jax.Array]  # axis -> [size]: scales readers' steps and writers' eps
    sourced: dict[str, jax.Array]  # axis -> [size]: 1, or 0 for slots without a source, which the
    step_scale: jax.Array  # [parameters, in the table's order] scales of steps
    eps_scale: jax.Array  # [parameters] and of eps do not touch


class SinceGrowth(NamedTuple):
    """What changes with the steps after a growth.

    Attributes:
      start: the growth's step; slots born then are added.
      added_rate, added_rate_steps: added slots' learning rate over that of old ones, and the steps
        in which it gets there (SPARKLING, ICML 2026: 1.3 and 250).
      fade_steps: the state's multipliers fade to 1, geometrically, over these steps; 0: they stay.
    """

    start: int
    added_rate: float = 1.0
    added_rate_steps: int = 1
    fade_steps: int = 0


def _map(function: Callable[..., Any], *given: Any) -> Any:
    """Maps (path, param, leaf, ...) -> leaf over trees shaped like the axis table."""
    flat = [dict(trees.flatten(tree)) for tree in given]
    return trees.unflatten(
        {path: function(path, p, *(f[path] for f in flat)) for path, p in axes.TABLE.items()}
    )


def _combined(
    param: axes.Param,
    vectors: dict[str, jax.Array],
    with_: Callable[[jax.Array, jax.Array], jax.Array],
    roles: frozenset[axes.Role] = frozenset(axes.Role),
) -> jax.Array:
    """Per-axis vectors of the parameter's axes in these roles, combined by broadcasting."""
    parts = [
        along(vectors[axis], dim, len(param.axes))
        for dim, (axis, role) in enumerate(zip(param.axes, param.roles, strict=True))
        if role in roles
    ]
    one = jnp.ones((1,) * len(param.axes), jax.tree.leaves(vectors)[0].dtype)
    return functools.reduce(with_, parts) if parts else one


_READ = frozenset({axes.Role.IN})
_WRITTEN = frozenset({axes.Role.OUT, axes.Role.GAIN})


def scale_by_slot_adam(
    sizes: dict[str, int], b1: float, b2: float, eps: float, growth: SinceGrowth | None = None
) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980, algorithm 1) whose step count t is that of each slot.

    An entry is as old as the youngest of its slots. Equal to `optax.scale_by_adam` as long as no
    slot was added. Multipliers act on the direction alone: decoupled decay, added afterwards,
    keeps its pace.

    Args:
      sizes: axis -> size.
      b1, b2, eps: Adam's.
      growth: of the stage; None: multipliers stay as they are.
    """

    def init(params: Any) -> SlotAdamState:
        dtype = jax.tree.leaves(params)[0].dtype
        return SlotAdamState(
            steps=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(jnp.zeros_like, params),
            born={axis: jnp.zeros(size, jnp.int32) for axis, size in sizes.items()},
            share={axis: jnp.ones(size, dtype) for axis, size in sizes.items()},
            sourced={axis: jnp.ones(size, dtype) for axis, size in sizes.items()},
            step_scale=jnp.ones(len(axes.TABLE), dtype),
            eps_scale=jnp.ones(len(axes.TABLE), dtype),
        )

    def update(grads: Any, state: SlotAdamState, params: Any = None) -> tuple[Any, SlotAdamState]:
        del params
        steps = state.steps + 1
        # float64 states correct in float64; the power itself is taken on small vectors.
        dtype = wide(jax.tree.leaves(grads)[0].dtype)
        age = {axis: (steps - born).astype(dtype) for axis, born in state.born.items()}
        decay1 = {axis: jnp.asarray(b1, dtype) ** a for axis, a in age.items()}
        decay2 = {axis: jnp.asarray(b2, dtype) ** a for axis, a in age.items()}
        kept = jnp.ones((), dtype)  # how much of the state's multipliers is in force
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
        row = {path: n for n, path in enumerate(axes.TABLE)}

        def direction(path: str, param: axes.Param, m: jax.Array, v: jax.Array) -> jax.Array:
            # The youngest slot has the largest beta^age.
            m_hat = m / (1 - _combined(param, decay1, jnp.maximum).astype(m.dtype))
            v_hat = v / (1 - _combined(param, decay2, jnp.maximum).astype(v.dtype))
            sourced = _combined(param, state.sourced, jnp.multiply)
            scale = 1 + sourced * (step_scale[row[path]] - 1)
            scale = scale * _combined(param, share, jnp.multiply, _READ)
            eps_here = 1 + sourced * (eps_scale[row[path]] - 1)
            eps_here = eps * eps_here * _combined(param, share, jnp.multiply, _WRITTEN)
            if growth and boosted:
                risen = _combined(param, boosted, jnp.maximum)
                scale = scale * (1 + (growth.added_rate - 1) * risen)
            return scale.astype(m.dtype) * m_hat / (jnp.sqrt(v_hat) + eps_here)

        return _map(direction, mu, nu), state._replace(steps=steps, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def add_mup_decay(weight_decay: float, model: TransformerConfig) -> optax.GradientTransformation:
    """Adds weight_decay * decay_mult * parameter to the update (arXiv 1711.05101)."""

    def update(updates: Any, state: optax.EmptyState, params: Any) -> tuple[Any, optax.EmptyState]:
        def decayed(_: str, param: axes.Param, u: jax.Array, p: jax.Array) -> jax.Array:
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
        scaled = _map(lambda _, param, u: u * (-peak(param) * now).astype(u.dtype), updates)
        return scaled, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def optimizer(
    stage: StageConfig, settings: OptimizerConfig, shape: Schedule, grown_at: int | None = None
) -> optax.GradientTransformation:
    """Clipping by global norm, slot-aged Adam, µP decay, µP learning rate.

    Args:
      stage: its model, its peaks, and its growth's rate of added slots.
      settings: Adam's.
      shape: learning-rate factor by global step.
      grown_at: global step of the stage's growth; None: it did not grow.
    """
    g, sizes = stage.growth, axes.axis_sizes(stage.model)
    growth = None
    if grown_at is not None:
        fade = g.ramp_steps if g.rates == "ramp" else 0
        growth = SinceGrowth(grown_at, g.added_rate, g.added_rate_steps, fade)
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        scale_by_slot_adam(sizes, settings.b1, settings.b2, settings.eps, growth),
        add_mup_decay(settings.weight_decay, stage.model),
        scale_by_mup_learning_rate(stage, shape),
    )

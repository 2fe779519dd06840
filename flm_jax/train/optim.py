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

from flm_jax.checks import require, require_type
from flm_jax.config import OptimizerConfig, StageConfig
from flm_jax.params import axes, mup, trees
from flm_jax.params.axes import ModelSpec, Param, Role
from flm_jax.params.dtypes import wide
from flm_jax.train.schedules import Schedule
from flm_jax.train.slots import combined
from flm_jax.train.trained import Trained, at_trained_rate, clip_by_trained_norm


class SlotAdamState(NamedTuple):
    """Adam's state, with ages and multipliers that differ from slot to slot.

    A slot is an index of an axis; parameters with query heads count these (`Param.slots`). The
    multipliers are all 1 until a growth with rates "carry" or "ramp" (`growth/moments.py`). They
    have one row for each growth: an entry takes the row of the growth that created its newest slot.
    What is in force is the multiplier to the power `kept`.
    """

    steps: jax.Array  # int32: updates done
    mu: Any
    nu: Any
    born: dict[str, jax.Array]  # kind of slot -> int32 [size]: `steps` when the slot was added
    created: dict[str, jax.Array]  # kind of slot -> int32 [size]: row of its multipliers
    share: dict[str, jax.Array]  # kind -> [rows, size]: factor on readers' steps and writers' eps
    step_scale: jax.Array  # [rows, parameters], in the table's order: factor on steps
    eps_scale: jax.Array  # [rows, parameters], in the table's order: factor on eps
    kept: jax.Array  # exponent of all multipliers: 1, or falling to 0 during a ramp


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


def _shares_out(param: Param, axis: str, role: Role) -> bool:
    """Whether the parameter divides a slot's contribution among its copies."""
    return role is Role.IN or axis in param.carries


def _is_copied(param: Param, axis: str, role: Role) -> bool:
    """Whether a slot's copies in the parameter are equal, so that they divide its gradient."""
    return role in (Role.OUT, Role.GAIN) and axis not in param.carries


def scale_by_slot_adam(
    spec: ModelSpec,
    b1: float,
    b2: float,
    eps: float,
    growth: SinceGrowth | None = None,
    moment_dtype: str = "",
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
      moment_dtype: how the moments are stored; "": as the parameters. They are widened, updated and
        used in the gradient's dtype, and rounded once, to the nearest, at the end of a step.

    Returns:
      The transformation; its state is a `SlotAdamState`.
    """
    table = spec.table

    def init(params: Any) -> SlotAdamState:
        dtype = jax.tree.leaves(params)[0].dtype
        zeros = functools.partial(jnp.zeros_like, dtype=moment_dtype or None)
        return SlotAdamState(
            steps=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(zeros, params),
            nu=jax.tree.map(zeros, params),
            born={kind: jnp.zeros(spec.count(kind), jnp.int32) for kind in spec.slots},
            created={kind: jnp.zeros(spec.count(kind), jnp.int32) for kind in spec.slots},
            share={kind: jnp.ones((1, spec.count(kind)), dtype) for kind in spec.slots},
            step_scale=jnp.ones((1, len(table)), dtype),
            eps_scale=jnp.ones((1, len(table)), dtype),
            kept=jnp.ones((), dtype),
        )

    def update(grads: Any, state: SlotAdamState, params: Any = None) -> tuple[Any, SlotAdamState]:
        del params
        steps = state.steps + 1
        # float64 states correct in float64; the power itself is taken on small vectors.
        dtype = wide(jax.tree.leaves(grads)[0].dtype)
        age = {kind: (steps - born).astype(dtype) for kind, born in state.born.items()}
        decay1 = {kind: jnp.asarray(b1, dtype) ** a for kind, a in age.items()}
        decay2 = {kind: jnp.asarray(b2, dtype) ** a for kind, a in age.items()}
        kept = state.kept
        if growth and growth.fade_steps:
            done = (steps - growth.start) / growth.fade_steps
            kept = 1 - jnp.clip(done, 0, 1).astype(kept.dtype)
        share = {kind: x**kept for kind, x in state.share.items()}
        step_scale, eps_scale = state.step_scale**kept, state.eps_scale**kept
        boosted = {
            kind: jnp.minimum(a / growth.added_rate_steps, 1)
            * (state.born[kind] >= growth.start).astype(dtype)
            for kind, a in age.items()
            if growth and growth.added_rate != 1
        }
        mu, nu = (
            jax.tree.map(lambda g, m: m.astype(g.dtype), grads, moment)
            for moment in (state.mu, state.nu)
        )
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * jnp.square(g), grads, nu)
        column = {path: n for n, path in enumerate(table)}
        entries = functools.partial(combined, spec)

        def multiplier(
            path: str, param: Param, scale: jax.Array, applies: Callable[[Param, str, Role], bool]
        ) -> jax.Array:
            """The multiplier in force on each entry: of the growth that created its newest slot."""
            created = entries(param, state.created, jnp.maximum)
            factor = None
            for row in range(len(scale)):
                in_row = {kind: x[row] for kind, x in share.items()}
                here = scale[row, column[path]] * entries(param, in_row, jnp.multiply, applies)
                factor = here if factor is None else jnp.where(created >= row, here, factor)
            assert factor is not None
            return factor

        def direction(path: str, param: Param, m: jax.Array, v: jax.Array) -> jax.Array:
            # The youngest slot has the largest beta^age.
            m_hat = m / (1 - entries(param, decay1, jnp.maximum).astype(m.dtype))
            v_hat = v / (1 - entries(param, decay2, jnp.maximum).astype(v.dtype))
            scale = multiplier(path, param, step_scale, _shares_out)
            eps_here = eps * spec.scale(path).eps * multiplier(path, param, eps_scale, _is_copied)
            if growth and boosted:
                progress = entries(param, boosted, jnp.maximum)
                scale = scale * (1 + (growth.added_rate - 1) * progress)
            return scale.astype(m.dtype) * m_hat / (jnp.sqrt(v_hat) + eps_here)

        stored = jax.tree.map(lambda kept, m: m.astype(kept.dtype), (state.mu, state.nu), (mu, nu))
        updated = state._replace(steps=steps, mu=stored[0], nu=stored[1], kept=kept)
        return _map(table, direction, mu, nu), updated

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


def since_growth(stage: StageConfig, grown_at: int) -> SinceGrowth:
    """How a stage's growth, at this global step, changes its optimizer."""
    g = stage.growth
    fade = g.ramp_steps if g.rates == "ramp" else 0
    return SinceGrowth(grown_at, g.added_rate, g.added_rate_steps, fade)


def optimizer(
    stage: StageConfig, settings: OptimizerConfig, shape: Schedule, grown_at: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """AdamW in µP groups: clipping by global norm, slot-aged Adam, decay, learning rate.

    Args:
      stage: gives the model, the peak learning rates, the rate of added slots, and what trains.
      settings: Adam's betas and eps, weight decay, and the norm to clip at.
      shape: factor on the learning rate, by global step.
      grown_at: global step of the stage's growth; None: it did not grow.

    Returns:
      The optimizer. With a `growth.old_rate` other than 1, its update takes the slots that the
      growth added: `update(grads, state, params, added=growth.added_slots(plan))`.

    Raises:
      UserError: `stage` or `settings` is of the wrong type, `train_paths` has a pattern without a
        parameter, or moments of lower precision are asked for an exact model.
    """
    require_type(stage, StageConfig, "optimizer: stage")
    require_type(settings, OptimizerConfig, "optimizer: settings")
    require(
        not (settings.moment_dtype and stage.model.dtype == "float64"),
        f"stage {stage.name}: model.dtype is 'float64', for exactness, and optimizer.moment_dtype "
        f"{settings.moment_dtype!r}, which rounds; set moment_dtype to ''",
    )
    spec, trained = mup.spec(stage.model), Trained.of(stage)
    growth = None if grown_at is None else since_growth(stage, grown_at)
    rate = scale_by_mup_learning_rate(spec, stage.learning_rate, stage.matrix_learning_rate, shape)
    return optax.chain(
        clip_by_trained_norm(settings.clip_norm, trained),
        scale_by_slot_adam(
            spec, settings.b1, settings.b2, settings.eps, growth, settings.moment_dtype
        ),
        add_mup_decay(settings.weight_decay, spec),
        at_trained_rate(rate, trained),
    )

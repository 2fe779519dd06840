"""Applies a plan to an optimizer's state: moments, and ages and multipliers of slots.

Gradients map by the dual of the values' map (`expansion.py`). So does Adam's first moment; its
second moment maps by the square of the dual. Known states are `SlotAdamState` (`train/optim.py`),
with an age for every slot, and `optax.ScaleByAdamState`, which keeps its single step count: slots
whose moments start from zero then get the bias correction of old slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.errors import UserError
from flm_jax.growth._plan import Plan
from flm_jax.growth.expansion import Expansion, any_slot, gather, weighted
from flm_jax.params import trees
from flm_jax.params.trees import Window
from flm_jax.train.optim import SlotAdamState


def grow_opt_state(opt_state: Any, plan: Plan) -> Any:
    """Grows the state of an optax optimizer.

    Args:
      opt_state: any tree of optax states.
      plan: the growth.

    Returns:
      The same tree with every known Adam state grown; counters and schedules do not change.

    Raises:
      UserError: another state holds something shaped like the parameters, or `plan.rates` needs
        multipliers of slots that the state does not have.
    """

    def is_adam(node: Any) -> bool:
        return isinstance(node, SlotAdamState | optax.ScaleByAdamState)

    def grown(path: tuple[Any, ...], node: Any) -> Any:
        if isinstance(node, SlotAdamState):
            return grow_slots(node, plan)._replace(
                mu=_grow_moments(node.mu, plan, 1), nu=_grow_moments(node.nu, plan, 2)
            )
        if isinstance(node, optax.ScaleByAdamState):
            return _grow_optax_adam(node, plan)
        name = "/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        if name in plan.table:
            raise UserError(
                f"grow: the optimizer state at {jax.tree_util.keystr(path)} is shaped like "
                f"parameter {name!r}, and growth does not know its kind; use flm_jax.optimizer or "
                "optax.adam, or grow the parameters alone and start a new optimizer state"
            )
        return node

    return jax.tree_util.tree_map_with_path(grown, opt_state, is_leaf=is_adam)


def _grow_optax_adam(state: optax.ScaleByAdamState, plan: Plan) -> optax.ScaleByAdamState:
    """Grows the moments; the step count stays unless the plan resets the moments."""
    if plan.rates != "target":
        raise UserError(
            f"grow: rates {plan.rates!r} needs multipliers for each slot, which optax.adam does "
            "not have; use flm_jax.optimizer, or rates='target'"
        )
    count = jnp.zeros_like(state.count) if plan.moments == "reset" else state.count
    mu, nu = _grow_moments(state.mu, plan, 1), _grow_moments(state.nu, plan, 2)
    return optax.ScaleByAdamState(count=count, mu=mu, nu=nu)


def carried(e: Expansion, moments: str) -> np.ndarray:
    """Marks the slots that keep their optimizer history: bool [target]."""
    if moments == "reset":
        return np.zeros(e.target, bool)
    if moments == "asym" or e.silenced or e.ahead.any():
        return ~e.added
    return ~e.new


def grow_moment(
    x: jax.Array, path: str, plan: Plan, power: int, window: Window | None = None
) -> jax.Array:
    """Maps one of Adam's moments, by the map of gradients.

    Exact where every slot has one source. The copies of a repeated key/value head get equal shares
    of its gradient, because only the sum over them is known.

    Args:
      x: the moment, or the sources of a window's slots, as in `grow_value`.
      path: the parameter's name in the axis table.
      plan: the growth.
      power: 1 for the first moment, 2 for the second.
      window: the part of the grown moment to compute; None: all of it.

    Returns:
      The grown moment, or the window of it; zero at slots that do not keep their history.
    """
    param = plan.table[path]
    if plan.moments == "reset":
        return jnp.zeros(trees.window_shape(plan.big.shape(path), window), x.dtype)
    grown = weighted(
        gather(x, param, plan.by_axis, window),
        param,
        plan.by_axis,
        scale=1 / plan.value_scale(path),
        dual=True,
        power=power,
        window=window,
    )
    restarted = any_slot(param, plan.by_axis, lambda e, role: ~carried(e, plan.moments), window)
    return grown if restarted is None else jnp.where(restarted, jnp.zeros((), x.dtype), grown)


def _grow_moments(tree: Any, plan: Plan, power: int) -> Any:
    leaves = plan.check_source(tree).items()
    return trees.unflatten({path: grow_moment(x, path, plan, power) for path, x in leaves})


def grow_slots(state: SlotAdamState, plan: Plan) -> SlotAdamState:
    """Grows the ages and multipliers of slots; the moments stay as they are."""
    return state._replace(born=_grow_born(state, plan), **_grow_rates(state, plan))


def _grow_vector(vector: jax.Array, axis: str, plan: Plan) -> jax.Array:
    """Grows a per-slot vector: each slot gets the value of its source."""
    e = plan.by_axis.get(axis)
    if e is not None:
        return jnp.take(vector, np.maximum(e.index, 0))
    for e in plan.by_axis.values():
        if e.splits == axis:  # a new slot combines one old slot of each part: the largest value
            return vector.reshape(e.target // e.source, -1).max(0)
    return vector


def _grow_born(state: SlotAdamState, plan: Plan) -> dict[str, jax.Array]:
    """The birth steps of the target's slots."""
    if plan.moments == "reset":
        return {axis: jnp.full(plan.big.sizes[axis], state.steps) for axis in state.born}
    grown = {axis: _grow_vector(old, axis, plan) for axis, old in state.born.items()}
    for axis, e in plan.by_axis.items():
        grown[axis] = jnp.where(carried(e, plan.moments), grown[axis], state.steps)
    return grown


def _grow_rates(state: SlotAdamState, plan: Plan) -> dict[str, Any]:
    """Multipliers that keep the size of the source's steps in the function (docs/growth.md).

    If a value is multiplied by f, so are its steps; if a gradient is multiplied by g, so is Adam's
    eps. Per axis, f is alpha where the slot is read, and g is alpha where it is written. Per
    parameter, they are the scales below. Entries without a source have no multipliers. "carry"
    multiplies the state's multipliers; "ramp" starts from 1, because its multipliers fade.
    """
    sizes = plan.big.sizes
    ones: dict[str, Any] = {
        "share": {axis: jnp.ones(sizes[axis], x.dtype) for axis, x in state.share.items()},
        "sourced": {axis: jnp.ones(sizes[axis], x.dtype) for axis, x in state.sourced.items()},
        "step_scale": jnp.ones_like(state.step_scale),
        "eps_scale": jnp.ones_like(state.eps_scale),
    }
    if plan.rates == "target":
        return ones
    if plan.rates == "carry":
        for name in ("share", "sourced"):
            for axis, old in getattr(state, name).items():
                ones[name][axis] = _grow_vector(old, axis, plan)
        ones |= {"step_scale": state.step_scale, "eps_scale": state.eps_scale}
    share, sourced = dict(ones["share"]), dict(ones["sourced"])
    for axis, e in plan.by_axis.items():
        share[axis] = jnp.where(e.new, 1, share[axis] * jnp.asarray(e.weight, share[axis].dtype))
        sourced[axis] = jnp.where(e.new, 0, sourced[axis])
    value = np.array([plan.value_scale(path) * plan.gain(path) for path in plan.table])
    rate = np.array([plan.small.scale(p).rate / plan.big.scale(p).rate for p in plan.table])
    dtype = state.step_scale.dtype
    return {
        "share": share,
        "sourced": sourced,
        "step_scale": ones["step_scale"] * (value * rate).astype(dtype),
        "eps_scale": ones["eps_scale"] * (1 / value).astype(dtype),
    }

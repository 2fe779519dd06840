"""Applies a plan to an optimizer's state: moments, and ages and multipliers of slots.

Gradients map by the dual of the values' map (`expansion.py`). So do momenta and Adam's first
moment; second moments map by the square of the dual. `SlotAdamState` (`train/optim.py`) has an age
for every slot. Optax's states keep their single step count: slots whose moments start from zero
then get the bias correction of old slots.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.errors import UserError
from flm_jax.growth import locks
from flm_jax.growth._plan import LockedCopiesWarning, Plan, UnfinishedRampWarning
from flm_jax.growth.expansion import Expansion, any_slot, gather, split, weighted
from flm_jax.params import trees
from flm_jax.params.dtypes import wide
from flm_jax.params.trees import Window
from flm_jax.train.optim import SlotAdamState

# What a field of an optax state is made of: power 1 of the gradient (momentum), or power 2.
_POWERS: dict[type, dict[str, int]] = {
    optax.ScaleByAdamState: {"mu": 1, "nu": 2},
    optax.ScaleByAmsgradState: {"mu": 1, "nu": 2, "nu_max": 2},
    optax.ScaleByBeliefState: {"mu": 1, "nu": 2},
    optax.ScaleByRStdDevState: {"mu": 1, "nu": 2},
    optax.ScaleByRmsState: {"nu": 2},
    optax.ScaleByRssState: {"sum_of_squares": 2},
    optax.ScaleByLionState: {"mu": 1},
    optax.TraceState: {"trace": 1},
    optax.EmaState: {"ema": 1},
    optax.MultiStepsState: {"acc_grads": 1},
}


def register_moments(state: type, **powers: int) -> None:
    """Says how the fields of an optimizer's state grow.

    Args:
      state: the type of the state, a NamedTuple.
      **powers: for each field that is shaped like the parameters, the power of the gradient that it
        averages: 1 (a momentum, grows by the dual map) or 2 (a second moment, by its square).

    Raises:
      UserError: the state has no such field, or a power is neither 1 nor 2.
    """
    fields = getattr(state, "_fields", ())
    for name, power in powers.items():
        if name not in fields or power not in (1, 2):
            raise UserError(
                f"register_moments: {state.__name__}.{name}={power}; give fields of the state "
                f"({', '.join(fields) or 'it is no NamedTuple'}) the power 1 or 2"
            )
    _POWERS[state] = powers


def grow_opt_state(opt_state: Any, plan: Plan) -> Any:
    """Grows the state of an optax optimizer.

    Args:
      opt_state: any tree of optax states.
      plan: the growth.

    Returns:
      The same tree with every known state grown; counters and schedules do not change.

    Raises:
      UserError: another state holds something shaped like the parameters (see `register_moments`),
        parameters are frozen, or `plan.rates` needs multipliers of slots that the state lacks.
    """
    return _grow_node(opt_state, plan)


def _grow_node(tree: Any, plan: Plan) -> Any:
    def known(node: Any) -> bool:
        return isinstance(node, SlotAdamState) or type(node) in _POWERS

    def grown(path: tuple[Any, ...], node: Any) -> Any:
        if isinstance(node, SlotAdamState):
            slots = node if node.steps is None else grow_slots(node, plan)
            return slots._replace(
                mu=_grow_moments(node.mu, plan, 1), nu=_grow_moments(node.nu, plan, 2)
            )
        if known(node):
            return _grow_optax(node, plan)
        _check_foreign(path, node, plan)
        return node

    return jax.tree_util.tree_map_with_path(grown, tree, is_leaf=known)


def _grow_optax(node: Any, plan: Plan) -> Any:
    """Grows a state of optax; its step count stays unless the plan resets the moments."""
    kind = type(node).__name__
    if plan.rates != "target":
        raise UserError(
            f"grow: rates {plan.rates!r} needs multipliers for each slot, which optax's {kind} "
            "does not have; use flm_jax.optimizer, or rates='target'"
        )
    powers = _POWERS[type(node)]
    fields = {}
    for name, value in node._asdict().items():
        if name in powers:
            fields[name] = _grow_moments(value, plan, powers[name])
        elif name == "count" and plan.moments == "reset":
            fields[name] = jax.tree.map(jnp.zeros_like, value)
        else:
            fields[name] = _grow_node(value, plan)
    return type(node)(**fields)


def _check_foreign(path: tuple[Any, ...], leaf: Any, plan: Plan) -> None:
    """Raises UserError if a leaf of an unknown state belongs to a parameter."""
    keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
    names = {"/".join(keys[start:]) for start in range(len(keys))} & set(plan.table)
    shape = getattr(leaf, "shape", ())
    shaped = {path for path in plan.table if shape and plan.small.shape(path) == shape}
    everything = sum(math.prod(plan.small.shape(path)) for path in plan.table)
    if names or shaped or shape == (everything,):
        of = f"parameter {min(names or shaped)!r}" if names or shaped else "all parameters together"
        raise UserError(
            f"grow: the optimizer state at {jax.tree_util.keystr(path)} is shaped like {of}, and "
            "growth does not know its kind; register it (flm_jax.growth.register_moments), use "
            "flm_jax.optimizer, or grow the parameters alone and start a new optimizer state"
        )


def check(state: Any, plan: Plan) -> None:
    """Warns of what only a state can tell about its growth. Does nothing for traced states.

    Args:
      state: a train state, or an optimizer's state.
      plan: the growth.

    Warns:
      LockedCopiesWarning: nothing in the state's values and history separates copies.
      UnfinishedRampWarning: multipliers of an earlier growth are still fading.
    """
    leaves = jax.tree.leaves(state)
    if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in leaves):
        return
    found = plan.locks(state)
    if found and found != locks.expected(plan):
        warnings.warn(
            f"{locks.warning(plan, found)}; nothing in this state's values and history separates "
            "them",
            LockedCopiesWarning,
            stacklevel=3,
        )
    states = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, SlotAdamState))
    for kept in (float(x.kept) for x in states if isinstance(x, SlotAdamState)):
        if 0 < kept < 1 and plan.expansions:
            warnings.warn(
                f"growth of axis {plan.expansions[0].axis!r}: the multipliers of an earlier growth "
                f"are still fading (exponent {kept:.3g}), and rates {plan.rates!r} starts from "
                "them; train to the end of its ramp (growth.ramp_steps) first",
                UnfinishedRampWarning,
                stacklevel=3,
            )


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
      The grown moment, or the window of it, in its dtype; zero at slots that do not keep their
      history. Moments in bfloat16 are multiplied in float32 and rounded once.
    """
    param = plan.table[path]
    if plan.moments == "reset":
        return jnp.zeros(trees.window_shape(plan.big.shape(path), window), x.dtype)
    grown = weighted(
        gather(x.astype(wide(x.dtype)), param, plan.by_axis, window),
        param,
        plan.by_axis,
        scale=1 / plan.value_scale(path),
        dual=True,
        power=power,
        window=window,
    ).astype(x.dtype)
    restarted = any_slot(
        param, plan.by_axis, lambda e, role: ~e.keeps_history(plan.moments), window
    )
    return grown if restarted is None else jnp.where(restarted, jnp.zeros((), x.dtype), grown)


def _grow_moments(tree: Any, plan: Plan, power: int) -> Any:
    if tree is None:
        return None
    if not isinstance(tree, Mapping):
        raise UserError(
            f"grow: moments of the optimizer state are a {type(tree).__name__}, not nested dicts "
            "like the parameters, so that their slots are not known; use the optimizer without "
            "optax.flatten, or grow the parameters alone and start a new optimizer state"
        )
    for path, leaf in trees.flatten(tree):
        if isinstance(leaf, optax.MaskedNode):
            raise UserError(
                f"grow: the optimizer state has no moments of parameter {path!r}, which is frozen; "
                "grow the parameters alone and start a new optimizer state"
            )
    leaves = plan.check_source(tree).items()
    return trees.unflatten({path: grow_moment(x, path, plan, power) for path, x in leaves})


def grow_slots(state: SlotAdamState, plan: Plan) -> SlotAdamState:
    """Grows the ages and multipliers of slots; the moments stay as they are."""
    return state._replace(born=_grow_born(state, plan), **_grow_rates(state, plan))


def _grow_vector(vector: jax.Array, kind: str, plan: Plan) -> jax.Array:
    """Grows a per-slot vector [.., size]: each slot gets the value of its source.

    New slots hold arbitrary values.
    """
    axes = plan.big.slots[kind]
    lead = vector.ndim - 1
    x = vector.reshape(*vector.shape[:-1], *(plan.small.sizes[axis] for axis in axes))
    for dim, axis in enumerate(axes, lead):
        e = plan.by_axis.get(axis)
        if e is None:
            continue
        if e.splits in axes:
            x = split(x, dim, e.target // e.source)
        elif e.source == 0:
            shape = list(x.shape)
            shape[dim] = e.target
            x = jnp.zeros(shape, x.dtype)
        else:
            x = jnp.take(x, np.maximum(e.index, 0), axis=dim)
    return x.reshape(*vector.shape[:-1], -1)


def _per_slot(
    kind: str,
    plan: Plan,
    of: Callable[[Expansion], np.ndarray],
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray],
    start: Any,
) -> np.ndarray:
    """Combines numbers of the slots of each axis of a kind of slot: [size], beginning with `start`.

    An axis that is divided among copies counts for nothing.
    """
    axes = plan.big.slots[kind]
    numbers = np.full([plan.big.sizes[axis] for axis in axes], start)
    for dim, axis in enumerate(axes):
        e = plan.by_axis.get(axis)
        if e is not None and e.splits not in axes:
            numbers = combine(numbers, trees.along(of(e), dim, len(axes)))
    return numbers.reshape(-1)


def added_slots(plan: Plan) -> dict[str, np.ndarray]:
    """The slots that a growth added: new ones and copies.

    Args:
      plan: the growth.

    Returns:
      Kind of slot (`Param.slots`) -> bool [size].
    """
    return {
        kind: _per_slot(kind, plan, lambda e: e.added, np.logical_or, False)
        for kind in plan.big.slots
    }


def _grow_born(state: SlotAdamState, plan: Plan) -> dict[str, jax.Array]:
    """The birth steps of the target's slots."""
    grown = {}
    for kind, born in state.born.items():
        restarted = _per_slot(
            kind, plan, lambda e: ~e.keeps_history(plan.moments), np.logical_or,
            plan.moments == "reset",
        )  # fmt: skip
        grown[kind] = jnp.where(restarted, state.steps, _grow_vector(born, kind, plan))
    return grown


def _grow_rates(state: SlotAdamState, plan: Plan) -> dict[str, Any]:
    """Multipliers that keep the size of the source's steps in the function (docs/growth.md).

    If a value is multiplied by f, so are its steps; if its gradient is multiplied by h, so is
    Adam's eps. Per kind of slot, f is alpha where the slot is read, and h is alpha where it is
    written. Per parameter, they are the scales below. They multiply what is in force before the
    growth. If the growth makes new slots, these get a row of their own, of ones.
    """
    dtype = state.step_scale.dtype
    slots, paths = plan.big.slots, list(plan.table)
    if plan.rates == "target":
        return {
            "created": {kind: jnp.zeros(plan.big.count(kind), jnp.int32) for kind in slots},
            "share": {kind: jnp.ones((1, plan.big.count(kind)), dtype) for kind in slots},
            "step_scale": jnp.ones((1, len(paths)), dtype),
            "eps_scale": jnp.ones((1, len(paths)), dtype),
            "kept": jnp.ones((), dtype),
        }
    rows = len(state.step_scale)
    new_row = any(e.new.any() for e in plan.expansions)

    def with_new_row(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, jnp.ones((1, x.shape[1]), dtype)]) if new_row else x

    created, share = {}, {}
    for kind in slots:
        new = _per_slot(kind, plan, lambda e: e.new, np.logical_or, False)
        weight = _per_slot(kind, plan, lambda e: e.weight, np.multiply, 1.0)
        created[kind] = jnp.where(new, rows, _grow_vector(state.created[kind], kind, plan))
        in_force = _grow_vector(state.share[kind] ** state.kept, kind, plan)
        grown = in_force * jnp.asarray(weight[None], dtype)
        share[kind] = with_new_row(jnp.where(new[None], 1, grown))
    small, big = plan.small, plan.big
    value = np.array([plan.value_scale(path) * plan.gain(path) for path in paths])
    rate = np.array([small.scale(path).rate / big.scale(path).rate for path in paths])
    own_eps = np.array([small.scale(path).eps / big.scale(path).eps for path in paths])
    step, eps = (jnp.asarray(x, dtype) for x in (value * rate, own_eps / value))
    return {
        "created": created,
        "share": share,
        "step_scale": with_new_row(state.step_scale**state.kept * step[None]),
        "eps_scale": with_new_row(state.eps_scale**state.kept * eps[None]),
        "kept": jnp.ones((), dtype),
    }

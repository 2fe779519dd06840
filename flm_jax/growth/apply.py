"""Applies a plan: pure functions from old trees to grown ones.

Every function here maps one leaf at a time and works on arrays, tracers and, through
`jax.eval_shape`, on shapes alone. `grow_value` and `grow_moment` also map a window of a leaf, from
the sources of its slots, which is how a checkpoint grows on disk (`stream.py`).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.errors import UserError
from flm_jax.growth._plan import Plan
from flm_jax.growth.expansion import Expansion, any_slot, gather, grown_dims, weighted
from flm_jax.params import axes, draws, mup, trees
from flm_jax.params.axes import Param, Role
from flm_jax.params.trees import Window
from flm_jax.train.optim import SlotAdamState
from flm_jax.train.train_step import TrainState

Tree = TypeVar("Tree")


def grow(tree: Tree, plan: Plan, key: jax.Array) -> Tree:
    """Expands a parameter tree or a whole train state by a plan.

    Old slots keep their parameters; added slots get what the plan's operators say. Optimizer
    state follows `plan.moments` and `plan.rates`; the step, and with it the place in the schedule
    and in the random keys, stays.

    Args:
      tree: parameters (nested dicts as in `axes.PARAMS`) or a `TrainState` of config `plan.source`.
      plan: from `plan`.
      key: of fresh entries and noise; the result depends on it and the inputs alone.

    Returns: the same kind of tree at the size of `plan.target`, with the same dtypes.

    Raises:
      UserError: the tree is not of `plan.source`.
    """
    if not isinstance(tree, TrainState):
        return _grow_params(tree, plan, key)

    def grown(node: Any) -> Any:
        if not isinstance(node, SlotAdamState):
            return node
        mu, nu = (_grow_moments(m, plan, power) for m, power in ((node.mu, 1), (node.nu, 2)))
        return grow_slots(node, plan)._replace(mu=mu, nu=nu)

    opt_state = jax.tree.map(
        grown, tree.opt_state, is_leaf=lambda node: isinstance(node, SlotAdamState)
    )
    params = _grow_params(tree.params, plan, key)
    return dataclasses.replace(tree, params=params, opt_state=opt_state)


def _checked(tree: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    leaves = dict(trees.flatten(tree))
    expected = {path: param.shape(plan.source) for path, param in axes.TABLE.items()}
    for path in dict.fromkeys([*expected, *leaves]):
        have = leaves[path].shape if path in leaves else "missing"
        if have != expected.get(path, "absent"):
            raise UserError(
                f"grow: parameter {path!r} is {have}, the plan's source has "
                f"{expected.get(path, 'no such parameter')}; use the plan made for this state"
            )
    return leaves


def _grow_params(tree: Any, plan: Plan, key: jax.Array) -> Any:
    leaves = _checked(tree, plan).items()
    return trees.unflatten(
        {path: grow_value(x, axes.TABLE[path], plan, leaf_key(key, path)) for path, x in leaves}
    )


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """Each parameter's own, from the growth's."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def grow_value(
    x: jax.Array,
    param: Param,
    plan: Plan,
    key: jax.Array,
    window: Window | None = None,
    following: jax.Array | None = None,
) -> jax.Array:
    """The value map of one parameter: copies, then noise, fresh entries and zeros over them.

    Args:
      x: the parameter; for a window the sources of its slots (`gather`).
      param: its entry in the axis table.
      plan: of the growth. Noise and "mean" need the whole parameter.
      key: from `leaf_key`.
      window: of the grown parameter; None: all of it.
      following: as x, one layer on, if the window cuts layers and the plan looks ahead.
    """
    # Each use of randomness has a key of its own.
    fill_key, noise_key, mean_key = key, *jax.random.split(key)

    expansions = plan.by_axis
    for e in expansions.values():
        if e.fill == "mean" and e.axis in param.axes:
            x = _with_mean_slots(x, param, e, mean_key)
            expansions = {axis: other for axis, other in expansions.items() if axis != e.axis}

    def copies(x: jax.Array) -> jax.Array:
        x = gather(x, param, expansions, window)
        return weighted(x, param, expansions, scale=plan.value_scale(param), window=window)

    def marked(which: Callable[[Expansion, Role], np.ndarray | None]) -> jax.Array | None:
        return any_slot(param, expansions, which, window)

    grown = copies(x)
    ahead = marked(lambda e, role: e.ahead if role is Role.OUT else None)
    if ahead is not None and looks_ahead(param, plan):
        if following is None:
            following = jnp.take(x, next_layer(np.arange(len(x)), len(x)), axis=0)
        grown = jnp.where(ahead, copies(following), grown)
    if plan.noise_db:
        grown = grown + _separating_noise(grown, param, plan, noise_key)
    new = marked(lambda e, role: None if e.learned else e.new)
    if new is not None:
        draw = mup.initializer(param, plan.target)
        fresh = draw(fill_key, param.shape(plan.target), x.dtype, window)
        grown = jnp.where(new, fresh * jnp.asarray(plan.gain(param), x.dtype), grown)
    zero = marked(lambda e, role: _zeroed(e, role, param))
    return grown if zero is None else jnp.where(zero, jnp.zeros((), x.dtype), grown)


def looks_ahead(param: Param, plan: Plan) -> bool:
    """Whether some of its copies are written as in the next layer (bert2BERT's AKI)."""
    written = (e for _, e, role in grown_dims(param, plan.by_axis) if role is Role.OUT)
    return param.axes[0] == "layers" and any(e.ahead.any() for e in written)


def next_layer(layer: np.ndarray, layers: int) -> np.ndarray:
    return np.minimum(layer + 1, layers - 1)


def _zeroed(e: Expansion, role: Role, param: Param) -> np.ndarray | None:
    if role.value not in e.zero:
        return None
    if role is Role.STACK:
        return e.added if param.residual_writer else None
    return e.new


def _with_mean_slots(x: jax.Array, param: Param, e: Expansion, key: jax.Array) -> jax.Array:
    """New slots after the old: their mean; for what reads the axis, with their covariance too.

    A new token's logit is then the mean of the old ones, so that the log-partition rises by at
    most log(V / v) (arithmetic above geometric mean). Its embedding is a draw from the normal
    distribution with the old rows' mean and covariance, as a random mixture of deviations.
    """
    dim = param.axes.index(e.axis)
    rows = jnp.moveaxis(x, dim, 0)
    more = e.target - e.source
    mean = jnp.mean(rows, axis=0, keepdims=True)
    new = jnp.repeat(mean, more, axis=0)
    if param.roles[dim] is Role.IN and e.source > 1:
        mixture = draws.unit_normal(key, (more, e.source), x.dtype, (e.source - 1) ** -0.5)
        new = new + jnp.tensordot(mixture, rows - mean, axes=1)
    return jnp.moveaxis(jnp.concatenate([rows, new]), 0, dim)


def _separating_noise(grown: jax.Array, param: Param, plan: Plan, key: jax.Array) -> jax.Array:
    """Noise on what reads copies, summing to zero over a slot's copies: their sum stays.

    With two copies it is +N and -N (HyperCloning, arXiv 2409.12903, section 3). Its power is
    that of the parameter, less `plan.noise_db`.
    """
    for dim, e, role in grown_dims(param, plan.by_axis):
        if role is not Role.IN or e not in plan.lockable:
            continue
        rms = jnp.sqrt(jnp.mean(jnp.square(grown)))
        noise = jnp.moveaxis(draws.unit_normal(key, grown.shape, grown.dtype), dim, 0)
        count = np.bincount(e.index[~e.new], minlength=e.source)[e.index] * ~e.new
        bucket = np.where(e.new, e.source, e.index)
        sums = jax.ops.segment_sum(noise, jnp.asarray(bucket), num_segments=e.source + 1)
        shape = (-1,) + (1,) * (grown.ndim - 1)
        mean = sums[bucket] / np.maximum(count, 1).astype(grown.dtype).reshape(shape)
        # Taking the mean out leaves (c - 1) / c of the variance; slots without copies get none.
        kept = np.sqrt(count / np.maximum(count - 1, 1)) * (count > 1)
        centred = (noise - mean) * kept.astype(grown.dtype).reshape(shape)
        level = jnp.asarray(10 ** (-plan.noise_db / 20), grown.dtype)
        return jnp.moveaxis(centred, 0, dim) * rms * level
    return jnp.zeros((), grown.dtype)


def carried(e: Expansion, moments: str) -> np.ndarray:
    """bool [target]: slots whose optimizer history comes along."""
    if moments == "reset":
        return np.zeros(e.target, bool)
    if moments == "asym" or e.silenced or e.ahead.any():
        return ~e.added
    return ~e.new


def grow_moment(
    x: jax.Array, param: Param, plan: Plan, power: int, window: Window | None = None
) -> jax.Array:
    """A first (power 1) or second (2) moment by the gradients' map; zero where none comes along.

    Exact where every slot has one source; a key/value head that is repeated gets an equal share
    of its gradient, of which only the sum is known. x and window as of `grow_value`.
    """
    if plan.moments == "reset":
        return jnp.zeros(trees.window_shape(param.shape(plan.target), window), x.dtype)
    grown = weighted(
        gather(x, param, plan.by_axis, window), param, plan.by_axis,
        scale=1 / plan.value_scale(param), dual=True, power=power, window=window,
    )  # fmt: skip
    begins = any_slot(param, plan.by_axis, lambda e, role: ~carried(e, plan.moments), window)
    return grown if begins is None else jnp.where(begins, jnp.zeros((), x.dtype), grown)


def _grow_moments(tree: Any, plan: Plan, power: int) -> Any:
    leaves = _checked(tree, plan).items()
    return trees.unflatten(
        {path: grow_moment(x, axes.TABLE[path], plan, power) for path, x in leaves}
    )


def grow_slots(state: SlotAdamState, plan: Plan) -> SlotAdamState:
    """Ages and multipliers of the slots; the moments are left as they are."""
    return state._replace(born=_grow_born(state, plan), **_grow_rates(state, plan))


def _grow_vector(vector: jax.Array, axis: str, plan: Plan) -> jax.Array:
    """A per-slot vector at the target's size, each slot's from its source."""
    e = plan.by_axis.get(axis)
    if e is not None:
        return jnp.take(vector, np.maximum(e.index, 0))
    for e in plan.by_axis.values():
        if e.splits == axis:  # a slot stands for one of each part: the youngest's
            return vector.reshape(e.target // e.source, -1).max(0)
    return vector


def _grow_born(state: SlotAdamState, plan: Plan) -> dict[str, jax.Array]:
    if plan.moments == "reset":
        sizes = axes.axis_sizes(plan.target)
        return {axis: jnp.full(sizes[axis], state.steps) for axis in state.born}
    grown = {axis: _grow_vector(old, axis, plan) for axis, old in state.born.items()}
    for axis, e in plan.by_axis.items():
        grown[axis] = jnp.where(carried(e, plan.moments), grown[axis], state.steps)
    return grown


def _grow_rates(state: SlotAdamState, plan: Plan) -> dict[str, Any]:
    """Multipliers that keep the size of the source's steps in the function (docs/growth.md).

    A value that is multiplied by f has its steps multiplied by f; a gradient that is multiplied by
    g has Adam's eps multiplied by g. Per axis f is alpha where the slot is read and g is alpha
    where it is written; per parameter they are the scales below. Entries without a source have
    none. "carry" multiplies what is there; "ramp" begins anew, since its multipliers fade.
    """
    sizes = axes.axis_sizes(plan.target)
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
    value = np.array([plan.value_scale(p) * plan.gain(p) for p in axes.TABLE.values()])
    rate = np.array(
        [
            mup.learning_rate_mult(p, plan.source) / mup.learning_rate_mult(p, plan.target)
            for p in axes.TABLE.values()
        ]
    )
    dtype = state.step_scale.dtype
    return {
        "share": share,
        "sourced": sourced,
        "step_scale": ones["step_scale"] * (value * rate).astype(dtype),
        "eps_scale": ones["eps_scale"] * (1 / value).astype(dtype),
    }

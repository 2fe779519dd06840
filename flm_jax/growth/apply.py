"""Applies a plan to parameters: pure functions from old trees to grown ones.

Every function here maps one leaf at a time. It works on arrays, on tracers and, through
`jax.eval_shape`, on shapes only. `grow_value` can also map a window of a leaf, from the sources of
its slots; this is how a checkpoint grows on disk (`stream.py`).
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.errors import UserError
from flm_jax.growth import locks, moments
from flm_jax.growth._plan import Plan
from flm_jax.growth.expansion import (
    DenseMaps,
    Expansion,
    any_slot,
    gather,
    grown_dims,
    weighted,
)
from flm_jax.params import draws, trees
from flm_jax.params.axes import Param, Role
from flm_jax.params.trees import Window
from flm_jax.train.train_step import TrainState

Tree = TypeVar("Tree")


def grow(tree: Tree, plan: Plan, key: jax.Array) -> Tree:
    """Expands a parameter tree or a whole train state by a plan.

    Old slots keep their parameters; the plan's operators set added slots. The optimizer state
    follows `plan.moments` and `plan.rates` (`moments.py`). The step does not change, so schedule
    and random keys continue where they were.

    Args:
      tree: parameters (nested dicts named by the plan's table), or a `TrainState` with them; also
        another dataclass with `step`, `params` and `opt_state`, as flax's. In a train state, what
        is None stays None: see `growth.parts`.
      plan: from `flm_jax.plan`.
      key: for fresh entries and noise; the result depends only on it and the other inputs.

    Returns:
      The same kind of tree at the size of `plan.target`, with the same dtypes.

    Raises:
      UserError: the tree does not have the shapes of `plan.source`, its optimizer state is of an
        unknown kind, or an argument has the wrong type.

    Warns:
      LockedCopiesWarning: nothing in the state's values and history separates copies.
      UnfinishedRampWarning: multipliers of an earlier growth are still fading.
    """
    if not isinstance(plan, Plan):
        raise UserError(
            f"grow: plan is a {type(plan).__name__}; make it with flm_jax.plan(small, big, recipe)"
        )
    grown: Any
    if _is_state(tree):
        state: Any = tree
        params = None if state.params is None else _grow_params(state.params, plan, key)
        opt_state = moments.grow_opt_state(state.opt_state, plan)
        moments.check(TrainState(state.step, state.params, state.opt_state), plan)
        grown = dataclasses.replace(state, params=params, opt_state=opt_state)
    elif isinstance(tree, Mapping):
        grown = _grow_params(tree, plan, key)
    else:
        raise UserError(
            f"grow: the tree is a {type(tree).__name__}; give parameters as nested dicts, or a "
            "flm_jax.TrainState with them and the optimizer's state"
        )
    return cast(Tree, grown)


def _is_state(tree: Any) -> bool:
    """Whether this is a train state: a dataclass with step, parameters and optimizer state."""
    if not dataclasses.is_dataclass(tree) or isinstance(tree, type):
        return False
    return {"step", "params", "opt_state"} <= {field.name for field in dataclasses.fields(tree)}


def _grow_params(tree: Any, plan: Plan, key: jax.Array) -> Any:
    if "params" in tree and "params" not in {path.split("/")[0] for path in plan.table}:
        raise UserError(
            f"grow: the tree has {', '.join(map(str, tree))}; give tree['params'] alone, or a "
            "flm_jax.TrainState with the parameters and the optimizer's state"
        )
    for path, leaf in trees.flatten(tree):
        if type(leaf).__module__.startswith("flax.nnx"):
            raise UserError(
                f"grow: parameter {path!r} is a flax.nnx {type(leaf).__name__}; give arrays: "
                "nnx.to_pure_dict(state)"
            )
    leaves = plan.check_source(tree).items()
    return trees.unflatten(
        {path: grow_value(x, path, plan, leaf_key(key, path)) for path, x in leaves}
    )


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """Derives a parameter's own key from the growth's."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def grow_value(
    x: jax.Array,
    path: str,
    plan: Plan,
    key: jax.Array,
    window: Window | None = None,
    following: jax.Array | None = None,
    dense: DenseMaps | None = None,
) -> jax.Array:
    """Maps one parameter: makes copies, then sets noise, fresh entries and zeros over them.

    Args:
      x: the parameter; for a window, the sources of its slots (`gather`).
      path: its name in the axis table.
      plan: the growth. Noise and "mean" need the whole parameter.
      key: from `leaf_key`.
      window: the part of the grown parameter to compute; None: all of it.
      following: like x, from the next layer; needed if the window cuts layers and the plan looks
        ahead.
      dense: dense maps to use in place of the plan's, by axis (LiGO's fit); None: the plan's.

    Returns:
      The grown parameter, or the window of it, in the dtype of x.
    """
    param, scale = plan.table[path], plan.value_scale(path)
    # Each use of randomness has its own key.
    fill_key, noise_key, mean_key = key, *jax.random.split(key)

    expansions = plan.by_axis
    for e in expansions.values():
        if e.fill == "mean" and e.axis in param.axes:
            x = _with_mean_slots(x, param, e, mean_key)
            expansions = {axis: other for axis, other in expansions.items() if axis != e.axis}

    def copies(x: jax.Array) -> jax.Array:
        x = gather(x, param, expansions, window, dense)
        return weighted(x, param, expansions, scale=scale, window=window)

    def marked(which: Callable[[Expansion, Role], np.ndarray | None]) -> jax.Array | None:
        return any_slot(param, expansions, which, window)

    grown = copies(x)
    ahead = marked(lambda e, role: e.ahead if role is Role.OUT else None)
    if ahead is not None and looks_ahead(param, plan):
        if following is None:
            following = jnp.take(x, next_layer(np.arange(len(x)), len(x)), axis=0)
        grown = jnp.where(ahead, copies(following), grown)
    dim = locks.noised(plan, param)
    if dim is not None:
        grown = grown + _separating_noise(grown, param, dim, plan, noise_key)
    new = marked(lambda e, role: None if e.learned else e.new)
    if new is not None:
        shape = plan.big.shape(path)
        fresh = draws.initial(plan.big.scale(path), fill_key, shape, x.dtype, window)
        grown = jnp.where(new, fresh * jnp.asarray(plan.gain(path), x.dtype), grown)
    zero = marked(lambda e, role: _zeroed(e, role, param))
    return grown if zero is None else jnp.where(zero, jnp.zeros((), x.dtype), grown)


def looks_ahead(param: Param, plan: Plan) -> bool:
    """Whether some of a parameter's copies are written as in the next layer (bert2BERT's AKI)."""
    written = (e for _, e, role in grown_dims(param, plan.by_axis) if role is Role.OUT)
    return param.axes[0] == "layers" and any(e.ahead.any() for e in written)


def next_layer(layer: np.ndarray, layers: int) -> np.ndarray:
    """The layer after each of these; the last is its own next.

    >>> next_layer(np.array([0, 1, 2]), 3).tolist()
    [1, 2, 2]
    """
    following: np.ndarray = np.minimum(layer + 1, layers - 1)
    return following


def _zeroed(e: Expansion, role: Role, param: Param) -> np.ndarray | None:
    """The slots at which the parameter is zero so that added slots have no effect."""
    if role.value not in e.zero:
        return None
    if role is Role.STACK:
        return e.added if param.residual_writer else None
    return e.new


def _with_mean_slots(x: jax.Array, param: Param, e: Expansion, key: jax.Array) -> jax.Array:
    """Appends new slots that are the mean of the old ones; readers also get their covariance.

    A new token's logit is then the mean of the old ones, so that the log-partition rises by at
    most log(V / v) (arithmetic above geometric mean). Its embedding is drawn from the normal
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


def _separating_noise(
    grown: jax.Array, param: Param, dim: int, plan: Plan, key: jax.Array
) -> jax.Array:
    """Noise for a reader of copies. It sums to zero over a slot's copies, so the function stays.

    With two copies it is +N and -N (HyperCloning, arXiv 2409.12903, section 3). Its power is
    `plan.noise_db` below that of the parameter.
    """
    e = plan.by_axis[param.axes[dim]]
    noise = jnp.moveaxis(draws.unit_normal(key, grown.shape, grown.dtype), dim, 0)
    shape = (-1,) + (1,) * (grown.ndim - 1)
    # Summed copy by copy: a segment sum along an axis that a mesh does not divide is wrong (XLA),
    # and its order of additions is not defined.
    total = jnp.zeros((e.source, *noise.shape[1:]), grown.dtype)
    for slots, there in e.occurrences:
        part = jnp.take(noise, slots, axis=0)
        total = total + jnp.where(there.reshape(shape), part, jnp.zeros((), grown.dtype))
    count = e.copies * ~e.new
    source = np.maximum(e.index, 0)
    mean = jnp.take(total, source, axis=0) / np.maximum(count, 1).astype(grown.dtype).reshape(shape)
    # Subtracting the mean leaves (c - 1) / c of the variance. Slots without copies get none.
    kept = np.sqrt(count / np.maximum(count - 1, 1)) * (count > 1)
    centred = (noise - mean) * kept.astype(grown.dtype).reshape(shape)
    rms = jnp.sqrt(jnp.mean(jnp.square(grown)))
    level = jnp.asarray(10 ** (-plan.noise_db / 20), grown.dtype)
    return jnp.moveaxis(centred, 0, dim) * rms * level

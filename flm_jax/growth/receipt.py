"""The receipt of a growth: what it did, measured and stored with the checkpoint that it produced.

Counts and sizes are computed on the devices and returned as scalars, so that no host needs to hold
a whole parameter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.growth._plan import Plan
from flm_jax.growth.expansion import Expansion, any_slot, grown_dims
from flm_jax.growth.moments import grow_moment
from flm_jax.params import trees
from flm_jax.params.axes import Param, Role


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What a growth did, on the calibration batch. Logits are in the run's dtype.

    Attributes:
      operator: the recipe.
      exactness: what the plan claims, "EXACT" or "APPROX".
      max_abs_logit_diff: largest absolute change of a logit, over the source's vocabulary.
      logit_scale: root mean square of the source's logits.
      kl: mean over tokens of KL(source || grown), in nats.
      loss_before: of the source, in nats per token.
      loss_after: of the grown model with its masks at 0, in nats per token.
      dead_slots: added slots where some parameter's gradient is all zero after the first steps.
      locked_copies: copies equal to their source in value and gradient after the first steps.
      first_update_over_lr: largest first step of an added entry over its learning rate.
      layer_distances: of the source's layers from the identity.
      layer_map: the source layer of every layer, -1 for a new one.
    """

    operator: str
    exactness: str
    max_abs_logit_diff: float
    logit_scale: float
    kl: float
    loss_before: float
    loss_after: float
    dead_slots: int
    locked_copies: int
    first_update_over_lr: float
    layer_distances: tuple[float, ...]
    layer_map: tuple[int, ...]


def unmeasured(plan: Plan, layer_distances: tuple[float, ...] | None) -> dict[str, Any]:
    """The receipt of a growth that was not measured: the plan's claims, and None elsewhere."""
    return {
        **dict.fromkeys(field.name for field in dataclasses.fields(Receipt)),
        "operator": plan.recipe,
        "exactness": plan.exactness,
        "layer_distances": layer_distances,
        "layer_map": plan.layer_map,
    }


def measured(receipt: Mapping[str, Any]) -> bool:
    """Whether the receipt has measurements (see `unmeasured`)."""
    return receipt["loss_after"] is not None


@jax.jit
def difference(
    before_BTV: jax.Array, after_BTV: jax.Array, weights_BT: jax.Array
) -> dict[str, jax.Array]:
    """max_abs_logit_diff, logit_scale and kl of two models' logits, over the first's tokens."""
    common_BTV = after_BTV[..., : before_BTV.shape[-1]]
    log_p_BTV, log_q_BTV = (jax.nn.log_softmax(x, axis=-1) for x in (before_BTV, common_BTV))
    kl_BT = jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)
    weights_BT = weights_BT.astype(kl_BT.dtype)
    return {
        "max_abs_logit_diff": jnp.max(jnp.abs(common_BTV - before_BTV)),
        "logit_scale": jnp.sqrt(jnp.mean(jnp.square(before_BTV))),
        "kl": jnp.sum(kl_BT * weights_BT) / jnp.sum(weights_BT),
    }


@functools.partial(jax.jit, static_argnums=0)
def gradient_error(plan: Plan, source: Mapping[str, Any], target: Mapping[str, Any]) -> jax.Array:
    """Compares the grown model's gradient to the mapped gradient of the source.

    Slots that do not keep their history are left out. So are keys and values if key/value heads are
    repeated, because only the sum over a head's copies is known.

    Args:
      plan: the growth.
      source: gradient of the source.
      target: gradient of the grown model.

    Returns:
      The largest absolute difference over the largest absolute gradient of the source.
    """
    dual = dataclasses.replace(plan, moments="dual")
    worst = largest = jnp.zeros(())
    for (path, before), (_, after) in zip(
        trees.flatten(source), trees.flatten(target), strict=True
    ):
        param = plan.table[path]
        if any(e.splits for _, e, _ in grown_dims(param, plan.by_axis)):
            continue
        restarted = any_slot(param, plan.by_axis, lambda e, role: ~e.keeps_history("dual"))
        error = jnp.abs(grow_moment(before, path, dual, power=1) - after)
        error = error if restarted is None else jnp.where(restarted, 0, error)
        worst = jnp.maximum(worst, jnp.max(error))
        largest = jnp.maximum(largest, jnp.max(jnp.abs(before)))
    return worst / largest


def largest_added(plan: Plan, tree: Mapping[str, Any]) -> jax.Array:
    """The largest absolute entry of a tree in an added slot of any axis."""
    largest = jnp.zeros(())
    for path, leaf in trees.flatten(tree):
        for dim, e, _ in grown_dims(plan.table[path], plan.by_axis):
            others = tuple(d for d in range(leaf.ndim) if d != dim)
            # Of each slot: the sizes of all entries would need the memory of another leaf.
            low, high = jnp.min(leaf, others, initial=0), jnp.max(leaf, others, initial=0)
            here = jnp.max(jnp.where(e.added, jnp.maximum(-low, high), 0), initial=0)
            largest = jnp.maximum(largest, here.astype(largest.dtype))
    return largest


def _slices(plan: Plan, tree: Mapping[str, Any], axis: str) -> list[jax.Array]:
    """All parameters that have the axis, with this axis first.

    The embedding is left out on `vocab`: a row has a gradient only if its token occurs.
    """
    slices = []
    for path, leaf in trees.flatten(tree):
        param = plan.table[path]
        if axis in param.axes and not (axis == "vocab" and param.has(Role.IN, axis)):
            slices.append(jnp.moveaxis(jnp.asarray(leaf), param.axes.index(axis), 0))
    return slices


def _squares(x: jax.Array) -> jax.Array:
    """The sum of squares of each slot (index of axis 0)."""
    return jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))


def dead_slots(plan: Plan, grads: Mapping[str, Any]) -> jax.Array:
    """Counts added slots with an all-zero gradient in at least one parameter; int32."""
    dead = jnp.zeros((), jnp.int32)
    for e in plan.expansions:
        zero = jnp.zeros(e.target, bool)
        for grad in _slices(plan, grads, e.axis):
            zero |= jnp.all(grad == 0, axis=tuple(range(1, grad.ndim)))
        dead += jnp.sum(zero & e.added, dtype=jnp.int32)
    return dead


def locked_copies(plan: Plan, params: Mapping[str, Any], grads: Mapping[str, Any]) -> jax.Array:
    """Counts copies that are still in proportion to an earlier slot of the same source; int32.

    Proportional means: their parameters and their gradients differ by the growth's own factors
    alone (`Plan.locks` predicts the count). They count as equal within 1e-6 of their size. Kernels
    may sum the columns of one matrix in different orders, so that equal copies differ in their last
    bits after a step.
    """
    total = jnp.zeros((), jnp.int32)
    for e in plan.expansions:
        locked = jnp.zeros(e.target, bool)
        for slots, earlier in e.pairs:
            same = jnp.ones(len(slots), bool)
            for path, param in plan.table.items():
                if e.axis not in param.axes or (e.axis == "vocab" and param.has(Role.IN, "vocab")):
                    continue
                for tree, dual in ((params, False), (grads, True)):
                    same &= _proportional(tree, path, param, e, slots, earlier, dual)
            locked = locked.at[slots].set(locked[slots] | same)
        total += jnp.sum(locked, dtype=jnp.int32)
    return total


def _proportional(
    tree: Mapping[str, Any],
    path: str,
    param: Param,
    e: Expansion,
    slots: np.ndarray,
    earlier: np.ndarray,
    dual: bool,
) -> jax.Array:
    """Whether a leaf at `slots` is in the growth's proportion to `earlier`; bool."""
    dim = param.axes.index(e.axis)
    leaf = jnp.asarray(dict(trees.flatten(tree))[path])
    factor = e.factor(param.roles[dim], dual=dual, carried=e.axis in param.carries)
    ratio = np.ones(len(slots)) if factor is None else factor[slots] / factor[earlier]

    def squares(x: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
        """Of the differences from the expected entries, and of these."""
        x = jnp.moveaxis(x, dim, 0)
        expected = x[earlier] * trees.along(jnp.asarray(ratio, x.dtype), 0, x.ndim)
        return _squares(x[slots] - expected), _squares(expected)

    if param.stacked and dim:
        # Layer by layer: where the axis is split over devices, its entries are gathered.
        by_layer = jax.lax.map(lambda x: squares(x, dim - 1), leaf)
        error, size = (jnp.sum(x, axis=0) for x in by_layer)
    else:
        error, size = squares(leaf, dim)
    return jnp.sqrt(error) <= 1e-6 * jnp.sqrt(size)

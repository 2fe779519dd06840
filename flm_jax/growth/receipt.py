"""What a growth did: measured, and kept with the checkpoint that it made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import axes
from flm_jax.growth.plan import Plan


@dataclasses.dataclass(frozen=True)
class Receipt:
    """Losses in nats per token on the calibration batch; logits in the run's dtype.

    logit_scale: root mean square of the source's logits.
    dead_slots: added slots that some parameter has an all-zero gradient in, once the ramp begins.
    locked_copies: copies equal to their source in value and in gradient: they never separate.
    """

    operator: str
    exactness: str
    max_abs_logit_diff: float
    logit_scale: float
    loss_before: float
    loss_after: float
    dead_slots: int
    locked_copies: int
    layer_distances: tuple[float, ...]
    layer_map: tuple[int, ...]


def difference(before_BTV: jax.Array, after_BTV: jax.Array) -> tuple[float, float]:
    """Largest absolute difference of the logits, and the root mean square of the first."""
    largest = jnp.max(jnp.abs(after_BTV - before_BTV))
    return float(largest), float(jnp.sqrt(jnp.mean(jnp.square(before_BTV))))


def _slices(tree: Mapping[str, Any], axis: str) -> list[np.ndarray]:
    """Every parameter that has the axis, as [slots of the axis, everything else]."""
    found = []
    for path, leaf in axes.flatten(tree):
        param = axes.TABLE[path]
        if axis in param.axes:
            moved = np.moveaxis(np.asarray(leaf), param.axes.index(axis), 0)
            found.append(moved.reshape(moved.shape[0], -1))
    return found


def dead_slots(plan: Plan, grads: Mapping[str, Any]) -> int:
    """Number of added slots with an all-zero gradient in at least one parameter."""
    dead = 0
    for e in plan.expansions:
        zero = np.zeros(e.target, bool)
        for grad in _slices(grads, e.axis):
            zero |= ~grad.any(axis=1)
        dead += int((zero & e.added).sum())
    return dead


def locked_copies(plan: Plan, params: Mapping[str, Any], grads: Mapping[str, Any]) -> int:
    """Number of copies whose parameters and gradients all equal their source slot's.

    Equal up to rounding of the gradient: 1e-6 of its size.
    """
    locked = 0
    for e in plan.expansions:
        copies = np.flatnonzero(e.added & ~e.new)
        if not len(copies):
            continue
        first = np.array([np.flatnonzero(e.index == e.index[c])[0] for c in copies])
        same = np.ones(len(copies), bool)
        for value, grad in zip(_slices(params, e.axis), _slices(grads, e.axis), strict=True):
            apart = np.linalg.norm(grad[copies] - grad[first], axis=1)
            same &= (value[copies] == value[first]).all(axis=1)
            same &= apart <= 1e-6 * np.linalg.norm(grad[first], axis=1)
        locked += int(same.sum())
    return locked

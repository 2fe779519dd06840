"""Turns a model with run-time masks into a plain one: multiplies the masks into its parameters.

Exported formats have no masks. Folding makes it possible to export a checkpoint inside a growth's
ramp. Derived here, for every axis from what its mask m does in `models/layers.py`:

    mlp, kv_heads, q_per_kv   activations times m  ->  the entries that read them times m
    layers                    a layer's branches times m  ->  its residual writers times m
    embed                     norms use the mean square sum(m x^2) / M, with M = sum m, and
                              return gain m x over its root

For `embed`, of size D, multiply the writers of the residual stream by sqrt(m). Then the stream is
x' = sqrt(m) x, and its plain mean square is M / D of the masked one, so that exactly

    sqrt(m M / D) gain x' / sqrt(mean(x'^2) + eps M / D)  =  m gain x / sqrt(sum(m x^2) / M + eps)

So gains are multiplied by sqrt(m M / D), and eps by M / D. Two kinds of gains differ. One that ends
a branch writes the stream, so that its output must be sqrt(m) times the old one: m sqrt(M / D). One
that is read by a tied head, whose entries have become sqrt(m) times the old ones: sqrt(M / D).

A mask on `vocab` adds log m to the logits, which would need a bias, so only m = 1 can be folded.
Nor can masks of heads be folded where a norm runs over all heads: its eps would have to change in
the queries and in the keys by different factors. A branch without a norm before it reads sqrt(m) x,
and therefore needs no change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flm_jax.errors import UserError
from flm_jax.growth._plan import AnyModel, Model, Plan, spec_of, with_norm_eps
from flm_jax.params import trees
from flm_jax.params.axes import Param, Role, normed_axes
from flm_jax.params.trees import along

Masks = Mapping[str, np.ndarray]


def fold(params: Any, plan: Plan, value: float) -> tuple[Any, Model]:
    """Makes the plain model that equals `params` with run-time masks `plan.masks(value)`.

    Args:
      params: parameters of `plan.target`.
      plan: the growth that made them.
      value: the masks of added slots, in [0, 1].

    Returns:
      Parameters, in the same dtypes, and the model, which differs from `plan.target` only in the
      eps of its RMSNorms.

    Raises:
      UserError: the vocabulary is masked below 1.
    """
    masks = masks_of(plan, value)
    folded = {path: fold_block(x, plan.table[path], masks) for path, x in trees.flatten(params)}
    return trees.unflatten(folded), folded_model(plan.target, masks)


def masks_of(plan: Plan, value: float) -> dict[str, np.ndarray]:
    """`plan.masks(value)` as float64 on the host. Raises UserError if they cannot be folded."""
    masks = {axis: np.asarray(m, np.float64) for axis, m in plan.masks(value).items()}
    for axis, why in _unfoldable(plan).items():
        if (masks.get(axis, np.ones(1)) != 1).any():
            raise UserError(
                f"fold: axis {axis!r} is masked at {value}, which {why}; use a checkpoint after "
                "the ramp (masks at 1)"
            )
    return masks


def _unfoldable(plan: Plan) -> dict[str, str]:
    """Axes whose masks below 1 no plain model expresses, with the reason."""
    reasons = {"vocab": "needs a bias on the logits, and plain models have none"}
    heads = {"kv_heads", "q_per_kv"} & normed_axes(plan.table)
    return reasons | dict.fromkeys(heads, "changes the mean of the norm over all queries or keys")


def folded_model(model: AnyModel, masks: Masks) -> AnyModel:
    """The config or spec of the plain model, from that of the masked model.

    Raises UserError if `embed` is masked in a model whose norms are not RMSNorm.
    """
    if "embed" not in masks:
        return model
    eps = spec_of(model).norm_eps
    if eps is None:
        raise UserError(
            "fold: axis 'embed' is masked, which only RMSNorm can absorb, and the model has "
            "another norm (ModelSpec.norm_eps is None); use masks at 1"
        )
    return with_norm_eps(model, eps * float(masks["embed"].mean()))


def fold_block(x: Any, param: Param, masks: Masks, index: Sequence[slice] | None = None) -> Any:
    """Multiplies the masks into one parameter, or into a block of it.

    Args:
      x: the parameter, or its block at `index`.
      param: its table entry.
      masks: from `masks_of`.
      index: a slice for each dimension; None: the whole parameter.
    """
    index = index or [slice(None)] * len(param.axes)
    factor: Any = None
    for dim, on_axis in enumerate(_factors(param, masks)):
        if on_axis is not None:
            here = along(on_axis[index[dim]], dim, x.ndim)
            factor = here if factor is None else factor * here
    return x if factor is None else x * factor.astype(x.dtype)


def _factors(param: Param, masks: Masks) -> list[np.ndarray | None]:
    """The factor on each axis of a parameter: float64 [size]; None for ones."""

    def factor(axis: str, role: Role) -> np.ndarray | None:
        if axis not in masks or axis == "vocab":
            return None
        mask = masks[axis]
        if axis == "layers":
            return mask if param.residual_writer else None
        if axis == "embed":
            return _embed_factor(param, role, mask)
        return mask if role is Role.IN else None

    return [factor(axis, role) for axis, role in zip(param.axes, param.roles, strict=True)]


def _embed_factor(param: Param, role: Role, mask: np.ndarray) -> np.ndarray | None:
    """The factor along `embed`: see the head of this module."""
    root: np.ndarray = np.sqrt(mask)
    if role is Role.OUT:
        return root
    if role is not Role.GAIN:
        return None
    share = float(np.sqrt(mask.mean()))
    if param.residual_writer:
        return mask * share
    if "embed" in param.carries:
        return np.full_like(mask, share)
    return root * share

"""The growth at the start of a leg, and what is measured of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import growth
from flm_jax.config import TransformerConfig
from flm_jax.growth import layer_maps, measure
from flm_jax.growth.receipt import dead_slots, locked_copies
from flm_jax.studies.growth_study.histories import Leg
from flm_jax.train.optim import SlotAdamState
from flm_jax.train.train_step import Batch, TrainState, gradients


def placed(leg: Leg, distances: list[float], layers: int) -> list[float]:
    """The distances by which a growth chooses the layers to copy: measured, or evenly spread."""
    if leg.placement == "distance" or not distances or layers <= len(distances):
        return distances
    copies = layer_maps.interposed(len(distances), layers)
    return [-float(copies.count(i)) for i in range(len(distances))]


def grow(
    state: TrainState,
    small: TransformerConfig,
    big: TransformerConfig,
    leg: Leg,
    batch: Batch,
    key: jax.Array,
) -> tuple[TrainState, growth.Plan, dict[str, Any]]:
    """Grows a train state.

    Args:
      state: the source's.
      small: the source.
      big: the target, with the fields that follow from the growth.
      leg: the leg that grows.
      batch: the calibration batch.
      key: for new entries.

    Returns:
      The grown state, its plan, and measurements: exactness, layer_map, distances,
      max_abs_logit_diff, dead_slots, locked_copies.
    """
    settings = leg.growth
    assert settings is not None
    old = measure.source(state.params, batch, small)
    distances = [float(d) for d in np.asarray(old["distances"])]
    plan = growth.plan(
        small, big, settings.recipe, moments=settings.moments, rates=settings.rates,
        noise_db=settings.noise_db, old_rate=settings.old_rate,
        layer_distances=placed(leg, distances, big.num_layers),
    )  # fmt: skip
    grown = jax.jit(functools.partial(growth.grow, plan=plan))(state, key=key)
    if leg.shared_steps:
        grown = dataclasses.replace(grown, opt_state=with_shared_steps(grown.opt_state))
    change = measure.function_change(old, grown.params, batch, plan)
    return grown, plan, {
        "exactness": plan.exactness,
        "layer_map": list(plan.layer_map),
        "distances": distances,
        "max_abs_logit_diff": change["max_abs_logit_diff"],
        **stuck(plan, grown.params, batch, 0.0),
    }  # fmt: skip


_gradients = jax.jit(gradients, static_argnums=2)


def stuck(plan: growth.Plan, params: Any, batch: Batch, mask: float | None) -> dict[str, int]:
    """Counts added slots without a gradient, and copies that are equal to their source.

    Args:
      plan: the growth.
      params: the grown model's.
      batch: on which gradients are taken.
      mask: value of the run-time masks; None: the model without masks.
    """
    masks = plan.masks(mask) if plan.masked and mask is not None else None
    _, grads, _ = _gradients(params, batch, plan.config, masks)
    return {
        "dead_slots": int(dead_slots(plan, grads)),
        "locked_copies": int(locked_copies(plan, params, grads)),
    }


def with_shared_steps(opt_state: Any) -> Any:
    """All slots get the age of the oldest: their bias correction is the old slots'."""

    def aged(node: Any) -> Any:
        if isinstance(node, SlotAdamState):
            return node._replace(born=jax.tree.map(jnp.zeros_like, node.born))
        return node

    return jax.tree.map(aged, opt_state, is_leaf=lambda x: isinstance(x, SlotAdamState))

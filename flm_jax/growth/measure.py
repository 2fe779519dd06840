"""Measures a growth: the function before and after, and the grown model's first steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.config import OptimizerConfig, StageConfig, TransformerConfig
from flm_jax.growth import Plan
from flm_jax.growth.receipt import dead_slots, difference, largest_added, locked_copies
from flm_jax.models import Transformer, layers
from flm_jax.params import axes, mup, sharding, trees
from flm_jax.train import optim, schedules
from flm_jax.train.optim import SlotAdamState
from flm_jax.train.train_step import Batch, TrainState, cross_entropy, gradients, logits_of

FIRST_STEPS = 3  # zeros are left after one step, slots behind two zeros after two


@functools.partial(jax.jit, static_argnums=2)
def source(params: Any, batch: Batch, config: TransformerConfig) -> dict[str, jax.Array]:
    """Logits, mean loss and layer distances of the model before it grows."""
    logits_BTV, sown = Transformer(config).apply(
        {"params": params}, batch["tokens"], batch["segment_ids"], batch["positions"],
        mutable=["intermediates"],
    )  # fmt: skip
    return {
        "logits": logits_BTV,
        "loss": _mean_loss(logits_BTV, batch),
        # In every process whole: a growth's plan depends on them.
        "distances": sharding.constrain(sown["intermediates"]["layers"]["distance"][0], None),
    }


def layer_distances(
    read: Callable[[str, Sequence[slice | np.ndarray]], np.ndarray],
    batch: Mapping[str, np.ndarray],
    config: TransformerConfig,
) -> tuple[float, ...]:
    """The distances that `source` measures, with one layer's parameters in memory at a time.

    read: (path in the axis table, slices) -> that part of the parameter.
    """

    @jax.jit
    def step(params: Any, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        segment_ids_BT, positions_BT = map(jnp.asarray, (batch["segment_ids"], batch["positions"]))
        angles = layers.rotary_angles(positions_BT, config)
        (x_BTD, _), sown = layers.Layer(config, axes.nested_table(config)["layers"]).apply(
            {"params": params}, x_BTD, None, segment_ids_BT, angles, {}, mutable=["intermediates"]
        )
        return x_BTD, sown["intermediates"]["distance"][0]

    tokens, where = np.unique(batch["tokens"], return_inverse=True)
    rows = jnp.asarray(read("embedding", (tokens, slice(None)))).astype(config.dtype)
    x_BTD = rows[where.reshape(batch["tokens"].shape)] * jnp.asarray(config.input_mult, rows.dtype)
    found = []
    for layer in range(config.num_layers):
        params = trees.unflatten(
            {
                path.removeprefix("layers/"): read(
                    path, (slice(layer, layer + 1), *[slice(None)] * (len(param.axes) - 1))
                )[0]
                for path, param in axes.table(config).items()
                if param.stacked
            }
        )
        x_BTD, distance = step(params, x_BTD)
        found.append(float(distance))
    return tuple(found)


@functools.partial(jax.jit, static_argnums=2)
def _grown(params: Any, batch: Batch, plan: Plan) -> tuple[jax.Array, jax.Array]:
    logits_BTV = logits_of(plan.config, params, batch, plan.masks(0.0))
    return logits_BTV, _mean_loss(logits_BTV, batch)


def _mean_loss(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    loss, tokens = cross_entropy(logits_BTV, batch["targets"], batch["weights"])
    return loss / tokens


def function_change(
    before: Mapping[str, jax.Array], params: Any, batch: Batch, plan: Plan
) -> dict[str, Any]:
    """Receipt fields of logits and losses, behind the masks at 0; `before` is from `source`."""
    logits, loss = _grown(params, batch, plan)
    change = difference(before["logits"], logits, batch["weights"])
    return {
        **{name: float(value) for name, value in change.items()},
        "loss_before": float(before["loss"]),
        "loss_after": float(loss),
    }


def first_steps(
    state: TrainState, batch: Batch, plan: Plan, stage: StageConfig, settings: OptimizerConfig
) -> dict[str, Any]:
    """Receipt fields of the first steps: Adam's, at the full learning rate, on one batch.

    Without decay and clipping, which neither wake a slot nor part two copies. No steps are taken
    if nothing was added.
    """
    if not plan.expansions:
        return {"dead_slots": 0, "locked_copies": 0, "first_update_over_lr": 0.0}
    spec = mup.spec(stage.model)
    adam = optim.scale_by_slot_adam(spec, settings.b1, settings.b2, settings.eps)
    rate = optim.scale_by_mup_learning_rate(
        spec, stage.learning_rate, stage.matrix_learning_rate, schedules.steady
    )

    @jax.jit
    def step(params: Any, moments: SlotAdamState, mask: jax.Array) -> tuple[Any, Any, Any, Any]:
        _, grads, _ = gradients(params, batch, stage.model, plan.masks(mask))
        directions, moments = adam.update(grads, moments)
        updates, _ = rate.update(directions, rate.init(params))
        return optax.apply_updates(params, updates), moments, grads, directions

    params, moments = state.params, slot_adam(state)
    for n in range(FIRST_STEPS):
        before = params
        mask = jnp.float32((n + 1) / stage.growth.ramp_steps)
        params, moments, grads, directions = step(params, moments, mask)
        if n == 0:
            first = float(_largest_added(plan, directions))
    dead, locked = _stuck(plan, before, grads)
    return {
        "dead_slots": int(dead),
        "locked_copies": int(locked),
        "first_update_over_lr": first,
    }


_largest_added = jax.jit(largest_added, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _stuck(plan: Plan, params: Any, grads: Any) -> tuple[jax.Array, jax.Array]:
    """Counted by a program of its own: rounding inside the step could tell copies apart."""
    return dead_slots(plan, grads), locked_copies(plan, params, grads)


def slot_adam(state: TrainState) -> SlotAdamState:
    """The Adam part of a train state."""
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, SlotAdamState))
    return next(leaf for leaf in leaves if isinstance(leaf, SlotAdamState))

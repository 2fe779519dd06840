"""Measures a growth: the model's function before and after, and its first steps afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.config import OptimizerConfig, StageConfig, TransformerConfig
from flm_jax.growth import Plan, added_slots
from flm_jax.growth.receipt import dead_slots, difference, largest_added, locked_copies
from flm_jax.models import Transformer, layers
from flm_jax.models.rope import angles_by_kind
from flm_jax.params import axes, mup, sharding, trees
from flm_jax.train import optim, schedules
from flm_jax.train.loss import cross_entropy
from flm_jax.train.optim import SlotAdamState
from flm_jax.train.train_step import Batch, TrainState, gradients, logits_of
from flm_jax.train.trained import Trained

FIRST_STEPS = 3  # a side that is zero delays gradients by one step, two such sides by two


@functools.partial(jax.jit, static_argnums=2)
def source(params: Any, batch: Batch, config: TransformerConfig) -> dict[str, jax.Array]:
    """Measures the model before it grows.

    Args:
      params: its parameters.
      batch: the calibration batch.
      config: the model.

    Returns:
      logits [B, T, V], loss (mean, nats per token) and distances [layers] from the identity.
    """
    logits_BTV, sown = Transformer(config).apply(
        {"params": params},
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        mutable=["intermediates"],
    )
    return {
        "logits": logits_BTV,
        "loss": _mean_loss(logits_BTV, batch),
        # Replicated, because every process makes the growth's plan from them.
        "distances": sharding.constrain(sown["intermediates"]["layers"]["distance"][0], None),
    }


def layer_distances(
    read: Callable[[str, Sequence[slice | np.ndarray]], np.ndarray],
    batch: Mapping[str, np.ndarray],
    config: TransformerConfig,
) -> tuple[float, ...]:
    """Measures the same distances as `source`, with one layer's parameters in memory at a time.

    Args:
      read: reads a part of a parameter, from its path in the axis table and its slices.
      batch: the calibration batch.
      config: the model.
    """

    @functools.partial(jax.jit, static_argnums=2)
    def step(params: Any, x_BTD: jax.Array, kind: str) -> tuple[jax.Array, Any]:
        segment_ids_BT, positions_BT = map(jnp.asarray, (batch["segment_ids"], batch["positions"]))
        angles = angles_by_kind(positions_BT, config)
        inputs: tuple[Any, ...] = (x_BTD, None, None, segment_ids_BT, angles, {})
        layer = layers.Layer(config, axes.nested_table(config)["layers"], kind)
        (x_BTD, _), sown = layer.apply({"params": params}, *inputs, mutable=["intermediates"])
        return x_BTD, sown["intermediates"]["distance"][0]

    tokens, positions = np.unique(batch["tokens"], return_inverse=True)
    rows = jnp.asarray(read("embedding", (tokens, slice(None)))).astype(config.dtype)
    x_BTD = rows[positions.reshape(batch["tokens"].shape)] * jnp.asarray(
        config.input_mult, rows.dtype
    )
    distances = []
    for layer, kind in enumerate(config.kinds):
        params = trees.unflatten(
            {
                path.removeprefix("layers/"): read(
                    path, (slice(layer, layer + 1), *[slice(None)] * (len(param.axes) - 1))
                )[0]
                for path, param in axes.table(config).items()
                if param.stacked
            }
        )
        x_BTD, distance = step(params, x_BTD, kind)
        distances.append(float(distance))
    return tuple(distances)


@functools.partial(jax.jit, static_argnums=2)
def _grown(params: Any, batch: Batch, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Logits and mean loss of the grown model, with its masks at 0."""
    logits_BTV = logits_of(plan.config, params, batch, plan.masks(0.0))
    return logits_BTV, _mean_loss(logits_BTV, batch)


def _mean_loss(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
    """Nats per target token."""
    loss, tokens = cross_entropy(logits_BTV, batch["targets"], batch["weights"])
    return loss / tokens


def function_change(
    before: Mapping[str, jax.Array], params: Any, batch: Batch, plan: Plan
) -> dict[str, Any]:
    """Compares the grown model, with its masks at 0, to its source.

    Args:
      before: from `source`.
      params: the grown parameters.
      batch: the calibration batch.
      plan: the growth.

    Returns:
      The receipt's fields about logits and losses.
    """
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
    """Takes the first Adam steps of a grown model, at the full learning rate, on one batch.

    Decay and clipping are left out: they can neither revive a slot nor separate copies. No steps
    are taken if nothing was added.

    Args:
      state: the grown state; it does not change.
      batch: the calibration batch.
      plan: the growth.
      stage: gives the model and the peak learning rates.
      settings: Adam's.

    Returns:
      The receipt's fields dead_slots, locked_copies and first_update_over_lr.
    """
    if not plan.expansions:
        return {"dead_slots": 0, "locked_copies": 0, "first_update_over_lr": 0.0}
    spec = mup.spec(stage.model)
    trained, added = Trained.of(stage), added_slots(plan)
    steps = int(slot_adam(state).steps)
    growth = optim.since_growth(stage, steps)._replace(added_rate=1.0)
    adam = optim.scale_by_slot_adam(spec, settings.b1, settings.b2, settings.eps, growth)
    rate = optim.scale_by_mup_learning_rate(
        spec, stage.learning_rate, stage.matrix_learning_rate, schedules.steady
    )

    @jax.jit
    def step(params: Any, moments: SlotAdamState, mask: jax.Array) -> tuple[Any, Any, Any, Any]:
        _, grads, _ = gradients(params, batch, stage.model, plan.masks(mask))
        directions, moments = adam.update(grads, moments)
        updates, _ = rate.update(directions, rate.init(params))
        updates = trained.scaled(updates, added)
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
    """Counts dead slots and locked copies.

    A separate program, because rounding inside the step's program could make copies differ.
    """
    return dead_slots(plan, grads), locked_copies(plan, params, grads)


def slot_adam(state: TrainState) -> SlotAdamState:
    """The Adam part of a train state."""
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, SlotAdamState))
    return next(leaf for leaf in leaves if isinstance(leaf, SlotAdamState))

"""Measures a growth: the model's function before and after, and its first steps afterwards."""

from __future__ import annotations

import functools
import math
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
def grown(params: Any, batch: Batch, plan: Plan) -> tuple[jax.Array, jax.Array]:
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
    logits, loss = grown(params, batch, plan)
    change = difference(before["logits"], logits, batch["weights"])
    return {
        **{name: float(value) for name, value in change.items()},
        "loss_before": float(before["loss"]),
        "loss_after": float(loss),
    }


def gradient_program(
    plan: Plan, stage: StageConfig, accumulate: int, params: Any
) -> Callable[[Any, Batch, jax.Array], Any]:
    """Makes the jitted `(params, batch, mask value) -> gradients` of the grown model.

    Args:
      plan: the growth.
      stage: gives the model.
      accumulate: number of microbatches.
      params: the grown parameters, or their shapes; the gradients are placed like them.
    """

    def gradient(params: Any, batch: Batch, mask: jax.Array) -> Any:
        return gradients(params, batch, stage.model, plan.masks(mask), accumulate)[1]

    return jax.jit(gradient, out_shardings=_placed(params))


def update_program(
    plan: Plan, stage: StageConfig, settings: OptimizerConfig, grown_at: int, params: Any
) -> Callable[[Any, SlotAdamState, Any], tuple[Any, SlotAdamState, Any]]:
    """Makes the jitted `(params, moments, gradients) -> (params, moments, directions)`.

    It is a step of Adam at the full learning rate, without decay and clipping. The arguments are
    donated; directions (steps before the learning rate) take the place of gradients.

    Args:
      plan: the growth.
      stage: gives the model and the peak learning rates.
      settings: Adam's.
      grown_at: the optimizer's steps at the growth.
      params: the grown parameters, or their shapes.
    """
    spec, trained, added = mup.spec(stage.model), Trained.of(stage), added_slots(plan)
    growth = optim.since_growth(stage, grown_at)._replace(added_rate=1.0)
    adam = optim.scale_by_slot_adam(spec, settings.b1, settings.b2, settings.eps, growth)
    rate = optim.scale_by_mup_learning_rate(
        spec, stage.learning_rate, stage.matrix_learning_rate, schedules.steady
    )

    def update(params: Any, moments: SlotAdamState, grads: Any) -> Any:
        directions, moments = adam.update(grads, moments)
        updates, _ = rate.update(directions, rate.init(params))
        updates = trained.scaled(updates, added)
        return optax.apply_updates(params, updates), moments, directions

    moments = jax.eval_shape(adam.init, params)
    moments = jax.tree.map(lambda _: None, moments)._replace(mu=_placed(params), nu=_placed(params))
    placed = (_placed(params), moments, _placed(params))
    return jax.jit(update, donate_argnums=(0, 1, 2), out_shardings=placed)


def _placed(tree: Any) -> Any:
    """The shardings of arrays or shapes; None where there is none."""
    return jax.tree.map(lambda x: getattr(x, "sharding", None), tree)


def first_steps(
    state: TrainState, batch: Batch, plan: Plan, stage: StageConfig, settings: OptimizerConfig
) -> dict[str, Any]:
    """Takes the first Adam steps of a grown model, at the full learning rate, on one batch.

    Decay and clipping are left out: they can neither revive a slot nor separate copies. No steps
    are taken if nothing was added. The steps are taken in place: beside the state there are its
    gradients, as in a train step, and nothing else of their size.

    Args:
      state: the grown state; its parameters and moments are consumed if anything was added.
      batch: the calibration batch.
      plan: the growth.
      stage: gives the model, the peak learning rates and the size of a microbatch.
      settings: Adam's.

    Returns:
      The receipt's fields dead_slots, locked_copies and first_update_over_lr.
    """
    if not plan.expansions:
        return {"dead_slots": 0, "locked_copies": 0, "first_update_over_lr": 0.0}
    params, moments = state.params, slot_adam(state)
    batch, accumulate = in_microbatches(batch, stage)
    gradient = gradient_program(plan, stage, accumulate, params)
    update = update_program(plan, stage, settings, int(moments.steps), params)

    def mask(n: int) -> Any:
        return jnp.float32((n + 1) / stage.growth.ramp_steps)

    largest = []
    for n in range(FIRST_STEPS - 1):
        grads = gradient(params, batch, mask(n))
        params, moments, directions = update(params, moments, grads)
        largest.append(float(largest_step(plan, directions)))
        del grads, directions  # before there are new ones
    del moments
    dead, locked = stuck(plan, params, gradient(params, batch, mask(FIRST_STEPS - 1)))
    return {
        "dead_slots": int(dead),
        "locked_copies": int(locked),
        "first_update_over_lr": largest[0],
    }


def in_microbatches(batch: Mapping[str, Any], stage: StageConfig) -> tuple[dict[str, Any], int]:
    """Divides a batch so that no device gets more sequences at a time than in training.

    Args:
      batch: any number of sequences.
      stage: gives the size of a microbatch.

    Returns:
      The batch and the number of its microbatches. Sequences of weight 0 are added if it does not
      divide: every device would otherwise compute all of it.
    """
    mesh, rows = jax.sharding.get_abstract_mesh(), len(batch["tokens"])
    over = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    count = math.ceil(rows / max(stage.batch_size // stage.accumulate, over))
    more = -rows % (count * over)
    if not more:
        return dict(batch), count
    return {
        name: np.pad(np.asarray(x), [(0, more), *[(0, 0)] * (np.ndim(x) - 1)])
        for name, x in batch.items()
    }, count


largest_step = jax.jit(largest_added, static_argnums=0)  # of directions, in an added slot


@functools.partial(jax.jit, static_argnums=0)
def stuck(plan: Plan, params: Any, grads: Any) -> tuple[jax.Array, jax.Array]:
    """Counts dead slots and locked copies.

    A separate program, because rounding inside the step's program could make copies differ.
    """
    return dead_slots(plan, grads), locked_copies(plan, params, grads)


def slot_adam(state: TrainState) -> SlotAdamState:
    """The Adam part of a train state."""
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, SlotAdamState))
    return next(leaf for leaf in leaves if isinstance(leaf, SlotAdamState))

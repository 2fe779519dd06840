"""The train state, the loss and one optimizer step, with or without run-time masks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flm_jax.checks import require_type
from flm_jax.config import RulesConfig, StageConfig, TransformerConfig
from flm_jax.models import Transformer
from flm_jax.models.readout import Readout
from flm_jax.params import axes, sharding
from flm_jax.params.sharding import Layout
from flm_jax.train import guard, loss
from flm_jax.train.trained import AddedSlots, Trained


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A train state. It keeps no random key: a step derives its own from the seed and `step`."""

    step: jax.Array  # int32: optimizer steps done over the whole chain
    params: Any  # nested dicts, named by the axis table
    opt_state: Any  # the optax optimizer's


Batch = dict[str, jax.Array]
MasksAt = Callable[[jax.Array], dict[str, jax.Array]]  # mask value -> run-time masks by axis
TrainStep = Callable[..., tuple[TrainState, dict[str, Any]]]  # see `make_train_step`


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_state(
    config: TransformerConfig, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Makes a fresh train state.

    Args:
      config: the model.
      tx: the optimizer.
      key: for the parameters.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = Transformer(config).init(key, tokens)["params"]
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def abstract_state(
    config: TransformerConfig,
    tx: optax.GradientTransformation,
    layout: Layout | None = None,
) -> TrainState:
    """Describes a train state without arrays: the result of `init_state` as `ShapeDtypeStruct`s.

    Args:
      config: the model.
      tx: the optimizer.
      layout: gives the leaves' shardings; None: leaves without a sharding.
    """
    state: TrainState = jax.eval_shape(lambda: init_state(config, tx, jax.random.key(0)))
    if layout is None:
        return state
    placed: TrainState = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        state,
        state_shardings(config, state, layout),
    )
    return placed


def init_program(
    config: TransformerConfig, tx: optax.GradientTransformation, layout: Layout
) -> Callable[[jax.Array], TrainState]:
    """Makes the jitted `key -> fresh train state`, with the layout's shardings."""
    placed = state_shardings(config, abstract_state(config, tx), layout)
    return jax.jit(functools.partial(init_state, config, tx), out_shardings=placed)


def state_shardings(config: TransformerConfig, state: TrainState, layout: Layout) -> TrainState:
    """The sharding of every leaf of a train state, as a tree of the same structure."""
    placed: TrainState = sharding.shardings(state, axes.table(config), *layout)
    return placed


def logits_of(
    config: TransformerConfig, params: Any, batch: Batch, masks: dict[str, jax.Array] | None = None
) -> jax.Array:
    """The model's logits [B, T, V] on a packed batch."""
    logits_BTV: jax.Array = Transformer(config).apply(
        {"params": params}, batch["tokens"], batch["segment_ids"], batch["positions"], masks=masks
    )  # type: ignore[assignment]
    return logits_BTV


def nats_of(
    config: TransformerConfig,
    params: Any,
    batch: Batch,
    masks: dict[str, jax.Array] | None = None,
    tokens: int | None = None,
) -> jax.Array:
    """The negative log-likelihood [B, T] of a packed batch's targets: `loss.token_nats`.

    It computes no logits [B, T, V] if the config has `loss_chunks`.
    """
    readout: Readout = Transformer(config).apply(
        {"params": params}, batch["tokens"], batch["segment_ids"], batch["positions"], masks=masks,
        method="readout",
    )  # type: ignore[assignment]  # fmt: skip
    return loss.token_nats(readout, batch["targets"], config, tokens)


def summed_loss(
    params: Any, batch: Batch, config: TransformerConfig, masks: dict[str, jax.Array] | None = None
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of a packed batch's `nats_of`, and the sum of the weights."""
    return loss.summed(nats_of(config, params, batch, masks), batch["weights"])


def gradients(
    params: Any,
    batch: Batch,
    config: TransformerConfig,
    masks: dict[str, jax.Array] | None = None,
    accumulate: int = 1,
) -> tuple[jax.Array, Any, jax.Array]:
    """Computes the mean loss and its gradient.

    Sums of losses and gradients are divided by the tokens of the whole batch, so that the result
    does not depend on the number of microbatches, up to rounding.

    Args:
      params: the parameters.
      batch: arrays [B, T]: tokens, targets, weights, segment_ids, positions.
      config: the model.
      masks: run-time masks by axis; None: the plain model.
      accumulate: number of microbatches that the batch is cut into; must divide B.

    Returns:
      The loss in nats per token, its gradient, and the number of target tokens.
    """
    value_and_grad = jax.value_and_grad(summed_loss, has_aux=True)
    if accumulate == 1:
        (total, tokens), grads = value_and_grad(params, batch, config, masks)
    else:
        # Every device has rows of every microbatch. Without this, XLA splits the microbatches over
        # devices, and its partitioner then fails on the embedding's lookup if tensor > 1.
        micro = {
            k: sharding.constrain(
                v.reshape(accumulate, -1, *v.shape[1:]), None, sharding.BATCH_AXES, None
            )
            for k, v in batch.items()
        }

        def add(sums: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, value_and_grad(params, part, config, masks)), None

        shapes = jax.eval_shape(
            lambda: value_and_grad(params, {k: v[0] for k, v in micro.items()}, config, masks)
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        ((total, tokens), grads), _ = jax.lax.scan(add, zeros, micro)
    return total / tokens, jax.tree.map(lambda g: g / tokens.astype(g.dtype), grads), tokens


def make_train_step(
    stage: StageConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    masks_at: MasksAt | None = None,
    rules: RulesConfig = sharding.RULES,
    measure: Callable[[Any], dict[str, Any]] | None = None,
    added: AddedSlots | None = None,
    guarded: bool = False,
) -> TrainStep:
    """Makes the jitted `step(state, batch, mask_value=None) -> (state, metrics)`.

    The state is donated. With a mask value (a traced scalar) the run-time masks are on; without
    one it is the plain step. At most these two programs are compiled.

    Args:
      stage: gives the model and the number of microbatches.
      tx: the optimizer.
      mesh: the devices to compute on.
      masks_at: run-time masks by axis, for a mask value; None: there are none.
      rules: how the state is split over the mesh.
      measure: computes further metrics from the step's updates (nested dicts like the parameters).
      added: the slots that the stage's growth added (`growth.added_slots`); needed if the stage has
        a `growth.old_rate`.
      guarded: where the loss, the gradient or the update is not finite, parameters and moments keep
        their bits, and only the counts of steps go on. Otherwise the bits are those of the step
        that is not guarded.

    Returns:
      The step. Metrics: loss (nats per token), grad_norm (of the entries that train), tokens, those
      of `measure`, and for a guarded step finite (whether the update was made).

    Raises:
      UserError: `stage` is of the wrong type, or `added` does not fit it.
    """
    require_type(stage, StageConfig, "make_train_step: stage")
    trained, update = Trained.of(stage), optax.with_extra_args_support(tx).update
    trained.check(added)

    def step(
        state: TrainState, batch: Batch, mask_value: jax.Array | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        masks = None if mask_value is None or masks_at is None else masks_at(mask_value)
        nats, grads, tokens = gradients(state.params, batch, stage.model, masks, stage.accumulate)
        updates, opt_state = update(grads, state.opt_state, state.params, added=added)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": nats, "grad_norm": trained.norm(grads, added), "tokens": tokens}
        if measure is not None:
            metrics |= measure(updates)
        if guarded:
            # A finite norm of all gradients makes the moments finite, also those of frozen entries.
            metrics["finite"] = guard.all_finite((nats, optax.tree.norm(grads), params))
            params, opt_state = guard.chosen(
                metrics["finite"], (params, opt_state), (state.params, state.opt_state)
            )
        return TrainState(state.step + 1, params, opt_state), metrics

    placed = state_shardings(stage.model, abstract_state(stage.model, tx), Layout(mesh, rules))
    return jax.jit(step, donate_argnums=0, out_shardings=(placed, None))

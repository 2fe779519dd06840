"""The compiled training of a model, several steps a call, at learning rates that are arguments.

Trunks, decays and all learning rates of a model share one program. A grown model trains by the same
program as one that never grew, unless its masks rise or its growth changes the optimizer.

Letters in array names: K steps of a call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from flm_jax import growth
from flm_jax.config import GrowthConfig, OptimizerConfig, StageConfig
from flm_jax.train import optim
from flm_jax.train.train_step import TrainState, make_train_step


@dataclasses.dataclass(frozen=True)
class Training:
    """What a program depends on.

    Attributes:
      stage: model, batch and growth settings; its steps mean nothing.
      settings: Adam's.
      grown_at: global step of a growth that changes the optimizer; None: there is none.
      plan: that growth, or the one whose masks rise.
      masked: whether run-time masks rise.
    """

    stage: StageConfig
    settings: OptimizerConfig
    grown_at: int | None = None
    plan: growth.Plan | None = None
    masked: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      training: what it depends on.
      tx: the optimizer, with `rate` in its state.
      call: (state, batches [K, B, T], rates [K], masks [K] or None) -> state and losses [K]. The
        state is donated.
    """

    training: Training
    tx: optax.GradientTransformation
    call: Callable[..., tuple[TrainState, jax.Array]]


def changes_optimizer(settings: GrowthConfig) -> bool:
    """Whether the steps after a growth differ from those of a model that never grew."""
    return settings.old_rate != 1 or settings.added_rate != 1 or settings.rates == "ramp"


def compiled(training: Training, mesh: Mesh) -> Program:
    """Makes a program; it compiles when it is first called."""
    stage, plan = training.stage, training.plan

    def with_rate(rate: jax.Array) -> optax.GradientTransformation:
        return optim.optimizer(stage, training.settings, lambda step: rate, training.grown_at)

    tx = optax.inject_hyperparams(with_rate)(rate=1.0)
    masks_at = plan.masks if plan and training.masked else None
    added = growth.added_slots(plan) if plan else None
    step = make_train_step(stage, tx, mesh, masks_at, added=added)

    def call(
        state: TrainState, batches: Any, rates_K: jax.Array, masks_K: jax.Array | None
    ) -> tuple[TrainState, jax.Array]:
        def one(state: TrainState, x: Any) -> tuple[TrainState, jax.Array]:
            batch, rate, mask = x
            opt_state = optax.tree.set(state.opt_state, rate=rate)
            state, metrics = step(dataclasses.replace(state, opt_state=opt_state), batch, mask)
            return state, metrics["loss"]

        return jax.lax.scan(one, state, (batches, rates_K, masks_K))

    return Program(training, tx, jax.jit(call, donate_argnums=0))

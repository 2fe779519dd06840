"""Many short trainings from scratch: one model at several sizes, and trials kept on disk."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax import data, mapping
from flm_jax.config import ExperimentConfig, StageConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.inference.evaluation import score
from flm_jax.params import sharding
from flm_jax.runtime import host
from flm_jax.store.trials import Trials
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState, TrainStep, init_state, make_train_step

LAST = 0.2  # share of the last steps, whose mean loss is the trial's training loss


def widened(
    model: TransformerConfig, factor: int, parametrisation: str = "mup"
) -> TransformerConfig:
    """Multiplies every width of a model.

    Args:
      model: the model; unless it names a µP base width, its own width becomes the base.
      factor: of the widths.
      parametrisation: of the result.
    """
    return dataclasses.replace(
        model,
        parametrisation=parametrisation,
        mup_base_width=model.mup_base_width or model.d_model,
        d_model=factor * model.d_model,
        num_heads=factor * model.num_heads,
        num_kv_heads=factor * model.num_kv_heads,
        d_ff=factor * model.d_ff,
    )


def deepened(model: TransformerConfig, factor: int, parametrisation: str) -> TransformerConfig:
    """The model with its depth multiplied; its own depth is CompleteP's base."""
    return dataclasses.replace(
        model,
        parametrisation=parametrisation,
        mup_base_depth=model.mup_base_depth or model.num_layers,
        num_layers=factor * model.num_layers,
    )


class Study:
    """Trains stages from scratch on one corpus, on one device.

    Attributes:
      experiment: what all trainings share: data, optimizer, schedule, evaluation, seed.
      corpus: the opened data.
      mesh: the device.
      trials: finished trials, which are not run again.
    """

    def __init__(self, experiment: ExperimentConfig, path: str | os.PathLike[str]):
        """Opens the data.

        Args:
          experiment: the stages to train, and what they share.
          path: file that stores the finished trials.

        Raises:
          UserError: the data cannot be opened, or its vocabulary is larger than a model's.
        """
        host.keep_freed()
        if experiment.quick_compile:
            host.compile_quickly()
        self.experiment = experiment
        self.corpus = data.open_corpus(experiment.data_of(0))
        smallest = min(stage.model.vocab_size for stage in experiment.stages)
        if self.corpus.vocab_size > smallest:
            raise UserError(
                f"TransformerConfig.vocab_size is {smallest}, but the data's vocabulary has "
                f"{self.corpus.vocab_size} tokens; set vocab_size to {self.corpus.vocab_size} or "
                "more"
            )
        self.mesh = sharding.one_device()
        self.trials = Trials(path)

    @functools.cached_property
    def validation(self) -> list[dict[str, np.ndarray]]:
        """The validation batches."""
        settings = self.experiment.eval
        return self.corpus.validation(settings.batch_size, settings.sequences)

    def batches(self, stage: StageConfig, seed: int) -> Any:
        """Opens the training stream of a seed, in batches of the stage's size."""
        config = dataclasses.replace(self.corpus.config, seed=self.experiment.data.seed + seed)
        return self.corpus.with_length(config).train(stage.batch_size)

    def trial(self, stage: StageConfig, seed: int = 0, rate: float = 1.0) -> dict[str, Any]:
        """Trains a stage from scratch, unless the trial is stored already.

        Args:
          stage: the model to train, its steps and its learning rates.
          seed: of the initial parameters and of the data's order.
          rate: factor on both learning rates. One compiled step serves all rates.

        Returns:
          The trial's row, with train_loss (nats per token) and bpb (validation bits per byte).
          Both are None if the loss diverged.
        """
        shared = mapping.to_dict(self.experiment)
        decides = {
            "stage": mapping.to_dict(stage), "seed": seed, "rate": rate,
            "fingerprint": self.corpus.fingerprint,
            **{key: shared[key] for key in ("data", "optimizer", "schedule", "eval", "seed")},
            "trial_seed": seed,
        }  # fmt: skip
        description = {
            "name": stage.name, "width": stage.model.d_model, "depth": stage.model.num_layers,
            "parametrisation": stage.model.parametrisation, "seed": seed, "rate": rate,
        }  # fmt: skip
        return self.trials.result(
            {"key": mapping.digest(decides)}, lambda: description | self._train(stage, seed, rate)
        )

    def optimizer(
        self, stage: StageConfig, grown_at: int | None = None
    ) -> optax.GradientTransformation:
        """Builds the stage's optimizer, on the experiment's schedule.

        Its state holds `rate`, a factor on the learning rates: one compiled step serves all rates.

        Args:
          stage: the model, its learning rates and its growth.
          grown_at: see `optim.optimizer`.
        """
        settings, schedule = self.experiment.optimizer, self.experiment.schedule
        shape = schedules.schedule_shape(schedule, schedule.total_steps or stage.steps)

        def with_rate(rate: jax.Array) -> optax.GradientTransformation:
            return optim.optimizer(stage, settings, lambda step: rate * shape(step), grown_at)

        return optax.inject_hyperparams(with_rate)(rate=1.0)

    def start(
        self, stage: StageConfig, seed: int, tx: optax.GradientTransformation, rate: float = 1.0
    ) -> TrainState:
        """Initialises a train state.

        Args:
          stage: the model.
          seed: of the parameters, in addition to the experiment's.
          tx: the optimizer, from `optimizer`.
          rate: factor on the learning rates, stored in the optimizer's state.
        """
        key = jax.random.fold_in(jax.random.key(self.experiment.seed), seed)
        state: TrainState = init_state(stage.model, tx, key)
        opt_state = optax.tree.set(state.opt_state, rate=jnp.float32(rate))
        return dataclasses.replace(state, opt_state=opt_state)

    @functools.lru_cache(maxsize=1)  # noqa: B019  (one entry: the stage in training)
    def compiled(self, stage: StageConfig) -> tuple[optax.GradientTransformation, TrainStep]:
        """Returns the stage's optimizer and its train step, compiled once for all seeds."""
        tx = self.optimizer(stage)
        return tx, make_train_step(stage, tx, self.mesh)

    def _train(self, stage: StageConfig, seed: int, rate: float) -> dict[str, Any]:
        """Trains and evaluates; returns the results of `trial`."""
        tx, step = self.compiled(stage)
        state, batches = self.start(stage, seed, tx, rate), self.batches(stage, seed)
        losses = []
        for _ in range(stage.steps):
            state, metrics = step(state, next(batches))
            losses.append(metrics["loss"])
        train_loss = float(np.mean(jax.device_get(losses[-math.ceil(LAST * stage.steps) :])))
        if not math.isfinite(train_loss):
            return {"train_loss": None, "bpb": None}
        bpb = score(
            state.params, stage.model, self.validation, self.corpus.token_bytes, self.mesh
        ).bits_per_byte
        return {"train_loss": train_loss, "bpb": bpb if math.isfinite(bpb) else None}

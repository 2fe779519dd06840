"""Many short trainings from scratch: widths of one model, and trials that are kept on disk."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import data, mapping
from flm_jax.config import ExperimentConfig, StageConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.growth import Plan
from flm_jax.inference.evaluation import score
from flm_jax.params import sharding
from flm_jax.runtime import host
from flm_jax.store.files import MetricsFile
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState, gradients, init_state

LAST = 0.2  # share of the steps whose mean training loss is a trial's


def widened(
    model: TransformerConfig, factor: int, parametrisation: str = "mup"
) -> TransformerConfig:
    """The model with every width multiplied; its own width is µP's base."""
    return dataclasses.replace(
        model,
        parametrisation=parametrisation,
        mup_base_width=model.mup_base_width or model.d_model,
        d_model=factor * model.d_model,
        num_heads=factor * model.num_heads,
        num_kv_heads=factor * model.num_kv_heads,
        d_ff=factor * model.d_ff,
    )


class Study:
    """Trains stages from scratch on one corpus; a trial that is on disk is not run again."""

    def __init__(self, experiment: ExperimentConfig, path: Any):
        host.keep_freed()
        if experiment.quick_compile:
            host.compile_quickly()
        self.experiment = experiment
        self.corpus = data.open_corpus(experiment.data_of(0))
        smallest = min(stage.model.vocab_size for stage in experiment.stages)
        if self.corpus.vocab_size > smallest:
            raise UserError(
                f"config.experiment: vocab_size is {smallest}, but the vocabulary has "
                f"{self.corpus.vocab_size} tokens; set vocab_size to that or more"
            )
        self.mesh = sharding.one_device()
        self.file = MetricsFile(path)

    @functools.cached_property
    def validation(self) -> list[dict[str, np.ndarray]]:
        settings = self.experiment.eval
        return self.corpus.validation(settings.batch_size, settings.sequences)

    def batches(self, stage: StageConfig, seed: int) -> Any:
        """The training stream of a seed."""
        about = dataclasses.replace(self.corpus.config, seed=self.experiment.data.seed + seed)
        return self.corpus.with_length(about).train(stage.batch_size)

    def trial(self, stage: StageConfig, seed: int = 0, rate: float = 1.0) -> dict[str, Any]:
        """A row with train_loss (nats per token) and bpb, both None if the loss diverged.

        Args:
          stage: what to train, from scratch.
          seed: of initial parameters and data.
          rate: what both learning rates are multiplied by; compiled once for all.
        """
        shared = mapping.to_dict(self.experiment)
        about = {
            "stage": mapping.to_dict(stage), "seed": seed, "rate": rate,
            "fingerprint": self.corpus.fingerprint,
            **{key: shared[key] for key in ("data", "optimizer", "schedule", "eval", "seed")},
            "trial_seed": seed,
        }  # fmt: skip
        key = mapping.digest(about)
        for row in self.file.rows("trial"):
            if row["key"] == key:
                return row
        result = self._train(stage, seed, rate)
        self.file.path.parent.mkdir(parents=True, exist_ok=True)
        self.file.append(
            "trial", stage.steps, key=key, name=stage.name, width=stage.model.d_model,
            parametrisation=stage.model.parametrisation, seed=seed, rate=rate, **result,
        )  # fmt: skip
        return self.file.rows("trial")[-1]

    def start(self, stage: StageConfig, seed: int) -> TrainState:
        tx = optim.optimizer(stage, self.experiment.optimizer, schedules.steady)
        key = jax.random.fold_in(jax.random.key(self.experiment.seed), seed)
        return init_state(stage.model, tx, key)

    @functools.lru_cache(maxsize=2)  # noqa: B019  (the compiled step of the stage at work)
    def step(
        self, stage: StageConfig, plan: Plan | None = None, grown_at: int | None = None
    ) -> Any:
        """`step(state, batch, rate, mask=None) -> (state, loss, updates)`; the state is donated."""
        schedule = self.experiment.schedule
        shape = schedules.schedule_shape(schedule, schedule.total_steps or stage.steps)

        def step(
            state: TrainState,
            batch: dict[str, jax.Array],
            rate: jax.Array,
            mask: jax.Array | None = None,
        ) -> tuple[TrainState, jax.Array, Any]:
            settings = self.experiment.optimizer
            tx = optim.optimizer(stage, settings, lambda n: rate * shape(n), grown_at)
            masks = None if plan is None or mask is None else plan.masks(mask)
            loss, grads, _ = gradients(state.params, batch, stage.model, masks)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = jax.tree.map(jnp.add, state.params, updates)
            return TrainState(state.step + 1, params, opt_state), loss, updates

        return jax.jit(step, donate_argnums=0)

    def _train(self, stage: StageConfig, seed: int, rate: float) -> dict[str, Any]:
        state, batches, step = self.start(stage, seed), self.batches(stage, seed), self.step(stage)
        losses = []
        for _ in range(stage.steps):
            state, loss, _ = step(state, next(batches), np.float32(rate))
            losses.append(loss)
        train_loss = float(np.mean(jax.device_get(losses[-math.ceil(LAST * stage.steps) :])))
        if not math.isfinite(train_loss):
            return {"train_loss": None, "bpb": None}
        bpb = score(
            state.params, stage.model, self.validation, self.corpus.token_bytes, self.mesh
        ).bits_per_byte
        return {"train_loss": train_loss, "bpb": bpb if math.isfinite(bpb) else None}

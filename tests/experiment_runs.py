"""A tiny experiment for the tests of branches, extensions and sweeps."""

import dataclasses

from flm_jax.commands import config_files
from flm_jax.config import (
    CheckpointConfig,
    EvalConfig,
    ExperimentConfig,
    MeshConfig,
    ScheduleConfig,
)
from tests import tiny_chain


def experiment(kind="constant", stages=1, steps=12, **schedule) -> ExperimentConfig:
    """Returns a chain of the first stages of `tiny_chain`, which keeps all checkpoints."""
    config = config_files.experiment(tiny_chain.get_config())
    return dataclasses.replace(
        config,
        mesh=MeshConfig(),
        stages=tuple(dataclasses.replace(s, steps=steps) for s in config.stages[:stages]),
        schedule=ScheduleConfig(kind, warmup_steps=2, **schedule),
        eval=EvalConfig(sequences=8, batch_size=8, every_steps=6),
        checkpoint=CheckpointConfig(every_steps=3, keep=99),
    )


def with_steps(config, steps, index=-1):
    """Returns the config with another number of steps in one stage."""
    stages = list(config.stages)
    stages[index] = dataclasses.replace(stages[index], steps=steps)
    return dataclasses.replace(config, stages=tuple(stages))

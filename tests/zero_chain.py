"""A chain from no layers to one to three, with every way of rates, for the tests.

flm train --config=tests/zero_chain.py --workdir=DIR
"""

import dataclasses

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    GrowthConfig,
    StageConfig,
    TransformerConfig,
)

NONE = TransformerConfig(
    vocab_size=260,
    num_layers=0,
    d_model=16,
    num_heads=4,
    head_dim=4,
    d_ff=24,
    mup_base_width=16,
    matrix_init_std=0.1,
    vector_init_std=0.1,
)


def _stage(name: str, recipe: str, rates: str, **model: int) -> StageConfig:
    growth = GrowthConfig(recipe, rates=rates, ramp_steps=4, calibration_sequences=4)
    return StageConfig(
        name, dataclasses.replace(NONE, **model), 8, 8, 2e-2, 2e-2, growth=growth
    )  # fmt: skip


def get_config() -> ml_collections.ConfigDict:
    """Returns the chain: growths after a growth from nothing, after a ramp, and carried twice."""
    stages = (
        _stage("none", "msg", "target"),
        _stage("one", "layers=zero_pad", "ramp", num_layers=1),
        _stage("two", "zero_pad,identity", "carry", num_layers=2, d_model=20, num_heads=5),
        _stage("three", "msg", "carry", num_layers=3, d_model=24, num_heads=6, d_ff=32),
    )
    return config_files.to_config_dict(
        ExperimentConfig(
            stages=stages,
            data=DataConfig(sequence_length=32, shuffle_tokens=1 << 14),
            eval=EvalConfig(sequences=16, batch_size=8, every_steps=4),
            checkpoint=CheckpointConfig(every_steps=4, keep=2),
            quick_compile=True,
        )
    )

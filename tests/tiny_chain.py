"""A chain of two stages that trains in seconds, for the tests of several processes.

flm train --config=tests/tiny_chain.py --workdir=DIR
"""

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    GrowthConfig,
    MeshConfig,
    ScheduleConfig,
    StageConfig,
    TransformerConfig,
)


def _stage(name: str, layers: int, heads: int, ffn: int) -> StageConfig:
    model = TransformerConfig(
        vocab_size=260,
        num_layers=layers,
        d_model=4 * heads,
        num_heads=heads,
        head_dim=4,
        d_ff=ffn,
        mup_base_width=16,
        matrix_init_std=0.1,
        vector_init_std=0.1,
    )
    growth = GrowthConfig(ramp_steps=4, rewarmup_steps=2, calibration_sequences=4)
    return StageConfig(name, model, 12, 8, 2e-2, 2e-2, growth=growth)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the chain. In variant `relayout` the second stage has another mesh."""
    stages = (_stage("small", 1, 4, 24), _stage("large", 2, 8, 48))
    config = config_files.to_config_dict(
        ExperimentConfig(
            stages=stages,
            data=DataConfig(sequence_length=32, shuffle_tokens=1 << 14),
            schedule=ScheduleConfig(warmup_steps=2, decay_steps=4),
            eval=EvalConfig(sequences=16, batch_size=8, every_steps=2),
            checkpoint=CheckpointConfig(every_steps=3, keep=2),
            mesh=MeshConfig(data=2, fsdp=2, tensor=2),
            quick_compile=True,
        )
    )
    if variant == "relayout":
        config.stages[1].mesh = config_files.to_config_dict(MeshConfig(data=1, fsdp=8, tensor=1))
    return config

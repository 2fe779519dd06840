"""The reference model for training speed: 34 million parameters, 8 layers, 8 x 512 tokens.

  flm benchmark step --config=configs/bench_34m.py

About a minute on two CPU cores. Nothing is trained. README.md has the results.
"""

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import (
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    StageConfig,
    TransformerConfig,
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    model = TransformerConfig(
        vocab_size=8192,
        num_layers=8,
        d_model=512,
        num_heads=8,
        head_dim=64,
        d_ff=1408,
        remat="dots",  # on a CPU, computing attention again is cheaper than storing it
    )
    stage = StageConfig(
        name="bench",
        model=model,
        steps=10,
        batch_size=8,
        learning_rate=1e-3,
        matrix_learning_rate=1e-3,
    )
    return config_files.single(
        ExperimentConfig((stage,), DataConfig(sequence_length=512), OptimizerConfig(clip_norm=1.0))
    )

"""A model of 110 million parameters to measure generation speed: 12 layers, hidden size 768.

  flm benchmark generate --config=configs/bench_110m.py

Less than a minute on two CPU cores. Nothing is trained. docs/generate.md has the results.
"""

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import DataConfig, ExperimentConfig, StageConfig, TransformerConfig


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    model = TransformerConfig(
        vocab_size=16_384,
        num_layers=12,
        d_model=768,
        num_heads=12,
        head_dim=64,
        d_ff=2048,
    )
    stage = StageConfig(
        name="bench",
        model=model,
        steps=10,
        batch_size=1,
        learning_rate=1e-3,
        matrix_learning_rate=1e-3,
    )
    return config_files.single(ExperimentConfig((stage,), DataConfig(sequence_length=512)))

r"""Grow a byte-level decoder twice on the Python standard library's source: 0.85M, 1.6M, 17M.

  make demo
  flm train --config=configs/demo.py --workdir=runs/demo

About 8 minutes on two CPU cores. Expected: validation falls from 8.51 bits per byte to 2.07, 1.87
and 1.77 at the ends of the stages, and does not change at either growth.

`:smoke` is the same chain with tiny models and few steps, for tests; it takes about a minute.
`:sentencepiece` uses a vocabulary of 1,024 pieces, which this command trains:

  flm vocabulary --config=configs/demo.py --vocab_size=1024 \
    --output=runs/vocab.model

The sizes mirror Tele-FLM's 52B -> 102B -> 1T: parameters x1.9 then x10, hidden x1.25 then x2,
depth x1.25 then x1.75, at a fixed head size. µP's base width is the first stage's width, so the
learning rates of matrix-like parameters fall as the model gets wider.
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
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    TransformerConfig,
)

HEAD_DIM = 32


def _model(layers: int, hidden: int, ffn: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=260,  # 256 bytes, 3 special tokens, 1 unused
        num_layers=layers,
        d_model=hidden,
        num_heads=hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        d_ff=ffn,
        mup_base_width=128,
        matrix_init_std=0.06,
        vector_init_std=0.06,
        depth_scaled_init=True,
        remat="dots",  # on a CPU, computing attention again is cheaper than storing it
    )


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    variants = {"": lambda config: config, "smoke": _smoke, "sentencepiece": _sentencepiece}
    if variant not in variants:
        raise config_files.unknown_variant(variant, ("smoke", "sentencepiece"))
    stages = (
        StageConfig(
            name="small",
            model=_model(4, 128, 336),
            steps=900,
            batch_size=4,
            learning_rate=2.5e-3,
            matrix_learning_rate=2.5e-3,
        ),
        StageConfig(
            name="medium",
            model=_model(5, 160, 416),
            steps=400,
            batch_size=4,
            learning_rate=2e-3,
            matrix_learning_rate=2.5e-3,
            growth=GrowthConfig(ramp_steps=80, rewarmup_steps=20),
        ),
        StageConfig(
            name="large",
            model=_model(9, 320, 1536),
            steps=200,
            batch_size=2,
            learning_rate=4e-4,
            matrix_learning_rate=1e-3,
            growth=GrowthConfig(ramp_steps=60, rewarmup_steps=20),
        ),
    )
    config = ExperimentConfig(
        stages=stages,
        data=DataConfig(sequence_length=256),
        optimizer=OptimizerConfig(weight_decay=0.1),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=50, decay_steps=100),
        eval=EvalConfig(sequences=64, batch_size=8, every_steps=100),
        checkpoint=CheckpointConfig(every_steps=100, keep=2),
    )
    return config_files.to_config_dict(variants[variant](config))


def _smoke(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the same chain with tiny models and few steps."""
    sizes = ((2, 4, 84, 40), (3, 5, 104, 24), (5, 10, 384, 24))
    stages = tuple(
        dataclasses.replace(
            stage,
            model=dataclasses.replace(
                stage.model, num_layers=layers, d_model=8 * heads, num_heads=heads, head_dim=8,
                d_ff=ffn, mup_base_width=32, remat="none",
            ),
            steps=steps,
            growth=GrowthConfig(ramp_steps=8, rewarmup_steps=4, calibration_sequences=4),
        )
        for stage, (layers, heads, ffn, steps) in zip(config.stages, sizes, strict=True)
    )  # fmt: skip
    return dataclasses.replace(
        config,
        stages=stages,
        data=DataConfig(sequence_length=64, shuffle_tokens=1 << 17),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=12),
        eval=EvalConfig(sequences=32, batch_size=8, every_steps=20),
        checkpoint=CheckpointConfig(every_steps=10, keep=2),
        quick_compile=True,
    )


def _sentencepiece(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the same chain with a trained vocabulary."""
    stages = tuple(
        dataclasses.replace(stage, model=dataclasses.replace(stage.model, vocab_size=1024))
        for stage in config.stages
    )
    data = dataclasses.replace(config.data, vocabulary="runs/vocab.model")
    return dataclasses.replace(config, stages=stages, data=data)

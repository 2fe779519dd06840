"""Tele-FLM-52B (arXiv 2404.16645, tables 2 and 4): 52,817,829,888 parameters.

  flm describe --config=configs/tele_flm_52b.py --json

The authors trained it on 896 A800 GPUs for about two months, to a loss near 1.55 after 2 trillion
tokens. It was not trained here. Values marked "our choice" are not published.
"""

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    LayoutConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    TransformerConfig,
)

BATCH = 1344  # sequences of 4,096: 5,505,024 tokens
DATA = DataConfig(
    task="c4",  # our choice: the authors' 2 trillion tokens are not public
    vocabulary="vocab.model",  # their 80k byte-level BPE is not SentencePiece; train one
    sequence_length=4096,
)
OPTIMIZER = OptimizerConfig(
    b1=0.9,  # our choice, with b2 and eps: FLM-101B's (arXiv 2309.03852); Tele-FLM states none
    b2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=1.0,
)
SCHEDULE = ScheduleConfig(
    kind="cosine",
    warmup_steps=2000,
    total_steps=2_500_000_000_000 // (BATCH * 4096),
    final_ratio=0.1,  # minimum 1.5e-5
)
EVAL = EvalConfig(sequences=1024, batch_size=64, every_steps=1000)  # our choice
# Our choice: layouts that fit (docs/scaling.md). 1344 divides over 64 devices, not over 128.
LAYOUTS = (
    LayoutConfig("v5p:4x4x4", MeshConfig(1, 64, 1), accumulate=21, remat="dots"),
    LayoutConfig("v5p:4x4x8", MeshConfig(1, 32, 4), accumulate=21),
    LayoutConfig("v5p:8x8x8", MeshConfig(1, 64, 8), accumulate=7),
    LayoutConfig("h100:8x8", MeshConfig(2, 16, 2), accumulate=42, remat="dots"),
    LayoutConfig("h100:16x8", MeshConfig(1, 16, 8), accumulate=21),
    LayoutConfig("h100:128x8", MeshConfig(1, 64, 16), accumulate=7),
)
CHECKPOINT = CheckpointConfig(every_steps=500, keep=3)  # our choice


def stage() -> StageConfig:
    model = TransformerConfig(
        vocab_size=80_000,
        num_layers=64,
        d_model=8192,
        num_heads=64,
        head_dim=128,
        d_ff=21_824,
        mup_base_width=512,  # mup_scale_factor 16
        input_mult=1.0,
        output_mult=0.5,
        matrix_init_std=0.012 * 2**0.5,  # 4.242e-3 at width 8192
        vector_init_std=4e-3,
        dtype="bfloat16",
        remat="full",  # our choice
    )
    return StageConfig(
        name="52b",
        model=model,
        steps=2_000_000_000_000 // (BATCH * 4096),
        batch_size=BATCH,
        learning_rate=1.5e-4,
        matrix_learning_rate=2.4e-3,  # 1.5e-4 at width 8192
        layouts=LAYOUTS,
    )


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    return config_files.single(
        ExperimentConfig((stage(),), DATA, OPTIMIZER, SCHEDULE, EVAL, CHECKPOINT)
    )

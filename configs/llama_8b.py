"""A decoder of Llama 3's 8B sizes: 8,030,261,248 parameters.

  flm preflight --config=configs/llama_8b.py --topology=h100:1x8
  flm train --config=configs/llama_8b.py --workdir=runs/8b

It has layouts for one node of eight H100, and for a v5p-16 slice: eight chips (v5p:2x2x2), because
the name counts two cores in each. 20,000 steps are 21 billion tokens. It was not trained here;
docs/scaling.md has what the compilers report. Sizes are Llama 3's (arXiv 2407.21783, table 3); the
rest is our choice.
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
    ScheduleConfig,
    StageConfig,
    TransformerConfig,
)

DATA = DataConfig(
    task="c4",
    vocabulary="vocab.model",  # train one of 128,256 tokens, or give a tokenizer.json
    sequence_length=8192,
)
CHECKPOINT = CheckpointConfig(every_steps=500, keep=3)
MODEL = TransformerConfig(
    vocab_size=128_256,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14_336,
    rope_theta=500_000.0,
    mup_base_width=256,
    matrix_init_std=0.02 * 4,  # 0.02 at width 4096
    dtype="bfloat16",
    remat="full",
)
LAYOUTS = (
    LayoutConfig("h100:1x8", MeshConfig(1, 8, 1), accumulate=16),
    LayoutConfig("v5p:2x2x2", MeshConfig(1, 8, 1), accumulate=8),
)


def stage() -> StageConfig:
    return StageConfig(
        name="8b",
        model=MODEL,
        steps=20_000,
        batch_size=128,  # 1,048,576 tokens
        learning_rate=3e-4,
        matrix_learning_rate=3e-4 * 16,  # 3e-4 at width 4096
        layouts=LAYOUTS,
    )


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    return config_files.single(
        ExperimentConfig(
            (stage(),),
            DATA,
            schedule=ScheduleConfig(warmup_steps=500, decay_steps=2000),
            eval=EvalConfig(sequences=256, batch_size=8, every_steps=1000),
            checkpoint=CHECKPOINT,
        )
    )

"""8B -> 70B: a decoder of Llama 3's sizes that grows once, on 256 H100 or on a v5p-256 slice.

  flm preflight --config=configs/llama_8b_to_70b.py --topology=h100:32x8
  flm train --config=configs/llama_8b_to_70b.py --workdir=runs/70b

A v5p-256 slice has 128 chips (v5p:4x4x8): the name counts two cores in each chip. The 70B has
70,553,706,496 parameters. The 8B sees 84 billion tokens, and the 70B 126 billion more. It was not
trained here; docs/scaling.md has what the compilers report. Sizes are Llama 3's (arXiv 2407.21783,
table 3); the rest is our choice.
"""

import dataclasses

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import (
    EvalConfig,
    ExperimentConfig,
    GrowthConfig,
    LayoutConfig,
    MeshConfig,
    ScheduleConfig,
    StageConfig,
)

llama_8b = config_files.shipped("llama_8b")

SMALL_LAYOUTS = (
    LayoutConfig("h100:32x8", MeshConfig(1, 32, 8), accumulate=4),
    LayoutConfig("v5p:4x4x8", MeshConfig(1, 32, 4), accumulate=4),
)
LAYOUTS = (
    LayoutConfig("h100:32x8", MeshConfig(1, 32, 8), accumulate=8),
    LayoutConfig("v5p:4x4x8", MeshConfig(1, 32, 4), accumulate=8),
)


def stages() -> tuple[StageConfig, StageConfig]:
    small = dataclasses.replace(
        llama_8b.stage(),
        batch_size=512,
        layouts=SMALL_LAYOUTS,  # 4,194,304 tokens
    )
    model = dataclasses.replace(small.model, num_layers=80, d_model=8192, num_heads=64, d_ff=28_672)
    large = dataclasses.replace(
        small,
        name="70b",
        model=model,
        steps=30_000,
        growth=GrowthConfig(ramp_steps=1000, rewarmup_steps=100, calibration_sequences=32),
        layouts=LAYOUTS,
    )
    return small, large


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    return config_files.to_config_dict(
        ExperimentConfig(
            stages(),
            llama_8b.DATA,
            schedule=ScheduleConfig(warmup_steps=500, decay_steps=5000),
            eval=EvalConfig(sequences=256, batch_size=32, every_steps=1000),
            checkpoint=llama_8b.CHECKPOINT,
        )
    )

"""Tele-FLM-102B, the chain's second stage (arXiv 2407.02783): 102,198,487,040 parameters.

  flm describe --config=configs/tele_flm_102b.py --json

The authors trained it on about 0.3 trillion tokens. It was not trained here. Its sizes follow from
the reported number of parameters and the 52B's rule for the FFN. Values marked "our choice" are not
published.
"""

import dataclasses

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import ExperimentConfig, GrowthConfig, LayoutConfig, MeshConfig, StageConfig

tele_flm_52b = config_files.shipped("tele_flm_52b")
# Our choice: layouts that fit (docs/scaling.md).
LAYOUTS = (
    LayoutConfig("v5p:4x4x8", MeshConfig(1, 32, 4), accumulate=42, remat="none"),
    LayoutConfig("v5p:8x8x8", MeshConfig(1, 64, 8), accumulate=7),
    LayoutConfig("h100:16x8", MeshConfig(1, 64, 2), accumulate=21, remat="dots"),
    LayoutConfig("h100:128x8", MeshConfig(1, 64, 16), accumulate=7),
)


def stage() -> StageConfig:
    small = tele_flm_52b.stage()
    model = dataclasses.replace(
        small.model,
        num_layers=80,
        d_model=10_240,
        num_heads=80,
        d_ff=27_264,
        # Our choice: the 52B's. With it the logits' multiplier falls to 1/40, the same as the 1T's.
        output_mult=0.5,
    )
    return dataclasses.replace(
        small,
        name="102b",
        model=model,
        steps=300_000_000_000 // (small.batch_size * 4096),
        # Our choice: the ramp. The re-warm-up is FLM-101B's, 100 steps.
        growth=GrowthConfig(ramp_steps=1000, rewarmup_steps=100, calibration_sequences=64),
        layouts=LAYOUTS,
    )


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    t = tele_flm_52b
    return config_files.single(
        ExperimentConfig((stage(),), t.DATA, t.OPTIMIZER, t.SCHEDULE, t.EVAL, t.CHECKPOINT)
    )

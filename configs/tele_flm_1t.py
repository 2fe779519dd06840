"""Tele-FLM-1T, the chain's last stage (arXiv 2407.02783): 1,083,735,265,280 parameters.

  flm describe --config=configs/tele_flm_1t.py --json

The authors trained it on about 15.7 billion tokens and published no scores. It was not trained
here. Values marked "our choice" are not published.
"""

import dataclasses

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import ExperimentConfig, GrowthConfig, LayoutConfig, MeshConfig, StageConfig

tele_flm_52b = config_files.shipped("tele_flm_52b")
tele_flm_102b = config_files.shipped("tele_flm_102b")
# Our choice: layouts that fit (docs/scaling.md).
LAYOUTS = (
    LayoutConfig("v5p:8x8x8", MeshConfig(1, 32, 16), accumulate=42, remat="dots"),
    LayoutConfig("h100:128x8", MeshConfig(1, 64, 16), accumulate=7),
)


def stage() -> StageConfig:
    small = tele_flm_102b.stage()
    model = dataclasses.replace(
        small.model,
        num_layers=140,
        d_model=20_480,
        num_heads=160,
        d_ff=98_304,
        mup_base_width=256,  # mup_scale_factor 80
        output_mult=2.0,
        # The base width is half of the 102B's. For the same matrices, the std is therefore larger
        # by sqrt(2), and the learning rate by 2.
        matrix_init_std=small.model.matrix_init_std * 2**0.5,
    )
    return dataclasses.replace(
        small,
        name="1t",
        model=model,
        steps=15_700_000_000 // (small.batch_size * 4096),
        matrix_learning_rate=2 * small.matrix_learning_rate,
        growth=GrowthConfig(ramp_steps=500, rewarmup_steps=100, calibration_sequences=64),
        layouts=LAYOUTS,
    )


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    t = tele_flm_52b
    return config_files.single(
        ExperimentConfig((stage(),), t.DATA, t.OPTIMIZER, t.SCHEDULE, t.EVAL, t.CHECKPOINT)
    )

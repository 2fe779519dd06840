"""Tele-FLM's µP proxy (arXiv 2404.16645, table 2): the 52B narrowed to 512, 281,215,488 parameters.

  flm describe --config=configs/tele_flm_proxy.py --json

The authors searched seven hyper-parameters on it, nine combinations of about 50,000 steps each; its
loss falls from about 3.0 to 2.6 in their figure 1. It was not trained here. Values marked
"our choice" are not published.
"""

import dataclasses

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import ExperimentConfig, StageConfig

tele_flm_52b = config_files.shipped("tele_flm_52b")


def stage() -> StageConfig:
    large = tele_flm_52b.stage()
    model = dataclasses.replace(large.model, d_model=512, num_heads=4, d_ff=1344)
    # Our choice: the proxy's batch size. The learning rates are the 52B's: µP transfers them.
    return dataclasses.replace(large, name="proxy", model=model, steps=50_000)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    t = tele_flm_52b
    return config_files.single(
        ExperimentConfig((stage(),), t.DATA, t.OPTIMIZER, t.SCHEDULE, t.EVAL, t.CHECKPOINT)
    )

r"""Is less more? Few chosen conversations against many, on the demo's first stage.

  make demo
  flm less_is_more --config=configs/less_is_more.py --workdir=runs/less_is_more

About 36 minutes for 24 arms, on two CPU cores shared with other work, at low priority. Only the
demo's first stage is needed. docs/less_is_more.md has the expected results.

`:smoke` trains two arms from a run of `configs/demo.py:smoke` in runs/demo-smoke, for tests.
For your own model and data, copy this file and set `base` and `paths`. Set `defects=0.0` to use
your files without added defects.
"""

import dataclasses

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import CheckpointConfig, EvalConfig
from flm_jax.sft.config import SftConfig
from flm_jax.sft.selection import SelectionConfig
from flm_jax.studies.less_is_more import LessIsMoreConfig, MixConfig


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "smoke"):
        raise config_files.unknown_variant(variant, ("smoke",))
    sft = SftConfig(
        base="runs/demo",
        base_stage="small",
        made=320,
        batch_size=4,
        steps=64,
        learning_rate=1e-3,
        matrix_learning_rate=1e-3,
        eval=EvalConfig(sequences=16, batch_size=8, every_steps=16),
        checkpoint=CheckpointConfig(every_steps=16, keep=1),
        held_out=0.1,
        score_samples=20,
        max_new_tokens=64,
    )
    config = LessIsMoreConfig(
        sft=sft,
        sizes=(48, 384),
        mixes=(
            MixConfig("even"),
            MixConfig("answers", more=("arithmetic",), without=("arithmetic_steps",)),
            MixConfig("steps", more=("arithmetic_steps",), without=("arithmetic",)),
        ),
        # A model this small ranks noise first by IFD, and half answers first by loss.
        selection=SelectionConfig(size=1, worst_loss=0.1, rank="none"),
        defects=0.2,
        seeds=3,
    )
    if variant == "smoke":
        sft = dataclasses.replace(
            sft, base="runs/demo-smoke", base_stage="", made=6, steps=4, sequence_length=256,
            eval=EvalConfig(sequences=8, batch_size=8, every_steps=4),
            checkpoint=CheckpointConfig(every_steps=4, keep=1),
            score_samples=2, max_new_tokens=8, quick_compile=True,
        )  # fmt: skip
        config = dataclasses.replace(
            config, sft=sft, sizes=(8, 16), mixes=config.mixes[:1], seeds=1, defects=0.0,
            # For a model trained for a few steps, no question helps.
            selection=SelectionConfig(size=1, worst_loss=0.0, max_ifd=100.0, rank="none"),
        )  # fmt: skip
    return config_files.to_config_dict(config)

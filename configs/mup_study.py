r"""µP on a small proxy: coordinate check, transfer sweep, growth and loss prediction.

  flm mup check --config=configs/mup_study.py --workdir=runs/mup
  flm mup sweep --config=configs/mup_study.py --workdir=runs/mup
  flm mup growth --config=configs/mup_study.py --workdir=runs/mup
  flm mup predict --config=configs/mup_study.py --workdir=runs/mup
  flm mup check --config=configs/mup_study.py:depth --workdir=runs/mup_depth
  flm mup sweep --config=configs/mup_study.py:depth --workdir=runs/mup_depth

About 3, 60, 2 and 10 minutes on two CPU cores. The text is the Python standard library's source.
docs/mup.md has the expected results. `:depth` varies the depth instead of the width: CompleteP
against µP. `:smoke` is the study of the width with tiny models and few steps.
"""

import dataclasses

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import (
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    ScheduleConfig,
    StageConfig,
    TransformerConfig,
)
from flm_jax.studies.config import MupStudyConfig

demo = config_files.shipped("demo")


def _family(proxy: StageConfig) -> tuple[StageConfig, ...]:
    """Returns the demo's largest model (9 layers, width 320) and narrower models of that shape."""
    large = demo.get_config().stages[2].model
    return tuple(
        dataclasses.replace(
            proxy,
            name=f"width-{width}",
            model=TransformerConfig(
                **{**large, "d_model": width, "num_heads": width // 32, "mup_base_width": 64,
                   "d_ff": large.d_ff * width // large.d_model}
            ),
            steps=400,
        )
        for width in (64, 96, 128, 160, 192, large.d_model)
    )  # fmt: skip


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "smoke", "depth"):
        raise config_files.unknown_variant(variant, ("smoke", "depth"))
    proxy = TransformerConfig(
        vocab_size=260,
        num_layers=2,
        d_model=64,
        num_heads=4,
        head_dim=16,
        d_ff=160,
        mup_base_width=64,
        matrix_init_std=0.08,
        vector_init_std=0.08,
        depth_scaled_init=True,
    )
    stage = StageConfig(
        name="proxy",
        model=proxy,
        steps=200,
        batch_size=8,
        learning_rate=4e-3,
        matrix_learning_rate=4e-3,
    )
    experiment = ExperimentConfig(
        (stage,),
        data=DataConfig(sequence_length=128),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=60, final_ratio=0.1),
        eval=EvalConfig(sequences=64, batch_size=16),
    )
    rates = tuple(2.0**n for n in range(-3, 4))
    config = MupStudyConfig(
        experiment, learning_rates=rates, family=_family(stage), seeds=3, coordinate_seeds=3
    )
    if variant == "depth":
        # Without depth_scaled_init, both parametrisations are the same model at the base depth.
        plain = dataclasses.replace(proxy, depth_scaled_init=False)
        stage = dataclasses.replace(stage, model=plain, steps=80)
        experiment = dataclasses.replace(
            experiment,
            stages=(stage,),
            data=DataConfig(sequence_length=64),
            schedule=ScheduleConfig(kind="wsd", warmup_steps=10, decay_steps=30, final_ratio=0.1),
        )
        config = MupStudyConfig(
            experiment,
            axis="depth",
            seeds=3,
            coordinate_seeds=3,
            init_stds=(),
            input_mults=(),
            output_mults=(),
        )
    if variant == "smoke":
        small = dataclasses.replace(
            proxy, d_model=16, num_heads=2, head_dim=8, d_ff=32, mup_base_width=16
        )
        stage = dataclasses.replace(stage, model=small, steps=12, batch_size=4)
        experiment = dataclasses.replace(
            experiment,
            stages=(stage,),
            data=DataConfig(sequence_length=32, shuffle_tokens=1 << 16),
            schedule=ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=4),
            eval=EvalConfig(sequences=8, batch_size=8),
            quick_compile=True,
        )
        narrow = [
            dataclasses.replace(
                stage,
                name=f"width-{width}",
                model=dataclasses.replace(
                    small, d_model=width, d_ff=2 * width, num_heads=width // 8
                ),
            )
            for width in (16, 24, 32, 40, 56)
        ]
        config = MupStudyConfig(
            experiment,
            family=tuple(narrow),
            growth_steps=6,
            width_factors=(1, 2),
            learning_rates=(0.5, 1.0, 2.0),
            init_stds=(1.0, 2.0),
            input_mults=(1.0,),
            output_mults=(1.0,),
            coordinate_steps=3,
            coordinate_seeds=1,
        )
    return config_files.to_config_dict(config)

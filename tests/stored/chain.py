"""The chain of the stored run: two tiny stages on a few sentences, the same on every machine.

Kept as it was when the run was recorded: see README.md.
"""

import ml_collections

from configs import common
from flm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    GrowthConfig,
    ScheduleConfig,
    StageConfig,
    TransformerConfig,
)


def _stage(name: str, layers: int, width: int) -> StageConfig:
    model = TransformerConfig(
        vocab_size=260, num_layers=layers, d_model=width, num_heads=width // 2,
        num_kv_heads=width // 4, head_dim=2, d_ff=2 * width, mup_base_width=4,
        matrix_init_std=0.2, vector_init_std=0.2, input_mult=1.5, output_mult=2.0,
    )  # fmt: skip
    growth = GrowthConfig(ramp_steps=8, rewarmup_steps=2, calibration_sequences=2)
    return StageConfig(name, model, 12, 4, 2e-2, 3e-2, accumulate=2, growth=growth)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    common.no_variant(variant)
    return common.to_config_dict(
        ExperimentConfig(
            stages=(_stage("small", 1, 4), _stage("large", 2, 8)),
            # Relative to the repository's root, where commands run.
            data=DataConfig(
                task="text_files", path="tests/stored/texts", sequence_length=32,
                shuffle_tokens=1 << 10,
            ),
            schedule=ScheduleConfig(warmup_steps=2, decay_steps=4),
            eval=EvalConfig(sequences=4, batch_size=4, every_steps=4),
            checkpoint=CheckpointConfig(every_steps=50, keep=1),
            quick_compile=True,
        )
    )  # fmt: skip

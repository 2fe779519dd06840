r"""Train on your own text, and grow: 0.85M parameters, then 1.6M.

  flm train --config=configs/own_text.py --config.data.path=FILE_OR_FOLDER --workdir=runs/mine
  flm generate --checkpoint=runs/mine --prompt="Once"

It reads 1.1M tokens (bytes), so 300 kB of text are enough. The two stages have the sizes of the
first two of configs/demo.py, so about 4 minutes on two idle CPU cores are expected. On 1.1 MB of
English (the docstrings of Python's standard library), validation fell from 8.44 to 2.65 bits per
byte in the first stage and to 2.38 in the second, at one pass.

`--config.data.path` takes a file, a folder, a pattern, or several of them with commas: .txt, .md,
.py and other plain text, .jsonl, .json, .parquet, and .gz or .zst of these. The last 4% of the text
are for validation, or `--config.data.validation_path`.

`--config.data.train_vocabulary=1024` trains a SentencePiece vocabulary on the text first, and
`--config.data.vocabulary=FOLDER` takes the tokenizer of a folder of Hugging Face files. The models'
`vocab_size` follows.
"""

import ml_collections

from flm_jax.commands import config_files
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

HEAD_DIM = 32


def _model(layers: int, hidden: int, ffn: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=0,  # that of the vocabulary
        num_layers=layers,
        d_model=hidden,
        num_heads=hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        d_ff=ffn,
        mup_base_width=128,
        matrix_init_std=0.06,
        vector_init_std=0.06,
        depth_scaled_init=True,
        remat="dots",
    )


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    stages = (
        StageConfig(
            name="small",
            model=_model(4, 128, 336),
            steps=700,
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
    )
    config = ExperimentConfig(
        stages=stages,
        data=DataConfig(task="own_text", sequence_length=256),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=50, decay_steps=100),
        eval=EvalConfig(sequences=32, batch_size=8, every_steps=100),
        checkpoint=CheckpointConfig(every_steps=100, keep=2),
    )
    return config_files.to_config_dict(config)

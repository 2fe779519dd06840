r"""Fine-tune the demo's last stage on synthetic conversations.

  make demo
  flm sft --config=configs/sft_demo.py

It trains the demo's 17M parameters on 453 conversations for 83 steps: 9 minutes on two shared CPU
cores. Expected: over all categories, the response loss falls from 3.06 to 1.43 nats per token and
the accuracy rises from 0% to 7%. On the base's text, bits per byte rises from 1.77 to 1.94: the
model forgets some of it. For the first stage (0.85M parameters):

  flm sft --config=configs/sft_demo.py --config.base_stage=small \
    --config.learning_rate=1e-3 --config.matrix_learning_rate=1e-3

`:smoke` fine-tunes a run of `configs/demo.py:smoke` in runs/demo-smoke, for tests. For your own
conversations, copy this file and set `made=0, paths=("chats.jsonl",)`.
"""

import dataclasses

import ml_collections

from flm_jax.commands import config_files
from flm_jax.config import CheckpointConfig, EvalConfig
from flm_jax.sft.config import SftConfig


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant not in ("", "smoke"):
        raise config_files.unknown_variant(variant, ("smoke",))
    config = SftConfig(
        base="runs/demo",
        made=60,
        batch_size=4,
        epochs=2,
        # Tele-FLM's 2.7e-5 is for 52B parameters; the demo's last stage has 4e-4 and 1e-3.
        learning_rate=2e-4,
        matrix_learning_rate=5e-4,
        eval=EvalConfig(sequences=64, batch_size=8, every_steps=30),
        checkpoint=CheckpointConfig(every_steps=30, keep=1),
        score_samples=16,
    )
    if variant == "smoke":
        config = dataclasses.replace(
            config,
            base="runs/demo-smoke",
            made=8,
            sequence_length=256,
            batch_size=4,
            epochs=2,
            eval=EvalConfig(sequences=16, batch_size=8, every_steps=4),
            checkpoint=CheckpointConfig(every_steps=4, keep=1),
            score_samples=2,
            max_new_tokens=16,
            quick_compile=True,
        )
    return config_files.to_config_dict(config)

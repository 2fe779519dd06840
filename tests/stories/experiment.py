"""A user's experiment, from a config of one's own to a figure; prints what each command prints.

  python tests/stories/experiment.py FOLDER

A config file, a run, a sweep over a learning rate, a branch with another recipe, an extension, and
one figure of all. Tiny models: about a minute on two cores.
"""

from __future__ import annotations

import json
import pathlib
import sys

from flm_jax.commands import front

CONFIG = '''"""A decoder of 3,000 parameters, grown to 12,000, on the source of Python's library."""

from flm_jax.commands import config_files
from flm_jax.config import (
    CheckpointConfig, DataConfig, EvalConfig, ExperimentConfig, GrowthConfig, ScheduleConfig,
    StageConfig, TransformerConfig,
)


def stage(name, layers, heads):
    model = TransformerConfig(
        vocab_size=260, num_layers=layers, d_model=4 * heads, num_heads=heads, head_dim=4,
        d_ff=8 * heads, mup_base_width=8,
    )
    growth = GrowthConfig(ramp_steps=4, rewarmup_steps=2, calibration_sequences=4)
    return StageConfig(name, model, 12, 8, 2e-2, 2e-2, growth=growth)


def get_config(variant=""):
    stages = (stage("small", 1, 2), stage("large", 2, 4))
    return config_files.to_config_dict(
        ExperimentConfig(
            stages=stages[:1] if variant == "small" else stages,
            data=DataConfig(sequence_length=32, shuffle_tokens=1 << 14),
            schedule=ScheduleConfig("wsd", warmup_steps=2, decay_steps=4),
            eval=EvalConfig(sequences=16, batch_size=8, every_steps=4),
            checkpoint=CheckpointConfig(every_steps=4, keep=3),
            quick_compile=True,
        )
    )
'''


def flm(*words: str) -> None:
    """Runs one command, as a user types it."""
    print("$ flm", *words, flush=True)
    if status := front.run(words):
        sys.exit(status)


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "mine.py"
    config.write_text(CONFIG)
    base, tile, rates = (str(folder / name) for name in ("base", "tile", "rates"))
    rate = "--sweep=stages[0].learning_rate=0.005,0.02"
    flm("sweep", f"--config={config}:small", f"--workdir={rates}", rate)
    flm("train", f"--config={config}", f"--workdir={base}")
    recipe = "--config.stages[1].growth.recipe=tile,identity"
    flm("branch", f"{base}:small", f"--workdir={tile}", recipe)
    flm("extend", base, "--stage=large", "--steps=+8")
    flm("compare", base, tile, f"{base}/ended/24", f"--output={folder / 'figure'}")
    rows = json.loads((folder / "rates" / "sweep.json").read_text())["runs"]
    print("the better rate:", rows[0]["values"])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))

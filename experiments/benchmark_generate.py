r"""Tokens per second of generation, with the key/value cache and without, in one run.

  python -m experiments.benchmark_generate --config=configs/demo.py
  python -m experiments.benchmark_generate --config=configs/bench_110m.py --batch=8 --json

Random weights of a config's last stage (--stage=0: its first): how fast it is does not depend on
them. Steps of both kinds are timed in turns, so that their ratio holds on a shared machine.
"""

from __future__ import annotations

from typing import Any

import ml_collections
import rich.console
from absl import flags

from experiments import cli
from flm_jax.errors import UserError
from flm_jax.studies import speed

STAGE = flags.DEFINE_integer("stage", -1, "Which stage of a chain; -1: the last.", lower_bound=-1)
BATCH = flags.DEFINE_integer("batch", 1, "Texts at once.", lower_bound=1)
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 128, "Tokens of a prompt.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Timed steps.", lower_bound=1)


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    stages = cli.experiment(config).stages
    if STAGE.value >= len(stages):
        raise UserError(f"--stage={STAGE.value}: the config has stages 0 to {len(stages) - 1}")
    model = stages[STAGE.value].model
    result = speed.measure_generation(model, BATCH.value, PROMPT_TOKENS.value, NEW_TOKENS.value)
    rich.console.Console(stderr=cli.json_wanted()).print(
        f"{result['params']:,} parameters, batch {result['batch']}: "
        f"{result['cached_tokens_per_s']:.1f} tokens/s with the cache, "
        f"{result['uncached_tokens_per_s']:.1f} without ({result['ratio']:.1f} x), prompt "
        f"{result['prefill_tokens_per_s']:.0f} tokens/s"
    )
    return result


if __name__ == "__main__":
    cli.run(main)

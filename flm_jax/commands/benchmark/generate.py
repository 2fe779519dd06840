r"""Times generation, with the key/value cache and without.

  flm benchmark generate --config=configs/demo.py
  flm benchmark generate --config=configs/bench_110m.py --batch=8 --json

The weights are random, of a config's last stage (--stage=0: its first); the speed does not depend
on them. Steps of both kinds are timed in turns, so that their ratio holds on a shared machine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag
from flm_jax.studies import speed


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    stage: int = flag(-1, "Index of the chain's stage; -1: the last.", lower=-1)
    batch: int = flag(1, "Texts generated at once.", lower=1)
    prompt_tokens: int = flag(128, "Tokens of a prompt.", lower=1)
    new_tokens: int = flag(64, "Timed new tokens of each text.", lower=1)


def main(call: Call[Flags]) -> dict[str, Any]:
    chain = config_files.experiment(call.config)
    model = chain.stages[config_files.stage_index(chain, call.flags.stage)].model
    result = speed.measure_generation(
        model, call.flags.batch, call.flags.prompt_tokens, call.flags.new_tokens
    )
    call.console().print(
        f"{result['params']:,} parameters, batch {result['batch']}: "
        f"{result['cached_tokens_per_s']:.1f} tokens/s with the cache, "
        f"{result['uncached_tokens_per_s']:.1f} without ({result['ratio']:.1f} x), prompt "
        f"{result['prefill_tokens_per_s']:.0f} tokens/s"
    )
    return result


COMMAND = Command(main, Flags)

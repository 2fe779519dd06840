"""Makes chat samples on this machine and writes them as JSONL.

  flm samples make --output=train.jsonl --per_category=500
  flm samples make --output=held_out.jsonl --split=evaluation --per_category=50
  flm samples make --output=pile.jsonl --per_category=500 --defects=0.2

Nothing is downloaded. No problem is in both splits. --defects adds copies, and wrong, cut and noisy
answers; each kind is that share of the samples, and ids name the kind. `flm samples select` chooses
from such a set.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from flm_jax.commands.command import Call, Command, flag
from flm_jax.runtime import paths
from flm_jax.sft import chats, synthetic


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    output: str = flag("", "File to write.", required="give one, as --output=FILE.jsonl")
    seed: int = flag(0, "Seed of the samples.")
    per_category: int = flag(100, "Samples of each category.", lower=1)
    split: str = flag("train", "Split: train or evaluation.")
    categories: tuple[str, ...] = flag(
        (), f"Categories, of {', '.join(synthetic.CATEGORIES)}; empty: all.", comma=True
    )
    defects: float = flag(0.0, "Share of each defect.", lower=0.0, upper=1.0)


def main(call: Call[Flags]) -> dict[str, Any]:
    samples = synthetic.make(
        call.flags.seed, call.flags.per_category, call.flags.split, call.flags.categories
    )
    if call.flags.defects:
        samples = synthetic.spoil(samples, call.flags.seed, call.flags.defects)
    path = paths.of(call.flags.output, "output")
    chats.write_jsonl(path, samples)
    counts = collections.Counter(sample.category for sample in samples)
    call.console().print(f"{path}: {len(samples)} samples")
    return {"output": str(path), "samples": len(samples), "categories": dict(counts)}


COMMAND = Command(main, Flags, config="none")

"""Makes chat samples on this machine and writes them as JSONL: nothing is downloaded.

  python -m experiments.make_samples --output=train.jsonl --per_category=500
  python -m experiments.make_samples --output=held_out.jsonl --split=evaluation --per_category=50
  python -m experiments.make_samples --output=pile.jsonl --per_category=500 --defects=0.2

No problem is in both splits. With --defects, copies, wrong, cut and noisy answers are added, each
as so large a share of the samples; ids say which: something to choose from (select_samples).
"""

from __future__ import annotations

import collections
import pathlib
from typing import Any

import rich.console
from absl import flags

from experiments import cli
from flm_jax.errors import UserError
from flm_jax.sft import chats, synthetic

OUTPUT = flags.DEFINE_string("output", None, "File to write.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draw.")
PER_CATEGORY = flags.DEFINE_integer("per_category", 100, "Samples of each category.", lower_bound=1)
SPLIT = flags.DEFINE_string("split", "train", "train or evaluation.")
CATEGORIES = flags.DEFINE_list(
    "categories", [], f"Of {', '.join(synthetic.CATEGORIES)}; empty: all."
)
DEFECTS = flags.DEFINE_float("defects", 0.0, "Share of each defect.", 0.0, 1.0)


def main(arguments: list[str]) -> dict[str, Any]:
    if arguments or not OUTPUT.value:
        raise UserError("--output is missing; give the file to write, as --output=FILE.jsonl")
    samples = synthetic.make(SEED.value, PER_CATEGORY.value, SPLIT.value, CATEGORIES.value)
    if DEFECTS.value:
        samples = synthetic.spoil(samples, SEED.value, DEFECTS.value)
    path = pathlib.Path(OUTPUT.value)
    chats.write_jsonl(path, samples)
    counts = collections.Counter(sample.category for sample in samples)
    rich.console.Console(stderr=cli.json_wanted()).print(f"{path}: {len(samples)} samples")
    return {"output": str(path), "samples": len(samples), "categories": dict(counts)}


if __name__ == "__main__":
    cli.run(main, needs_config=False)

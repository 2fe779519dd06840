"""Fine-tunes a model on conversations, as a stage of its lineage, and scores it before and after.

  python -m experiments.sft --config=configs/sft_demo.py
  python -m experiments.sft --config=configs/sft_demo.py --config.base=runs/mine --workdir=runs/new

The new run folder (default: runs/BASE-NAME) has the base's stages and the fine-tuned one; with
--workdir=BASE the stage is added to the base's own folder. Stopped anywhere and called again, it
goes on. See docs/sft.md.
"""

from __future__ import annotations

import pathlib
from typing import Any

import ml_collections
import rich.console

from experiments import cli
from flm_jax.sft import before_after, fine_tune
from flm_jax.sft.config import SftConfig


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    settings = cli.dataclass_of(SftConfig, config)
    name = pathlib.Path(settings.base).resolve().name
    workdir = cli.WORKDIR.value or f"runs/{name}-{settings.name}"
    found = before_after.scores(settings, workdir, fine_tune.run(settings, workdir))
    console = rich.console.Console(stderr=cli.json_wanted())
    console.print(before_after.table(found), *before_after.sentences(found), sep="\n")
    return found


if __name__ == "__main__":
    cli.run(main)

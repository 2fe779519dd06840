"""Fine-tunes a model on conversations, and scores it before and after.

  flm sft --config=configs/sft_demo.py
  flm sft --config=configs/sft_demo.py --config.base=runs/mine --workdir=runs/new

Fine-tuning is a stage of the run's lineage. The new run folder (default: runs/BASE-NAME) has the
base's stages and the fine-tuned one; with --workdir=BASE the stage is added to the base's own
folder. Stopped anywhere and called again, it resumes. See docs/sft.md.
"""

from __future__ import annotations

import pathlib
from typing import Any

from flm_jax.commands import config_files
from flm_jax.commands.answer_flags import AnswerFlags
from flm_jax.commands.command import Call, Command
from flm_jax.sft import before_after, fine_tune
from flm_jax.sft.config import SftConfig


def main(call: Call[AnswerFlags]) -> dict[str, Any]:
    settings = config_files.dataclass_of(SftConfig, call.config)
    name = pathlib.Path(settings.base).resolve().name
    workdir = call.workdir or f"runs/{name}-{settings.name}"
    scores = before_after.scores(
        settings, workdir, fine_tune.run(settings, workdir), call.flags.unsafe
    )
    console = call.console()
    console.print(before_after.table(scores), *before_after.sentences(scores), sep="\n")
    return scores


COMMAND = Command(main, AnswerFlags, workdir="optional")

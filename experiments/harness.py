r"""Runs tasks of EleutherAI's lm-evaluation-harness on a run, a checkpoint or Hugging Face files.

  python -m experiments.harness --checkpoint=runs/demo --tasks=lambada_openai --limit=100
  python -m experiments.harness --checkpoint=runs/demo --tasks=mine --include_path=FOLDER --json

Needs the extra [hf]. The harness downloads the data of its own tasks; a task of yours is a YAML
file under --include_path, and may read local files. `experiments.benchmarks --results=FILE` puts
what --json prints beside the papers' scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import rich.console
from absl import flags

from experiments import cli
from flm_jax.errors import UserError
from flm_jax.interop.opening import open_model
from flm_jax.runtime import host

DEFAULT_CONTEXT = 2048  # of weights whose files do not say

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run, checkpoint or Hugging Face folder.")
STAGE = flags.DEFINE_string("stage", "", "Of a run: index or name of a stage; else the last.")
TASKS = flags.DEFINE_list("tasks", [], "Names of tasks, as arc_easy,hellaswag.")
INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Folder with YAML files of more tasks.")
NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples in a prompt; else the task's.")
LIMIT = flags.DEFINE_integer("limit", None, "Only the first samples of each task.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Requests at once.", lower_bound=1)
CONTEXT = flags.DEFINE_integer("context", 0, "Tokens of a request at most; 0: as trained.")
SEED = flags.DEFINE_integer("seed", 0, "Of generation that samples.")


def main(arguments: Sequence[str]) -> dict[str, Any]:
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; give tasks as --tasks=NAME,NAME")
    if not CHECKPOINT.value:
        raise UserError("--checkpoint is missing; give a run's folder or one of Hugging Face files")
    if not TASKS.value:
        raise UserError("--tasks is missing; give names of tasks, as --tasks=arc_easy,hellaswag")
    try:
        from flm_jax.inference import harness
    except ImportError as error:
        raise UserError(
            f"the harness is not installed ({error}); install the extra: pip install -e '.[hf]'"
        ) from error
    host.keep_freed()
    model = open_model(CHECKPOINT.value, STAGE.value)
    context = CONTEXT.value or model.context or DEFAULT_CONTEXT
    adapter = harness.Adapter(model, context, BATCH_SIZE.value, SEED.value)
    results = harness.run(adapter, TASKS.value, INCLUDE_PATH.value, NUM_FEWSHOT.value, LIMIT.value)
    console = rich.console.Console(stderr=cli.json_wanted())
    for task, values in results.items():
        shown = [f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float)]
        console.print(f"{task} ({values['samples']} samples): {'  '.join(shown)}")
    plain = json.loads(json.dumps(results, default=float))
    return {"checkpoint": str(model.path), "context": context, "results": plain}


if __name__ == "__main__":
    cli.run(main, needs_config=False)

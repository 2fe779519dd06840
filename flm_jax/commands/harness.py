r"""Runs tasks of EleutherAI's lm-evaluation-harness on a model.

  flm harness --checkpoint=runs/demo --tasks=lambada_openai --limit=100
  flm harness --checkpoint=runs/demo --tasks=mine --include_path=FOLDER --json

Needs the extra [hf]. The harness downloads the data of its own tasks; a task of yours is a YAML
file under --include_path, and may read local files. `flm reported --results=FILE` puts what --json
prints beside the papers' scores. With --chat, requests are put into the model's chat template: of
its fine-tuning, or else its tokenizer's own, or else Tele-FLM's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flm_jax.commands.command import Call, Command, flag
from flm_jax.commands.model_flags import ModelFlags
from flm_jax.interop.opening import OpenedModel

if TYPE_CHECKING:
    from flm_jax.inference.harness import Chat

DEFAULT_CONTEXT = 2048  # for weights whose files do not give one


@dataclasses.dataclass(frozen=True)
class Flags(ModelFlags):
    """The command's own flags."""

    tasks: tuple[str, ...] = flag(
        (), "Names of tasks, as arc_easy,hellaswag.", comma=True,
        required="give names of tasks, as --tasks=arc_easy,hellaswag",
    )  # fmt: skip
    include_path: str | None = flag(None, "Folder with YAML files of more tasks.")
    num_fewshot: int | None = flag(None, "Examples in a prompt; the task's number if not given.")
    limit: int | None = flag(None, "Only the first samples of each task.", lower=1)
    batch_size: int = flag(8, "Requests at once.", lower=1)
    context: int = flag(0, "Most tokens of a request; 0: the trained context.")
    seed: int = flag(0, "Seed of sampled generation.")
    chat: bool = flag(False, "Put requests into the model's chat template.")


def main(call: Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    from flm_jax.inference import harness

    model = flags.open()
    context = flags.context or model.context or DEFAULT_CONTEXT
    chat = _chat(model) if flags.chat else None
    adapter = harness.Adapter(model, context, flags.batch_size, flags.seed, chat)
    results = harness.run(
        adapter, list(flags.tasks), flags.include_path, flags.num_fewshot, flags.limit
    )
    console = call.console()
    for task, values in results.items():
        shown = [f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float)]
        console.print(f"{task} ({values['samples']} samples): {'  '.join(shown)}")
    plain = json.loads(json.dumps(results, default=float))
    return {
        "checkpoint": str(model.path), "context": context, "chat": flags.chat, "results": plain
    }  # fmt: skip


def _chat(model: OpenedModel) -> Chat:
    """The model's chat template."""
    from flm_jax.inference.harness import Chat
    from flm_jax.sft.chats import Message
    from flm_jax.sft.template import model_prompt, prompt_text, stop_ids

    def write(messages: Sequence[Mapping[str, str]]) -> tuple[str, list[int]]:
        turns = [Message(message["role"], message["content"]) for message in messages]
        return prompt_text(model, turns), model_prompt(model, turns)

    return Chat(write, stop_ids(model.tokenizer, model.template))


COMMAND = Command(
    main, Flags, config="none", argument="checkpoint", unexpected="give tasks as --tasks=NAME,NAME"
)

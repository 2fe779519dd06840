r"""Continues text with a model, and shows it as it is generated.

  flm generate --checkpoint=runs/demo --prompt='def main(' --temperature=0.8
  flm generate --checkpoint=runs/demo --prompts=prompts.jsonl --json

A model is a run, one of its checkpoints, or a folder of Hugging Face files.

--prompts reads a file with one prompt per line: a JSON string, a JSON object with `prompt`, or else
the line as it is. Several prompts are generated as one batch. With --chat a prompt is what the user
says, and is put into the model's chat template: of its fine-tuning, or else its tokenizer's own, or
else Tele-FLM's.

A text ends at --max_new_tokens, at one of the model's end-of-sequence tokens, or at a text given by
--stop.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax

from flm_jax.commands.command import Call, Command, flag
from flm_jax.commands.model_flags import ModelFlags
from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.inference.generation import Sampling, TextStream, check_context, generate
from flm_jax.interop.opening import OpenedModel
from flm_jax.runtime import paths


@dataclasses.dataclass(frozen=True)
class Flags(ModelFlags):
    """The command's own flags."""

    prompt: tuple[str, ...] = flag((), "Text to continue; repeatable.")
    prompts: str = flag("", "File with one prompt per line.")
    max_new_tokens: int = flag(128, "Most tokens to generate.")
    temperature: float = flag(0.0, "Sampling temperature; 0: always the likeliest token.")
    top_k: int = flag(0, "Only the k likeliest tokens; 0: all.")
    top_p: float = flag(1.0, "Only the likeliest tokens that together have this probability.")
    seed: int = flag(0, "Seed of the random draws.")
    stop: tuple[str, ...] = flag((), "Text that ends a continuation and is left out; repeatable.")
    chat: bool = flag(False, "Put prompts into the model's chat template.")
    context: int = flag(0, "Most tokens, prompt included; 0: the trained context.")


def main(call: Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    prompts = [*flags.prompt, *(_read_prompts(flags.prompts) if flags.prompts else [])]
    if not prompts:
        raise UserError("no prompt; give --prompt=TEXT or --prompts=FILE")
    settings = (flags.max_new_tokens, flags.temperature, flags.top_k, flags.top_p)
    sampling = Sampling(*settings)
    model = flags.open()
    tokens = [_tokens(model, prompt, flags.chat) for prompt in prompts]
    check_context(tokens, sampling.max_new_tokens, flags.context or model.context)
    sampling = Sampling(*settings, stop_tokens=_stops(model, flags.chat))

    shown = len(prompts) == 1 and not call.json
    if shown:
        print(prompts[0], end="", flush=True)
    streams = [TextStream(model.tokenizer, flags.stop, _show if shown else None) for _ in prompts]
    new = generate(
        model.params, model.token_config, tokens, sampling, jax.random.key(flags.seed),
        on_token=lambda row, token: streams[row].add(token),
    )  # fmt: skip
    texts = [stream.end() for stream in streams]
    if shown:
        print()
    elif not call.json:
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"{prompt}{text}\n")
    rows = [
        {"prompt": prompt, "text": text, "tokens": len(ids)}
        for prompt, text, ids in zip(prompts, texts, new, strict=True)
    ]
    return {"checkpoint": str(model.path), "completions": rows}


def _tokens(model: OpenedModel, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return model.prompt(prompt)
    from flm_jax.sft.chats import Message
    from flm_jax.sft.template import model_prompt

    return model_prompt(model, [Message("user", prompt)])


def _stops(model: OpenedModel, chat: bool) -> tuple[int, ...]:
    if not chat:
        return model.tokenizer.stop_ids
    from flm_jax.sft.template import stop_ids

    return stop_ids(model.tokenizer, model.template)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_prompts(path: str) -> list[str]:
    """The prompts of a file, one per line; empty lines are skipped."""
    try:
        # Not `read_text`, which also ends lines at carriage returns.
        text = paths.of(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path}: {error}; give a text file") from error
    prompts = []
    # Only a line feed ends a line: JSON strings may hold every other separator.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            try:
                prompts.append(json_text.check_text(_prompt(line)))
            except ValueError as error:
                raise UserError(
                    f"--prompts={path}, line {number}: {error}; fix or remove the line"
                ) from error
    if not prompts:
        raise UserError(f"--prompts={path}: the file holds no prompt; write one per line")
    return prompts


def _prompt(line: str) -> str:
    """The prompt on a line: a JSON string, `prompt` of a JSON object, or the line itself."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if isinstance(value, dict):
        value = value.get("prompt")
    return value if isinstance(value, str) else line


COMMAND = Command(
    main, Flags, config="none", argument="checkpoint", unexpected="give text as --prompt=TEXT"
)

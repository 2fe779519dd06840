r"""Continues text from a run, one of its checkpoints, or Hugging Face files, as it is generated.

  python -m experiments.generate --checkpoint=runs/demo --prompt='def main(' --temperature=0.8
  python -m experiments.generate --checkpoint=runs/demo --prompts=prompts.jsonl --json

--prompts reads a file with one prompt a line: a JSON string, a JSON object with `prompt`, or else
the line as it is. Several prompts are generated as one batch. With --chat a prompt is what the user
says, and is put into the chat format of Tele-FLM's instruct model.

A text ends at --max_new_tokens, at the model's end-of-sequence token, or at a text given by --stop.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments import cli
from flm_jax.errors import UserError
from flm_jax.inference.generation import Sampling, TextStream, check_context, generate
from flm_jax.interop.opening import OpenedModel, open_model
from flm_jax.runtime import host

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run, checkpoint or Hugging Face folder.")
STAGE = flags.DEFINE_string("stage", "", "Of a run: index or name of a stage; else the last.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
PROMPTS = flags.DEFINE_string("prompts", None, "File with a prompt a line.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to generate at most.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Only the k likeliest tokens; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens of this probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of the random draws.")
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends a continuation, and is left out.")
CHAT = flags.DEFINE_bool("chat", False, "Put prompts into the chat format.")
CONTEXT = flags.DEFINE_integer("context", 0, "Tokens allowed, prompt included; 0: as trained.")


def main(arguments: Sequence[str]) -> dict[str, Any]:
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; give text as --prompt=TEXT")
    if not CHECKPOINT.value:
        raise UserError("--checkpoint is missing; give a run's folder or one of Hugging Face files")
    prompts = [*PROMPT.value, *(_read_prompts(PROMPTS.value) if PROMPTS.value else [])]
    if not prompts:
        raise UserError("no prompt; give --prompt=TEXT or --prompts=FILE")
    settings = (MAX_NEW_TOKENS.value, TEMPERATURE.value, TOP_K.value, TOP_P.value)
    sampling = Sampling(*settings)
    host.keep_freed()
    model = open_model(CHECKPOINT.value, STAGE.value)
    tokens = [_tokens(model, prompt) for prompt in prompts]
    check_context(tokens, sampling.max_new_tokens, CONTEXT.value or model.context)
    stops = (*sampling.stop_tokens, model.tokenizer.eos_id)
    sampling = Sampling(*settings, stop_tokens=stops)

    shown = len(prompts) == 1 and not cli.json_wanted()
    if shown:
        print(prompts[0], end="", flush=True)
    streams = [TextStream(model.tokenizer, STOP.value, _show if shown else None) for _ in prompts]
    new = generate(
        model.params, model.config, tokens, sampling, jax.random.key(SEED.value),
        on_token=lambda row, token: streams[row].add(token),
    )  # fmt: skip
    texts = [stream.end() for stream in streams]
    if shown:
        print()
    elif not cli.json_wanted():
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"{prompt}{text}\n")
    rows = [
        {"prompt": prompt, "text": text, "tokens": len(ids)}
        for prompt, text, ids in zip(prompts, texts, new, strict=True)
    ]
    return {"checkpoint": str(model.path), "completions": rows}


def _tokens(model: OpenedModel, prompt: str) -> list[int]:
    if not CHAT.value:
        return model.prompt(prompt)
    from flm_jax.sft.chats import Message
    from flm_jax.sft.template import encode_prompt

    return model.with_start(encode_prompt([Message("user", prompt)], model.tokenizer))


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_prompts(path: str) -> list[str]:
    try:
        lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path}: {error}; give a text file") from error
    prompts = [_prompt(line) for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts={path}: the file holds no prompt; write one a line")
    return prompts


def _prompt(line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        return line
    if isinstance(value, dict):
        value = value.get("prompt")
    return value if isinstance(value, str) else line


if __name__ == "__main__":
    cli.run(main, needs_config=False)

"""Selects a small set of chat samples from a pool, and says why.

  flm samples select --pool=pile.jsonl --output=chosen.jsonl --size=1000
  flm samples select --pool=a.jsonl --pool=b.jsonl --output=chosen.jsonl \
      --size=1000 --checkpoint=runs/demo --evaluation=held_out.jsonl --quota=arithmetic:0.3

Writes OUTPUT, OUTPUT.report.json and OUTPUT.report.md. With --checkpoint (a run's folder, with
:STAGE if not the last; or a folder of Hugging Face files with --vocabulary) quality is judged by
the model's losses, and its embeddings are clustered; without, TF-IDF vectors of letters are.
docs/selection.md describes the steps.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import rich.markdown

from flm_jax import mapping
from flm_jax.commands.answer_flags import AnswerFlags
from flm_jax.commands.chat_flags import ChatFlags
from flm_jax.commands.command import Call, Command, flag
from flm_jax.errors import UserError
from flm_jax.fields import comments
from flm_jax.runtime import paths
from flm_jax.sft import chats, selection
from flm_jax.sft.chat_model import open_chat_model
from flm_jax.sft.chats import BadRows
from flm_jax.store.files import write_atomically, write_result


@dataclasses.dataclass(frozen=True)
class _OwnFlags(ChatFlags, AnswerFlags):
    """The command's own flags."""

    pool: tuple[str, ...] = flag(
        (), "File or folder of conversations; repeatable.", required="give --pool=FILE.jsonl"
    )
    output: str = flag("", "JSONL file to write.", required="give --output=FILE.jsonl")
    evaluation: tuple[str, ...] = flag((), "Samples that must not be trained on; repeatable.")
    checkpoint: str | None = flag(None, "Model that judges quality.")
    vocabulary: str | None = flag(None, "Vocabulary of a model without a run; see DataConfig.")
    quota: tuple[str, ...] = flag((), "CATEGORY:SHARE of the chosen set; repeatable.")
    scripts: tuple[str, ...] = flag(
        (), "Allowed scripts of letters, as LATIN,CJK; empty: all.", comma=True
    )


_GIVEN_ABOVE = ("quotas", "scripts")
# Every other field of SelectionConfig is a flag of the same name.
_FIELDS = [f for f in dataclasses.fields(selection.SelectionConfig) if f.name not in _GIVEN_ABOVE]
_MEANINGS = comments(selection.SelectionConfig)
_TYPES = typing.get_type_hints(selection.SelectionConfig)
Flags: Any = dataclasses.make_dataclass(
    "Flags",
    [
        (f.name, _TYPES[f.name], flag(
            None if f.default is dataclasses.MISSING else f.default,
            f"{_MEANINGS[f.name]}." if _MEANINGS[f.name] else f"See {f.name} in docs/selection.md.",
            required=f"give --{f.name}=NUMBER" if f.default is dataclasses.MISSING else "",
        ))
        for f in _FIELDS
    ],
    bases=(_OwnFlags,),
    frozen=True,
)  # fmt: skip


def _quota(text: str) -> dict[str, Any]:
    category, _, share = text.rpartition(":")
    try:
        return {"category": category, "share": float(share)}
    except ValueError:
        raise UserError(f"--quota={text}: write CATEGORY:SHARE, as arithmetic:0.3") from None


def main(call: Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    values = {f.name: getattr(flags, f.name) for f in _FIELDS}
    quotas = [_quota(text) for text in flags.quota]
    config = mapping.from_mapping(
        selection.SelectionConfig, {**values, "quotas": quotas, "scripts": flags.scripts}
    )
    bad = BadRows(flags.bad_rows)
    samples = flags.read(flags.pool, bad)
    evaluation = flags.read(flags.evaluation, bad)
    console = call.console()
    model: dict[str, Any] = {}
    judge = None
    if flags.checkpoint:
        judge, _ = open_chat_model(flags.checkpoint, flags.vocabulary or "")
        samples = judge.writable(samples, bad)
        model = {
            "losses": judge.losses,
            "unprompted": judge.unprompted,
            "embed": judge.embeddings,
        }
    chosen = selection.select(samples, config, evaluation, **model, unsafe=flags.unsafe)
    left_out = judge.left_out(samples) if judge else {}
    report = {
        **chosen.report, "judge": flags.checkpoint, "bad_rows": bad.reasons, "left_out": left_out,
    }  # fmt: skip
    path = paths.of(flags.output, "output")
    chats.write_jsonl(path, chosen.chosen)
    write_result(path.with_name(path.name + ".report.json"), report)
    page = selection.markdown(report)
    write_atomically(path.with_name(path.name + ".report.md"), page)
    console.print(rich.markdown.Markdown(page))
    if bad.reasons:
        console.print(str(bad))
    for what, count in left_out.items():
        console.print(f"{count} {what} left out by the template of {flags.checkpoint}")
    return {**report, "output": str(path)}


COMMAND = Command(main, Flags, config="none")

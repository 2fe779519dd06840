"""Chooses a small set of chat samples out of a pool, and reports why each other was dropped.

  python -m experiments.select_samples --pool=pile.jsonl --output=chosen.jsonl --size=1000
  python -m experiments.select_samples --pool=a.jsonl --pool=b.jsonl --output=chosen.jsonl \
      --size=1000 --checkpoint=runs/demo --evaluation=held_out.jsonl --quota=arithmetic:0.3

Writes OUTPUT, OUTPUT.report.json and OUTPUT.report.md. With --checkpoint (a run's folder, with
:STAGE if not the last; or a folder of Hugging Face files with --vocabulary) quality is judged by
the model's losses and clusters are of its embeddings; without, clusters are of letters' TF-IDF.
docs/selection.md describes the steps.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import rich.console
import rich.markdown
from absl import flags

from experiments import cli
from flm_jax import mapping
from flm_jax.errors import UserError
from flm_jax.sft import chats, selection
from flm_jax.sft.chat_model import open_chat_model
from flm_jax.store.files import write_atomically, write_json

POOL = flags.DEFINE_multi_string("pool", [], "JSONL file or folder of samples; repeatable.")
OUTPUT = flags.DEFINE_string("output", None, "JSONL file to write.")
EVALUATION = flags.DEFINE_multi_string("evaluation", [], "Sets that must not be trained on.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Model that judges.")
VOCABULARY = flags.DEFINE_string("vocabulary", None, "Of a model without a run: see DataConfig.")
QUOTA = flags.DEFINE_multi_string("quota", [], "CATEGORY:SHARE of the chosen set; repeatable.")
SCRIPTS = flags.DEFINE_list("scripts", [], "Scripts of the letters, as LATIN,CJK; empty: any.")
_DEFINE: dict[str, Any] = {
    "int": flags.DEFINE_integer,
    "float": flags.DEFINE_float,
    "str": flags.DEFINE_string,
    "bool": flags.DEFINE_bool,
}
_GIVEN_ABOVE = ("quotas", "scripts")
VALUES = {
    f.name: _DEFINE[str(f.type)](
        f.name,
        None if f.default is dataclasses.MISSING else f.default,
        f"SelectionConfig.{f.name}; see flm_jax/sft/selection.py.",
    )
    for f in dataclasses.fields(selection.SelectionConfig)
    if f.name not in _GIVEN_ABOVE
}


def _quota(text: str) -> dict[str, Any]:
    category, _, share = text.rpartition(":")
    try:
        return {"category": category, "share": float(share)}
    except ValueError:
        raise UserError(f"--quota={text}: write CATEGORY:SHARE, as arithmetic:0.3") from None


def main(arguments: list[str]) -> dict[str, Any]:
    if arguments or not POOL.value or not OUTPUT.value or VALUES["size"].value is None:
        raise UserError("give --pool=FILE.jsonl, --output=FILE.jsonl and --size=NUMBER")
    values = {name: flag.value for name, flag in VALUES.items()}
    quotas = [_quota(text) for text in QUOTA.value]
    config = mapping.from_mapping(
        selection.SelectionConfig, {**values, "quotas": quotas, "scripts": SCRIPTS.value}
    )
    samples = chats.read(POOL.value)
    evaluation = chats.read(EVALUATION.value)
    console = rich.console.Console(stderr=cli.json_wanted())
    model: dict[str, Any] = {}
    if CHECKPOINT.value:
        judge, _ = open_chat_model(CHECKPOINT.value, VOCABULARY.value or "")
        model = {
            "losses": judge.losses, "unprompted": judge.unprompted, "embed": judge.embeddings
        }  # fmt: skip
    chosen = selection.select(samples, config, evaluation, **model)
    report = {**chosen.report, "judge": CHECKPOINT.value}
    path = pathlib.Path(OUTPUT.value)
    chats.write_jsonl(path, chosen.chosen)
    write_json(path.with_name(path.name + ".report.json"), report)
    page = selection.markdown(report)
    write_atomically(path.with_name(path.name + ".report.md"), page)
    console.print(rich.markdown.Markdown(page))
    return {**report, "output": str(path)}


if __name__ == "__main__":
    cli.run(main, needs_config=False)

"""What fine-tuning changed: scores by category, before and after, and the knowledge retained."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import rich.box
import rich.table

from flm_jax.interop.opening import OpenedModel, open_model
from flm_jax.sft import chats, scoring, synthetic
from flm_jax.sft.chat_model import ChatModel
from flm_jax.sft.chats import Sample
from flm_jax.sft.config import SftConfig
from flm_jax.sft.fine_tune import Tuned
from flm_jax.sft.packing import Counts
from flm_jax.store.checkpoint import params_digest
from flm_jax.store.lineage import RunFolder
from flm_jax.store.trials import Trials


def samples_to_score(config: SftConfig, tuned: Tuned) -> list[Sample]:
    """At most `score_samples` of each category, none of them trained on.

    Of conversations made on the machine their evaluation side; of files what was held out.
    """
    if not config.paths:
        return synthetic.make(config.seed, config.score_samples, split="evaluation")
    return few_of_each(tuned.talk.held_out_samples, config.score_samples)


def few_of_each(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Takes the first `most` samples of each category that have an answer to compare with."""
    seen: collections.Counter[str] = collections.Counter()
    chosen = []
    for sample in samples:
        answered = any(m.role == "assistant" for m in sample.messages)
        if answered and seen[sample.category] < most:
            seen[sample.category] += 1
            chosen.append(sample)
    return chosen


def of_model(
    model: OpenedModel, config: SftConfig, samples: list[Sample]
) -> dict[str, dict[str, float]]:
    """Scores by category and metric, with intervals: see `scoring.flat`."""
    chat = ChatModel(model, config.template, config.max_new_tokens)
    return scoring.flat(scoring.summarise(scoring.score(samples, chat.losses, chat.answer)))


def scores(config: SftConfig, workdir: str, tuned: Tuned) -> dict[str, Any]:
    """Scores the base and the fine-tuned model, unless that is done already.

    Finished scores are rows of the stage's scores.jsonl.

    Args:
      config: what was done.
      workdir: the run's folder.
      tuned: the result.

    Returns:
      before, after, retention, stage and conversations, as `flm sft --json` prints them.
    """
    stage, samples = tuned.stage, samples_to_score(config, tuned)
    folder = RunFolder(workdir).stage(stage["index"], stage["name"])
    trials = Trials(folder.path / "scores.jsonl")

    def scored(digest: str, model: Callable[[], OpenedModel]) -> dict[str, dict[str, float]]:
        identity = {
            "params_digest": digest,
            "samples": chats.fingerprint(samples),
            "max_new_tokens": config.max_new_tokens,
        }
        row = trials.result(identity, lambda: {"scores": of_model(model(), config, samples)})
        return dict(row["scores"])

    base = tuned.base.model
    bpb = stage["eval"]
    return {
        "before": scored(params_digest(base.params), lambda: base),
        "after": scored(stage["params_digest"], lambda: open_model(workdir, stage["name"])),
        "retention": {"bpb_before": bpb["bpb_start"], "bpb_after": bpb["bpb_end"]},
        "stage": stage,
        "conversations": {side: vars(c) for side, c in tuned.talk.counts.items()},
    }


def table(found: dict[str, Any]) -> rich.table.Table:
    """Before -> after, by category."""
    drawn = rich.table.Table(box=rich.box.SIMPLE)
    for name in ("category", "response loss", "bits per byte", "right"):
        drawn.add_column(name, no_wrap=True)
    for category, before in found["before"].items():
        after, cells = found["after"][category], []
        for metric, form in (("loss", ".3f"), ("bpb", ".3f"), ("accuracy", ".0%")):
            values = [format(s[metric], form) for s in (before, after) if metric in s]
            cells.append(" -> ".join(values))
        drawn.add_row(category, *cells)
    return drawn


def sentences(found: dict[str, Any]) -> list[str]:
    """Sentences about what the table does not show."""
    stage, kept = found["stage"], found["retention"]
    lines = [f"{side}: {Counts(**c)}" for side, c in found["conversations"].items()]
    return [
        *lines,
        f"held-out response loss {stage['eval']['response_loss_start']:.3f} -> "
        f"{stage['eval']['response_loss_end']:.3f} nats per token; base data "
        f"{kept['bpb_before']:.4f} -> {kept['bpb_after']:.4f} bits per byte",
        f"stage {stage['index']} {stage['name']}: {stage['checkpoint']}",
    ]

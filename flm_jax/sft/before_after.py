"""Effects of fine-tuning: scores by category, before and after, and the retained knowledge."""

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
from flm_jax.store.lineage import RunFolder
from flm_jax.store.trials import Trials


def samples_to_score(config: SftConfig, tuned: Tuned) -> list[Sample]:
    """Chooses at most `score_samples` conversations per category; none was trained on.

    They are the held-out conversations of the config's files; without files, the evaluation split
    of the synthetic conversations.

    Args:
      config: the fine-tuning's config.
      tuned: its result.
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
    model: OpenedModel, config: SftConfig, samples: list[Sample], unsafe: bool = False
) -> dict[str, dict[str, float | None]]:
    """Scores a model on samples.

    Args:
      model: an opened model, with its chat template.
      config: gives the longest answer.
      samples: what to score.
      unsafe: as for `scoring.check_all`.

    Returns:
      category -> metric -> value, with intervals, as `scoring.flat` gives them.
    """
    chat = ChatModel(model, config.max_new_tokens)
    scored = scoring.score(samples, chat.losses, chat.answer, unsafe)
    return scoring.flat(scoring.summarise(scored))


def scores(config: SftConfig, workdir: str, tuned: Tuned, unsafe: bool = False) -> dict[str, Any]:
    """Scores the base and the fine-tuned model, unless that is done already.

    Finished scores are rows of the stage's scores.jsonl.

    Args:
      config: the fine-tuning's config.
      workdir: the run's folder.
      tuned: the fine-tuning's result.
      unsafe: as for `scoring.check_all`.

    Returns:
      A JSON-able dict:
        before, after: the models' scores, as `of_model` gives them.
        retention: bpb_before and bpb_after, bits per byte of the base's text.
        stage: the stage's entry of lineage.json.
        conversations: "train" and "held_out" -> the fields of `packing.Counts`.
        bad_rows: why rows were left out, with file and line.
    """
    stage, samples = tuned.stage, samples_to_score(config, tuned)
    folder = RunFolder(workdir).stage(stage["index"], stage["name"])
    trials = Trials(folder.path / "scores.jsonl")

    def scored(digest: str, model: Callable[[], OpenedModel]) -> dict[str, dict[str, Any]]:
        identity = {
            "params_digest": digest,
            "samples": chats.fingerprint(samples),
            "max_new_tokens": config.max_new_tokens,
        }
        row = trials.result(
            identity, lambda: {"scores": of_model(model(), config, samples, unsafe)}
        )
        return dict(row["scores"])

    base = tuned.base.model
    bpb = stage["eval"]
    return {
        "before": scored(tuned.base.params_digest, lambda: base),
        "after": scored(stage["params_digest"], lambda: open_model(workdir, stage["name"])),
        "retention": {"bpb_before": bpb["bpb_start"], "bpb_after": bpb["bpb_end"]},
        "stage": stage,
        "conversations": {side: vars(c) for side, c in tuned.talk.counts.items()},
        "bad_rows": tuned.talk.bad.reasons,
    }


def table(results: dict[str, Any]) -> rich.table.Table:
    """Draws "before -> after" of every metric, by category. Args: `results` is from `scores`."""
    drawn = rich.table.Table(box=rich.box.SIMPLE)
    for name in ("category", "response loss", "bits per byte", "right"):
        drawn.add_column(name, no_wrap=True)
    for category, before in results["before"].items():
        after, cells = results["after"][category], []
        for metric, form in (("loss", ".3f"), ("bpb", ".3f"), ("accuracy", ".0%")):
            values = [s[metric] for s in (before, after) if s.get(metric) is not None]
            cells.append(" -> ".join(format(value, form) for value in values))
        drawn.add_row(category, *cells)
    return drawn


def sentences(results: dict[str, Any]) -> list[str]:
    """Sentences about what the table does not show. Args: `results` is from `scores`."""
    stage, kept = results["stage"], results["retention"]
    lines = [f"{side}: {Counts(**c)}" for side, c in results["conversations"].items()]
    if bad := results["bad_rows"]:
        lines.append(f"{len(bad)} bad rows left out; the first: {bad[0]}")
    return [
        *lines,
        f"held-out response loss {stage['eval']['response_loss_start']:.3f} -> "
        f"{stage['eval']['response_loss_end']:.3f} nats per token; base data "
        f"{kept['bpb_before']:.4f} -> {kept['bpb_after']:.4f} bits per byte",
        f"stage {stage['index']} {stage['name']}: {stage['checkpoint']}",
    ]

"""Compares runs by their curves, or two models by their answers to chat samples.

  flm compare runs/demo runs/tile runs/longer --output=compared

Runs that were trained on text, any number: a table (parameters, tokens, FLOPs, time, bits per byte,
growths), where their configs differ, and curves over each other (PNG, SVG, CSV) in --output or the
first run's report/. See docs/experiments.md. Two models, if one was fine-tuned on conversations, a
:STAGE is given, or any flag below except --output: scores on chat samples, and text that they
retain.

  flm compare runs/demo runs/sft
  flm compare runs/demo:medium runs/demo:large --samples=held_out.jsonl
  flm compare runs/v1 runs/v2 --fail_if=all/accuracy:0.02 --fail_if=retention/bpb:0.01
  flm compare runs/v1 runs/v2 --judge="python my_judge.py" --output=compared

A model is a run's folder, with :STAGE if not the last; a checkpoint in one; or a folder of Hugging
Face files (with --vocabulary). Without --samples they are made here (evaluation split). Exit status
3 if a --fail_if (category/metric:margin; `all` for all samples) got worse from the first model to
the second by more than its margin. docs/selection.md describes scores and the judge's protocol.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import rich.console
import rich.table

from flm_jax import data
from flm_jax.commands import run_comparison
from flm_jax.commands.answer_flags import AnswerFlags
from flm_jax.commands.chat_flags import ChatFlags
from flm_jax.commands.command import Call, Command, Gate, flag
from flm_jax.errors import UserError
from flm_jax.runs import comparison as run_curves
from flm_jax.runtime import paths
from flm_jax.runtime.display import Progress
from flm_jax.sft import comparison, judge, scoring, synthetic
from flm_jax.sft.chat_model import ChatModel, open_chat_model, retention
from flm_jax.sft.chats import BadRows, Sample
from flm_jax.store.files import write_atomically, write_result
from flm_jax.store.lineage import RunFolder
from flm_jax.studies import reported

if TYPE_CHECKING:
    from flm_jax.data.pipeline import Corpus


@dataclasses.dataclass(frozen=True)
class Flags(ChatFlags, AnswerFlags):
    """The command's own flags."""

    samples: tuple[str, ...] = flag((), "Held-out conversations; repeatable.")
    per_category: int = flag(25, "Without --samples: generated samples of each category.", lower=1)
    seed: int = flag(0, "Seed of generated samples and bootstraps.")
    retention_sequences: int = flag(96, "Sequences of the base's validation text.", lower=1)
    max_new_tokens: int = flag(160, "Most tokens of an answer.", lower=1)
    fail_if: tuple[str, ...] = flag((), "Gate, as category/metric:margin; repeatable.")
    vocabulary: str = flag("", "Vocabulary of a model without a run; see DataConfig.")
    judge: str | None = flag(None, "Command that compares answers; needs --output.")
    judge_timeout: float = flag(60.0, "Seconds that one question may take.", lower=0.0)
    output: str | None = flag(None, "Folder for compare.json, answers and verdicts.")


def _samples(flags: Flags, bad: BadRows) -> tuple[list[Sample], int]:
    """Returns the samples that have an assistant turn, and the number of those without."""
    if not flags.samples:
        return synthetic.make(flags.seed, flags.per_category, "evaluation"), 0
    samples = flags.read(flags.samples, bad)
    answered = [s for s in samples if s.answers]
    if not answered:
        raise UserError(
            f"--samples: {len(samples)} conversations, none with an assistant turn; give "
            "samples with answers"
        )
    return answered, len(samples) - len(answered)


def _check_gates(gates: list[comparison.Gate], samples: list[Sample]) -> None:
    """Raises UserError if a gate's metric is not measured on these samples."""
    checked = {s.category: False for s in samples} | {s.category: True for s in samples if s.check}
    for gate in gates:
        gate.check(comparison.metrics_of(checked))


def _open(given: str, flags: Flags) -> tuple[ChatModel, Any]:
    model, corpus = open_chat_model(given, flags.vocabulary)
    return dataclasses.replace(model, max_new_tokens=flags.max_new_tokens), corpus


def _same_text(corpus: Corpus, other: Corpus) -> Corpus:
    """Returns the text of `corpus` in the vocabulary of `other`: both models get the same text."""
    vocabulary = other.config.vocabulary
    if vocabulary == corpus.config.vocabulary:
        return corpus
    return data.open_corpus(dataclasses.replace(corpus.config, vocabulary=vocabulary))


def _table(compared: comparison.Comparison, names: list[str]) -> rich.table.Table:
    table = rich.table.Table(box=None, header_style="bold")
    for column in ("category", "metric", *names, "difference", "95%", "n"):
        table.add_column(column, no_wrap=column not in names, overflow="fold")
    for category, metrics in compared.items():
        for metric, row in metrics.items():
            interval = "" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
            texts = ("" if row[k] is None else f"{row[k]:.4f}" for k in ("a", "b"))
            difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
            table.add_row(category, metric, *texts, difference, interval, str(row["n"]))
    return table


def _answers(one: list[scoring.Scored], two: list[scoring.Scored]) -> str:
    rows = (
        {
            "id": a.sample.id, "category": a.sample.category,
            "answer_a": a.answer, "right_a": a.right, "why_a": a.why,
            "answer_b": b.answer, "right_b": b.right, "why_b": b.why,
        }
        for a, b in zip(one, two, strict=True)
    )  # fmt: skip
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _score(
    name: str, model: ChatModel, samples: list[Sample], all_answers: bool, unsafe: bool
) -> list[scoring.Scored]:
    """Scores a model; with `all_answers` also on samples without a check."""
    with Progress(name, unit="samples") as progress:
        return _scored(
            dataclasses.replace(model, note=progress.count), samples, all_answers, unsafe
        )


def _scored(
    model: ChatModel, samples: list[Sample], all_answers: bool, unsafe: bool
) -> list[scoring.Scored]:
    if not all_answers:
        return scoring.score(samples, model.losses, model.answer, unsafe)
    answers = dict(zip(samples, model.answer(samples), strict=True))
    scored = scoring.score(
        samples, model.losses, lambda checked: [answers[s] for s in checked], unsafe
    )
    return [dataclasses.replace(s, answer=answers[s.sample]) for s in scored]


def _print_verdicts(report: dict[str, Any], console: rich.console.Console) -> None:
    table = rich.table.Table("category", "win rate of the first", "failed", box=None)
    for category, row in report["categories"].items():
        rate = row["win_rate"]
        text = ""
        if rate is not None:
            text = f"{rate:.3f}, 95% {row['win_rate_low']:.3f} to {row['win_rate_high']:.3f}"
        table.add_row(category, text, f"{row['failed']} of {row['asked']}")
    console.print(table)
    if "overall_a" in report:
        ours = f"{report['overall_a']:.2f} and {report['overall_b']:.2f}"
        rows = {b.name: b.scores for b in reported.benchmarks() if b.group == "AlignBench"}
        known = ", ".join(f"{name} {score}" for name, score in rows["Overall"].items())
        console.print(f"overall, by AlignBench's rule: {ours} (reported: {known})")


def _are_runs(call: Call[Flags]) -> bool:
    """Whether all arguments are runs to compare by their curves."""
    if dataclasses.replace(call.flags, output=None) != Flags():
        return False
    runs = [RunFolder(given) for given in call.arguments]
    return all(run.lineage.exists() for run in runs) and not any(
        "sft" in stage.saved() for run in runs for stage in run.begun()
    )


def main(call: Call[Flags]) -> dict[str, Any]:
    if _are_runs(call):
        output = call.flags.output
        folder = paths.of(output, "output") if output else RunFolder(call.arguments[0]).report
        return run_comparison.show(run_curves.read_all(call.arguments), folder, call.console())
    if len(call.arguments) != 2:
        raise UserError(
            f"got {' '.join(call.arguments)}, which are not all runs trained on text; give such "
            "runs, or two models"
        )
    return _compare_models(call)


def _compare_models(call: Call[Flags]) -> dict[str, Any]:
    flags, arguments = call.flags, list(call.arguments)
    gates = [comparison.Gate.parse(text) for text in flags.fail_if]
    answer_judge = judge.Judge(flags.judge, flags.judge_timeout) if flags.judge else None
    folder = paths.of(flags.output, "output") if flags.output else None
    if answer_judge and not folder:
        raise UserError("--judge is given without --output; give a folder for its verdicts")
    bad = BadRows(flags.bad_rows)
    samples, unanswered = _samples(flags, bad)
    _check_gates(gates, samples)
    console = call.console()
    (one, corpus), (two, other) = (_open(given, flags) for given in arguments)
    for model in (one, two):
        samples = model.writable(samples, bad)
    if not samples:
        raise UserError(f"no conversation is left to compare: {bad}; give other samples")
    _check_gates(gates, samples)
    other = _same_text(corpus, other)
    scored = [
        _score(name, model, samples, answer_judge is not None, flags.unsafe)
        for name, model in zip(arguments, (one, two), strict=True)
    ]
    retained = [
        retention(m, c, flags.retention_sequences) for m, c in ((one, corpus), (two, other))
    ]
    compared = comparison.compare(scored[0], scored[1], flags.seed)
    compared[comparison.RETENTION] = {"bpb": comparison.retained(*retained)}
    console.print(_table(compared, arguments))
    if unanswered:
        console.print(f"{unanswered} conversations without an assistant turn were left out")
    if bad.reasons:
        console.print(str(bad))
    lost = [model.left_out(samples) for model in (one, two)]
    for name, counts in zip(arguments, lost, strict=True):
        for what, count in counts.items():
            console.print(f"{name}: {count} {what} left out by its template")
    result: dict[str, Any] = {
        "samples": {"scored": len(samples), "without_answer": unanswered},
        "bad_rows": bad.reasons,
        "a": {
            "model": arguments[0],
            "scores": scoring.flat(scoring.summarise(scored[0])),
            "left_out": lost[0],
        },
        "b": {
            "model": arguments[1],
            "scores": scoring.flat(scoring.summarise(scored[1])),
            "left_out": lost[1],
        },
        "difference": compared,
        "retention": {"bpb_a": retained[0], "bpb_b": retained[1]},
        "failed": [text for gate in gates if (text := gate.failure(compared))],
    }
    if folder:
        write_atomically(folder / "answers.jsonl", _answers(*scored))
    if answer_judge and folder:
        first, second = ([s.answer for s in side] for side in scored)
        path = folder / "verdicts.jsonl"
        with Progress("judge", unit="samples") as progress:
            verdicts = answer_judge.verdicts(samples, first, second, path, progress.count)
        result["judge"] = judge.report(verdicts, flags.seed)
        _print_verdicts(result["judge"], console)
    if folder:
        write_result(folder / "compare.json", result)
    return result


COMMAND = Command(
    main,
    Flags,
    config="none",
    positional=("RUN", "RUN..."),
    gate=Gate(3, lambda result: "; ".join(result.get("failed", ()))),
)

"""Win rates of one model's answers against another's, judged by a command that the user gives.

The command reads one JSON object from standard input: `messages` (the conversation up to the
question), `category`, `id`, `answer_a`, `answer_b`. It writes one JSON object: `winner` ("a", "b"
or "tie"), or `score_a` and `score_b` (numbers, higher is better), or both. It is asked twice, the
second time with the answers exchanged, so that a preference for the first answer cancels out. If
both answers are equal, both questions are the same, and it is asked once. Every reply is stored at
once: an interrupted judgement resumes, and only failed questions are asked again.

Scores are combined by the rule of AlignBench (arXiv 2311.18743): 683 Chinese questions, whose
answers a judge rates from 1 to 10.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.sft import scoring
from flm_jax.sft.chats import Sample, to_row
from flm_jax.sft.scoring import ALL, Estimate
from flm_jax.store.trials import Trials

WINNERS = ("a", "b", "tie")
# AlignBench's categories.
REASONING = ("Math", "Logic")
LANGUAGE = ("Fundamental", "Chinese", "Open-ended", "Writing", "Role play", "Professional")
CATEGORIES = (*REASONING, *LANGUAGE)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judge's replies to both orders of the answers, combined.

    Attributes:
      sample: the question.
      points: model A's mean over both orders: 1 per win, 0.5 per tie; None: the judge failed.
      agreed: whether both orders have the same winner.
      score_a: answer A's mean score over both orders; None: the judge gives no scores.
      score_b: answer B's.
      failures: why the judge failed, once per order.
    """

    sample: Sample
    points: float | None
    agreed: bool = False
    score_a: float | None = None
    score_b: float | None = None
    failures: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Judge:
    """A command that compares two answers.

    Attributes:
      command: program and arguments, quoted as in a shell; no shell runs it.
      timeout: seconds for one question.
      workers: questions asked in parallel.

    Raises UserError if there is no such program.
    """

    command: str
    timeout: float = 60.0
    workers: int = 2

    def __post_init__(self) -> None:
        words = shlex.split(self.command)
        if not words or not shutil.which(words[0]):
            raise UserError(
                f"judge {self.command!r}: no such command; give a program that exists",
                argument="judge",
            )

    def verdicts(
        self,
        samples: Sequence[Sample],
        answers_a: Sequence[str],
        answers_b: Sequence[str],
        path: pathlib.Path,
        note: Callable[[int, int], None] = lambda done, of: None,
    ) -> list[Verdict]:
        """Asks about every sample whose replies are not stored yet.

        Args:
          samples: the questions.
          answers_a: model A's answers, one per sample.
          answers_b: model B's.
          path: JSONL file that stores the command's replies.
          note: called with two numbers, of finished samples and of all samples.

        Returns:
          One verdict per sample.
        """
        replies, done, lock = Trials(path), itertools.count(1), threading.Lock()

        def reply(sample: Sample, question: dict[str, Any]) -> dict[str, Any]:
            text = f"{self.command} {json.dumps(question)}"
            identity = {"question": hashlib.sha256(text.encode()).hexdigest()}
            return replies.result(identity, lambda: {"id": sample.id, **self._ask(question)})

        def verdict(sample: Sample, answer_a: str, answer_b: str) -> Verdict:
            orders = [
                reply(sample, question_of(sample, answer_a, answer_b, exchanged))
                for exchanged in (False, True)
            ]
            with lock:
                note(next(done), len(samples))
            return _verdict(sample, orders)

        with concurrent.futures.ThreadPoolExecutor(self.workers) as workers:
            return list(workers.map(verdict, samples, answers_a, answers_b))

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Runs the command once; returns its checked reply, or {"failure": why}."""
        with subprocess.Popen(
            shlex.split(self.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(json.dumps(question), timeout=self.timeout)
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # includes its children
                if isinstance(error, subprocess.TimeoutExpired):
                    return {"failure": f"no verdict within {self.timeout:g} s"}
                raise
        if process.returncode:
            last = (err.strip().splitlines() or ["nothing on standard error"])[-1]
            return {"failure": f"exit status {process.returncode}: {last[-200:]}"}
        return _parse(out)


def question_of(sample: Sample, answer_a: str, answer_b: str, exchanged: bool) -> dict[str, Any]:
    """Builds the question for the command: the conversation so far, and both answers.

    Args:
      sample: its last assistant message and its check are left out.
      answer_a: model A's answer.
      answer_b: model B's.
      exchanged: give model B's answer as `answer_a`, and model A's as `answer_b`.
    """
    last = max(n for n, m in enumerate(sample.messages) if m.role == "assistant")
    row = to_row(dataclasses.replace(sample, messages=sample.messages[:last], check=None))
    first, second = (answer_b, answer_a) if exchanged else (answer_a, answer_b)
    return {**row, "answer_a": first, "answer_b": second}


def _parse(out: str) -> dict[str, Any]:
    """The command's output as winner and scores, or {"failure": why}."""
    try:
        value = json_text.parse(out)
        reply = {k: value[k] for k in ("winner", "score_a", "score_b") if k in value}
    except (ValueError, TypeError):
        return {"failure": f"wrote {out[:80]!r}, which is not a JSON object"}
    scores = [reply[k] for k in ("score_a", "score_b") if k in reply]
    if not all(type(s) in (int, float) and math.isfinite(s) for s in scores) or len(scores) == 1:
        return {"failure": f"wrote {out[:80]!r}; score_a and score_b must be two numbers"}
    if scores and "winner" not in reply:
        reply["winner"] = _winner(*scores)
    if reply.get("winner") not in WINNERS:
        return {"failure": f"wrote {out[:80]!r}; winner must be one of {', '.join(WINNERS)}"}
    return reply


def _winner(score_a: float, score_b: float) -> str:
    if score_a == score_b:
        return "tie"
    return "a" if score_a > score_b else "b"


def _verdict(sample: Sample, orders: Sequence[dict[str, Any]]) -> Verdict:
    """Combines the replies to the original and the exchanged order."""
    failures = tuple(row["failure"] for row in orders if "failure" in row)
    if failures:
        return Verdict(sample, None, failures=failures)
    first, second = ([row["winner"], row.get("score_a"), row.get("score_b")] for row in orders)
    exchanged = {"a": "b", "b": "a", "tie": "tie"}
    points = {"a": 1.0, "b": 0.0, "tie": 0.5}
    winners = [first[0], exchanged[second[0]]]
    score_a = score_b = None
    if first[1] is not None and second[1] is not None:
        score_a, score_b = (first[1] + second[2]) / 2, (first[2] + second[1]) / 2
    agreed = winners[0] == winners[1]
    return Verdict(sample, sum(points[w] for w in winners) / 2, agreed, score_a, score_b)


def report(verdicts: Sequence[Verdict], seed: int = 0) -> dict[str, Any]:
    """Summarises verdicts.

    Args:
      verdicts: from `Judge.verdicts`.
      seed: of the bootstrap.

    Returns:
      A JSON-able dict:
        categories: category (or "all") -> asked, failed, failures (up to 5 texts) and win_rate
          (model A's, a tie counts half; None if all failed); with a win rate also win_rate_low and
          win_rate_high (95% interval), agreement, and, if the judge gives scores, score_a and
          score_b (means).
        overall_a, overall_b: AlignBench's overall scores, if all its categories are there.
    """
    groups: dict[str, list[Verdict]] = {}
    for v in verdicts:
        groups.setdefault(v.sample.category, []).append(v)
    categories = {
        c: _of_category(vs, seed) for c, vs in [*sorted(groups.items()), (ALL, list(verdicts))]
    }
    result: dict[str, Any] = {"categories": categories}
    for which in ("a", "b"):
        scores = {c: v[f"score_{which}"] for c, v in categories.items() if f"score_{which}" in v}
        if (overall := overall_score(scores)) is not None:
            result[f"overall_{which}"] = overall
    return result


def _of_category(verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
    """One category's part of `report`."""
    decided = [v for v in verdicts if v.points is not None]
    failures = [text for v in verdicts for text in v.failures]
    summary: dict[str, Any] = {
        "asked": len(verdicts),
        "failed": len(verdicts) - len(decided),
        "failures": sorted(set(failures))[:5],
        "win_rate": None,
    }
    if not decided:
        return summary
    points = np.array([v.points for v in decided], float)
    rate: Estimate = scoring.ratio(points, np.ones_like(points), seed)
    summary |= {"win_rate": rate.value, "win_rate_low": rate.low, "win_rate_high": rate.high}
    summary["agreement"] = sum(v.agreed for v in decided) / len(decided)
    for which in ("score_a", "score_b"):
        scores = [s for v in decided if (s := getattr(v, which)) is not None]
        if scores:
            summary[which] = sum(scores) / len(scores)
    return summary


def overall_score(scores: Mapping[str, float]) -> float | None:
    """Computes AlignBench's overall score: reasoning and language have equal weight.

    Args:
      scores: by category.

    Returns:
      The mean of two means, over REASONING and over LANGUAGE; None if a category is missing.

    >>> overall_score(dict.fromkeys(REASONING, 4.0) | dict.fromkeys(LANGUAGE, 8.0))
    6.0
    """
    if not set(CATEGORIES) <= set(scores):
        return None
    means = [sum(scores[c] for c in group) / len(group) for group in (REASONING, LANGUAGE)]
    return sum(means) / 2

"""Win rates of one model's answers against another's, judged by a command of the user's.

The command gets one JSON object on standard input: `messages` (the conversation up to the
question), `category`, `id`, `answer_a`, `answer_b`; and writes one: `winner` ("a", "b" or "tie"),
or `score_a` and `score_b` (numbers, higher is better), or both. It is asked twice, with the answers
exchanged, so that a preference for the first answer cancels out; equal answers make both orders the
same question, which is asked once. What it says is stored at once: an interrupted judgement
resumes, and only questions that failed are asked again.

Scores are summed up by the rule of AlignBench (arXiv 2311.18743), which has 683 Chinese questions,
whose answers a judge rates from 1 to 10.
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
    """Both orders together. `points` are model A's: 1 won, 0.5 undecided, 0 lost; None: failed."""

    sample: Sample
    points: float | None
    agreed: bool = False  # both orders said the same
    score_a: float | None = None  # mean of both orders, where the judge gives scores
    score_b: float | None = None
    failures: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Judge:
    """A command that compares two answers.

    Attributes:
      command: as in a shell, but none runs it.
      timeout: seconds for one question.
      workers: questions asked side by side.
    """

    command: str
    timeout: float = 60.0
    workers: int = 2

    def __post_init__(self) -> None:
        words = shlex.split(self.command)
        if not words or not shutil.which(words[0]):
            raise UserError(f"judge {self.command!r}: no such command; give one that can be run")

    def verdicts(
        self,
        samples: Sequence[Sample],
        answers_a: Sequence[str],
        answers_b: Sequence[str],
        path: pathlib.Path,
        note: Callable[[int, int], None] = lambda done, of: None,
    ) -> list[Verdict]:
        """Asks about every sample, unless that is done already.

        Args:
          samples: whose answers to compare.
          answers_a: one model's answers.
          answers_b: the other model's.
          path: JSONL file that stores what the command says.
          note: called with the number of samples done, and of all.

        Returns:
          One verdict for each sample.
        """
        said, done, lock = Trials(path), itertools.count(1), threading.Lock()

        def asked(sample: Sample, question: dict[str, Any]) -> dict[str, Any]:
            text = f"{self.command} {json.dumps(question)}"
            identity = {"question": hashlib.sha256(text.encode()).hexdigest()}
            return said.result(identity, lambda: {"id": sample.id, **self._ask(question)})

        def verdict(sample: Sample, answer_a: str, answer_b: str) -> Verdict:
            orders = [
                asked(sample, question_of(sample, answer_a, answer_b, exchanged))
                for exchanged in (False, True)
            ]
            with lock:
                note(next(done), len(samples))
            return _verdict(sample, orders)

        with concurrent.futures.ThreadPoolExecutor(self.workers) as workers:
            return list(workers.map(verdict, samples, answers_a, answers_b))

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Parses and checks the command's answer; {"failure": why} if it does not fit."""
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
                    os.killpg(process.pid, signal.SIGKILL)  # its children too
                if isinstance(error, subprocess.TimeoutExpired):
                    return {"failure": f"no verdict within {self.timeout:g} s"}
                raise
        if process.returncode:
            last = (err.strip().splitlines() or ["it said nothing"])[-1]
            return {"failure": f"exit status {process.returncode}: {last[-200:]}"}
        return _said(out)


def question_of(sample: Sample, answer_a: str, answer_b: str, exchanged: bool) -> dict[str, Any]:
    """The question for the command: the conversation so far, and both answers.

    The sample's own answer and its check are left out. With `exchanged` the answers change places.
    """
    last = max(n for n, m in enumerate(sample.messages) if m.role == "assistant")
    asked = to_row(dataclasses.replace(sample, messages=sample.messages[:last], check=None))
    first, second = (answer_b, answer_a) if exchanged else (answer_a, answer_b)
    return {**asked, "answer_a": first, "answer_b": second}


def _said(out: str) -> dict[str, Any]:
    try:
        value = json.loads(out)
        found = {k: value[k] for k in ("winner", "score_a", "score_b") if k in value}
    except (ValueError, TypeError):
        return {"failure": f"said {out[:80]!r}, which is not a JSON object"}
    scores = [found[k] for k in ("score_a", "score_b") if k in found]
    if not all(type(s) in (int, float) and math.isfinite(s) for s in scores) or len(scores) == 1:
        return {"failure": f"said {out[:80]!r}; score_a and score_b must be two numbers"}
    if scores and "winner" not in found:
        a, b = scores
        found["winner"] = "a" if a > b else "b" if b > a else "tie"
    if found.get("winner") not in WINNERS:
        return {"failure": f"said {out[:80]!r}; winner must be one of {', '.join(WINNERS)}"}
    return found


def _verdict(sample: Sample, orders: Sequence[dict[str, Any]]) -> Verdict:
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
    """Per category and for "all": A's win rate (ties half) with its interval, scores, failures.

    `overall_a` and `overall_b` are AlignBench's, where its categories are all there.
    """
    groups: dict[str, list[Verdict]] = {}
    for v in verdicts:
        groups.setdefault(v.sample.category, []).append(v)
    found = {
        c: _of_category(vs, seed) for c, vs in [*sorted(groups.items()), (ALL, list(verdicts))]
    }
    result: dict[str, Any] = {"categories": found}
    for which in ("a", "b"):
        scores = {c: v[f"score_{which}"] for c, v in found.items() if f"score_{which}" in v}
        if (overall := overall_score(scores)) is not None:
            result[f"overall_{which}"] = overall
    return result


def _of_category(verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
    decided = [v for v in verdicts if v.points is not None]
    failures = [text for v in verdicts for text in v.failures]
    found: dict[str, Any] = {
        "asked": len(verdicts),
        "failed": len(verdicts) - len(decided),
        "failures": sorted(set(failures))[:5],
        "win_rate": None,
    }
    if not decided:
        return found
    points = np.array([v.points for v in decided], float)
    rate: Estimate = scoring.ratio(points, np.ones_like(points), seed)
    found |= {"win_rate": rate.value, "win_rate_low": rate.low, "win_rate_high": rate.high}
    found["agreement"] = sum(v.agreed for v in decided) / len(decided)
    for which in ("score_a", "score_b"):
        scores = [s for v in decided if (s := getattr(v, which)) is not None]
        if scores:
            found[which] = sum(scores) / len(scores)
    return found


def overall_score(scores: Mapping[str, float]) -> float | None:
    """AlignBench's overall score: reasoning and language weigh the same.

    Args:
      scores: by category.

    Returns:
      The mean of the mean of REASONING and the mean of LANGUAGE; None if a category is missing.
    """
    if not set(CATEGORIES) <= set(scores):
        return None
    means = [sum(scores[c] for c in group) / len(group) for group in (REASONING, LANGUAGE)]
    return sum(means) / 2

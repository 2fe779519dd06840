"""Scores of a model on chat samples: response loss, and answers that a program can check.

Nothing here depends on the model: `losses` and `answer` are functions of samples, which
`chat_model.py` provides. Intervals are at 95%: Wilson's for accuracies, a bootstrap over samples
for losses, both from scipy.
"""

from __future__ import annotations

import ast
import concurrent.futures
import dataclasses
import doctest
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import stats

from flm_jax.errors import UserError
from flm_jax.sft import sandbox
from flm_jax.sft.chats import Check, Sample

ALL = "all"  # the category of all samples together
CONFIDENCE = 0.95
BOOTSTRAPS = 1000
_ENTRIES = 1 << 22  # array entries that a bootstrap draws at once
# A minus is a sign, except directly after a letter, digit or point.
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?|\d+(?:\.\d+)?")


@dataclasses.dataclass(frozen=True)
class ResponseLoss:
    """Loss of all assistant messages of a sample, given the messages before them."""

    nats: float  # summed over tokens, including end tokens
    tokens: float  # including end tokens; each counts with its weight
    bytes: float  # UTF-8 bytes of the text; each counts with its weight


Losses = Callable[[Sequence[Sample]], Sequence[ResponseLoss]]
Answer = Callable[[Sequence[Sample]], Sequence[str]]  # to each sample's last question


@dataclasses.dataclass(frozen=True)
class Scored:
    """One sample's results.

    Attributes:
      sample: the sample.
      loss: of all its assistant messages.
      answer: the model's answer to the last question; "" if the sample has no check.
      right: whether the answer passes the check; None if there is none.
      why: the reason, if the answer is wrong.
    """

    sample: Sample
    loss: ResponseLoss
    answer: str = ""
    right: bool | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over n samples and its 95% interval; None if there are no samples."""

    value: float | None
    low: float | None
    high: float | None
    n: int


Scores = dict[str, dict[str, Estimate]]  # category -> metric


def score(
    samples: Sequence[Sample], losses: Losses, answer: Answer, unsafe: bool = False
) -> list[Scored]:
    """Computes the loss of every sample, and checks the answers to those that have a check.

    Args:
      samples: what to score.
      losses: the model's response losses.
      answer: the model's answers; called with the samples that have a check.
      unsafe: as for `check_all`.

    Returns:
      One result per sample, in order.

    Raises:
      UserError: there are no samples, a check is malformed, or answers cannot be isolated.
    """
    if not samples:
        raise UserError("there are no samples to score; give some (`flm samples make` writes them)")
    checked = [s for s in samples if s.check]
    answers = answer(checked) if checked else []
    verdicts = zip(answers, check_all(checked, answers, unsafe), strict=True)
    results = []
    for sample, loss in zip(samples, losses(samples), strict=True):
        if sample.check:
            text, (right, why) = next(verdicts)
            results.append(Scored(sample, loss, text, right, why))
        else:
            results.append(Scored(sample, loss))
    return results


def summarise(scored: Sequence[Scored], seed: int = 0) -> Scores:
    """Averages results by category.

    Args:
      scored: from `score`.
      seed: of the bootstrap.

    Returns:
      category (or "all") -> metric -> estimate. The metrics are loss (nats per token), bpb (bits
      per byte) and, if a sample has a check, accuracy.
    """
    groups: dict[str, list[Scored]] = {}
    for s in scored:
        groups.setdefault(s.sample.category, []).append(s)
    scores: Scores = {}
    for category, rows in [*sorted(groups.items()), (ALL, list(scored))]:
        scores[category] = {name: ratio(*parts(rows, name), seed) for name in ("loss", "bpb")}
        right = [s.right for s in rows if s.right is not None]
        if right:
            scores[category]["accuracy"] = wilson(sum(right), len(right))
    return scores


def parts(scored: Iterable[Scored], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns each sample's numerator and denominator; the ratio of their sums is the metric.

    Args:
      scored: from `score`.
      metric: "accuracy" (only samples with a check count), "bpb" or "loss" (only samples with an
        answer that says something count).

    Returns:
      Numerators and denominators, float64 [samples]; no denominator is 0.
    """
    if metric == "accuracy":
        pairs = [(float(s.right), 1.0) for s in scored if s.right is not None]
    elif metric == "bpb":
        pairs = [(s.loss.nats / math.log(2), float(s.loss.bytes)) for s in scored]
    else:
        pairs = [(s.loss.nats, float(s.loss.tokens)) for s in scored]
    values = np.array(pairs, float).reshape(-1, 2)
    values = values[values[:, 1] > 0]
    return values[:, 0], values[:, 1]


def ratio(above: np.ndarray, below: np.ndarray, seed: int = 0) -> Estimate:
    """Estimates the ratio of two sums over samples, with a bootstrap interval over the samples.

    Args:
      above: numerators [samples].
      below: denominators above 0 [samples].
      seed: of the bootstrap.
    """
    if not len(above):
        return Estimate(None, None, None, 0)

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(a.sum(axis) / b.sum(axis))

    low, high = bootstrap(statistic, (above, below), seed)
    return Estimate(float(above.sum() / below.sum()), low, high, len(above))


def bootstrap(
    statistic: Callable[..., np.ndarray], parts: Sequence[np.ndarray], seed: int
) -> tuple[float, float]:
    """Computes the 95% percentile interval of a statistic by resampling samples.

    Args:
      statistic: called as `statistic(*parts, axis)`.
      parts: arrays [samples]; one draw takes the same samples of all arrays.
      seed: the same seed draws the same samples.

    Returns:
      The interval's ends. With a single sample, both are the statistic.
    """
    count = len(parts[0])
    if count == 1:  # scipy refuses it
        value = float(statistic(*parts, axis=0))
        return value, value
    interval = stats.bootstrap(
        parts, statistic, paired=True, vectorized=True, n_resamples=BOOTSTRAPS,
        batch=max(_ENTRIES // count, 1), confidence_level=CONFIDENCE, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def wilson(right: int, count: int) -> Estimate:
    """Estimates a proportion with Wilson's score interval.

    The interval is also valid for few samples and near 0 and 1.

    Args:
      right: number of right answers.
      count: number of answers.

    >>> estimate = wilson(3, 3)
    >>> estimate.value, round(estimate.low, 3), estimate.high
    (1.0, 0.439, 1.0)
    """
    interval = stats.binomtest(right, count).proportion_ci(CONFIDENCE, "wilson")
    return Estimate(right / count, float(interval.low), float(interval.high), count)


def flat(scores: Scores) -> dict[str, dict[str, float | None]]:
    """Flattens estimates into numbers: metric, metric_low, metric_high and metric_n.

    >>> flat({"lists": {"loss": Estimate(2.0, 1.5, 2.5, 9)}})
    {'lists': {'loss': 2.0, 'loss_low': 1.5, 'loss_high': 2.5, 'loss_n': 9}}
    """
    return {
        category: {
            f"{name}{suffix}": value
            for name, e in metrics.items()
            for suffix, value in (("", e.value), ("_low", e.low), ("_high", e.high), ("_n", e.n))
        }
        for category, metrics in scores.items()
    }


def check_all(
    samples: Sequence[Sample], answers: Sequence[str], unsafe: bool = False
) -> list[tuple[bool, str]]:
    """Checks one answer per sample, in parallel.

    Args:
      samples: samples with a check.
      answers: one per sample.
      unsafe: run code also where the kernel cannot isolate it; see `sandbox.run_examples`.

    Returns:
      For each answer whether it is right, and the reason if it is not.

    Raises:
      UserError: a check is malformed, or the answer cannot be isolated; the error names the sample.
    """

    def one(pair: tuple[Sample, str]) -> tuple[bool, str]:
        sample, answer = pair
        assert sample.check
        try:
            return check_answer(sample.check, answer, unsafe)
        except UserError as error:
            raise UserError(f"sample {sample.id!r}: {error}") from error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, zip(samples, answers, strict=True)))


def check_answer(check: Check, answer: str, unsafe: bool = False) -> tuple[bool, str]:
    """Checks one answer.

    Args:
      check: the rule.
      answer: the text.
      unsafe: as for `check_all`.

    Returns:
      Whether it is right, and the reason if it is not.

    Raises:
      UserError: the check is malformed.

    >>> check_answer(Check("number", "7"), "3 + 4 = 7")
    (True, '')
    >>> check_answer(Check("number", "7"), "It is 8.")
    (False, 'another number')
    """
    if check.kind == "exact":
        right = answer.strip() == check.expected.strip()
        return right, "" if right else "another text"
    if check.kind == "number":
        if (wanted := last_number(check.expected)) is None:
            raise UserError(f"its check expects {check.expected!r}, which holds no number")
        given = last_number(answer)
        if given == wanted:
            return True, ""
        return False, "no number" if given is None else "another number"
    if check.kind == "doctest":
        return _check_doctest(check.expected, answer, unsafe)
    raise UserError(f"its check is of kind {check.kind!r}; choose exact, number or doctest")


def last_number(text: str) -> float | None:
    """Finds the last number in a text; a comma before three digits separates thousands.

    >>> last_number("5-2 makes 3, not 1,200")
    1200.0
    """
    numbers = _NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return float(numbers[-1]) if numbers else None


def _check_doctest(expected: str, answer: str, unsafe: bool) -> tuple[bool, str]:
    """Runs the docstring's examples with the answer as the function's body, in the sandbox."""
    try:
        module = ast.parse(expected)
        function = module.body[-1]
        assert isinstance(function, ast.FunctionDef)
        examples = doctest.DocTestParser().get_examples(ast.get_docstring(function) or "")
        assert examples
        # The expected outputs stay in this process, so that the answer cannot read them.
        function.body = [ast.Expr(ast.Constant("Completed below."))]
        head = ast.unparse(module)
    except (
        SyntaxError, ValueError, IndexError, AssertionError, RecursionError, MemoryError,
    ) as error:  # fmt: skip  # the last two: nested too deeply
        raise UserError(
            "its check must be source whose last function has a docstring with examples and no body"
        ) from error
    body = textwrap.indent(textwrap.dedent(answer.strip("\n")), "    ")
    source = f"{head}\n{body}\n"
    outcome = sandbox.run_examples(source, [e.source for e in examples], unsafe=unsafe)
    if outcome.failure:
        return False, outcome.failure
    if len(outcome.outputs) != len(examples):
        return False, f"{len(outcome.outputs)} outputs of {len(examples)} examples"
    compare = doctest.OutputChecker().check_output
    for example, output in zip(examples, outcome.outputs, strict=True):
        flags = sum(flag for flag, on in example.options.items() if on)
        if not compare(_last_line(example.want), _last_line(output), flags):
            return False, f"{example.source.strip()} gives {output.strip()[-100:]}"
    return True, ""


def _last_line(output: str) -> str:
    """Shortens a traceback to its exception, as doctest does."""
    if output.startswith("Traceback (most recent call last):"):
        return output.strip().splitlines()[-1] + "\n"
    return output

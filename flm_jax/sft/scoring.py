"""Scores of a model on chat samples: response loss, and answers that a program can check.

Nothing here knows the model: `losses` and `answer` are functions of samples (`chat_model.py` makes
them). Intervals are at 95%: Wilson's for accuracies, a bootstrap over samples for losses. Both are
scipy's.
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
_ENTRIES = 1 << 22  # drawn at once by a bootstrap
# A minus is a sign unless it stands between numbers.
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?|\d+(?:\.\d+)?")


@dataclasses.dataclass(frozen=True)
class ResponseLoss:
    """Loss of all assistant messages of a sample, given the messages before them."""

    nats: float  # summed over tokens, the end tokens included
    tokens: int
    bytes: int  # of the text, UTF-8


Losses = Callable[[Sequence[Sample]], Sequence[ResponseLoss]]
Answer = Callable[[Sequence[Sample]], Sequence[str]]  # to each sample's last question


@dataclasses.dataclass(frozen=True)
class Scored:
    """One sample's results. `right` is None where the sample has no check."""

    sample: Sample
    loss: ResponseLoss
    answer: str = ""
    right: bool | None = None
    why: str = ""  # it is not right


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over n samples and its 95% interval."""

    value: float
    low: float
    high: float
    n: int


Scores = dict[str, dict[str, Estimate]]  # category -> metric


def score(samples: Sequence[Sample], losses: Losses, answer: Answer) -> list[Scored]:
    """Every sample's response loss, and whether the answers that can be checked are right.

    Raises UserError where there is nothing to score, or a check is malformed.
    """
    if not samples:
        raise UserError("there are no samples to score; give some, as make_samples writes them")
    checked = [s for s in samples if s.check]
    answers = answer(checked) if checked else []
    verdicts = iter(check_all(checked, answers))
    given = iter(answers)
    return [
        Scored(s, loss, next(given), *next(verdicts)) if s.check else Scored(s, loss)
        for s, loss in zip(samples, losses(samples), strict=True)
    ]


def summarise(scored: Sequence[Scored], seed: int = 0) -> Scores:
    """Per category, and for "all" together: loss (nats per token), bpb and accuracy."""
    groups: dict[str, list[Scored]] = {}
    for s in scored:
        groups.setdefault(s.sample.category, []).append(s)
    found: Scores = {}
    for category, rows in [*sorted(groups.items()), (ALL, list(scored))]:
        found[category] = {name: ratio(*parts(rows, name), seed) for name in ("loss", "bpb")}
        right = [s.right for s in rows if s.right is not None]
        if right:
            found[category]["accuracy"] = wilson(sum(right), len(right))
    return found


def parts(scored: Iterable[Scored], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators of each sample, float64: their sums' ratio is the metric."""
    if metric == "accuracy":
        pairs = [(float(s.right), 1.0) for s in scored if s.right is not None]
    elif metric == "bpb":
        pairs = [(s.loss.nats / math.log(2), float(s.loss.bytes)) for s in scored]
    else:
        pairs = [(s.loss.nats, float(s.loss.tokens)) for s in scored]
    values = np.array(pairs, float).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def ratio(above: np.ndarray, below: np.ndarray, seed: int = 0) -> Estimate:
    """Ratio of two sums over samples, with a bootstrap over the samples.

    Args:
      above: numerators [samples].
      below: denominators [samples].
      seed: of the bootstrap.
    """

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(a.sum(axis) / b.sum(axis))

    low, high = bootstrap(statistic, (above, below), seed)
    return Estimate(float(above.sum() / below.sum()), low, high, len(above))


def bootstrap(
    statistic: Callable[..., np.ndarray], parts: Sequence[np.ndarray], seed: int
) -> tuple[float, float]:
    """95% percentile interval of a statistic over samples, which are resampled together.

    Args:
      statistic: called as `statistic(*parts, axis)`.
      parts: arrays [samples], one or more numbers of each sample.
      seed: the same seed draws the same samples.

    Returns:
      Its two ends; of a single sample twice the statistic.
    """
    count = len(parts[0])
    if count == 1:  # refused by scipy
        value = float(statistic(*parts, axis=0))
        return value, value
    found = stats.bootstrap(
        parts, statistic, paired=True, vectorized=True, n_resamples=BOOTSTRAPS,
        batch=max(_ENTRIES // count, 1), confidence_level=CONFIDENCE, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def wilson(right: int, count: int) -> Estimate:
    """Wilson's score interval of a proportion: it holds for few samples and near 0 and 1."""
    found = stats.binomtest(right, count).proportion_ci(CONFIDENCE, "wilson")
    return Estimate(right / count, float(found.low), float(found.high), count)


def flat(scores: Scores) -> dict[str, dict[str, float]]:
    """Scores as plain numbers: metric, metric_low, metric_high and metric_n of every category."""
    return {
        category: {
            f"{name}{suffix}": value
            for name, e in metrics.items()
            for suffix, value in (("", e.value), ("_low", e.low), ("_high", e.high), ("_n", e.n))
        }
        for category, metrics in scores.items()
    }


def check_all(samples: Sequence[Sample], answers: Sequence[str]) -> list[tuple[bool, str]]:
    """Checks each answer; returns whether it passes and, if not, why. Doctests run in parallel."""

    def one(pair: tuple[Sample, str]) -> tuple[bool, str]:
        sample, answer = pair
        assert sample.check
        try:
            return check_answer(sample.check, answer)
        except UserError as error:
            raise UserError(f"sample {sample.id!r}: {error}") from error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, zip(samples, answers, strict=True)))


def check_answer(check: Check, answer: str) -> tuple[bool, str]:
    """Checks an answer; returns whether it passes and, if not, why.

    Raises UserError: the check itself is malformed.
    """
    if check.kind == "exact":
        right = answer.strip() == check.expected.strip()
        return right, "" if right else "another text"
    if check.kind == "number":
        if (wanted := last_number(check.expected)) is None:
            raise UserError(f"its check expects {check.expected!r}, which holds no number")
        found = last_number(answer)
        right = found == wanted
        return right, "" if right else "no number" if found is None else "another number"
    if check.kind == "doctest":
        return _check_doctest(check.expected, answer)
    raise UserError(f"its check is of kind {check.kind!r}; choose exact, number or doctest")


def last_number(text: str) -> float | None:
    """The last number in a text; commas between digits belong to it."""
    found = _NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return float(found[-1]) if found else None


def _check_doctest(expected: str, answer: str) -> tuple[bool, str]:
    try:
        module = ast.parse(expected)
        function = module.body[-1]
        assert isinstance(function, ast.FunctionDef)
        examples = doctest.DocTestParser().get_examples(ast.get_docstring(function) or "")
        assert examples
    except (SyntaxError, ValueError, IndexError, AssertionError) as error:
        raise UserError(
            "its check must be source whose last function has a docstring with examples and no body"
        ) from error
    # What the examples should give stays here: the answer cannot read it.
    function.body = [ast.Expr(ast.Constant("Completed below."))]
    body = textwrap.indent(textwrap.dedent(answer.strip("\n")), "    ")
    outcome = sandbox.run_examples(f"{ast.unparse(module)}\n{body}\n", [e.source for e in examples])
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

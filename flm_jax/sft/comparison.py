"""Compares two models' scores: differences with intervals, and gates on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flm_jax.errors import UserError
from flm_jax.sft import scoring
from flm_jax.sft.scoring import ALL, Scored

METRICS = ("accuracy", "bpb", "loss")
RISES = ("accuracy",)  # higher is better; for the others lower is better
RETENTION = "retention"  # the category of the base text's bits per byte

NUMBERS = ("a", "b", "difference", "low", "high")

Comparison = dict[str, dict[str, dict[str, float | None]]]  # category -> metric -> numbers


def compare(a: Sequence[Scored], b: Sequence[Scored], seed: int = 0) -> Comparison:
    """Compares two models' results on the same samples.

    The interval comes from a paired bootstrap: each draw takes the same samples for both models,
    so that a sample's difficulty, which both models share, cancels.

    Args:
      a: the first model's results.
      b: the second model's, on the same samples in the same order.
      seed: of the bootstrap.

    Returns:
      category (or "all") -> metric -> a, b, difference (b - a), low and high (the difference's 95%
      interval), and n (samples). Without samples that count, all but n are None.
    """
    assert [s.sample for s in a] == [s.sample for s in b]
    comparison: Comparison = {}
    for category in [*sorted({s.sample.category for s in a}), ALL]:
        pairs = [p for p in zip(a, b, strict=True) if category in (ALL, p[0].sample.category)]
        comparison[category] = {}
        for metric in METRICS:
            parts = [scoring.parts(side, metric) for side in zip(*pairs, strict=True)]
            count = len(parts[0][0])
            if count:
                comparison[category][metric] = _difference(parts, count, seed)
            elif metric != "accuracy":  # no answer says anything
                comparison[category][metric] = dict.fromkeys(NUMBERS) | {"n": 0}
    return comparison


def _difference(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], count: int, seed: int
) -> dict[str, float | None]:
    """Compares one metric, given numerators and denominators [samples] of both models."""

    def difference(*arrays: np.ndarray, axis: int) -> np.ndarray:
        above_a, below_a, above_b, below_b = (x.sum(axis) for x in arrays)
        return np.asarray(above_b / below_b - above_a / below_a)

    one, two = (float(above.sum() / below.sum()) for above, below in parts)
    low, high = scoring.bootstrap(difference, [x for pair in parts for x in pair], seed)
    return {"a": one, "b": two, "difference": two - one, "low": low, "high": high, "n": count}


def retained(a: float, b: float) -> dict[str, float | None]:
    """The base text's bits per byte, in the form of `compare`; there is no interval.

    >>> retained(1.5, 1.75)["difference"]
    0.25
    """
    return {"a": a, "b": b, "difference": b - a, "low": None, "high": None, "n": 1}


@dataclasses.dataclass(frozen=True)
class Gate:
    """Fails if a metric of a category is worse in model b than in model a by more than a margin.

    Attributes:
      category: a category, "all" or "retention".
      metric: one of METRICS.
      margin: in the metric's unit, 0 or above.
    """

    category: str
    metric: str
    margin: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Parses category/metric:margin. Raises UserError if it is malformed.

        >>> Gate.parse("lists/accuracy:0.05")
        Gate(category='lists', metric='accuracy', margin=0.05)
        """
        name, _, margin = text.rpartition(":")
        category, _, metric = name.rpartition("/")
        try:
            value = float(margin)
        except ValueError:
            value = math.nan
        if metric not in METRICS or not value >= 0 or not category:
            raise UserError(
                f"fail_if={text}: write category/metric:margin, as lists/accuracy:0.05; metric is "
                f"one of {', '.join(METRICS)}, and margin is 0 or above",
                argument="fail_if",
            )
        return cls(category, metric, value)

    def check(self, available: Mapping[str, Sequence[str]]) -> None:
        """Raises UserError if the gate's metric is not measured.

        A gate on an unmeasured metric would always pass.

        Args:
          available: category -> its metrics, from `metrics_of`.
        """
        if self.metric not in available.get(self.category, ()):
            known = ", ".join(f"{c}/{m}" for c, metrics in available.items() for m in metrics)
            raise UserError(
                f"fail_if={self.category}/{self.metric}:{self.margin:g}: not measured here; "
                f"choose one of {known}",
                argument="fail_if",
            )

    def failure(self, comparison: Comparison) -> str:
        """Returns one line that says what got worse, with both values; "" if the gate passes."""
        row: Mapping[str, Any] = comparison[self.category][self.metric]
        if row["difference"] is None:
            return f"{self.category}/{self.metric} is not measured: no answer says anything"
        worse = -row["difference"] if self.metric in RISES else row["difference"]
        # Not `worse > margin`: NaN must not pass.
        if worse <= self.margin:
            return ""
        return (
            f"{self.category}/{self.metric} went from {row['a']:.4f} to {row['b']:.4f}, worse by "
            f"{worse:.4f}; the margin is {self.margin:g}"
        )


def metrics_of(scored_categories: Mapping[str, bool]) -> dict[str, list[str]]:
    """Lists what `compare` measures, with retention added.

    Args:
      scored_categories: category -> whether it has a sample with a check.

    Returns:
      category -> metrics.

    >>> metrics_of({"lists": False})
    {'lists': ['bpb', 'loss'], 'all': ['bpb', 'loss'], 'retention': ['bpb']}
    """
    every = {**scored_categories, ALL: any(scored_categories.values())}
    metrics = {
        c: [m for m in METRICS if m != "accuracy" or checked] for c, checked in every.items()
    }
    return {**metrics, RETENTION: ["bpb"]}
